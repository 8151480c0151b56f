"""Tools that know the hosts and not this package find what it made, with nothing imported."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe_ext.selftest import sequence_mixture, weight_ensembling_model
from tests.conftest import start
from tests.peft_routing.adapters import (
    has_native_adapters,
    make_base,
    make_routed,
    save_experts,
)
from tests.tokenizers import save_tokenizer

SCRIPT = (Path(__file__).parent / "stock_tools.py").read_text(encoding="utf-8")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# In the second and third, torch is imported from the body of a module that we extend.
FIRST = [
    "import torch",
    "from transformers import AutoConfig",
    "from transformers import AutoModelForCausalLM",
    "import peft",
    "import mergekit.merge",
    "import accelerate",
]
# What mergekit and PEFT call themselves.
STRICT = [
    *("-W", "error"),
    *("-W", "ignore:numpy.core is deprecated"),
    *("-W", "ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a base model, a routed adapter, and two models of our architectures."""
    here = tmp_path_factory.mktemp("tools")
    make_base().save_pretrained(here / "base")
    save_tokenizer(here / "base", 96)
    routed = make_routed(save_experts(here / "experts"), "arrow")
    routed.peft_config["default"].base_model_name_or_path = "base"
    routed.save_pretrained(here / "routed")
    save_tokenizer(here / "routed", 96)
    models = {
        "routed": routed,
        "sequence": sequence_mixture(),
        "ensemble": weight_ensembling_model(),
    }
    expected = {}
    for name, model in models.items():
        if name != "routed":
            model.save_pretrained(here / name)
            save_tokenizer(here / name, model.config.vocab_size)
        with torch.no_grad():
            expected[name] = model(input_ids=torch.arange(5, 25)[None]).logits
    torch.save(expected, here / "expected.pt")
    return here


def rows():
    """Questions with two answers each, of words that every tokenizer here knows."""
    made = []
    for i in range(4):
        question = " ".join(f"w{(3 * i + j) % 28}" for j in range(8))
        made.append({"question": question, "answers": [f"w{i}", f"w{i + 7}"], "label": i % 2})
    return made


TASK = {
    "task": "tiny",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "label",
    "doc_to_choice": "{{answers}}",
    "metadata": {"version": 1},
}


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.parametrize("name", ["routed", "sequence", "ensemble"])
def test_lm_eval_measures_what_this_package_made(made, tmp_path, monkeypatch, name):
    with (made / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows())
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TASK))
    model = "pretrained=base,peft=routed" if name == "routed" else f"pretrained={name}"
    done = start(
        *(
            sys.executable,
            "-m",
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            f"{model},dtype=float32",
        ),
        *("--tasks", "tiny", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "1"),
        *("--log_samples", "--output_path", tmp_path / "out"),
        cwd=made,
        env={**OFFLINE, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_tiny_*.jsonl")
    measured = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(made / name)
    loaded = AutoPeftModelForCausalLM if name == "routed" else AutoModelForCausalLM
    monkeypatch.chdir(made)
    model = loaded.from_pretrained(name).eval()
    for sample in measured:
        ids = torch.tensor([tokenizer(sample["doc"]["question"])["input_ids"]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        for answer, ((log_likelihood, _),) in zip(
            sample["doc"]["answers"], sample["resps"], strict=True
        ):
            token = tokenizer.convert_tokens_to_ids(answer)
            assert float(log_likelihood) == pytest.approx(expected[token].item(), abs=1e-4)
    assert len(measured) == len(rows())


@pytest.mark.hosts
@pytest.mark.parametrize("first", FIRST)
def test_nothing_has_to_be_imported(made, first):
    told = ["native"] if has_native_adapters() else []
    if first != FIRST[0]:
        told.append("briefly")
    done = start(sys.executable, *STRICT, "-c", SCRIPT, first, *told, cwd=made, env=OFFLINE)
    assert done.returncode == 0, done.stderr
