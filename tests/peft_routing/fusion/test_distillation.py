"""A plain LoRA that is trained to match an ensemble."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_routing
from peft_routing import Distilling, Reading, UserError, distil, ensemble
from peft_routing.cli import main
from peft_routing.fusion import distillation
from peft_routing.fusion.distillation import Distillation, kl_of_likeliest
from tests.conftest import ON_CPU, TWO_PROCESSES, read_tensors, run
from tests.peft_routing.adapters import make_base, save_experts
from tests.tokenizers import save_tokenizer

COEFFICIENTS = {"math": 0.7, "law": 0.3}


@pytest.fixture
def here(tmp_path, monkeypatch):
    make_base().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", 96)
    experts = save_experts(tmp_path / "experts", lora_alpha=64)
    peft_routing.compose(str(tmp_path / "base"), experts, str(tmp_path / "routed"))
    rows = []
    for row in range(24):
        words = [f"w{(5 * row + 7 * step) % 90}" for step in range(4 + row % 5)]
        rows.append(json.dumps({"text": " ".join(words)}) + "\n")
    (tmp_path / "texts.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("top", [5, 12])
def test_the_divergence_is_of_the_likeliest_and_the_rest(top):
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(3, 12, generator=generator).double()
    others = torch.randn(3, 12, generator=generator).double().softmax(dim=-1)
    likeliest = others.topk(top, dim=-1)
    found = kl_of_likeliest(own, likeliest.indices, likeliest.values.log())
    for row in range(3):
        kept = likeliest.indices[row].tolist()
        rest = [token for token in range(12) if token not in kept]
        p = [*others[row, kept].tolist(), others[row, rest].sum().item()]
        q = own[row].softmax(dim=-1)
        q = [*q[kept].tolist(), q[rest].sum().item()]
        expected = sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q, strict=True) if a)
        assert found[row].item() == pytest.approx(expected, abs=1e-5)


def divergence(adapter):
    """The mean whole divergence of an adapter, or the base, from the ensemble, over all texts."""
    base = AutoModelForCausalLM.from_pretrained("base").eval()
    student = PeftModel.from_pretrained(base, adapter).eval() if adapter else base
    mixture = ensemble(PeftModel.from_pretrained(make_base(), "routed").eval(), COEFFICIENTS)
    tokenizer = AutoTokenizer.from_pretrained("base")
    values = []
    with torch.no_grad():
        for line in Path("texts.jsonl").read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
            of_mixture = mixture(input_ids=ids).logits.log_softmax(dim=-1)
            own = student(input_ids=ids).logits.log_softmax(dim=-1)
            values.append((of_mixture.exp() * (of_mixture - own)).sum(dim=-1)[0, :-1])
    return torch.cat(values).mean().item()


def test_distillation_lowers_the_divergence_from_the_ensemble(here):
    recipe = Distilling(max_steps=60, held_out=6, per_device_train_batch_size=6)
    losses = distil(
        "routed", ["texts=texts.jsonl"], output="student", coefficients=COEFFICIENTS,
        rank=8, learning_rate=2e-2, recipe=recipe, reading=Reading(quiet=True),
    )  # fmt: skip
    before, after = losses["texts"]
    assert after < 0.8 * before
    # Other texts, and 33 of 96 words counted as one.
    assert before == pytest.approx(divergence(None), rel=0.5)
    assert divergence("student") < 0.8 * divergence(None)
    config = json.loads((here / "student" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 8
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert "## Distillation" in (here / "student" / "README.md").read_text()
    assert not (here / "student.checkpoints").exists()


def distil_here(output, resume=False, **changes):
    settings = {"max_steps": 4, "held_out": 6, "per_device_train_batch_size": 6, **changes}
    return distil(
        "routed", ["texts=texts.jsonl"], output=output, coefficients=COEFFICIENTS, rank=4,
        learning_rate=1e-2, recipe=Distilling(**settings), reading=Reading(quiet=True),
        resume=resume,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_an_ensemble_that_reads_in_each_step_teaches_the_same(here, monkeypatch, beta):
    expected = distil(
        "routed", ["texts=texts.jsonl"], output="kept", beta=beta, rank=4, learning_rate=1e-2,
        recipe=Distilling(max_steps=4, held_out=6), reading=Reading(quiet=True),
    )  # fmt: skip

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(distillation, "with_targets", never)
    options = ["--rank", "4", "--learning-rate", "1e-2", "--beta", str(beta), "--max-steps", "4"]
    options += ["--held-out", "6", "--on-the-fly", "--quiet", "-o", "student"]
    result = CliRunner().invoke(main, ["distil", "routed", "--data", "texts=texts.jsonl", *options])
    assert result.exit_code == 0, result.output
    before, after = expected["texts"]
    assert f"{before:.4f}" in result.output and f"{after:.4f}" in result.output
    tensors = read_tensors(here / "student")
    for name, tensor in read_tensors(here / "kept").items():
        torch.testing.assert_close(tensor, tensors[name], atol=1e-4, rtol=0)


def test_interrupted_and_resumed_equals_uninterrupted(here, monkeypatch):
    expected = distil_here("whole", save_steps=2)
    steps = []
    stock = Distillation.training_step

    def counted(self, *args, **kwargs):
        steps.append(args)
        if len(steps) == 4:  # after the checkpoint of step 2
            raise KeyboardInterrupt
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Distillation, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        distil_here("stopped", save_steps=2)
    assert not Path("stopped").exists()
    with pytest.raises(UserError, match="--resume goes on"):
        distil_here("stopped", save_steps=2)
    with pytest.raises(UserError, match="had another max steps: 4, not 5"):
        distil_here("stopped", save_steps=2, max_steps=5, resume=True)
    weights = here / "base" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-64] + bytes(64))
    with pytest.raises(UserError, match="had another base weights"):
        distil_here("stopped", save_steps=2, resume=True)
    weights.write_bytes(kept)
    resumed = distil_here("stopped", save_steps=2, resume=True)
    assert len(steps) == 4 + 2
    assert resumed == expected
    tensors = read_tensors(here / "stopped")
    for name, tensor in read_tensors(here / "whole").items():
        assert torch.equal(tensor, tensors[name]), name
    assert not Path("stopped.checkpoints").exists()


def test_the_loss_of_a_step_is_a_mean_over_its_tokens_whatever_its_batches(here):
    expected = distil_here("whole")
    parts = distil_here("parts", per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert parts["texts"] == pytest.approx(expected["texts"], abs=1e-5)
    tensors = read_tensors(here / "parts")
    for name, tensor in read_tensors(here / "whole").items():
        torch.testing.assert_close(tensor, tensors[name], atol=1e-4, rtol=0)


def test_two_processes_distil_as_one(here):
    expected = distil_here("one")
    options = ["--data", "texts=texts.jsonl", "--rank", "4", "--learning-rate", "1e-2", "--quiet"]
    options += ["--coefficient", "math=0.7", "--coefficient", "law=0.3", "--max-steps", "4"]
    options += ["--held-out", "6", "--per-device-train-batch-size", "3", "-o", "two"]
    command = [*TWO_PROCESSES, "-m", "peft_routing", "distil", "routed"]
    result = run(*command, *options, env=ON_CPU)
    assert result.returncode == 0, result.stderr
    before, after = expected["texts"]
    assert result.stdout.count(f"{before:.4f}") == 1 and f"{after:.4f}" in result.stdout
    tensors = read_tensors(here / "two")
    for name, tensor in read_tensors(here / "one").items():
        torch.testing.assert_close(tensor, tensors[name], atol=1e-4, rtol=0)


def test_mistakes_are_told_before_anything_is_read(here):
    with pytest.raises(UserError, match="did you mean 'math'"):
        distil("routed", ["texts.jsonl"], coefficients={"maths": 1}, reading=Reading(quiet=True))
    result = CliRunner().invoke(
        main, ["distil", "routed", "--data", "texts.jsonl", "-o", "experts"]
    )
    assert result.exit_code == 1 and "is not empty" in result.output
    assert not list(here.glob("*.checkpoints")) and not (here / "routed-distilled").exists()
