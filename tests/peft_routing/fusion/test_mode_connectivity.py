"""`examples/mode_connectivity.py` against adapters that are interpolated by hand."""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoTokenizer

from tests.peft_routing.adapters import make_base, save_experts
from tests.tokenizers import save_tokenizer

ROOT = Path(__file__).parents[3]
TEXTS = {"math": ["w1 w2 w3 w4", "w5 w6 w7"], "code": ["w30 w31 w9", "w40 w8 w12 w3 w2"]}


@pytest.fixture
def script(examples):
    import mode_connectivity

    return mode_connectivity


def interpolated(way, alpha, experts):
    """A base model with the interpolation of two adapters in its weights."""
    models = [PeftModel.from_pretrained(make_base(), path) for path in experts.values()]
    result = make_base()
    weights = dict(result.named_modules())
    shares = (1 - alpha, alpha)
    places = [name for name, module in models[0].named_modules() if hasattr(module, "lora_A")]
    for name in places:
        layers = [model.get_submodule(name) for model in models]
        a = [layer.lora_A["default"].weight.detach() for layer in layers]
        b = [layer.lora_B["default"].weight.detach() for layer in layers]
        if way == "factors":
            mixed_a = shares[0] * a[0] + shares[1] * a[1]
            mixed_b = shares[0] * b[0] + shares[1] * b[1]
            update = mixed_b @ mixed_a
        else:
            update = shares[0] * b[0] @ a[0] + shares[1] * b[1] @ a[1]
        scaling = layers[0].scaling["default"]
        weights[name.removeprefix("base_model.model.")].weight.data += scaling * update
    return result


def test_the_docs_command_runs_and_is_right(script, tmp_path, monkeypatch):
    make_base().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", 96)
    experts = save_experts(tmp_path, ("math-lora", "code-lora"))
    for task, texts in TEXTS.items():
        rows = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{task}.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    docs = (ROOT / "docs" / "fusion.md").read_text()
    (command,) = re.findall(r"python examples/mode_connectivity.py (.*)", docs)
    arguments = [*command.split(), "--points", "3", "-o", "losses.json"]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "losses.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained("base")
    for way in ("factors", "updates"):
        for place, alpha in enumerate((0.0, 0.5, 1.0)):
            model = interpolated(way, alpha, experts)
            for task, texts in TEXTS.items():
                values = []
                for text in texts:
                    ids = tokenizer(text, return_tensors="pt")["input_ids"]
                    with torch.no_grad():
                        logits = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
                    values.append(-logits.gather(1, ids[0, 1:, None])[:, 0])
                expected = torch.cat(values).mean().item()
                assert measured["losses"][way][task][place] == pytest.approx(expected, abs=2e-5)
    middle = measured["losses"]["factors"]["math"]
    excess = middle[1] - (middle[0] + middle[2]) / 2
    assert f"math {max(excess, 0.0):.4f}" in result.output
    assert (tmp_path / "connectivity.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(script.main, arguments)
    assert again.exit_code == 1 and "exists and is not overwritten" in again.output


def test_a_barrier_is_the_greatest_excess_over_the_straight_line(script):
    assert script.barrier([1.0, 4.0, 3.0], [0.0, 0.5, 1.0]) == 2.0
    assert script.barrier([1.0, 0.0, 3.0], [0.0, 0.5, 1.0]) == 0.0
