"""The weight-ensembling models: their forward pass against loops, routing in time, caches,
gradients.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from measuring import operations
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from mergekit_moe_ext.modeling import modeling_wemoe, wemoe_products, wemoe_tiles
from mergekit_moe_ext.modeling.wemoe_calls import running_mean
from mergekit_moe_ext.modeling.wemoe_products import EnsembledLinear
from tests.mergekit_moe_ext.ensembles import (
    EXPERTS,
    FAMILIES,
    PAIRS,
    build,
    by_samples,
    by_tokens,
    inputs_of,
    padded,
    stock_of,
)

PER_SAMPLE = [family for family in FAMILIES if family not in PAIRS]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **{"atol": 2e-4, "rtol": 1e-4, **tolerances})


def change_rule(monkeypatch, **numbers):
    rule = wemoe_tiles.RULES["cpu"]._replace(**numbers)
    monkeypatch.setitem(wemoe_tiles.RULES, "cpu", rule)


@pytest.fixture(params=["merged", "one by one"])
def path(request, monkeypatch):
    """Which of the two ways to compute the same is taken, whatever the number of tokens."""
    change_rule(monkeypatch, merging=1 if request.param == "merged" else 10**6)

    return request.param


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("family", PER_SAMPLE)
@torch.no_grad()
def test_every_family_is_a_loop_over_samples(family, sparsity, path):
    model, inputs = build(family, sparsity=sparsity), inputs_of(family)
    close(model(**inputs)[0], by_samples(model, family, inputs))


@pytest.mark.parametrize("router_layers", [0, 1, 2])
@pytest.mark.parametrize("upscale", ["mlp", "attention+mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "vit", "bert", "gpt2", "swin"])
@torch.no_grad()
def test_every_depth_and_strategy_is_a_loop_over_samples(family, upscale, router_layers):
    inputs = inputs_of(family)
    model = build(
        family,
        upscale=upscale,
        router_layers=router_layers,
        sparsity=0.7 if router_layers == 1 else 0,
    )
    assert len(model.ensembling.groups) == (4 if upscale == "attention+mlp" else 2)
    close(model(**inputs)[0], by_samples(model, family, inputs))


@torch.no_grad()
def test_one_router_for_all_reads_each_group_s_own_input():
    for family in ("llama", "vit"):
        model = build(family, upscale="attention+mlp", shared_router=True)
        assert list(model.routers) == ["0"]
        close(model(**inputs_of(family))[0], by_samples(model, family, inputs_of(family)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "llama-classifier"])
@torch.no_grad()
def test_padding_has_no_part_in_the_mean(family, side, path):
    model, inputs = build(family, routing_tokens=4), padded(inputs_of(family), side)
    limit = 4 if model.can_generate() else None
    real = ... if limit is None else inputs["attention_mask"].bool()
    close(model(**inputs)[0][real], by_samples(model, family, inputs, limit)[real])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@torch.no_grad()
def test_padding_without_a_mask_has_no_part_in_the_mean(family, side):
    model, inputs = build(family, routing_tokens=4), padded(inputs_of(family), side)
    model.config.pad_token_id = 0
    expected = model(**inputs)[0]
    got = model(**{name: value for name, value in inputs.items() if name != "attention_mask"})[0]
    real = inputs["attention_mask"].bool() if family in ("llama", "gpt2") else ...
    close(got[real], expected[real])


@pytest.mark.parametrize("mode", ["frozen", "running"])
@torch.no_grad()
def test_padding_without_a_mask_stays_padding_in_the_steps_that_follow(mode):
    model, inputs = build("llama", mode=mode), padded(inputs_of("llama"), "left")
    model.config.pad_token_id = 0
    ids = inputs["input_ids"]
    outputs = []
    for masks in ([inputs["attention_mask"][:, :7], inputs["attention_mask"]], [None, None]):
        first = model(input_ids=ids[:, :7], attention_mask=masks[0], use_cache=True)
        cache = first.past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        mask = None if masks[1] is None else masks[1][[2, 0, 1]]
        rows = ids[[2, 0, 1]]
        outputs.append(
            model(input_ids=rows[:, 7:], attention_mask=mask, past_key_values=cache).logits
        )
    close(*outputs)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@torch.no_grad()
def test_a_padding_token_that_ends_texts_as_well(family):
    """It is seen as any other token is; but behind a text it does not choose."""
    model = build(family, routing_tokens=20)
    model.config.pad_token_id = model.config.eos_token_id = 1
    ids = inputs_of(family)["input_ids"].clamp(min=2)
    ids[1:, 6:] = 1
    chosen = model.coefficients(input_ids=ids)
    alone = model.coefficients(input_ids=ids[1:, :6])
    if family == "gpt2":  # in which no token sees later ones
        close(chosen[1:], alone)
    else:
        mask = torch.ones_like(ids)
        everything = model(input_ids=ids, attention_mask=mask, coefficients=chosen).logits
        close(model(input_ids=ids, coefficients=chosen).logits, everything)


@torch.no_grad()
def test_batches_too_large_to_merge_at_once_are_split(monkeypatch):
    model, inputs = build("vit"), inputs_of("vit", samples=5)
    expected = model(**inputs).logits
    change_rule(monkeypatch, tile=2 * 16 * 24)
    close(model(**inputs).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", *PAIRS])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_running_coefficients_are_a_loop_over_tokens(family, side):
    inputs = padded(inputs_of(family, tokens=7), side)
    real = ... if family in PAIRS else inputs["attention_mask"].bool()
    for sparsity in (0.0, 0.7):
        model = build(family, mode="running", sparsity=sparsity)
        close(model(**inputs)[0][real], by_tokens(model, family, inputs)[real])


@pytest.mark.parametrize("family", PAIRS)
@torch.no_grad()
def test_attention_of_an_encoder_decoder_is_ensembled_except_across(family):
    model, inputs = build(family, upscale="attention+mlp"), inputs_of(family, tokens=7)
    linears = set().union(*model.ensembling.groups.values())
    assert not any("EncDec" in linear or "encoder_attn" in linear for linear in linears)
    close(model(**inputs)[0], by_tokens(model, family, inputs))


@pytest.mark.parametrize("family", ["llama", "vit", "bert"])
@torch.no_grad()
def test_half_precision_stays_near_the_same_model_in_double(family):
    inputs = inputs_of(family)
    half, double = build(family, dtype=torch.bfloat16), build(family, dtype=torch.bfloat16).double()
    images = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    wide = {
        name: value.double() if value.is_floating_point() else value
        for name, value in images.items()
    }
    expected = double(**wide)[0]
    assert half(**images)[0].dtype == torch.bfloat16
    error = (half(**images)[0] - expected).abs().mean() / expected.abs().mean()
    assert error < 0.05


@torch.no_grad()
def test_a_long_running_mean_in_half_precision_does_not_drift():
    """A sum of 2000 bfloat16 numbers, taken in bfloat16, would stop growing."""
    values, real = (
        torch.full((1, 2000, 1), 0.3, dtype=torch.bfloat16),
        torch.ones(1, 2000, dtype=torch.bool),
    )
    router = build("llama", dtype=torch.bfloat16, router_layers=1).routers["0"]
    r = router(torch.randn(1, 2000, 16, dtype=torch.bfloat16))
    assert r.dtype == torch.float32
    means, _ = running_mean(values.float(), real)
    close(means[:, -1], values[:, 0].float())


@pytest.mark.parametrize(
    ("ensembling", "count"),
    [
        ({"router_layers": 0}, 96),
        ({"router_layers": 1}, 73_824),
        ({"router_layers": 2}, 12 * (768 * 769 + 8 * 769)),
        ({"router_layers": 2, "shared_router": True}, 768 * 769 + 8 * 769),
    ],
)
def test_routers_are_as_large_as_the_paper_s(ensembling, count):
    """Tables 1 and 9: 96, 73.8 K and 7.16 M for ViT-B/32 and eight tasks."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from mergekit_moe_ext.wemoe.groups import ensembled_groups

    config = CLIPVisionConfig(patch_size=32)
    with torch.device("meta"):
        groups = ensembled_groups(CLIPVisionModel(config), "mlp", None)
        kind = modeling_wemoe.config_class(CLIPVisionConfig)
        experts = [f"task{index}" for index in range(8)]
        ours = kind(patch_size=32, ensembling={"experts": experts, "groups": groups, **ensembling})
        model = modeling_wemoe.model_class(CLIPVisionModel)(ours)
    assert sum(parameter.numel() for parameter in model.routers.parameters()) == count
    if ensembling == {"router_layers": 2}:
        assert round(count / 1e6, 2) == 7.16


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.routers.named_parameters()}


def routers_only(model):
    model.requires_grad_(False)
    model.routers.requires_grad_(True)
    return model


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("family", ["vit", "llama"])
def test_routers_get_the_gradients_of_the_loop(family, sparsity, path):
    inputs = inputs_of(family, samples=2)
    model = routers_only(build(family, sparsity=sparsity))
    target = torch.randn_like(model(**inputs)[0])
    actual = gradients(model, (model(**inputs)[0] * target).sum())
    expected = gradients(model, (by_samples(model, family, inputs) * target).sum())
    for name, gradient in actual.items():
        close(gradient, expected[name], atol=1e-2, rtol=1e-3)
        assert gradient.abs().sum() > 0
    assert all(
        p.grad is None for name, p in model.named_parameters() if not name.startswith("routers.")
    )
    vectors = {
        name for name, _ in model.named_buffers() if "vectors" in name or name.endswith("values")
    }
    assert vectors and not vectors & {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("upscale", "reentrant"), [("mlp", False), ("mlp", True), ("block", False)]
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradient_checkpointing_changes_no_gradient_though_two_batches_wait(
    family, upscale, reentrant
):
    """As in adaptation: a forward pass per task, entropies summed, one backward pass."""
    first = padded(inputs_of(family), "left")
    second = padded(inputs_of(family, samples=2, tokens=6, seed=1), "right")
    model = routers_only(build(family, upscale=upscale)).train()
    torch.manual_seed(0)

    def loss():
        torch.manual_seed(0)
        return sum(
            torch.special.entr(model(**batch)[0].softmax(-1)).sum() for batch in (first, second)
        )

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(model, loss())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if upscale == "block":
        with pytest.raises(ValueError, match="take False"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
    actual = gradients(model, loss())
    for name, gradient in actual.items():
        close(gradient, expected[name])
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_in_frozen_positions_after_the_prefix_know_nothing_of_the_future(family):
    model, inputs = build(family, routing_tokens=4), inputs_of(family)
    changed = inputs["input_ids"].clone()
    changed[:, 6:] = changed[:, 6:] % 60 + 2
    close(model(changed).logits[:, :6], model(**inputs).logits[:, :6], atol=0, rtol=0)
    changed[:, 3] = changed[:, 3] % 60 + 2
    assert not torch.allclose(model(changed).logits[:, :3], model(**inputs).logits[:, :3])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_in_frozen_labels_in_the_prefix_are_left_out_of_the_loss(side):
    model, inputs = build("llama", routing_tokens=4), padded(inputs_of("llama"), side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    logits = model(**inputs).logits
    losses = []
    for row, mask in enumerate(inputs["attention_mask"].tolist()):
        for position in range(1, len(mask)):
            if mask[position] and sum(mask[: position + 1]) > 4:
                losses.append(-logits[row, position - 1].log_softmax(-1)[labels[row, position]])
    close(model(**inputs, labels=labels).loss, torch.stack(losses).mean())
    items = torch.tensor(int((labels[:, 1:] != -100).sum()))
    close(model(**inputs, labels=labels, num_items_in_batch=items).loss, torch.stack(losses).mean())
    given = model.coefficients(**inputs)
    kept = model(**inputs, labels=labels, coefficients=given).loss
    reference = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    close(kept, reference)


@torch.no_grad()
def test_in_running_no_position_knows_the_future_and_every_label_counts():
    model, inputs = build("llama", mode="running"), inputs_of("llama")
    changed = inputs["input_ids"].clone()
    changed[:, 4:] = changed[:, 4:] % 60 + 2
    logits = model(**inputs).logits
    close(model(changed).logits[:, :4], logits[:, :4], atol=0, rtol=0)
    labels = inputs["input_ids"]
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    close(model(**inputs, labels=labels).loss, expected)


def stepwise(model, ids, mask, prompt, cache=None, **inputs):
    """Logits with a cache: the prompt, then token by token."""
    outputs, cache = [], cache if cache is not None else DynamicCache(config=model.config)
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        output = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, **inputs
        )
        cache = output.past_key_values
        outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_in_frozen_cached_equals_uncached_with_the_prompt_s_coefficients(family, samples):
    batch = padded(inputs_of(family, samples=samples), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for router_layers, sparsity in ((2, 0.0), (1, 0.7), (0, 0.0)):
        model = build(family, router_layers=router_layers, sparsity=sparsity)
        prompt = {"input_ids": ids[:, :5], "attention_mask": mask[:, :5]}
        given = model.coefficients(**prompt, past_key_values=DynamicCache(config=model.config))
        assert given.shape == (1 if router_layers == 0 else samples, 2, len(EXPERTS))
        given = given.expand(samples, -1, -1)
        expected = model(ids, attention_mask=mask, coefficients=given).logits[mask.bool()]
        close(stepwise(model, ids, mask, 5)[mask.bool()], expected)
        close(stepwise(model, ids, mask, 5, coefficients=given)[mask.bool()], expected)


@torch.no_grad()
def test_a_cache_that_the_model_made_itself_carries_the_choice():
    model, ids = build("llama", routing_tokens=4), inputs_of("llama")["input_ids"]
    start = model(ids[:, :6], use_cache=True)
    expected = model(ids).logits
    close(start.logits, expected[:, :6])
    close(model(ids[:, 6:], past_key_values=start.past_key_values).logits, expected[:, 6:])


@torch.no_grad()
def test_a_cache_of_another_model_is_refused():
    ids = inputs_of("llama")["input_ids"]
    stock_class, config = FAMILIES["llama"]
    cache = stock_class(config)(ids, use_cache=True).past_key_values
    for mode in ("frozen", "running"):
        with pytest.raises(ValueError, match="start with an empty one"):
            build("llama", mode=mode)(ids[:, :1], past_key_values=copy.deepcopy(cache))


@pytest.mark.parametrize("mode", ["frozen", "running"])
def test_a_static_cache_gives_what_a_dynamic_one_does(mode):
    model, inputs = build("llama", mode=mode), padded(inputs_of("llama"), "left")
    dynamic = model.generate(**inputs, **GREEDY)
    # Where it makes a static cache, transformers hands the model masks of four dimensions.
    static = model.generate(**inputs, **GREEDY, cache_implementation="static")
    assert torch.equal(static, dynamic)
    assert not model._can_compile_fullgraph
    kept = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        step = model(**inputs, past_key_values=kept).logits
        close(step, model(**inputs, past_key_values=DynamicCache(config=model.config)).logits)


def test_a_mask_that_does_not_tell_padding_is_refused():
    model, ids = build("llama"), inputs_of("llama")["input_ids"]
    mask = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask= of shape .* give one of shape \(rows"):
        model(ids, attention_mask=mask)
    coefficients = model.coefficients(input_ids=ids)
    given = model(ids, attention_mask=mask, coefficients=coefficients).logits
    close(given, model(ids, coefficients=coefficients).logits)


@torch.no_grad()
def test_rows_of_several_documents_are_refused():
    """They would have one set of coefficients for all their documents."""
    model, ids = build("llama"), inputs_of("llama")["input_ids"]
    positions = torch.arange(ids.shape[1])[None] % 4
    packed = ({"position_ids": positions}, {"cu_seq_lens_q": torch.tensor([0, 4])})
    for arguments in packed:
        with pytest.raises(ValueError, match="several documents each"):
            model(ids, **arguments)
    coefficients = model.coefficients(input_ids=ids)
    model(ids, coefficients=coefficients, position_ids=positions)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = (mask.cumsum(1) - 1).clamp(min=0)
    close(model(ids, mask, padded).logits[1:], model(ids, mask).logits[1:])


@torch.no_grad()
def test_while_one_sequence_is_decoded_its_merged_weights_are_kept(monkeypatch):
    model, ids = build("llama"), inputs_of("llama", samples=1)["input_ids"]
    calls = []
    merged = EnsembledLinear.merged
    monkeypatch.setattr(
        EnsembledLinear, "merged", lambda self, c: calls.append(1) or merged(self, c)
    )
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    linears = sum(len(linears) for linears in model.ensembling.groups.values())
    model(ids[:, 5:6], past_key_values=cache)
    calls.clear()
    other = inputs_of("llama", samples=1, seed=3)["input_ids"]
    model(other)  # another sequence in between takes nothing from it
    calls.clear()
    model(ids[:, 6:7], past_key_values=cache)
    assert not calls and len(cache.carried.merged) == linears
    repeated = copy.deepcopy(cache)
    close(
        model(ids[:, 7:8], past_key_values=cache).logits,
        model(ids[:, 7:8], past_key_values=repeated).logits,
        atol=0,
        rtol=0,
    )


@pytest.fixture
def much_memory(monkeypatch, tmp_path):
    """A machine with room for all that is worth keeping, whatever else runs on it."""
    lines = "MemTotal: 24000000 kB\nMemFree: 1000 kB\nMemAvailable: 20000000 kB\n"
    (tmp_path / "meminfo").write_text(lines)
    monkeypatch.setattr(wemoe_products, "_MEMORY", tmp_path / "meminfo")


def test_a_quarter_of_the_memory_stays_free(much_memory):
    # 20 of 24 million kilobytes can be had, and 6 are to stay.
    cpu = torch.device("cpu")
    assert wemoe_products._has_room(14_000_000 * 1024, cpu)
    assert not wemoe_products._has_room(14_000_001 * 1024, cpu)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_so_are_those_of_a_batch_until_its_rows_change(family, much_memory):
    model, batch = build(family), padded(inputs_of(family), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    samples = len(ids)
    assert samples <= len(model.ensembling.experts) + 1
    cache = DynamicCache(config=model.config)
    model(ids[:, :-3], attention_mask=mask[:, :-3], past_key_values=cache)
    coefficients = model._last_coefficients()
    expected = model(ids, attention_mask=mask, coefficients=coefficients).logits
    for end in (-2, -1):
        step = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        close(step.logits[:, 0], expected[:, end - 1])
    linears = sum(len(linears) for linears in model.ensembling.groups.values())
    assert len(cache.carried.merged) == linears
    cache.reorder_cache(torch.arange(samples).flip(0))
    step = model(ids[:, -1:].flip(0), attention_mask=mask.flip(0), past_key_values=cache)
    close(step.logits[:, 0], expected[:, -1].flip(0))
    assert not cache.carried.merged


@pytest.mark.parametrize("samples", [1, 3])
@torch.no_grad()
def test_a_step_is_one_of_the_base(samples, much_memory):
    """But for what is noted of a group, and for giving rows back to products of several."""
    model = build("llama")
    ids = inputs_of("llama", samples=samples)["input_ids"]
    counts = []
    for each in (model, stock_of(model, "llama")):
        cache = DynamicCache(config=each.config)
        each(ids[:, :5], past_key_values=cache)
        each(ids[:, 5:6], past_key_values=cache)
        counts.append(operations(partial(each, ids[:, 6:7], past_key_values=cache)))
    ours, of_base = counts
    groups = model.ensembling.groups
    linears = sum(len(linears) for linears in groups.values())
    assert ours <= of_base + len(groups) + (2 * linears if samples > 1 else 0)


@torch.no_grad()
def test_a_pass_starts_few_operations_beyond_the_base_s(monkeypatch):
    monkeypatch.delitem(wemoe_tiles.RULES, "cpu")
    model, inputs = build("llama"), inputs_of("llama")
    model.config.pad_token_id = None
    groups = model.ensembling.groups
    linears = sum(len(linears) for linears in groups.values())
    ours = operations(partial(model, **inputs))
    of_base = operations(partial(stock_of(model, "llama"), **inputs))
    # A pass looks for padding at the end of rows, a group has a router of two layers and a mean,
    # and a linear module merges. Most of these are views, which cost a GPU nothing.
    assert ours <= of_base + 11 + 9 * len(groups) + 7 * linears


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", *PAIRS])
@torch.no_grad()
def test_in_running_cached_equals_uncached(family, samples):
    model, inputs = build(family, mode="running", sparsity=0.7), inputs_of(family, samples=samples)
    if family in PAIRS:
        cache, decoded, outputs = None, inputs["decoder_input_ids"], []
        for position in range(decoded.shape[1]):
            output = model(
                input_ids=inputs["input_ids"],
                decoder_input_ids=decoded[:, position : position + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            outputs.append(output.logits)
        close(torch.cat(outputs, dim=1), model(**inputs).logits)
        return
    batch = padded(inputs, "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    close(stepwise(model, ids, mask, 5)[mask.bool()], expected)
    close(stepwise(model, ids, mask, 1)[mask.bool()], expected)


@pytest.mark.parametrize("mode", ["frozen", "running"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_generates_what_plain_passes_say(family, mode):
    model = build(family, mode=mode)
    batch = padded(inputs_of(family), "left")
    out = model.generate(**batch, **GREEDY, pad_token_id=0)
    width = batch["input_ids"].shape[1]
    given = (
        model.coefficients(**batch, past_key_values=DynamicCache(config=model.config))
        if mode == "frozen"
        else None
    )
    for step in range(5):
        ids = out[:, : width + step]
        mask = torch.cat([batch["attention_mask"], torch.ones(3, step, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        more = (
            {} if family == "opt" else {"position_ids": positions}
        )  # OPT makes its own of the mask
        logits = model(ids, attention_mask=mask, coefficients=given, **more).logits[:, -1]
        logits[:, 1] = -torch.inf  # generate was told not to end
        assert torch.equal(logits.argmax(-1), out[:, width + step])
    if mode == "frozen":
        assert torch.equal(
            model.generate(**batch, **GREEDY, pad_token_id=0, coefficients=given), out
        )
        uncached = model.generate(
            **batch, **GREEDY, pad_token_id=0, coefficients=given, use_cache=False
        )
        assert torch.equal(uncached, out)
    uncached = model.generate(**batch, **GREEDY, pad_token_id=0, use_cache=False)
    assert torch.equal(uncached, out)


@pytest.mark.parametrize("mode", ["frozen", "running"])
@pytest.mark.parametrize("family", ["llama", *PAIRS])
@torch.no_grad()
def test_beam_search_scores_what_plain_passes_score(family, mode):
    """A running mean that stayed with its row, while beams change rows, would score another
    sequence.
    """
    model, ids = build(family, mode=mode), inputs_of(family, samples=2, tokens=5)["input_ids"]
    found = model.generate(
        ids,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
        suppress_tokens=[0, 1],
    )
    for index, (sequence, given_score) in enumerate(
        zip(found.sequences, found.sequences_scores, strict=True)
    ):
        prompt = ids[index // 4]
        if family in PAIRS:
            logits = model(input_ids=prompt[None], decoder_input_ids=sequence[None, :-1]).logits[0]
            targets = sequence[1:]
        else:
            given = None
            if mode == "frozen":
                cache = DynamicCache(config=model.config)
                given = model.coefficients(input_ids=prompt[None], past_key_values=cache)
            logits = model(sequence[None], coefficients=given).logits[0, len(prompt) - 1 : -1]
            targets = sequence[len(prompt) :]
        expected = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
        close(given_score, expected, atol=1e-3)


@torch.no_grad()
def test_what_a_cache_carries_follows_its_rows():
    ids = inputs_of("llama")["input_ids"]
    for mode in ("frozen", "running"):
        model = build("llama", mode=mode)
        for change, rows in (
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ):
            cache = DynamicCache(config=model.config)
            model(ids[:, :5], past_key_values=cache)
            plain = copy.deepcopy(cache)
            change(cache)
            expected = model(ids[:, 5:6], past_key_values=plain).logits[rows]
            close(model(ids[rows, 5:6], past_key_values=cache).logits, expected)
        if mode == "running":
            with pytest.raises(ValueError, match="cannot take tokens back"):
                cache.crop(1)
        cache.reset()
        if mode == "frozen":
            with pytest.raises(ValueError, match=r"guidance_scale.*give coefficients="):
                model.generate(ids, use_cache=False, guidance_scale=2.0)
            with pytest.raises(ValueError, match="prefill_chunk_size"):
                model.generate(ids, prefill_chunk_size=2)


@torch.no_grad()
def test_coefficients_are_the_routers_means_and_can_be_given():
    for family in ("vit", "llama", "bert"):
        model, inputs = build(family), inputs_of(family)
        given = model.coefficients(**inputs)
        assert given.shape == (3, 2, len(EXPERTS))
        close(model(**inputs, coefficients=given)[0], model(**inputs)[0])
        other = given.flip(0)
        assert not torch.allclose(model(**inputs, coefficients=other)[0], model(**inputs)[0])
        close(
            model(**inputs, coefficients=given[:1])[0],
            model(**inputs, coefficients=given[:1].expand(3, -1, -1))[0],
        )
        for wrong in (given[:, 0], given[:2]):
            with pytest.raises(
                ValueError, match=r"\(3, 2 groups, 3 experts\), or one set for all samples, not \("
            ):
                model(**inputs, coefficients=wrong)
    for family in ("llama", "t5"):
        with pytest.raises(ValueError, match="no one set of coefficients"):
            build(family, mode="running").coefficients(**inputs_of(family))


@torch.no_grad()
def test_given_coefficients_reach_encoder_and_decoder_of_a_generating_t5():
    model, ids = build("t5"), inputs_of("t5")["input_ids"]
    given = torch.rand(3, 4, len(EXPERTS))
    out = model.generate(ids, **GREEDY, coefficients=given)
    for step in range(1, 6):
        logits = model(input_ids=ids, decoder_input_ids=out[:, :step], coefficients=given).logits[
            :, -1
        ]
        logits[:, 1] = -torch.inf  # generate was told not to end
        assert torch.equal(logits.argmax(-1), out[:, step])


@torch.no_grad()
def test_an_encoder_called_on_its_own_takes_the_mask_that_it_is_given():
    model = build("t5")
    first = padded(inputs_of("t5"), "right")
    encoder = model.get_encoder()
    for mask in (first["attention_mask"], torch.ones_like(first["attention_mask"])):
        batch = {**first, "attention_mask": mask}
        alone = encoder(input_ids=batch["input_ids"], attention_mask=mask)[0]
        close(alone, model(**batch).encoder_last_hidden_state)
    with pytest.raises(RuntimeError, match="through its model"):
        model.get_submodule(next(iter(model.ensembling.groups)))(torch.randn(1, 3, 16))


CLASSES = [f"c{number}" for number in range(6)]
HEADS = {
    "heads": {"sun": CLASSES[:4], "cars": CLASSES, "dtd": CLASSES[:3]},
    "head": "classifier",
}


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_a_task_s_own_head_is_picked(family):
    model, inputs = build(family, **HEADS), inputs_of(family)
    logits = {}
    for index, (task, names) in enumerate(HEADS["heads"].items()):
        classes = len(names)
        output = model(**inputs, task=task, output_hidden_states=True)
        logits[task] = output.logits
        assert output.logits.shape == (3, classes)
        head = model.classifier[index]
        pooled = model.bert.pooler(output.hidden_states[-1]) if family == "bert" else None
        if family == "vit":
            pooled = model.vit.layernorm(output.hidden_states[-1])[:, 0]
        close(output.logits, pooled @ head.weight.T + head.bias)
        labels = torch.arange(3) % classes
        expected = torch.stack(
            [-output.logits[row].log_softmax(-1)[label] for row, label in enumerate(labels)]
        ).mean()
        close(model(**inputs, task=task, labels=labels).loss, expected)
        close(model(**inputs, task=task, labels=labels, return_dict=False)[0], expected)
    for task in (None, "law"):
        with pytest.raises(ValueError, match="choose a head, one of sun, cars, dtd"):
            model(**inputs, task=task)
    one_head = build(family)
    close(one_head(**inputs, task="sun").logits, one_head(**inputs).logits)
    with pytest.raises(ValueError, match="'law' is none of sun, cars, dtd"):
        one_head(**inputs, task="law")


def test_the_loss_of_a_head_is_over_the_items_that_the_trainer_has_counted():
    model, inputs, labels = build("vit", **HEADS), inputs_of("vit"), torch.tensor([0, 1, 0])
    whole = model(**inputs, task="sun", labels=labels)
    parts = [
        model(
            inputs["pixel_values"][part],
            task="sun",
            labels=labels[part],
            num_items_in_batch=torch.tensor(3),
        ).loss
        for part in (slice(0, 1), slice(1, 3))
    ]
    close(sum(parts), whole.loss)
    assert list(whole) == ["loss", "logits"]
    for wrong in (labels.float(), labels[:2]):
        with pytest.raises(ValueError, match="numbers of classes, one for each of the 3"):
            model(**inputs, task="sun", labels=wrong)


@pytest.mark.parametrize("upscale", ["mlp", "all"])
def test_threads_do_not_see_each_other_s_forward_passes(upscale):
    model = build("vit", upscale=upscale, **HEADS)
    batches = [inputs_of("vit", samples=2, seed=seed) for seed in range(4)]
    tasks = ["sun", "cars", "dtd", "sun"]

    @torch.no_grad()
    def run(index):
        return model(**batches[index], task=tasks[index]).logits

    expected = [run(index) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, logits in enumerate(pool.map(run, list(range(4)) * 20)):
            assert torch.equal(logits, expected[number % 4])
    with pytest.raises(RuntimeError, match="torchrun or accelerate launch"):
        model._replicate_for_data_parallel()


@pytest.mark.parametrize("upscale", ["mlp", "all"])
def test_a_checkpointed_model_is_copied_and_pickled_whole(upscale, tmp_path):
    model = build("vit", upscale=upscale).train()
    expected = model(**inputs_of("vit")).logits
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        routers_only(copied)
        logits = copied(**inputs_of("vit")).logits
        close(logits, expected)
        logits.sum().backward()
        wanted = [
            name for name, parameter in copied.routers.named_parameters() if parameter.grad is None
        ]
        assert not wanted or (
            upscale == "all" and len(wanted) == 1
        )  # the mask token, which has no part


@pytest.mark.parametrize(("upscale", "router_layers"), [("mlp", 0), ("mlp", 2), ("all", 0)])
@torch.no_grad()
def test_routers_that_are_offloaded(upscale, router_layers):
    model, inputs = build("vit", upscale=upscale, router_layers=router_layers), inputs_of("vit")
    expected, coefficients = model(**inputs).logits, model.coefficients(**inputs)
    for router in model.routers.values():  # as accelerate does with what does not fit
        cpu_offload(router, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.routers.parameters())
    close(model(**inputs).logits, expected)
    close(model.coefficients(**inputs), coefficients)


def test_a_copy_of_a_model_is_on_its_own():
    model, inputs = build("vit"), inputs_of("vit")
    expected = model(**inputs).logits
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.routers.parameters():
            parameter.zero_()
    assert not torch.allclose(copied(**inputs).logits, expected)
    close(model(**inputs).logits, expected, atol=0, rtol=0)


def test_a_compiled_vit_gives_the_same_logits():
    model, inputs = build("vit"), inputs_of("vit")
    with torch.no_grad():
        expected = model(**inputs).logits
        close(torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits, expected)


def test_the_trainer_trains_routers_alone(tmp_path):
    model = routers_only(build("vit", **HEADS))
    before = copy.deepcopy(model.state_dict())
    rows = [
        {"pixel_values": image, "labels": index % 3}
        for index, image in enumerate(torch.randn(8, 3, 12, 12))
    ]

    def collate(batch):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
            "labels": torch.tensor([row["labels"] for row in batch]),
            "task": "dtd",
        }

    arguments = TrainingArguments(
        tmp_path / "out",
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if name.startswith("routers.")}


INITIALISED = {
    "dense": {},
    "sparse": {"sparsity": 0.5},
    "with biases": {"family": "gpt2"},
    "every parameter": {"upscale": "all"},
}


@pytest.mark.parametrize("kind", INITIALISED)
def test_what_no_file_holds_is_initialised(tmp_path, kind):
    options = {"family": "llama", **INITIALISED[kind]}
    family = options["family"]
    model = build(**options)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    ours = ("vectors", ".values", ".columns", ".row_ends")
    kept = {name: each for name, each in tensors.items() if not any(part in name for part in ours)}
    assert len(kept) < len(tensors)
    save_file(kept, file, {"format": "pt"})
    # Memory that is given back and taken again is not 0 by chance.
    litter = [torch.full((64, 64), 7.0) for _ in range(200)]
    del litter
    loaded = type(model).from_pretrained(tmp_path).eval()
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert not any(state[name].any() for name in tensors if "vectors" in name or "values" in name)
    inputs = inputs_of(family)
    assert torch.allclose(loaded(**inputs)[0], stock_of(model, family)(**inputs)[0], atol=1e-5)


def test_a_base_that_no_file_holds_is_random_as_that_of_transformers(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    weight = type(model).from_pretrained(tmp_path).state_dict()[name]
    assert 0.015 < weight.std() < 0.025 and abs(weight.mean()) < 0.005


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_guesses_of_an_assistant_do_not_choose(sparsity):
    model = build("llama", sparsity=sparsity)
    ids = inputs_of("llama", samples=1)["input_ids"].repeat(1, 2)  # there is something to look up
    alone = model.generate(ids, **GREEDY)
    assistants = [
        {"assistant_model": stock_of(model, "llama")},
        {"assistant_model": copy.deepcopy(model)},
        {"prompt_lookup_num_tokens": 3},
    ]
    chosen = model._last_coefficients()
    for assistant in assistants:
        assert torch.equal(model.generate(ids, **assistant, **GREEDY), alone)
        close(model._last_coefficients(), chosen, atol=1e-6)
    given = {"coefficients": torch.full_like(chosen, 0.9), **GREEDY}
    assert torch.equal(model.generate(ids, **assistants[0], **given), model.generate(ids, **given))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_assistant_s_guesses_are_taken_back_from_running_means(family):
    options = {"mode": "running"} if family == "llama" else {}
    model = build(family, **options)
    ids = inputs_of(family, samples=1)["input_ids"]
    alone = model.generate(ids, **GREEDY)
    guesses_wrongly = copy.deepcopy(model)
    with torch.no_grad():
        for router in guesses_wrongly.routers.values():
            router.bias += 3
    for assistant in (
        {"assistant_model": copy.deepcopy(model)},
        {"assistant_model": guesses_wrongly},
        {"assistant_model": stock_of(model, family)},
        {"prompt_lookup_num_tokens": 3},
    ):
        assert torch.equal(model.generate(ids, **assistant, **GREEDY), alone)


def test_a_trunk_alone_loads_and_says_what_it_lacks(tmp_path):
    model = build("llama")
    model.base_model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    expected = {name for name, _ in model.named_parameters() if not name.startswith("model.")}
    assert set(info["missing_keys"]) == expected
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, model.model.get_parameter(name))
