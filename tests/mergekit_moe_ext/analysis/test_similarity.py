"""Similarity of task vectors, against a loop over the state dicts that transformers loads, and
closed forms.
"""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergekit_moe_ext.analysis import similarity
from mergekit_moe_ext.analysis.similarity import task_vector_similarity
from tests.conftest import make_model

READINGS = ("concatenated", "mean")
LLAMA = ("model.layers.{}.", "self_attn.", "mlp.")
# family: what its config needs here, and where its layers, attention and FFNs are
FAMILIES = {
    "llama": ({}, *LLAMA),
    "qwen2": ({}, *LLAMA),  # biases in attention
    "qwen3": ({}, *LLAMA),  # norms inside attention
    "olmo": ({}, *LLAMA),
    "olmo2": ({}, *LLAMA),
    "gemma2": ({"head_dim": 8}, *LLAMA),
    "phi3": ({}, *LLAMA),  # joined matrices
    "gpt2": ({}, "transformer.h.{}.", "attn.", "mlp."),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "model.decoder.layers.{}.",
        "self_attn.",
        "fc",
    ),
}


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").double().state_dict()


def loop(base, first, second, layer, part, reading):
    """One cosine, by the paper's words."""
    cosines, vectors = [], []
    for name, start in base.items():
        if name.startswith(layer + part) and "norm" not in name:
            task_vectors = [(state[name] - start).numpy().ravel() for state in (first, second)]
            vectors.append(task_vectors)
            cosines.append(cosine(*task_vectors))
    assert vectors
    if reading == "mean":
        return sum(cosines) / len(cosines)
    return cosine(*(np.concatenate(of_model) for of_model in zip(*vectors, strict=True)))


def cosine(a, b):
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


def check(base, models, reading, layers, attention, ffn):
    start, states = load(base), {name: load(path) for name, path in models.items()}
    for pair in task_vector_similarity(base, models, reading):
        of_pair = states[pair.first], states[pair.second]
        for layer in range(3):
            for part, found in ((attention, pair.attention), (ffn, pair.ffn)):
                wanted = loop(start, *of_pair, layers.format(layer), part, reading)
                assert found[layer] == pytest.approx(wanted, abs=1e-12)
        assert len(pair.attention) == len(pair.ffn) == 3


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_a_loop_over_whole_state_dicts(tmp_path, family, reading, monkeypatch):
    config, *places = FAMILIES[family]
    names = ("base", "math", "code")
    models = {
        name: make_model(tmp_path / name, seed, family=family, **config)
        for seed, name in enumerate(names)
    }
    base = models.pop("base")
    monkeypatch.setattr(similarity, "_CHUNK", 100)  # several per tensor, and one that is not full
    check(base, models, reading, *places)


@pytest.mark.parametrize("reading", READINGS)
def test_every_pair_of_shards_and_half_precision(sources, tmp_path, reading):
    half = make_model(tmp_path / "half", 3, dtype=torch.bfloat16)
    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(sources / "code").save_pretrained(
        shards, max_shard_size="20KB"
    )
    assert len(list(shards.glob("*.safetensors"))) > 3
    models = {"math": sources / "math", "half": half, "shards": shards}
    check(sources / "base", models, reading, *LLAMA)
    pairs = task_vector_similarity(sources / "base", models, reading)
    assert [(pair.first, pair.second) for pair in pairs] == [
        ("math", "half"),
        ("math", "shards"),
        ("half", "shards"),
    ]


@pytest.fixture
def fine_tune(sources, tmp_path):
    """Makes a fine-tune of the base out of `change(name, shape)`, its task vector, in float64."""

    def make(name, change):
        shutil.copytree(sources / "base", tmp_path / name)
        start = load_file(sources / "base" / "model.safetensors")
        state = {
            key: tensor.double() + change(key, tuple(tensor.shape)) for key, tensor in start.items()
        }
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    return make


def noise(name, shape):
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(("factor", "wanted"), [(1, 1), (1000, 1), (1e-3, 1), (-1, -1), (-7, -1)])
def test_the_same_direction_and_the_opposite_one_whatever_the_length(
    sources, fine_tune, reading, factor, wanted
):
    models = {"a": fine_tune("a", noise), "b": fine_tune("b", lambda *key: factor * noise(*key))}
    (pair,) = task_vector_similarity(sources / "base", models, reading)
    assert pair.attention + pair.ffn == pytest.approx([wanted] * 6, abs=1e-9)


@pytest.mark.parametrize("reading", READINGS)
def test_what_changes_other_weights_is_orthogonal(sources, fine_tune, reading):
    def every_second(start):
        def change(name, shape):
            result = noise(name, shape).flatten()
            result[start::2] = 0
            return result.view(shape)

        return change

    models = {"even": fine_tune("even", every_second(1)), "odd": fine_tune("odd", every_second(0))}
    (pair,) = task_vector_similarity(sources / "base", models, reading)
    assert pair.attention + pair.ffn == (0,) * 6


def test_the_readings_differ_where_tensors_do(sources, fine_tune):
    """q_proj alike and twice as large, k, v and o opposite: (1 - 3) / 4, and (4|q| - |k| - |v| -
    |o|) / (4|q| + …).
    """

    def plain(name, shape):
        return torch.full(shape, 2.0 if "q_proj" in name else 1.0, dtype=torch.float64)

    def turned(name, shape):
        return plain(name, shape) * (1 if "q_proj" in name else -1)

    models = {"a": fine_tune("a", plain), "b": fine_tune("b", turned)}
    elements = {"q": 32 * 32, "k": 16 * 32, "v": 16 * 32, "o": 32 * 32}
    others = elements["k"] + elements["v"] + elements["o"]
    wanted = (4 * elements["q"] - others) / (4 * elements["q"] + others)
    (pair,) = task_vector_similarity(sources / "base", models, "concatenated")
    assert pair.attention == pytest.approx([wanted] * 3, abs=1e-9)
    (pair,) = task_vector_similarity(sources / "base", models, "mean")
    assert pair.attention == pytest.approx([-0.5] * 3, abs=1e-9)


def test_what_was_not_trained_has_no_cosine(sources, fine_tune):
    def no_attention(name, shape):
        return noise(name, shape) * ("self_attn" not in name)

    def only_q_in_attention(name, shape):
        return noise(name, shape) * ("self_attn" not in name or "q_proj" in name)

    models = {
        "all": fine_tune("all", noise),
        "none": fine_tune("none", no_attention),
        "q": fine_tune("q", only_q_in_attention),
    }
    for reading in READINGS:
        of_none, of_q, none_and_q = task_vector_similarity(sources / "base", models, reading)
        assert all(map(math.isnan, of_none.attention + none_and_q.attention))
        assert of_none.ffn == pytest.approx([1] * 3)
        assert not any(map(math.isnan, of_q.attention))
    assert of_q.attention == pytest.approx([1] * 3)  # the mean of the one that both have


def test_checkpoints_of_the_model_without_its_head(tmp_path):
    """GPT-2's own on the Hub is one."""
    paths = [make_model(tmp_path / str(seed), seed, family="gpt2") for seed in range(3)]
    whole = task_vector_similarity(paths[0], {"a": paths[1], "b": paths[2]})
    for path in paths[:2]:
        state = load_file(path / "model.safetensors")
        save_file(
            {name.removeprefix("transformer."): t for name, t in state.items()},
            path / "model.safetensors",
        )
    assert task_vector_similarity(paths[0], {"a": paths[1], "b": paths[2]}) == whole


def rewritten(path, change):
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def test_what_cannot_be_compared_is_refused_by_name(sources, tmp_path):
    base, math_model = sources / "base", sources / "math"

    def refused(message, path, base=base):
        with pytest.raises(ValueError, match=message) as caught:
            task_vector_similarity(base, {"math": math_model, "other": path})
        assert str(path) in str(caught.value) or path == math_model

    refused(
        "`model_type` is 'qwen2', not 'llama'", make_model(tmp_path / "qwen2", 1, family="qwen2")
    )
    refused(
        "`num_hidden_layers` is 4, not 3", make_model(tmp_path / "deep", 1, num_hidden_layers=4)
    )
    wide = make_model(tmp_path / "wide", 1, intermediate_size=64)
    refused(r"model.layers.0.mlp.gate_proj.weight of .* has the shape \(64, 32\)", wide)
    shutil.copytree(math_model, tmp_path / "lacking")
    rewritten(
        tmp_path / "lacking", lambda state: state.pop("model.layers.1.self_attn.k_proj.weight")
    )
    refused("lacks the tensor model.layers.1.self_attn.k_proj.weight", tmp_path / "lacking")
    shutil.copytree(math_model, tmp_path / "int8")
    name = "model.layers.2.mlp.up_proj.weight"
    rewritten(tmp_path / "int8", lambda state: state.update({name: state[name].to(torch.int8)}))
    refused(f"{name} of .* is I8; only bfloat16", tmp_path / "int8")
    refused("there is no directory", tmp_path / "nowhere")
    shutil.copytree(
        math_model, tmp_path / "no weights", ignore=shutil.ignore_patterns("*.safetensors")
    )
    refused("holds no model.safetensors", tmp_path / "no weights")
    (tmp_path / "no weights" / "pytorch_model.bin").write_bytes(b"never unpickled")
    refused("holds no model.safetensors", tmp_path / "no weights")
    (tmp_path / "no weights" / "model.safetensors").write_bytes(b"damaged")
    refused("cannot read the weights", tmp_path / "no weights")
    mixture = make_model(tmp_path / "mixture", 0, family="mixtral")
    with pytest.raises(
        ValueError, match=r"mlp \(MixtralSparseMoeBlock\) is neither attention nor FFN nor norm"
    ):
        task_vector_similarity(mixture, {"a": mixture, "b": mixture})
    with pytest.raises(ValueError, match="two fine-tunes or more, not 1"):
        task_vector_similarity(base, {"math": math_model})
    with pytest.raises(ValueError, match="'median' is none of concatenated, mean"):
        task_vector_similarity(base, {"a": math_model, "b": math_model}, "median")
