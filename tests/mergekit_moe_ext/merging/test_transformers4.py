"""Outputs for readers of transformers 4: by its own logits, and by what transformers 5 reads.

The first runs where TRANSFORMERS_4_PYTHON names a Python that has transformers 4.57 and torch
(`make transformers4` makes one), and is skipped elsewhere.
"""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mergekit_moe_ext.merging.transformers4 import add_old_keys
from mergekit_moe_ext.mixtures.training import train
from mergekit_moe_ext.recipes import Recipe
from mergekit_moe_ext.wemoe.unloading import unload
from tests.conftest import SPECIAL_TOKENS, TINY, document, make_model, merge
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, READING, make_moe, words, write
from tests.tokenizers import save_tokenizer

TOKENS = torch.arange(1, 61)[None] * 7 % 94 + 2
# Far from every default, so that a base of rotary embeddings that is not read shows.
BASE = 37.0
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": BASE,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": BASE}
PLAIN = {"rope_type": "default", "rope_theta": BASE}
UPCYCLED = {
    "llama": LLAMA3,
    "qwen2": LINEAR,
    "qwen3": PLAIN,
    "olmo2": PLAIN,
    "granite": LINEAR,
    "ernie4_5": PLAIN,
    "hunyuan_v1_dense": PLAIN,
}
TRAINED = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
UNLOADED = {
    "llama": LLAMA3,
    "stablelm": {**PLAIN, "partial_rotary_factor": 0.5},
    "gemma3_text": {
        "full_attention": {**LINEAR, "rope_theta": 90.0},
        "sliding_attention": PLAIN,
    },
}
# Which the old reader has to find; without them it takes its defaults.
SCRIPT = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
tokens = torch.load("tokens.pt")
for name in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        name, torch_dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), (name, info)
    assert model.dtype == torch.float32, (name, model.dtype)
    text = AutoTokenizer.from_pretrained(name)("w1 <|end|> w2")["input_ids"]
    with torch.no_grad():
        torch.save((text, model.eval()(tokens).logits), f"{name}.pt")
"""


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tokenizer_of(path):
    """As transformers 5 writes one, with a special token of its own."""
    save_tokenizer(path, 96)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    tokenizer.save_pretrained(path)


def make_source(path, seed, family, rope):
    make_model(path, seed, family=family, rope_parameters=rope, head_dim=8, vocab_size=98)
    tokenizer_of(path)


def upcycled(family, rope):
    name = f"{family}-upcycled"
    make_source(f"{family}-source", 1, family, rope)
    merge(document("moe_linear", [f"{family}-source"] * 2, base=None), name)
    return name


def trained(directory, family):
    name = f"{family}-trained"
    keys = {"rope_parameters": PLAIN, "vocab_size": 98}
    make_moe(directory / family, family, **{**FAMILIES[family], **keys})
    tokenizer_of(directory / family)
    recipe = Recipe(max_steps=1, held_out=0, learning_rate=0.01)
    train(family, name, "gates", ["news=news.jsonl"], READING, recipe)
    return name


def unloaded(family, rope):
    name = f"{family}-unloaded"
    for seed, part in enumerate(("base", "one", "two"), 1):
        make_source(f"{family}-{part}", seed, family, rope)
    sources = [f"{family}-one", f"{family}-two"]
    constant = {"router_layers": 0}
    base = f"{family}-base"
    merge(document("wemoe", sources, base=base, parameters=constant), f"{family}-constant")
    unload(f"{family}-constant", name)
    return name


@pytest.mark.skipif(
    "TRANSFORMERS_4_PYTHON" not in os.environ,
    reason="TRANSFORMERS_4_PYTHON names no Python with transformers 4",
)
def test_transformers_4_computes_the_same(empty):
    write(empty / "news.jsonl", words(1, 12))
    names = [upcycled(family, rope) for family, rope in UPCYCLED.items()]
    names += [trained(empty, family) for family in TRAINED]
    names += [unloaded(family, rope) for family, rope in UNLOADED.items()]
    torch.save(TOKENS, "tokens.pt")
    done = subprocess.run(
        [os.environ["TRANSFORMERS_4_PYTHON"], "-c", SCRIPT, *names],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        text, logits = torch.load(f"{name}.pt")
        assert text == AutoTokenizer.from_pretrained(name)("w1 <|end|> w2")["input_ids"], name
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(name).eval()(TOKENS).logits
        assert torch.allclose(logits, expected, atol=1e-5), (name, (logits - expected).abs().max())


OLD_KEYS = {
    "global_rope_theta",
    "local_rope_theta",
    "num_experts",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
}


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("mixtral", {"rope_parameters": PLAIN}, {"rope_theta": BASE, "rope_scaling": None}),
        (
            "llama",
            {"rope_parameters": LLAMA3},
            {
                "rope_theta": BASE,
                "rope_scaling": {k: v for k, v in LLAMA3.items() if "theta" not in k},
            },
        ),
        ("qwen3_moe", {"num_experts": 6}, {"num_experts": 6}),
        (
            "stablelm",
            {"rope_parameters": UNLOADED["stablelm"]},
            {"rope_theta": BASE, "partial_rotary_factor": 0.5},
        ),
        (
            "gemma3_text",
            {"rope_parameters": UNLOADED["gemma3_text"]},
            {
                "rope_theta": 90.0,
                "rope_local_base_freq": BASE,
                "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            },
        ),
        (
            "modernbert",
            {"rope_parameters": UNLOADED["gemma3_text"]},
            {"global_rope_theta": 90.0, "local_rope_theta": BASE},
        ),
        ("gpt2", {}, {}),
        ("bert", {}, {}),
    ],
)
def test_old_keys_change_nothing_for_transformers_5(empty, model_type, keys, expected):
    config = AutoConfig.for_model(model_type, **keys, dtype="bfloat16")
    config.save_pretrained("model")
    add_old_keys(empty / "model", config)
    stored = json.loads((empty / "model" / "config.json").read_text())
    assert expected == {key: stored[key] for key in expected}
    complete = AutoConfig.from_pretrained("model").to_dict()
    for key in OLD_KEYS & stored.keys():
        del stored[key]
    (empty / "model" / "config.json").write_text(json.dumps(stored))
    assert AutoConfig.from_pretrained("model").to_dict() == complete
    if model_type in ("gpt2", "bert"):
        assert not OLD_KEYS & stored.keys()


def test_a_part_of_a_model_has_old_keys_too(empty):
    text = {**TINY, **SPECIAL_TOKENS, "rope_parameters": PLAIN}
    config = AutoConfig.for_model("llava", text_config={"model_type": "llama", **text})
    config.save_pretrained("model")
    add_old_keys(empty / "model", config)
    stored = json.loads((empty / "model" / "config.json").read_text())
    assert stored["text_config"]["rope_theta"] == BASE and "rope_theta" not in stored
    again = AutoConfig.from_pretrained("model")
    assert again.text_config.rope_parameters == config.text_config.rope_parameters


def test_both_versions_know_the_tokenizer(empty):
    make_source("source", 1, "llama", PLAIN)
    settings = json.loads((empty / "source" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    merge(document("moe_linear", ["source"] * 2, base=None), "out")
    settings = json.loads((empty / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|end|>"]
    assert "extra_special_tokens" not in settings
    before, after = (AutoTokenizer.from_pretrained(name) for name in ("source", "out"))
    assert type(before) is type(after)
    assert before.extra_special_tokens == after.extra_special_tokens == ["<|end|>"]
    assert before.all_special_ids == after.all_special_ids
    assert before("w1 <|end|>")["input_ids"] == after("w1 <|end|>")["input_ids"]
