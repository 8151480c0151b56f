"""Choosers against plain loops: each expert as a PEFT model of its own, gradients and updates
written out.
"""

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from peft_routing import RoutedLoraConfig, given_coefficients
from peft_routing.choosers import Nearest, oracle, perplexity, task_vector
from peft_routing.choosers.task_vector import squared_norms
from tests.peft_routing.adapters import (
    make_base,
    save_experts,
    save_lora,
    skip_without_native_adapters,
)
from tests.tokenizers import save_tokenizer

LENGTHS = (7, 4, 2, 1)
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 96, (length,), generator=GENERATOR) for length in LENGTHS]
CHOOSERS = [perplexity, task_vector]
NAMES = ["math", "code", "law", "art"]


def padded(side="right", prompts=PROMPTS, fill=0):
    length = max(map(len, prompts))
    ids, mask = (
        torch.full((len(prompts), length), fill),
        torch.zeros(len(prompts), length, dtype=torch.long),
    )
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(length - len(prompt), length)
        ids[row, place], mask[row, place] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Of different ranks, scalings and targets."""
    root = tmp_path_factory.mktemp("experts")
    kinds: dict[str, dict[str, Any]] = {
        "math": {},
        "code": {
            "r": 2,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": ["o_proj", "q_proj"],
        },
        "law": {"target_modules": ["down_proj"]},
        "art": {"rank_pattern": {"v_proj": 3}},
    }
    return {
        name: str(save_lora(root / name, seed, **kind))
        for seed, (name, kind) in enumerate(kinds.items(), 1)
    }


def routed(experts, base=None, **options):
    options = {"router": "arrow", "top_k": 1, **options}
    return get_peft_model(
        make_base() if base is None else base, RoutedLoraConfig(experts=experts, **options)
    ).eval()


def softmax_of_the_best(values, top_k):
    order = sorted(range(len(values)), key=lambda i: -values[i])[:top_k]
    weights = functional.softmax(
        torch.tensor([values[i] for i in order], dtype=torch.float64), dim=0
    )
    result = torch.zeros(len(values), dtype=torch.float64)
    for i, weight in zip(order, weights, strict=True):
        result[i] = weight
    return result.float()


@functools.cache
def alone(path):
    return PeftModel.from_pretrained(make_base(), path).double().eval()


def labelled(prompt, special):
    """A sequence of its own, and labels as transformers takes them."""
    return prompt[None], torch.where(torch.isin(prompt, torch.tensor(special)), -100, prompt)[None]


def reciprocals(experts, prompt, special):
    ids, labels = labelled(prompt, special)
    if not (labels[:, 1:] != -100).any():
        return None
    losses = [alone(path)(input_ids=ids, labels=labels).loss.item() for path in experts.values()]
    return [1 / torch.tensor(loss, dtype=torch.float64).exp().item() for loss in losses]


def cosines(experts, prompt, special):
    """Every gradient and every update in full, in float64, by autograd."""
    ids, labels = labelled(prompt, special)
    if not (labels[:, 1:] != -100).any():
        return None
    touched: dict[str, Any] = {}
    for name, path in experts.items():
        for key, layer in alone(path).get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight") and key:
                touched.setdefault(key, {})[name] = layer.get_delta_weight("default").detach()
    base = make_base().double()
    weights = {key: base.get_submodule(key).weight for key in touched}
    gradients = torch.autograd.grad(base(input_ids=ids, labels=labels).loss, list(weights.values()))
    found = []
    for name in experts:
        update = [
            of.get(name, torch.zeros_like(weights[key])).flatten() for key, of in touched.items()
        ]
        gradient = torch.cat([-g.flatten() for g in gradients])
        found.append(functional.cosine_similarity(gradient, torch.cat(update), dim=0).item())
    return found


@pytest.mark.parametrize(
    "special", [(), (int(PROMPTS[0][3]), int(PROMPTS[1][0]), int(PROMPTS[2][1]))], ids=bool
)
@pytest.mark.parametrize(("choose", "by_hand"), [(perplexity, reciprocals), (task_vector, cosines)])
def test_they_are_the_plain_loops(experts, choose, by_hand, special):
    values = [by_hand(experts, prompt, special) for prompt in PROMPTS]
    assert values[-1] is None
    for top_k in (None, 1, 2):
        expected = [
            torch.full((4,), 0.25) if value is None else softmax_of_the_best(value, top_k or 4)
            for value in values
        ]
        given = choose(routed(experts), **padded(), special_ids=special, top_k=top_k)
        torch.testing.assert_close(given, torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert len({tuple(row.tolist()) for row in given}) > 1


@pytest.mark.parametrize("choose", CHOOSERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # relative positions, absolute ones
def test_padding_and_company_change_nothing(tmp_path, choose, family):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    base = make_base("gpt2", **sizes) if family == "gpt2" else make_base()
    targets = ["c_attn", "mlp.c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    paths = {
        str(i): str(save_lora(tmp_path / str(i), i, copy.deepcopy(base), target_modules=targets))
        for i in (1, 2)
    }
    model = routed(paths, base)
    one_by_one = torch.cat([choose(model, prompt[None]) for prompt in PROMPTS])
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1]])
    spread = torch.full_like(holes, 50).masked_scatter(holes.bool(), PROMPTS[0])
    for rows_at_a_time in (1, 3, 100):
        for side, fill in (("right", 0), ("left", 77)):
            given = choose(model, **padded(side, fill=fill), rows_at_a_time=rows_at_a_time)
            torch.testing.assert_close(given, one_by_one, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(choose(model, spread, holes), one_by_one[:1], atol=1e-5, rtol=1e-4)
    assert (one_by_one[0] - one_by_one[1]).abs().max() > 1e-4


@pytest.mark.parametrize("choose", CHOOSERS)
def test_what_a_tokenizer_returns_goes_straight_in(experts, choose, tmp_path):
    save_tokenizer(tmp_path, 96)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    batch = tokenizer(
        ["w5 w6 w7 w8", "w9 w10"], return_tensors="pt", padding=True, return_token_type_ids=True
    )
    model = routed(experts)
    coefficients = choose(model, **batch, top_k=1, special_ids=tokenizer.all_special_ids)
    batch.pop("token_type_ids")
    together = model.generate(**batch, coefficients=coefficients, do_sample=False, max_new_tokens=4)
    for row, weights in enumerate(coefficients):
        one = PeftModel.from_pretrained(make_base(), experts[NAMES[int(weights.argmax())]]).eval()
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        expected = one.generate(input_ids=ids, do_sample=False, max_new_tokens=4)[:, ids.shape[1] :]
        assert torch.equal(
            together[row : row + 1, batch["input_ids"].shape[1] :][:, : expected.shape[1]], expected
        )


@pytest.mark.parametrize("choose", CHOOSERS)
def test_nothing_to_score_is_uniform(experts, choose):
    model = routed(experts)
    uniform = torch.full((2, 4), 0.25)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert torch.equal(choose(model, ids[:, :1], top_k=1), uniform)
    assert torch.equal(choose(model, ids, torch.zeros_like(ids), top_k=1), uniform)
    assert torch.equal(choose(model, ids, special_ids=[6, 7, 9, 10]), uniform)
    assert choose(model, ids[:0]).shape == (0, 4)
    mixed = choose(model, ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    torch.testing.assert_close(mixed, torch.stack([choose(model, ids[:1])[0], uniform[0]]))


@pytest.mark.parametrize("choose", CHOOSERS)
def test_one_expert_is_it(experts, choose):
    model = routed({"math": experts["math"]})
    for top_k in (None, 1):
        assert torch.equal(choose(model, **padded(), top_k=top_k), torch.ones(4, 1))


def test_an_expert_without_an_update_has_the_cosine_0(experts, tmp_path):
    base = make_base()
    empty = save_lora(tmp_path, 9)
    model = get_peft_model(
        base, RoutedLoraConfig(experts={**experts, "none": str(empty)}, router="uniform")
    ).eval()
    for module in model.modules():
        if hasattr(module, "routed_lora_experts"):
            with torch.no_grad():
                module.experts_of("default").factors()[4][1].zero_()
    without, given = task_vector(routed(experts), **padded()), task_vector(model, **padded())
    shares = given[:, :4] / given[:, :4].sum(dim=1, keepdim=True)
    torch.testing.assert_close(shares[:3], without[:3], atol=1e-5, rtol=1e-4)
    values = cosines(experts, PROMPTS[0], ())
    torch.testing.assert_close(
        given[0], softmax_of_the_best([*values, 0.0], 5), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("choose", CHOOSERS)
def test_bfloat16_is_close(experts, choose):
    model, exact = routed(experts, make_base(dtype=torch.bfloat16)), routed(experts)
    given = choose(model, **padded())
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, choose(exact, **padded()), atol=2e-2, rtol=0)


@pytest.mark.parametrize("choose", CHOOSERS)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_of_the_model_is_changed(experts, choose, around):
    model = routed(experts, make_base(attention_dropout=0.5), router="linear", top_k=None)
    expected, logits = choose(model, **padded()), model(input_ids=PROMPTS[0][None]).logits
    model.train()
    model.get_base_model().model.layers[0].eval()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    before = {
        name: (module.training, len(module._forward_hooks))
        for name, module in model.named_modules()
    }
    with around():
        torch.testing.assert_close(choose(model, **padded()), expected)
    after = {
        name: (module.training, len(module._forward_hooks))
        for name, module in model.named_modules()
    }
    assert after == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.eval()(input_ids=PROMPTS[0][None]).logits, logits)


@pytest.mark.parametrize("choose", CHOOSERS)
def test_mixing_router_and_loading_do_not_matter(experts, choose, tmp_path):
    paths = save_experts(tmp_path / "experts")
    expected = choose(routed(paths), **padded())
    sequence = routed(paths, granularity="sequence", mixing="low_rank")
    torch.testing.assert_close(choose(sequence, **padded()), expected)


@pytest.mark.parametrize("choose", CHOOSERS)
def test_an_adapter_that_transformers_loads_itself(experts, choose, tmp_path):
    skip_without_native_adapters()
    paths = save_experts(tmp_path / "experts")
    expected = choose(routed(paths), **padded())
    routed(paths, granularity="sequence", mixing="low_rank").save_pretrained(tmp_path / "routed")
    native = make_base()
    native.load_adapter(str(tmp_path / "routed"))
    torch.testing.assert_close(choose(native, **padded()), expected)
    with given_coefficients(torch.ones(3)):
        torch.testing.assert_close(choose(native, **padded()), expected)


def test_a_module_that_runs_twice_has_one_gradient(tmp_path):
    """The second layer's `down_proj` is the first's."""

    def make():
        base = make_base()
        base.model.layers[1].mlp.down_proj = base.model.layers[0].mlp.down_proj
        return base

    paths = {
        str(i): str(
            save_lora(tmp_path / str(i), i, make(), target_modules=["layers.0.mlp.down_proj"])
        )
        for i in (1, 2)
    }
    model = routed(paths, make())
    layers = model.get_base_model().model.layers
    layers[1].mlp.down_proj = layers[0].mlp.down_proj
    base = make().double()
    weight = base.model.layers[0].mlp.down_proj.weight
    ids = PROMPTS[0][None]
    (gradient,) = torch.autograd.grad(base(input_ids=ids, labels=ids).loss, [weight])
    experts = layers[0].mlp.down_proj.experts_of("default")
    updates = [b.double() @ a.double() for a, b in experts.factors()]
    values = [
        functional.cosine_similarity(-gradient.flatten(), u.flatten(), dim=0).item()
        for u in updates
    ]
    torch.testing.assert_close(
        task_vector(model, ids)[0], softmax_of_the_best(values, 2), atol=1e-6, rtol=0
    )


def test_tokens_without_a_batch_are_taken_one_sequence_at_a_time(tmp_path):
    class Flat(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def make(flat):
        base = make_base()
        if flat:
            for layer in base.model.layers:
                layer.mlp.down_proj = Flat(layer.mlp.down_proj)
        return base

    chosen = []
    for flat in (False, True):
        targets = ["inner"] if flat else ["down_proj"]
        paths = {
            str(i): str(save_lora(tmp_path / f"{flat}{i}", i, make(flat), target_modules=targets))
            for i in (1, 2)
        }
        chosen.append(routed(paths, make(flat)))
    expected = task_vector(chosen[0], **padded())
    torch.testing.assert_close(task_vector(chosen[1], **padded(), rows_at_a_time=1), expected)
    with pytest.raises(ValueError, match=r"of shape \(21, 48\): rows_at_a_time=1"):
        task_vector(chosen[1], **padded())


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_both_ways_to_a_gradient_s_norm(tokens):
    x, delta = (
        torch.randn(2, tokens, 6, dtype=torch.float64),
        torch.randn(2, tokens, 5, dtype=torch.float64),
    )
    expected = torch.einsum("bti,bto->boi", x, delta).flatten(1).norm(dim=1) ** 2
    torch.testing.assert_close(squared_norms(x, delta), expected)


def classifier():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bert", vocab_size=96, **sizes)
    )


def encoder_decoder():
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 4,
        "vocab_size": 96,
    }
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))


@pytest.mark.parametrize("choose", CHOOSERS)
def test_what_cannot_choose_is_refused(experts, choose, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    for make, targets in ((classifier, ["query"]), (encoder_decoder, ["q"])):
        path = save_lora(
            tmp_path / make.__name__, 1, make(), target_modules=targets, task_type=None
        )
        with pytest.raises(ValueError, match="needs a causal language model"):
            choose(routed([str(path)], make()), ids)
    model = routed(experts)
    with pytest.raises(ValueError, match="top_k=5 is not between 1 and the number of experts, 4"):
        choose(model, ids, top_k=5)
    with pytest.raises(ValueError, match=r"not \(1, 3\) and \(1, 2\)"):
        choose(model, ids, torch.ones(1, 2))
    with pytest.raises(ValueError, match="exactly one active routed adapter; active: none"):
        choose(make_base(), ids)
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters enabled"):
        choose(model, ids)
    uniform = routed(experts, router="uniform", top_k=None)
    uniform.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        choose(uniform, ids)


def test_the_oracle_knows(experts):
    names = ["law", "math", "law"]
    expected = torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
    assert torch.equal(oracle(names, NAMES), expected)
    assert torch.equal(oracle(names, routed(experts)), expected)
    clusters = {"math": 0, "code": 0, "law": "b", "art": 0}
    third = 1 / 3
    expected = torch.tensor([[0.0, 0, 1, 0], [third, third, 0, third], [0, 0, 1, 0]])
    assert torch.equal(oracle(names, NAMES, clusters), expected)


@pytest.mark.parametrize(
    ("names", "clusters", "message"),
    [
        (["maths"], None, "names: there is no expert 'maths'; did you mean 'math'"),
        (["xyz"], None, "there is no expert 'xyz'; there are math, code, law, art"),
        (
            ["law"],
            {"math": 0, "code": 0, "law": 1},
            "clusters: every expert has one, and 'art' has none",
        ),
        (
            ["law"],
            dict.fromkeys([*NAMES, "arts"], 0),
            "clusters: there is no expert 'arts'; did you mean 'art'",
        ),
    ],
)
def test_the_oracle_is_asked_for_what_there_is(names, clusters, message):
    with pytest.raises(ValueError, match=message):
        oracle(names, NAMES, clusters)


class Letters:
    """How often each of a few letters is in a text."""

    def __init__(self, as_array):
        self.as_array = as_array

    def encode(self, sentences):
        counts = torch.tensor(
            [[float(text.count(letter)) for letter in "abcd"] for text in sentences]
        )
        return counts.numpy() if self.as_array else counts.bfloat16()


@pytest.mark.parametrize("as_array", [True, False])
def test_the_nearest_by_cosine(as_array):
    examples = {"code": ["b", "bbb"], "math": ["a", "aab"]}
    nearest = Nearest(Letters(as_array), examples, ["math", "code"])
    assert torch.equal(nearest(["aaaa", "b", "abbb"]), torch.tensor([[1.0, 0], [0, 1], [0, 1]]))
    # centroids (1.5, 0.5) and (0, 2); the text (1, 1)
    values = [2 / (2**0.5 * 2.5**0.5), 1 / 2**0.5]
    torch.testing.assert_close(nearest(["ab"], top_k=2)[0], softmax_of_the_best(values, 2))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"math": ["a"], "code": []}, "examples: there is none for the expert 'code'"),
        ({"math": ["a"], "cod": ["b"]}, "examples: there is no expert 'cod'; did you mean 'code'"),
        ({"math": "a", "code": ["b"]}, "a list of texts, not the text 'a'"),
    ],
)
def test_every_expert_has_examples(examples, message):
    with pytest.raises(ValueError, match=message):
        Nearest(Letters(True), examples, ["math", "code"])


@pytest.mark.parametrize("choose", CHOOSERS)
def test_they_take_the_same(choose):
    expected = [
        "model",
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "top_k",
        "special_ids",
        "rows_at_a_time",
    ]
    assert list(inspect.signature(choose).parameters) == expected
