"""Training of some experts' rows alone: the rest against the file that it started from, the rows
against a loop with AdamW on the loss that transformers computes.
"""

import click
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_moe_ext
from mergekit_moe_ext import Reading, Recipe
from tests.conftest import read_tensors
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, make_moe, words, write

QUIET = Reading(max_length=24, quiet=True)
GATE = "block_sparse_moe.gate.weight"


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """A working directory with ./mixture, whose expert 3 is called law, and law.jsonl."""
    monkeypatch.chdir(tmp_path)
    names = {"expert_names": [None, None, None, "law"]}
    make_moe(tmp_path / "mixture", "mixtral", **FAMILIES["mixtral"], **names)
    (tmp_path / "mixture" / "README.md").write_text("# mixture\n")
    write(tmp_path / "law.jsonl", words(2, 8))
    return tmp_path


def train(output="out", experts=("law",), part="gates", **changes):
    settings = {"max_steps": 2, "held_out": 0, "learning_rate": 0.05, "weight_decay": 0.5}
    recipe = Recipe(**{**settings, **changes})
    mergekit_moe_ext.train(
        "mixture", ["law.jsonl"], part, output=output, recipe=recipe, reading=QUIET,
        only_experts=experts,
    )  # fmt: skip


def test_only_the_rows_of_these_experts_change(mixture):
    train()
    before, after = read_tensors(mixture / "mixture"), read_tensors(mixture / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith(GATE):
            assert torch.equal(after[name][:3], tensor[:3])
            assert not torch.equal(after[name][3], tensor[3])
        else:
            assert torch.equal(after[name], tensor), name
    card = (mixture / "out" / "README.md").read_text()
    assert "the gates' rows of the experts law alone were trained" in card


def test_the_rows_are_those_of_a_loop(mixture):
    """One step on all texts, without a schedule: the row's gradient alone is clipped to one."""
    train(max_steps=1, lr_scheduler_type="constant", learning_rate=0.01)
    model = AutoModelForCausalLM.from_pretrained("mixture")
    tokenizer = AutoTokenizer.from_pretrained("mixture")
    texts = [row["text"] for row in words(2, 8)]
    losses = []
    tokens = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:24]])
        logits = model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    gradients = torch.autograd.grad(torch.stack(losses).sum() / tokens, gates)
    rows = [torch.nn.Parameter(gate.detach()[3].clone()) for gate in gates]
    for row, gradient in zip(rows, gradients, strict=True):
        row.grad = gradient[3].clone()
    torch.nn.utils.clip_grad_norm_(rows, 1.0)
    torch.optim.AdamW(rows, lr=0.01, weight_decay=0.5).step()
    after = read_tensors(mixture / "out")
    for layer, row in enumerate(rows):
        written = after[f"model.layers.{layer}.{GATE}"][3]
        assert torch.allclose(written, row, atol=2e-4), layer


def test_what_cannot_be_trained_is_refused(mixture):
    with pytest.raises(click.ClickException, match="there is no expert 'tax'"):
        train(experts=("tax",))
    with pytest.raises(click.ClickException, match="is for --train gates"):
        train(part="all")
    assert not (mixture / "out").exists()


def test_an_expert_that_nobody_chooses_is_not_trained_in_vain(mixture):
    """Two of the logits g, -g, h and -h are above its own, which is zero."""
    make_moe(mixture / "mixture", "mixtral", num_local_experts=5)
    model = AutoModelForCausalLM.from_pretrained("mixture")
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[2:4] = -gate[:2]
            gate[4] = 0
    model.save_pretrained("mixture")
    with pytest.raises(click.ClickException, match="no token of the first texts chooses"):
        train(experts=("4",))
    train(experts=("4",), router_aux_loss=0.1)
    changed = read_tensors(mixture / "out")[f"model.layers.0.{GATE}"]
    assert changed[4].abs().max() > 0
