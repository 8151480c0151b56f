"""Gates made of prompts, against a forward pass of one prompt at a time with a hook of the test's
own.
"""

import logging

import click
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe_ext.upcycling.prompts import warn_of_degenerate
from tests.conftest import document, make_model, merge, read_tensors
from tests.tokenizers import save_tokenizer

PROMPTS = {
    "base": (["w1 w2 w3 w4 w5 w6 w7 w8 w9"], None),
    "math": (["w10", "w11 w12 w13 w14 w15 w16"], ["w40 w41", "w42 w43 w44 w45 w46"]),
    "code": (
        ["w20 w21", "w22", "w23 w24 w25", "w26", "w27", "w28", "w29", "w30", "w31 w32 w33 w34"],
        ["w1"],
    ),
}
NAMES = {  # family: the module that the gate reads, the gate's hub name
    "llama": ("post_attention_layernorm", "block_sparse_moe.gate"),
    "qwen3": ("post_attention_layernorm", "mlp.gate"),
    "olmo2": (None, "mlp.gate"),  # the FFN reads the residual stream
}


def entries(**changes):
    models = {
        name: {"positive_prompts": p, **({"negative_prompts": n} if n else {})}
        for name, (p, n) in PROMPTS.items()
    }
    models |= changes
    return [{"model": f"./{name}", "parameters": parameters} for name, parameters in models.items()]


@pytest.fixture
def prompted(tmp_path, monkeypatch):
    """A function that makes base, math and code of a family."""
    monkeypatch.chdir(tmp_path)

    def make(family="llama"):
        for seed, name in enumerate(PROMPTS, 1):
            make_model(tmp_path / name, seed, family=family)
        save_tokenizer(tmp_path / "base", 96)
        return tmp_path

    return make


def by_hand(where, family, mode):
    """(layers, experts, hidden)"""
    model = AutoModelForCausalLM.from_pretrained(where / "base")
    tokenizer = AutoTokenizer.from_pretrained(where / "base")
    norm, _gate = NAMES[family]

    def states(prompts):
        of_prompts = []
        for prompt in prompts:
            seen = []
            hooks = [
                getattr(layer, norm).register_forward_hook(
                    lambda _m, _i, out, seen=seen: seen.append(out[0])
                )
                if norm
                else layer.mlp.gate_proj.register_forward_pre_hook(
                    lambda _m, ins, seen=seen: seen.append(ins[0][0])
                )
                for layer in model.model.layers
            ]
            model(**tokenizer(prompt, return_tensors="pt"))
            of_prompts.append(
                torch.stack([s.mean(0) if mode == "hidden_avg" else s[-1] for s in seen])
            )
            for hook in hooks:
                hook.remove()
        return sum(of_prompts) / len(of_prompts)

    gates = []
    with torch.no_grad():
        for positive, negative in PROMPTS.values():
            gate = states(positive) - (states(negative) if negative else 0)
            gates.append(gate / gate.norm(dim=-1, keepdim=True))
    return torch.stack(gates, dim=1)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg"])
def test_gates_are_what_the_ffn_receives_without_padding(prompted, family, mode):
    where = prompted(family)
    got = read_tensors(merge(document("moe", entries(), parameters={"gate_mode": mode})))
    expected = by_hand(where, family, mode)
    for layer in range(3):
        gate = got[f"model.layers.{layer}.{NAMES[family][1]}.weight"]
        assert torch.allclose(gate, expected[layer], atol=1e-5)


def test_the_gate_prefers_the_expert_of_the_prompt(prompted):
    """The point of it all: a prompt's own last state scores highest for its expert."""
    prompted()
    one_each = {name: {"positive_prompts": [p[0]]} for name, (p, _n) in PROMPTS.items()}
    model = AutoModelForCausalLM.from_pretrained(
        merge(
            document(
                "moe",
                entries(**one_each),
                parameters={"gate_mode": "hidden", "experts_per_token": 1},
            )
        )
    )
    tokenizer = AutoTokenizer.from_pretrained("base")
    for expert, parameters in enumerate(one_each.values()):
        scores = []
        hook = model.model.layers[0].mlp.gate.register_forward_hook(
            lambda _m, _i, out, scores=scores: scores.append(out[0][-1])
        )
        model(**tokenizer(parameters["positive_prompts"], return_tensors="pt"))
        hook.remove()
        assert scores[0].argmax() == expert


def test_cheap_embed_is_the_direction_of_the_embeddings_sum(prompted):
    where = prompted()
    config = document("moe", entries(), parameters={"gate_mode": "cheap_embed"})
    got = read_tensors(merge(config))
    card = (where / "out" / "README.md").read_text()
    assert "## Load it" in card and "## Train it first" not in card
    embedding = read_tensors(where / "base")["model.embed_tokens.weight"]
    vocabulary = AutoTokenizer.from_pretrained("base").get_vocab()

    def direction(prompts):
        total = sum(embedding[vocabulary[word]] for word in " ".join(prompts).split())
        return total / total.norm()

    for expert, (positive, negative) in enumerate(PROMPTS.values()):
        gate = direction(positive) - (direction(negative) if negative else 0)
        for layer in range(3):
            row = got[f"model.layers.{layer}.block_sparse_moe.gate.weight"][expert]
            assert torch.allclose(row, gate / gate.norm(), atol=1e-6)


def test_prompts_from_a_text_file(prompted):
    where = prompted()
    (where / "math.txt").write_text("w10\n\nw11 w12 w13 w14 w15 w16\n")
    from_file = {"positive_prompts": "math.txt", "negative_prompts": PROMPTS["math"][1]}
    parameters = {"gate_mode": "hidden"}
    expected = read_tensors(merge(document("moe", entries(), parameters=parameters), "expected"))
    got = read_tensors(merge(document("moe", entries(math=from_file), parameters=parameters)))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_model_listed_twice_may_have_two_sets_of_prompts(prompted):
    prompted()
    models = [
        {"model": "./base", "parameters": {"positive_prompts": [text]}} for text in ("w1 w2", "w50")
    ]
    got = read_tensors(merge(document("moe", models, parameters={"gate_mode": "hidden"})))
    gate = got["model.layers.0.block_sparse_moe.gate.weight"]
    assert not torch.allclose(gate[0], gate[1], atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "mode", "complaint"),
    [
        ({"code": {}}, "hidden", r"models\[2\].parameters \(./code\)"),
        ({"code": {"positive_prompts": []}}, "hidden_avg", "needs `positive_prompts`"),
        ({"code": {"positive_prompts": "nowhere.txt"}}, "hidden", "no text file 'nowhere.txt'"),
        ({"code": {"positive_prompts": ["w1", " "]}}, "hidden", "is empty"),
        ({"code": {"positive_prompts": 3}}, "hidden", "`positive_prompts` under models"),
        ({"code": {"positive_prompt": ["w1"]}}, "hidden", "did you mean `positive_prompts`"),
        (
            {name: {"positive_prompts": ["w1"]} for name in PROMPTS},
            "cheap_embed",
            "the same for all experts",
        ),
        ({}, "hiden", "`gate_mode` under `parameters:`"),
    ],
)
def test_prompts_that_cannot_make_gates_are_refused(prompted, changes, mode, complaint):
    where = prompted()
    with pytest.raises(click.ClickException, match=complaint):
        merge(document("moe", entries(**changes), parameters={"gate_mode": mode}))
    assert not (where / "out").exists()


def test_prompts_under_the_merge_and_a_base_without_tokenizer_are_refused(prompted):
    where = prompted()
    with pytest.raises(click.ClickException, match="belongs under the `parameters:` of a model"):
        merge(document("moe", entries(), parameters={"positive_prompts": ["w1"]}))
    for file in where.glob("base/tokenizer*"):
        file.unlink()
    with pytest.raises(click.ClickException, match=r"\./base has no tokenizer"):
        merge(document("moe", entries(), parameters={"gate_mode": "hidden"}))


def test_unused_prompts_and_degenerate_gates_are_warned_about(prompted, caplog):
    prompted()
    with caplog.at_level(logging.WARNING):
        merge(document("moe", entries()))
    assert "gate_mode is random, so the prompts are not used" in caplog.text
    similar = {
        name: {"positive_prompts": [f"w{number}" + 20 * " w60"]}
        for number, name in enumerate(PROMPTS)
    }
    with caplog.at_level(logging.WARNING):
        merge(document("moe", entries(**similar), parameters={"gate_mode": "hidden"}), "degenerate")
    assert "the gates of all layers are degenerate" in caplog.text
    caplog.clear()
    warn_of_degenerate(torch.stack([torch.eye(3, 8), torch.ones(3, 8)]))
    assert "the gates of layers 1 are degenerate" in caplog.text
    caplog.clear()
    warn_of_degenerate(torch.eye(3, 8)[None])
    assert not caplog.text
