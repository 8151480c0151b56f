"""Coefficients from outside: the same logits as `router="fixed"` with those weights, sequence by
sequence.
"""

import contextlib
import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from peft_routing import RoutedLoraConfig, given_coefficients
from tests.peft_routing.adapters import (
    has_native_adapters,
    make_base,
    save_experts,
    save_lora,
    skip_without_native_adapters,
)

IDS = torch.tensor([[5, 17, 40, 9, 66, 31], [12, 80, 33, 7, 21, 90]])
ONE = torch.tensor([0.5, -0.25, 1.5])
EACH = torch.stack([ONE, torch.tensor([0.0, 2.0, 0.125])])
ROUTERS: dict[str, dict[str, Any]] = {
    "arrow": {"router": "arrow", "top_k": 1},
    "low_rank": {"router": "linear", "init": "arrow", "mixing": "low_rank"},
    "sequence": {"router": "arrow", "granularity": "sequence", "routing_tokens": 2},
    "uniform": {"router": "uniform", "mixing": "full"},
    "global": {"router": "global", "mixing": "full"},
    "balanced": {"router": "linear", "mixing": "full", "router_aux_loss_coef": 0.5},
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return save_experts(tmp_path_factory.mktemp("experts"))


def routed(experts, base=None, **options):
    torch.manual_seed(1)
    base = make_base() if base is None else base
    return get_peft_model(base, RoutedLoraConfig(experts=experts, **options)).eval()


def fixed(experts, weights: Tensor, mixing="full", base=None):
    return routed(experts, base, router="fixed", weights=weights.tolist(), mixing=mixing)


def mixing_of(model):
    return model.peft_config["default"].mixing


def generate(model, ids=IDS, **options):
    return model.generate(
        input_ids=ids,
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def logits(output):
    """(batch, steps, vocabulary)"""
    return torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("router", ROUTERS)
def test_one_set_is_the_fixed_router(experts, router):
    model = routed(experts, **ROUTERS[router])
    reference = fixed(experts, ONE, mixing_of(model))
    before = model(input_ids=IDS).logits
    assert torch.equal(
        model(input_ids=IDS, coefficients=ONE).logits, reference(input_ids=IDS).logits
    )
    with given_coefficients(ONE):
        assert torch.equal(model(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    output, expected = generate(model, coefficients=ONE), generate(reference)
    assert torch.equal(logits(output), logits(expected)) and torch.equal(
        output.sequences, expected.sequences
    )
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not torch.allclose(before, reference(input_ids=IDS).logits, atol=1e-2)


def test_a_top_k_of_the_router_is_none_of_theirs(experts):
    """Of many experts, few tokens: only the chosen ones would be read."""
    many, weights = list(experts.values()) * 6, torch.linspace(-0.5, 1, 18)
    model, token = routed(many, router="arrow", top_k=1), IDS[:1, :1]
    expected = fixed(many, weights)(input_ids=token).logits
    assert torch.equal(model(input_ids=token, coefficients=weights).logits, expected)


@pytest.mark.parametrize("router", ["arrow", "low_rank", "sequence"])
@pytest.mark.parametrize("cached", [True, False])
def test_each_sequence_has_its_own(experts, router, cached):
    model = routed(experts, **ROUTERS[router])
    apart = [fixed(experts, weights, mixing_of(model)) for weights in EACH]
    together = model(IDS, coefficients=EACH).logits
    output = generate(model, coefficients=EACH, use_cache=cached)
    for row, reference in enumerate(apart):
        ids = IDS[row : row + 1]
        torch.testing.assert_close(
            together[row : row + 1], reference(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
        expected = generate(reference, ids)
        assert torch.equal(output.sequences[row : row + 1], expected.sequences)
        torch.testing.assert_close(
            logits(output)[row : row + 1], logits(expected), atol=1e-5, rtol=1e-5
        )


def test_all_the_ways_to_call_agree(experts, tmp_path):
    plain, typed = (routed(experts, router="arrow", task_type=task) for task in (None, "CAUSAL_LM"))
    assert type(plain) is type(typed) is PeftModelForCausalLM  # as the experts' own task says
    typed.save_pretrained(tmp_path)
    models = [plain, copy.deepcopy(plain), torch.load(pickled(plain), weights_only=False)]
    if has_native_adapters():
        models.append(make_base())
        models[-1].load_adapter(str(tmp_path))
    expected, sequences = (
        typed(IDS, coefficients=EACH).logits,
        generate(typed, coefficients=EACH).sequences,
    )
    for model in models:
        assert torch.equal(model(IDS, coefficients=EACH).logits, expected)
        assert torch.equal(generate(model, coefficients=EACH).sequences, sequences)
        with given_coefficients(EACH):
            assert torch.equal(model(IDS).logits, expected)
            assert torch.equal(generate(model).sequences, sequences)
            with given_coefficients(EACH.flip(0)):
                assert torch.equal(model(IDS.flip(0)).logits, expected.flip(0))
            assert torch.equal(
                model(IDS.flip(0), coefficients=EACH.flip(0)).logits, expected.flip(0)
            )
            assert torch.equal(model(IDS).logits, expected)


def test_a_model_that_is_let_go_is_freed_at_once(experts):
    model = routed(experts, router="arrow")
    seen = weakref.ref(model.get_base_model())
    gc.collect()
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str
)
def test_beams_keep_the_coefficients_of_their_sequence(experts, options):
    model = routed(experts, router="arrow")
    options = {**options, "pad_token_id": 0, "output_scores": True}
    output = generate(model, coefficients=EACH, **options)
    per_row = options.get("num_return_sequences", 1)
    for row, weights in enumerate(EACH):
        expected = generate(fixed(experts, weights), IDS[row : row + 1], **options)
        rows = slice(row * per_row, (row + 1) * per_row)
        assert torch.equal(output.sequences[rows], expected.sequences)
        torch.testing.assert_close(
            output.sequences_scores[rows], expected.sequences_scores, atol=1e-4, rtol=1e-4
        )


def test_returned_sequences_keep_the_coefficients_of_theirs(experts):
    torch.manual_seed(0)
    output = routed(experts, router="arrow").generate(
        input_ids=IDS,
        coefficients=EACH,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
        min_new_tokens=4,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for row, weights in enumerate(EACH.repeat_interleave(3, dim=0)):
        expected = fixed(experts, weights)(input_ids=output.sequences[row : row + 1]).logits[
            :, IDS.shape[1] - 1 : -1
        ]
        torch.testing.assert_close(logits(output)[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_no_label_is_left_out_and_no_choice_is_kept(experts):
    model = routed(experts, **ROUTERS["sequence"])
    reference = fixed(experts, ONE)
    expected = reference(input_ids=IDS, labels=IDS).loss
    assert torch.equal(model(input_ids=IDS, labels=IDS, coefficients=ONE).loss, expected)
    cache, untouched = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for each in (cache, untouched):
            model(input_ids=IDS, past_key_values=each)
        model(input_ids=IDS, past_key_values=DynamicCache(config=model.config), coefficients=ONE)
        model(input_ids=IDS, coefficients=ONE)
        after = [
            model(input_ids=IDS[:, :1], past_key_values=each).logits for each in (cache, untouched)
        ]
        assert torch.equal(*after)
        given = DynamicCache(config=model.config)
        model(input_ids=IDS, past_key_values=given, coefficients=ONE)
        whole = reference(input_ids=torch.cat([IDS, IDS[:, :1]], dim=1)).logits[:, -1:]
        step = model(input_ids=IDS[:, :1], past_key_values=given, coefficients=ONE).logits
        torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}], ids=str
)
def test_what_a_prompt_s_choice_cannot_have_is_possible(experts, options):
    output = routed(experts, **ROUTERS["sequence"]).generate(
        input_ids=IDS[:1], coefficients=ONE, max_new_tokens=6, do_sample=False, **options
    )
    expected = fixed(experts, ONE).generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(output, expected)


def test_an_overridden_router_has_no_load_to_balance(experts):
    model = routed(experts, **ROUTERS["balanced"]).train()
    balanced, given = (
        model(input_ids=IDS, labels=IDS),
        model(input_ids=IDS, labels=IDS, coefficients=ONE),
    )
    assert torch.equal(given.loss, fixed(experts, ONE)(input_ids=IDS, labels=IDS).loss)
    unbalanced = routed(experts, **{**ROUTERS["balanced"], "router_aux_loss_coef": 0.0}).train()
    assert not torch.allclose(balanced.loss, unbalanced(input_ids=IDS, labels=IDS).loss)


@pytest.mark.parametrize("router", ["arrow", "sequence", "balanced"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_they_get_a_gradient_through_checkpoints_too(experts, router, reentrant):
    model = routed(experts, **ROUTERS[router]).train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients = []
    for ids in (IDS, IDS[:1]):
        coefficients = EACH[: len(ids)].clone().requires_grad_()
        model(input_ids=ids, labels=ids, coefficients=coefficients).loss.backward()
        gradients.append(coefficients.grad)
    assert all(parameter.grad is None for parameter in model.parameters())
    step = torch.zeros(1, 3)
    step[0, 1] = 1e-2
    double = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        up, down = (
            double(input_ids=IDS[:1], labels=IDS[:1], coefficients=EACH[:1] + s).loss
            for s in (step, -step)
        )
    assert gradients[1][0, 1].item() == pytest.approx(((up - down) / 2e-2).item(), rel=2e-2)
    assert gradients[0].abs().min() > 0


def test_a_compiled_model_takes_them(tmp_path):
    paths = save_experts(
        tmp_path, base=make_base(num_hidden_layers=1), target_modules=["down_proj"]
    )
    model = routed(paths, make_base(num_hidden_layers=1), router="arrow")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for given in (contextlib.nullcontext(), given_coefficients(EACH), contextlib.nullcontext()):
        with given:
            assert torch.allclose(
                compiled(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-6
            )


def test_halves_take_them(experts):
    model = routed(experts, make_base(dtype=torch.bfloat16), router="arrow")
    reference = fixed(experts, ONE, base=make_base(dtype=torch.bfloat16))
    for weights in (ONE, ONE.bfloat16(), ONE.double()):  # numbers that bfloat16 holds exactly
        assert torch.equal(model(IDS, coefficients=weights).logits, reference(IDS).logits)


def classifier():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=96, max_position_embeddings=32, num_labels=3, **SMALL
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def encoder():
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=96, max_position_embeddings=32, **SMALL)
    return AutoModel.from_config(config, add_pooling_layer=True).eval()


@pytest.mark.parametrize(
    ("make", "task", "targets", "output"),
    [
        (classifier, "SEQ_CLS", ["query", "intermediate.dense"], "logits"),
        (encoder, None, ["query", "pooler.dense"], "pooler_output"),
        (encoder, "FEATURE_EXTRACTION", ["query", "pooler.dense"], "pooler_output"),
    ],
)
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_encoders_take_them(tmp_path, make, task, targets, output, granularity):
    paths = save_experts(tmp_path, base=make(), target_modules=targets, task_type=None)
    model = routed(paths, make(), router="arrow", granularity=granularity, task_type=task)
    together = model(input_ids=IDS, coefficients=EACH)[output]
    for row, weights in enumerate(EACH):
        expected = fixed(paths, weights, base=make())(input_ids=IDS[row : row + 1])[output]
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    def make():
        torch.manual_seed(0)
        sizes = {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 96,
        }
        config = AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0)
        return AutoModelForSeq2SeqLM.from_config(config).eval()

    paths = save_experts(
        tmp_path_factory.mktemp("t5"),
        base=make(),
        target_modules=["q", "v", "wo"],
        task_type="SEQ_2_SEQ_LM",
    )
    return make, paths


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_encoder_decoders_take_them(t5, options):
    make, paths = t5
    model = routed(paths, make(), router="arrow", task_type="SEQ_2_SEQ_LM")
    batch = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)[:, :3]}
    together, output = (
        model(**batch, coefficients=EACH).logits,
        generate(model, coefficients=EACH, **options),
    )
    for row, weights in enumerate(EACH):
        reference = fixed(paths, weights, base=make())
        expected = reference(**{name: ids[row : row + 1] for name, ids in batch.items()}).logits
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(
            output.sequences[row : row + 1],
            generate(reference, IDS[row : row + 1], **options).sequences,
        )


def test_an_input_without_a_batch_takes_one_set_for_all(tmp_path):
    class Flat(torch.nn.Module):
        """As in a mixture of experts: tokens of all sequences below each other."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def make():
        torch.manual_seed(0)
        base = make_base()
        for layer in base.model.layers:
            layer.mlp = Flat(layer.mlp)
        return base

    paths = save_experts(tmp_path, base=make(), target_modules=["down_proj"])
    model = routed(paths, make(), router="arrow")
    expected = fixed(paths, ONE, base=make())(input_ids=IDS).logits
    for weights in (ONE, ONE[None]):
        assert torch.equal(model(input_ids=IDS, coefficients=weights).logits, expected)
    with pytest.raises(ValueError, match=r"cannot tell the sequences apart .*\(12, 48\)"):
        model(input_ids=IDS, coefficients=EACH)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([0.5, 0.5, 0.0], "give a float tensor .* not list"),
        (torch.ones(3, dtype=torch.long), "not torch.int64 of shape"),
        (torch.ones(2, 2, 3), r"not torch.float32 of shape \(2, 2, 3\)"),
        (torch.ones(0, 3), r"of shape \(0, 3\)"),
        (torch.tensor([0.5, torch.nan, 0.5]), "NaN or infinity"),
        (torch.ones(2), "for 2 experts, and adapter 'default' has 3: math, code, law"),
        (torch.ones(2, 4), "for 4 experts, and adapter 'default' has 3"),
        (torch.ones(3, 3), "for 3 sequences, and the batch has 2"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_what_does_not_fit_is_refused_and_forgotten(experts, coefficients, message, call):
    model = routed(experts, router="arrow")
    expected = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(input_ids=IDS, coefficients=coefficients)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_two_adapters_need_as_many_experts(experts, tmp_path):
    skip_without_native_adapters()
    one, two = (
        routed(experts, router="arrow"),
        routed(dict(list(experts.items())[:2]), router="uniform"),
    )
    for name, model in (
        ("three", one),
        ("two", two),
        ("same", routed(experts, router="uniform", mixing="full")),
    ):
        model.save_pretrained(tmp_path / name)
    model = make_base()
    for name in ("three", "two", "same"):
        model.load_adapter(str(tmp_path / name), name)
    model.set_adapter(["three", "same"])
    given = model(input_ids=IDS, coefficients=ONE).logits
    torch.testing.assert_close(
        given, fixed(experts, 2 * ONE)(input_ids=IDS).logits, atol=1e-4, rtol=1e-4
    )
    model.set_adapter(["three", "two"])
    with pytest.raises(ValueError, match="for 3 experts, and adapter 'two' has 2: math, code"):
        model(input_ids=IDS, coefficients=ONE)


def test_merged_weights_are_refused_and_the_base_model_is_left_alone(experts):
    model = routed(experts, router="uniform")
    base = make_base()(input_ids=IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, coefficients=ONE).logits, base)
        assert torch.equal(
            generate(model, coefficients=ONE).sequences, generate(make_base()).sequences
        )
    model.merge_adapter()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="'default' is merged"):
            call(input_ids=IDS, coefficients=ONE)
    model.unmerge_adapter()
    get_peft_model(model.get_base_model(), RoutedLoraConfig(experts=experts, router="arrow"))
    unloaded = model.unload()
    assert "generate" not in vars(unloaded)
    with pytest.raises(ValueError, match="not used by the model"):
        unloaded.generate(input_ids=IDS, coefficients=ONE)


def test_an_expert_without_a_module_has_no_update_there(tmp_path):
    paths = {
        "math": str(save_lora(tmp_path / "math", 1)),
        "code": str(save_lora(tmp_path / "code", 2, target_modules=["o_proj"], r=2)),
    }
    model = routed(paths, router="arrow")
    for row, path in zip(torch.eye(2), paths.values(), strict=True):
        alone = PeftModel.from_pretrained(make_base(), path).eval()
        given = model(input_ids=IDS, coefficients=row).logits
        torch.testing.assert_close(given, alone(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
