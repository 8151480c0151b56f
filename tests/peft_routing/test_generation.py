"""Generating: with a cache as without, and one choice per sequence, which comes from its prompt
alone.
"""

import copy
import inspect

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)

from peft_routing import RoutedLoraConfig, UserError, given_coefficients
from tests.peft_routing.adapters import (
    ROUTERS,
    make_base,
    make_routed,
    save_experts,
    save_lora,
)

PROMPT = torch.tensor([[5, 17, 40, 9, 66, 31], [12, 80, 33, 7, 21, 90]])


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"))


def routed(experts, router="arrow", **changes):
    return make_routed(experts, router, **changes)


def generate(model, ids=PROMPT, **options):
    return model.generate(
        input_ids=ids,
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
        return_dict_in_generate=True,
        **options,
    )


def scores(output):
    """(batch, steps, vocabulary)"""
    return torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("router", ROUTERS)
def test_per_token_a_cache_changes_nothing(experts, router):
    model = routed(experts, router)
    cached, uncached = (
        generate(model, output_logits=True, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.allclose(scores(cached), scores(uncached), atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_per_sequence_the_prompt_decides_once(experts, router):
    model = routed(experts, router, granularity="sequence")
    output = generate(model, output_logits=True)
    frozen = routed(experts, router, granularity="sequence", routing_tokens=PROMPT.shape[1])
    expected = frozen(input_ids=output.sequences).logits[:, PROMPT.shape[1] - 1 : -1]
    assert torch.allclose(scores(output), expected, atol=1e-5)
    shorter = routed(experts, router, granularity="sequence", routing_tokens=2)(
        input_ids=output.sequences
    ).logits
    assert not torch.allclose(scores(output), shorter[:, PROMPT.shape[1] - 1 : -1], atol=1e-3)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_left_padding_changes_nothing(experts, granularity):
    model = routed(experts, granularity=granularity)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), PROMPT], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(PROMPT)], dim=1)
    plain, beside_padding = (
        generate(model, output_logits=True),
        generate(model, padded, attention_mask=mask, output_logits=True),
    )
    assert torch.allclose(scores(plain), scores(beside_padding), atol=1e-5)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_beam_search_scores_what_it_returns(experts, granularity):
    model = routed(experts, granularity=granularity)
    output = generate(model, num_beams=3, length_penalty=0.0, output_scores=True, pad_token_id=0)
    reference = routed(experts, granularity=granularity, routing_tokens=PROMPT.shape[1])
    logits = (
        reference(input_ids=output.sequences).logits[:, PROMPT.shape[1] - 1 : -1].log_softmax(-1)
    )
    chosen = logits.gather(-1, output.sequences[:, PROMPT.shape[1] :, None]).sum(dim=(1, 2))
    assert torch.allclose(output.sequences_scores, chosen, atol=1e-4)


def test_sampled_sequences_of_one_prompt_share_its_choice(experts):
    model = routed(experts, granularity="sequence")
    torch.manual_seed(0)
    output = model.generate(
        input_ids=PROMPT,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=5,
        min_new_tokens=5,
        return_dict_in_generate=True,
        output_logits=True,
    )
    frozen = routed(experts, granularity="sequence", routing_tokens=PROMPT.shape[1])
    expected = frozen(input_ids=output.sequences).logits[:, PROMPT.shape[1] - 1 : -1]
    assert torch.allclose(scores(output), expected, atol=1e-5)


def test_other_passes_in_between_do_not_disturb_a_cache(experts):
    model = routed(experts, granularity="sequence")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    following = torch.tensor([[3], [4]])
    with torch.no_grad():
        alone = DynamicCache(config=model.config)
        model(input_ids=PROMPT, past_key_values=alone)
        expected = model(input_ids=following, past_key_values=alone).logits
        model(input_ids=PROMPT, past_key_values=caches[0])
        model(input_ids=PROMPT.flip(1), past_key_values=caches[1])
        branched = copy.deepcopy(caches[0])
        model(input_ids=PROMPT.flip(0))
        with model.disable_adapter():
            model(input_ids=PROMPT)
        for cache in (caches[0], branched):
            assert torch.equal(model(input_ids=following, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_the_choice_goes_with_the_rows_of_a_cache(experts, kind):
    """Each row as if it were alone, after rows were moved, dropped and doubled by hand."""
    model, config = routed(experts, granularity="sequence"), make_base().config
    options = {"config": config, **({"max_cache_len": 16} if kind is StaticCache else {})}
    following = torch.tensor([[3], [4]])
    alone = {}
    for row in range(2):
        cache = kind(**options)
        model(input_ids=PROMPT[row : row + 1], past_key_values=cache)
        next_ids = following[row : row + 1]
        alone[row] = model(input_ids=next_ids, past_key_values=cache).logits[0]
    changes = {
        "reorder_cache": (torch.tensor([1, 0]), [1, 0]),
        "batch_select_indices": (torch.tensor([1]), [1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
    }
    for method, (argument, rows) in changes.items():
        if kind is StaticCache and method != "reorder_cache":
            continue  # it has no such methods
        cache = kind(**options)
        model(input_ids=PROMPT, past_key_values=cache)
        getattr(cache, method)(argument)
        branched = copy.deepcopy(cache)
        for each in (cache, branched):
            logits = model(input_ids=following[rows], past_key_values=each).logits
            expected = torch.stack([alone[row] for row in rows])
            assert torch.allclose(logits, expected, atol=1e-5), method


def test_rows_that_are_not_those_of_the_cache_are_refused(experts):
    model = routed(experts, granularity="sequence")
    cache = DynamicCache(config=model.config)
    model(input_ids=PROMPT, past_key_values=cache)
    for layer in cache.layers:
        layer.batch_select_indices(torch.tensor([1]))
    with pytest.raises(UserError, match="coefficients for 2 sequences, and the batch has 1"):
        model(input_ids=PROMPT[:1, :1], past_key_values=cache)


@pytest.mark.parametrize("negative", [None, PROMPT[1:]])
@pytest.mark.parametrize("in_config", [False, True])
def test_guidance_is_that_of_two_prompts(experts, negative, in_config):
    """Each step by plain forward passes, in which either prompt is the prefix."""
    model, scale = routed(experts, granularity="sequence"), 1.7
    options = {"guidance_scale": scale}
    if in_config:
        options = {"generation_config": GenerationConfig(**options, max_new_tokens=8)}
    guided = generate(
        model, PROMPT[:1], output_scores=True, negative_prompt_ids=negative, **options
    )
    length = PROMPT.shape[1]
    answer = guided.sequences[:, length:]
    other = PROMPT[:1, -1:] if negative is None else negative
    logits = []
    for prompt in (PROMPT[:1], other):
        frozen = routed(experts, granularity="sequence", routing_tokens=prompt.shape[1])
        whole = frozen(input_ids=torch.cat([prompt, answer], dim=1)).logits
        logits.append(whole[:, prompt.shape[1] - 1 : -1].log_softmax(-1))
    expected = scale * (logits[0] - logits[1]) + logits[1]
    scores_of_steps = torch.stack(guided.scores, dim=1)
    real = scores_of_steps.isfinite()  # the end is forbidden before the last step
    assert torch.allclose(scores_of_steps[real], expected[real], atol=1e-4)


def test_continuous_batching_is_refused_per_sequence(experts):
    """It runs in a thread of its own, where an error would be logged, and nothing returned."""
    model, rows = routed(experts, granularity="sequence"), PROMPT.tolist()
    with pytest.raises(UserError, match="keeps no choice for a sequence"):
        model.generate_batch(rows, max_new_tokens=3)
    with pytest.raises(UserError, match="keeps no choice for a sequence"):
        model.generate(PROMPT, cache_implementation="paged", max_new_tokens=3)
    with (
        pytest.raises(UserError, match="keeps no choice for a sequence"),
        model.continuous_batching_context_manager(),
    ):
        pass
    with pytest.raises(UserError, match="takes no coefficients"):
        routed(experts).generate_batch(rows, coefficients=torch.ones(3), max_new_tokens=3)
    with pytest.raises(UserError, match="takes no coefficients"), given_coefficients(torch.ones(3)):
        routed(experts).generate_batch(rows, max_new_tokens=3)
    base = model.unload()
    assert not {"generate", "generate_batch", "init_continuous_batching"} & vars(base).keys()


def test_per_token_continuous_batching_generates_the_same(experts):
    model = routed(experts)
    expected = generate(model).sequences[:, PROMPT.shape[1] :].tolist()
    outputs = model.generate_batch(PROMPT.tolist(), max_new_tokens=3)
    for output, tokens in zip(outputs.values(), expected, strict=True):
        assert output.generated_tokens == tokens[:3]


LENGTHS = (12, 3, 7, 1)
ROW = torch.randint(2, 96, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


@pytest.mark.parametrize("router", ROUTERS)
def test_packed_documents_choose_each_for_itself(experts, router):
    """Two rows of packed documents, against each document as a row of its own."""
    model = routed(experts, router, granularity="sequence", routing_tokens=4)
    rows, positions = torch.stack([ROW, ROW.flip(0)]), POSITIONS.expand(2, -1)
    packed = {"input_ids": rows, "position_ids": positions, "use_cache": False}
    logits = []
    for row in rows:
        for document in row.split(LENGTHS):
            logits.append(model(input_ids=document[None]).logits[0])
    expected = torch.cat(logits).view(2, len(ROW), -1)
    assert torch.allclose(model(**packed).logits, expected, atol=1e-5)
    one_set_of_positions = {**packed, "position_ids": POSITIONS[None]}
    assert torch.allclose(model(**one_set_of_positions).logits, expected, atol=1e-5)


def test_the_loss_of_packed_documents_is_that_of_each(experts):
    """As the collator of transformers packs them."""
    model = routed(experts, granularity="sequence", routing_tokens=4)
    features = [{"input_ids": document.tolist()} for document in ROW.split(LENGTHS)]
    packed = DataCollatorWithFlattening()(features, return_tensors="pt")
    losses = []
    for document in ROW.split(LENGTHS):
        logits = model(input_ids=document[None]).logits[0]
        log_probabilities = logits[3:-1].log_softmax(-1)  # what predicts the fifth token and so on
        losses.append(-log_probabilities.gather(-1, document[4:, None])[:, 0])
    expected = torch.cat(losses).mean()
    assert torch.allclose(model(**packed, use_cache=False).loss, expected, atol=1e-5)


def test_packing_that_cannot_be_followed_is_refused(experts):
    model = routed(experts, granularity="sequence", routing_tokens=4)
    packed = {"input_ids": ROW[None], "position_ids": POSITIONS[None]}
    for more in (
        {"attention_mask": torch.ones(1, len(ROW))},
        {"past_key_values": DynamicCache(config=model.config)},
    ):
        with pytest.raises(UserError, match="position_ids start again within a row"):
            model(**packed, **more)
    with pytest.raises(UserError, match=r"seq_idx: .* packed documents apart by position_ids"):
        model(input_ids=ROW[None], seq_idx=torch.zeros(1, len(ROW)))
    mask = (torch.arange(len(ROW)) > 5).long()[None]
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected = model(input_ids=ROW[None, 6:]).logits
    got = model(input_ids=ROW[None], **padded).logits[:, 6:]
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_cache_that_this_adapter_did_not_fill_is_refused(experts):
    model = routed(experts, granularity="sequence")
    with model.disable_adapter():
        cache = model(input_ids=PROMPT, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="start with an empty one"):
        model(input_ids=PROMPT[:, :1], past_key_values=cache)


def test_generating_without_a_cache_is_refused_per_sequence(experts):
    with pytest.raises(ValueError, match="use_cache=True"):
        generate(routed(experts, granularity="sequence"), use_cache=False)


def test_a_part_of_the_model_is_refused_per_sequence(experts):
    model = routed(experts, granularity="sequence")
    with pytest.raises(RuntimeError, match="the whole model"):
        model.get_base_model().model(input_ids=PROMPT)


def test_nothing_after_the_prefix_is_seen_before_it(experts):
    model = routed(experts, granularity="sequence", routing_tokens=3)
    changed = PROMPT.clone()
    changed[:, -1] = 2
    one, other = (model(input_ids=ids).logits[:, :-1] for ids in (PROMPT, changed))
    assert torch.equal(one, other)


def test_labels_inside_the_prefix_are_left_out_of_the_loss(experts):
    model = routed(experts, granularity="sequence", routing_tokens=3)
    output = model(input_ids=PROMPT, labels=PROMPT)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, 2:-1].flatten(0, 1), PROMPT[:, 3:].flatten()
    )
    assert torch.allclose(output.loss, expected)
    # PEFT's class for language models has an order of arguments of its own.
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    by_position = [None] * (names.index("labels") + 1)
    by_position[0] = by_position[-1] = PROMPT
    assert torch.allclose(model(*by_position).loss, expected)


def test_padding_has_no_part_in_the_choice(experts):
    model = routed(experts, granularity="sequence", routing_tokens=4)
    padded = torch.cat([PROMPT, torch.full((2, 5), 77)], dim=1)
    mask = (torch.arange(padded.shape[1]) < PROMPT.shape[1]).long().expand(2, -1)
    short = model(input_ids=PROMPT[:, :3]).logits
    long = model(
        input_ids=padded[:, :8], attention_mask=mask[:, :8] * (torch.arange(8) < 3)
    ).logits[:, :3]
    assert torch.allclose(short, long, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}, {"assistant_early_exit": 1}],
    ids=lambda o: next(iter(o)),
)
def test_a_first_pass_that_is_not_the_prompt_is_refused_per_sequence(experts, options):
    complaint = f"{next(iter(options))}: .* must be the prompt"
    per_sequence = routed(experts, granularity="sequence")
    with pytest.raises(ValueError, match=complaint):
        generate(per_sequence, PROMPT[:1], **options)
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, **options)
    with pytest.raises(ValueError, match=complaint):
        per_sequence.generate(PROMPT[:1], settings)
    expected = generate(routed(experts), PROMPT[:1]).sequences
    assert torch.equal(generate(routed(experts), PROMPT[:1], **options).sequences, expected)


def test_guidance_in_a_configuration_given_by_place_is_that_of_the_argument(experts):
    model = routed(experts, granularity="sequence")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(PROMPT[:1], guidance_scale=1.5, **options)
    settings = GenerationConfig(guidance_scale=1.5, **options)
    assert torch.equal(model.generate(PROMPT[:1], settings), expected)


def test_a_model_without_a_cache_is_refused_per_sequence(tmp_path):
    config = AutoConfig.for_model(
        "openai-gpt", vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4
    )
    base = AutoModelForCausalLM.from_config(config)
    path = save_lora(tmp_path / "one", 1, copy.deepcopy(base), target_modules=["c_attn"])
    model = get_peft_model(base, RoutedLoraConfig(experts=[path, path], granularity="sequence"))
    with pytest.raises(ValueError, match="which this model has not"):
        model.eval().generate(input_ids=PROMPT, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("router", ["arrow", "linear", "mlp"])
def test_choices_per_token_compile_without_a_break(experts, router):
    model = routed(experts, router)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(
        compiled(input_ids=PROMPT).logits, model(input_ids=PROMPT).logits, atol=1e-6
    )
