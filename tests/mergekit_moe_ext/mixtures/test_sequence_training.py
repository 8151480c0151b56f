"""Training sequence MoEs: against AdamW over single texts whose experts are mixed by hand, and one
way of running against another.
"""

import json
import shutil
from functools import wraps

import click
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext import train
from mergekit_moe_ext.mixtures.sequences import balance_of_texts, count_choices
from mergekit_moe_ext.mixtures.trainers import SequenceTrainer
from mergekit_moe_ext.modeling import SequenceMoEForCausalLM
from mergekit_moe_ext.recipes import Recipe
from tests.conftest import read_tensors
from tests.mergekit_moe_ext.mixtures.test_usage import words, write
from tests.mergekit_moe_ext.sequences import VOCAB, dense, fine_tunes, mixture
from tests.tokenizers import save_tokenizer

PREFIX = 4
LENGTH = 12
READING = Reading(max_length=LENGTH, quiet=True)


def recipe(**changes):
    settings = {
        "held_out": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    return Recipe(**{**settings, **changes})


def save(path, model):
    """The model with a tokenizer and a card."""
    model.save_pretrained(path)
    save_tokenizer(path, VOCAB)
    (path / "README.md").write_text("# A merged model\n")


def with_projectors(sources=None, **config):
    """A sequence MoE with a learned router, projectors, and a shared embedding and head."""
    embed = nn.Embedding(VOCAB, 32)
    head = nn.Linear(32, VOCAB, bias=False)
    settings = {"routing": "learned", "routing_tokens": PREFIX, "projector": "mlp", **config}
    model = mixture(sources or fine_tunes(3), embed, head, **settings)
    torch.manual_seed(3)
    nn.init.normal_(model.router.weight)
    return model


@pytest.fixture
def moe(tmp_path, monkeypatch):
    """A working directory with ./moe, and texts; eight of the news go beyond the prefix."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "moe", with_projectors())
    write(tmp_path / "news.jsonl", [{"text": "w5 w6 w7"}, *words(1, 9)])
    write(tmp_path / "law.jsonl", words(2, 6))
    return tmp_path


def ids_of(path):
    """The tokens of the texts that have any behind the prefix."""
    tokenizer = AutoTokenizer.from_pretrained("moe")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ids = [tokenizer(row["text"], return_tensors="pt")["input_ids"][0, :LENGTH] for row in rows]
    return [each for each in ids if len(each) > PREFIX]


def by_hand(model, ids):
    """The router's scores of one text, and the sum of its losses behind the prefix."""
    embedded = model.embed_tokens.weight[ids]
    scores = model.router.weight @ embedded[:PREFIX].mean(dim=0)
    best = scores.topk(2).indices
    mixed = 0
    for weight, index in zip(scores[best].softmax(dim=0), best, strict=True):
        expert = model.experts[index]
        hidden = expert.trunk(inputs_embeds=expert.proj_in(embedded[None])).logits[0]
        mixed = mixed + weight * expert.proj_out(hidden)
    logits = mixed @ model.lm_head.weight.T
    losses = [-logits[t - 1].log_softmax(-1)[ids[t]] for t in range(PREFIX, len(ids))]
    return scores, torch.stack(losses).sum()


def balance_by_hand(scores):
    """N * sum_i f_i P_i over all texts."""
    total = 0.0
    for expert in range(3):
        chosen = sum(expert in row.topk(2).indices for row in scores) / (2 * len(scores))
        probability = torch.stack([row.softmax(-1)[expert] for row in scores]).mean()
        total = total + 3 * chosen * probability
    return total


def part_of(name):
    if name.startswith("router."):
        return "router"
    return "projectors" if ".proj_" in name else "rest"


RATES = {"router": 3e-3, "projectors": 2e-3, "rest": 1e-3}


@pytest.mark.parametrize("part", ["all", ("router", "projectors")])
def test_training_is_adamw_on_single_texts_mixed_by_hand(moe, part):
    """Four batches of two texts a step, of different lengths, with balance and a rate per part."""
    train(
        "moe",
        ["news.jsonl"],
        part,
        output="out",
        recipe=recipe(
            router_learning_rate=RATES["router"],
            projector_learning_rate=RATES["projectors"],
            router_aux_loss=0.5,
            lr_scheduler_type="constant",
        ),
        reading=READING,
    )
    expected = AutoModelForCausalLM.from_pretrained("moe")
    before = read_tensors(moe / "moe")
    texts = ids_of(moe / "news.jsonl")
    assert len(texts) == 8
    groups = []
    for name, parameter in expected.named_parameters():
        is_trained = part == "all" or part_of(name) in part
        parameter.requires_grad_(is_trained)
        if is_trained:
            decay = 0.0 if "norm" in name else 0.01
            group = {"params": [parameter], "lr": RATES[part_of(name)], "weight_decay": decay}
            groups.append(group)
    optimizer = torch.optim.AdamW(groups)
    for _step in range(2):
        optimizer.zero_grad()
        passes = [by_hand(expected, ids) for ids in texts]
        tokens = sum(len(ids) - PREFIX for ids in texts)
        balance = balance_by_hand([scores for scores, _ in passes])
        (sum(losses for _, losses in passes) / tokens + 0.5 * balance).backward()
        trained = [parameter for group in groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    got = dict(AutoModelForCausalLM.from_pretrained("out").named_parameters())
    for name, parameter in expected.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(got[name], before[name]), name
            continue
        moved = (parameter - before[name]).abs().max()
        assert moved > RATES[part_of(name)], name  # two steps
        assert (got[name] - parameter).abs().max() < 0.02 * moved, name


@pytest.mark.parametrize("part", ["gates", "router", "projectors"])
def test_a_part_changes_its_own_tensors_alone(moe, part):
    """Of a model in bfloat16, which stays what it is, and keeps its card and its tokenizer."""
    AutoModelForCausalLM.from_pretrained("moe", dtype=torch.bfloat16).save_pretrained("moe")
    settings = recipe(held_out=2, max_steps=1, learning_rate=0.1)
    losses = train("moe", ["news.jsonl"], part, recipe=settings, reading=READING)
    before, after = read_tensors(moe / "moe"), read_tensors(moe / "moe-trained")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    own_part = "projectors" if part == "projectors" else "router"
    assert changed == {name for name in before if part_of(name) == own_part}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert before.keys() == after.keys() and list(losses) == ["news"]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (moe / "moe" / name).read_bytes() == (moe / "moe-trained" / name).read_bytes()
    assert (moe / "moe-trained" / "modeling_sequence_moe.py").exists()
    card = (moe / "moe-trained" / "README.md").read_text()
    assert card.startswith("# A merged model\n")
    assert f"the {own_part} alone w" in card and "held-out loss" in card


def test_held_out_losses_are_of_what_follows_the_prefix(moe):
    losses = train(
        "moe",
        ["news.jsonl"],
        "all",
        output="out",
        recipe=recipe(max_steps=1, per_device_eval_batch_size=4),
        reading=READING,
        eval_data=["law.jsonl"],
    )
    texts = ids_of(moe / "law.jsonl")
    for path, measured in zip(("moe", "out"), losses["law"], strict=True):
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            total = sum(by_hand(model, ids)[1] for ids in texts)
        tokens = sum(len(ids) - PREFIX for ids in texts)
        assert measured == pytest.approx(total.item() / tokens, abs=1e-4)


def test_autocast_moves_float32_weights_nearly_as_float32_does(moe):
    before = read_tensors(moe / "moe")
    moves = {}
    for is_bf16 in (False, True):
        settings = recipe(max_steps=1, lr_scheduler_type="constant", bf16=is_bf16)
        train("moe", ["news.jsonl"], "all", output="out", recipe=settings, reading=READING)
        after = read_tensors(moe / "out")
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        moves[is_bf16] = {name: (after[name] - before[name]).flatten() for name in after}
        shutil.rmtree("out")
    for name, move in moves[False].items():
        # A first step of AdamW is little more than the signs of the gradients.
        assert nn.functional.cosine_similarity(move, moves[True][name], dim=0) > 0.8, name


def test_interrupted_and_resumed_equals_uninterrupted(moe):
    """Several learning rates, and a load-balancing loss of whole steps."""
    settings = recipe(
        max_steps=4,
        save_steps=2,
        gradient_accumulation_steps=2,
        router_learning_rate=1e-2,
        router_aux_loss=0.1,
    )
    data = ["news.jsonl", "law.jsonl"]
    train("moe", data, "all", output="whole", recipe=settings, reading=READING)
    stock = SequenceTrainer.training_step
    calls = []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 6:  # in step 3, after the checkpoint of step 2
            raise KeyboardInterrupt
        return stock(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SequenceTrainer, "training_step", interrupted)
        train("moe", data, "all", output="out", recipe=settings, reading=READING)
    with pytest.raises(click.ClickException, match="had another train: all, not router"):
        train("moe", data, "router", output="out", recipe=settings, reading=READING, resume=True)
    train("moe", data, "all", output="out", recipe=settings, reading=READING, resume=True)
    expected, got = read_tensors(moe / "whole"), read_tensors(moe / "out")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_the_balance_of_a_step_is_that_of_all_its_texts():
    """Over batches of different sizes, whose own balances have another mean."""
    model = with_projectors()
    ids = torch.randint(2, VOCAB, (7, 6), generator=torch.Generator().manual_seed(0))
    batches = []
    for rows in (ids[:4], ids[4:6], ids[6:]):
        batches.append({"input_ids": rows, "attention_mask": torch.ones_like(rows)})
    counts = count_choices(model, batches, torch.device("cpu"))
    scores = [model.router_scores(**batch) for batch in batches]
    total = sum(balance_of_texts(each, counts, 2) for each in scores)
    expected = balance_by_hand(list(torch.cat(scores)))
    torch.testing.assert_close(total, expected)
    assert counts.sum() == 7 * 2 + 7
    means = torch.stack([balance_by_hand(list(each)) for each in scores]).mean()
    assert (means - expected).abs() > 1e-3


def test_the_load_balancing_loss_of_the_config_balances(moe):
    """Without --router-aux-loss the weight that the model was merged with holds."""
    model = with_projectors(router_aux_loss_coef=10.0)
    model.router.weight.data[0] += 2 * model.embed_tokens.weight.data[2:].mean(dim=0)
    save(moe / "moe", model)
    write(moe / "many.jsonl", words(3, 16))

    def imbalance(path):
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            scores = [by_hand(model, ids)[0] for ids in ids_of(moe / "many.jsonl")]
        return balance_by_hand(scores).item() - 1

    settings = recipe(max_steps=20, learning_rate=0.05, per_device_train_batch_size=4)
    train("moe", ["many.jsonl"], "router", output="out", recipe=settings, reading=READING)
    assert imbalance("out") < 0.5 * imbalance("moe")
    assert "router aux loss 10.0" in (moe / "out" / "README.md").read_text()


def test_weights_of_sources_multiply_how_often_their_texts_are_read(moe, monkeypatch):
    """Each row of the source that is drawn least is read once in an epoch, and three of the other
    for each of them.
    """
    for name, source in (("news", "w1"), ("law", "w2")):
        rows = [{"text": f"{source} w{20 + number} w3 w4 w5 w6 w7"} for number in range(60)]
        write(moe / f"{name}.jsonl", rows)
    read = []
    forward = SequenceMoEForCausalLM.forward

    @wraps(forward)
    def recorded(model, *args, **kwargs):
        read.extend(kwargs["input_ids"][:, :2].tolist())
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(SequenceMoEForCausalLM, "forward", recorded)
    settings = recipe(
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
    )
    data = ["news=news.jsonl", "law=law.jsonl"]
    train("moe", data, "router", recipe=settings, reading=READING, weights={"law": 3})
    tokenizer = AutoTokenizer.from_pretrained("moe")
    of_news, of_law = tokenizer.convert_tokens_to_ids(["w1", "w2"])
    news = [row for source, row in read if source == of_news]
    law = [row for source, row in read if source == of_law]
    assert len(news) + len(law) == len(read)
    assert sorted(news) == sorted(set(news)) and len(news) == 60
    assert len(set(law)) == 60
    # The standard deviation of such a draw is 0.45.
    assert len(law) / len(news) == pytest.approx(3, abs=1.2)


# What is refused.


@pytest.mark.parametrize(
    ("part", "changes", "complaint"),
    [
        ("router", {"packing": True}, "--packing joins texts"),
        ("router", {"projector_learning_rate": 0.1}, "no projectors to train"),
        ("projectors", {"router_learning_rate": 0.1}, "no router to train"),
        ("projectors", {"router_aux_loss": 0.1}, "no router to train"),
        ([], {}, "name the part"),
    ],
)
def test_what_a_sequence_moe_is_not_trained_with(moe, part, changes, complaint):
    with pytest.raises(click.ClickException, match=complaint):
        train("moe", ["news.jsonl"], part, output="out", recipe=recipe(**changes), reading=READING)
    assert not list(moe.glob("out*"))


def test_a_prefix_as_long_as_the_rows_is_refused(moe):
    reading = Reading(max_length=PREFIX, quiet=True)
    with pytest.raises(click.ClickException, match="the first 4 tokens choose"):
        train("moe", ["news.jsonl"], "router", output="out", recipe=recipe(), reading=reading)


def test_models_without_what_is_to_be_trained(moe):
    save(moe / "heuristic", mixture(fine_tunes(2), routing="perplexity", routing_tokens=PREFIX))
    for part, changes, complaint in (
        ("router", {}, "it routes by perplexity; merge with routing: learned"),
        ("projectors", {}, "has no projectors"),
        ("all", {"router_aux_loss": 0.1}, "--router-aux-loss: this training has no router"),
    ):
        settings = recipe(**changes)
        with pytest.raises(click.ClickException, match=complaint):
            train("heuristic", ["news.jsonl"], part, recipe=settings, reading=READING)
    # What chooses by perplexity has experts to train all the same.
    train("heuristic", ["news.jsonl"], "all", recipe=recipe(max_steps=1), reading=READING)
    before, after = read_tensors(moe / "heuristic"), read_tensors(moe / "heuristic-trained")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_router_that_keeps_one_expert_is_not_trained(moe, caplog):
    save(moe / "one", with_projectors(experts_per_sequence=1))
    with pytest.raises(click.ClickException, match="keeps one expert"):
        train("one", ["news.jsonl"], "router", recipe=recipe(), reading=READING)
    train("one", ["news.jsonl"], "all", recipe=recipe(max_steps=1), reading=READING)
    assert "keeps one expert" in caplog.text and "the rest is trained" in caplog.text
    before, after = read_tensors(moe / "one"), read_tensors(moe / "one-trained")
    assert torch.equal(before["router.weight"], after["router.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_an_expert_with_fewer_positions_than_a_row_is_found_first(moe):
    short = dense(1, "gpt2", max_position_embeddings=8)
    save(moe / "short", mixture([*fine_tunes(2), short], routing="learned", routing_tokens=PREFIX))
    complaint = "--max-length 12: the expert '2' has 8 positions; give --max-length 8 or less"
    with pytest.raises(click.ClickException, match=complaint):
        train("short", ["missing.jsonl"], "router", recipe=recipe(), reading=READING)
    reading = Reading(max_length=8, quiet=True)
    train("short", ["news.jsonl"], "router", recipe=recipe(max_steps=1), reading=reading)


def test_processes_cannot_share_the_parts_of_a_sequence_moe(moe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(click.ClickException, match="FSDP is not supported here"):
        train("moe", ["news.jsonl"], "all", recipe=recipe(), reading=READING)
