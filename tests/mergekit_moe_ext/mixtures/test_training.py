"""Training: against AdamW written out over unpadded texts, and one way of running against
another."""

import json
import logging
import os

import click
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from _mergekit_moe_ext_common import training as shared_training
from _mergekit_moe_ext_common.data import RealTokens, pack
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.mixtures import trainers
from mergekit_moe_ext.mixtures.routers import Choice, load_balancing_loss, recorded
from mergekit_moe_ext.mixtures.training import train
from mergekit_moe_ext.recipes import Recipe
from tests.conftest import (
    INTERRUPTED,
    ON_CPU,
    SPLIT_ON_CPU,
    TWO_PROCESSES,
    make_model,
    processes,
    read_tensors,
    run,
    start,
)
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, SWITCH, make_moe, words, write
from tests.tokenizers import save_tokenizer

READING = Reading(max_length=24, quiet=True)
ROUTER = ".gate.weight"


def recipe(**changes):
    return Recipe(
        **{
            "held_out": 0,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 0.01,
            **changes,
        }
    )


@pytest.fixture
def moe(tmp_path, monkeypatch):
    """A working directory with ./moe (a Mixtral), news.jsonl and law.jsonl."""
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "mixtral", **FAMILIES["mixtral"])
    write(tmp_path / "news.jsonl", words(1, 12))
    write(tmp_path / "law.jsonl", words(2, 8))
    return tmp_path


def ids_of(rows, tokenizer):
    return [tokenizer(row["text"], return_tensors="pt")["input_ids"][:, :24] for row in rows]


def by_hand(path, rows, *, steps, learning_rate, trained, weight_decay=0.01):
    """Full-batch AdamW, one unpadded text at a time; the loss is the mean over all predicted
    tokens.
    """
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    texts = [ids for ids in ids_of(rows, tokenizer) if ids.numel() > 1]
    tokens = sum(ids.numel() - 1 for ids in texts)
    parameters = {name: p for name, p in model.named_parameters() if trained in name}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    for step in range(steps):
        model.zero_grad()
        for ids in texts:
            chances = model(ids).logits[0, :-1].log_softmax(-1)
            (-chances.gather(1, ids[0, 1:, None]).sum() / tokens).backward()
        norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
        rate = learning_rate * (1 - step / steps)
        with torch.no_grad():
            for name, p in parameters.items():
                gradient = p.grad * min(1.0, 1.0 / (norm.item() + 1e-6))
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                decay = 0.0 if "norm" in name else weight_decay
                p *= 1 - rate * decay
                unbiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                p -= rate * first / (1 - 0.9 ** (step + 1)) / unbiased
    return parameters


@pytest.mark.parametrize("part", ["gates", "all"])
def test_training_is_adamw_on_the_mean_loss_of_all_tokens(moe, part):
    """Batches of three padded rows, accumulated four times: twelve texts of different lengths."""
    train(
        "moe",
        "out",
        part,
        ["news.jsonl"],
        READING,
        recipe(per_device_train_batch_size=3, gradient_accumulation_steps=4, learning_rate=0.002),
    )
    trained = ROUTER if part == "gates" else ""
    expected = by_hand("moe", words(1, 12), steps=3, learning_rate=0.002, trained=trained)
    got = dict(AutoModelForCausalLM.from_pretrained("out").named_parameters())
    before = dict(AutoModelForCausalLM.from_pretrained("moe").named_parameters())
    for name, parameter in expected.items():
        moved = (parameter - before[name]).abs().max()
        assert moved > 1e-3
        assert (got[name] - parameter).abs().max() < 0.02 * moved, name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_gates_changes_gates_only(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", family, **FAMILIES[family])
    AutoModelForCausalLM.from_pretrained("moe", dtype=torch.bfloat16).save_pretrained("moe")
    (tmp_path / "moe" / "README.md").write_text("# A merged model\n")
    write(tmp_path / "news.jsonl", words(1, 8))
    aux = 0.01 if family == "deepseek_v3" else 0.0
    train(
        "moe",
        None,
        "gates",
        ["news.jsonl"],
        READING,
        recipe(router_aux_loss=aux, learning_rate=0.1),
    )
    before, after = read_tensors(tmp_path / "moe"), read_tensors(tmp_path / "moe-trained")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(
        name.endswith(("gate.weight", "router.weight", "router.bias", "layer.weight"))
        for name in changed
    )
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert sorted(path.name for path in tmp_path.iterdir() if "trained" in path.name) == [
        "moe-trained"
    ]
    loaded = AutoModelForCausalLM.from_pretrained("moe-trained")
    assert loaded.dtype == torch.bfloat16 and type(loaded).__module__.startswith("transformers")
    card = (tmp_path / "moe-trained" / "README.md").read_text()
    assert card.startswith("# A merged model\n") and "the gates alone were trained" in card


def test_switch_transformers_train_on_inputs_and_targets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "switch_transformers", **SWITCH)
    write(tmp_path / "news.jsonl", words(1, 10, ("input", "target")))
    losses = train(
        "moe", "out", "gates", ["news.jsonl"], READING, recipe(held_out=3, router_aux_loss=0.01)
    )
    before, after = read_tensors(tmp_path / "moe"), read_tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "router" in name}
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained("moe"),
        AutoTokenizer.from_pretrained("moe"),
    )
    from datasets import load_dataset

    held_out = load_dataset("json", data_files="news.jsonl", split="train").train_test_split(
        test_size=3, seed=42
    )["test"]
    total, tokens = 0.0, 0
    for row in held_out:
        labels = tokenizer(row["target"], return_tensors="pt")["input_ids"][:, :24]
        ids = tokenizer(row["input"], return_tensors="pt")["input_ids"][:, :24]
        total += model.eval()(input_ids=ids, labels=labels).loss.item() * labels.numel()
        tokens += labels.numel()
    assert losses["news"][0] == pytest.approx(total / tokens, abs=1e-4)


def test_held_out_losses_are_means_over_tokens_and_nobody_trains_on_them(moe):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        stock = trainers.MoeTrainer.training_step
        patch.setattr(
            trainers.MoeTrainer,
            "training_step",
            lambda self, model, inputs, *rest: (
                seen.append(inputs) or stock(self, model, inputs, *rest)
            ),
        )
        losses = train(
            "moe",
            "out",
            "all",
            ["news.jsonl", "law=law.jsonl"],
            READING,
            recipe(
                held_out=5,
                max_steps=8,
                eval_steps=4,
                router_aux_loss=1.0,
                per_device_eval_batch_size=2,
            ),
            eval_data=["law=law.jsonl:train[:3]"],
        )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained("moe"),
        AutoTokenizer.from_pretrained("moe"),
    )

    def loss(model, rows):
        texts = [ids for ids in ids_of(rows, tokenizer) if ids.numel() > 1]
        total = sum(model(ids, labels=ids).loss.item() * (ids.numel() - 1) for ids in texts)
        return total / sum(ids.numel() - 1 for ids in texts)

    held_out = Dataset.from_list(words(1, 12)).train_test_split(test_size=5, seed=42)["test"]
    trained = AutoModelForCausalLM.from_pretrained("out")
    for rows, name in ((held_out, "news"), (words(2, 8)[:3], "law")):
        assert losses[name] == pytest.approx((loss(model, rows), loss(trained, rows)), abs=1e-4)
    read = set()
    for batch in seen:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            read.add(tuple(ids[mask.bool()].tolist()))
    assert not read & {tuple(ids[0].tolist()) for ids in ids_of(held_out, tokenizer)}
    assert tuple(ids_of(words(2, 8), tokenizer)[7][0].tolist()) in read
    history = json.loads((moe / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_news_loss" in entry] == [0, 4, 8]


def test_two_processes_train_as_one(moe):
    """The same rows per step, on two processes of two and on one of four: the same gates to
    1e-5."""
    arguments = [
        "train",
        "moe",
        "--train",
        "all",
        "--data",
        "news.jsonl",
        "--data",
        "law.jsonl",
        "--quiet",
    ]
    arguments += [
        "--max-steps",
        "3",
        "--max-length",
        "24",
        "--learning-rate",
        "0.001",
        "--held-out",
        "3",
    ]
    # As a user starts it: no variable says that these are processes on CPUs.
    plain = {name: value for name, value in os.environ.items() if "ACCELERATE" not in name}
    two = start(
        *TWO_PROCESSES,
        "-m",
        "mergekit_moe_ext",
        *arguments,
        "--per-device-train-batch-size",
        "2",
        "-o",
        "two",
        cwd=moe,
        env=plain,
    )
    assert two.returncode == 0, two.stderr
    assert "processes 2." in (moe / "two" / "README.md").read_text()
    one = run(
        "mergekit-moe-ext", *arguments, "--per-device-train-batch-size", "4", "-o", "one", cwd=moe
    )
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout and one.stdout.splitlines()[0].split() == [
        "held-out",
        "loss",
        "before",
        "after",
    ]
    first, second, before = (read_tensors(moe / name) for name in ("one", "two", "moe"))
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 1e-5, name
    moved = [name for name in first if not torch.equal(first[name], before[name])]
    assert len(moved) == len(first)


def same_files(one, two):
    """The same files, the same config, and tensors of the same names, dtypes and values."""
    assert sorted(path.name for path in one.iterdir()) == sorted(
        path.name for path in two.iterdir()
    )
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    expected, got = read_tensors(one), read_tensors(two)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == got[name].dtype
        assert (tensor - got[name]).abs().max() < 1e-5, name


OF_A_SPLIT = ["--data", "news.jsonl", "--data", "law.jsonl", "--quiet", "--max-length", "24"]
OF_A_SPLIT += ["--learning-rate", "0.001", "--held-out", "3", "--max-steps", "3"]


@pytest.mark.slow
def test_a_model_split_between_four_processes_trains_as_a_whole_one(moe):
    """The gates, with a frozen rest, under gradient checkpointing; the embedding is tied."""
    config = {**FAMILIES["mixtral"], "tie_word_embeddings": True}
    make_moe(moe / "tied", "mixtral", **config)
    arguments = ["train", "tied", "--train", "gates", *OF_A_SPLIT]
    arguments += ["--gradient-checkpointing", "--per-device-train-batch-size"]
    command = (*processes(4), "-m", "mergekit_moe_ext")
    four = run(*command, *arguments, "1", "-o", "four", cwd=moe, env=SPLIT_ON_CPU)
    assert four.returncode == 0, four.stderr
    one = run("mergekit-moe-ext", *arguments, "4", "-o", "one", cwd=moe, env=ON_CPU)
    assert one.returncode == 0, one.stderr
    assert one.stdout == four.stdout
    same_files(moe / "one", moe / "four")
    before, after = read_tensors(moe / "tied"), read_tensors(moe / "four")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(ROUTER)}


def test_a_group_of_one_process_writes_a_whole_model(moe):
    """accelerate splits a model between one process, too, as on a machine with one GPU."""
    arguments = ["train", "moe", "--train", "gates", *OF_A_SPLIT]
    command = (*processes(1), "-m", "mergekit_moe_ext")
    split = run(*command, *arguments, "-o", "split", cwd=moe, env=SPLIT_ON_CPU)
    assert split.returncode == 0, split.stderr
    plain = run("mergekit-moe-ext", *arguments, "-o", "plain", cwd=moe, env=ON_CPU)
    assert plain.stdout == split.stdout
    same_files(moe / "plain", moe / "split")


def test_a_split_model_that_was_interrupted_and_resumed_trains_as_a_whole_one(moe):
    (moe / "interrupted.py").write_text(INTERRUPTED)
    AutoModelForCausalLM.from_pretrained("moe", dtype=torch.bfloat16).save_pretrained("moe")
    arguments = ["train", "moe", "--train", "all", *OF_A_SPLIT]
    one = run(
        "mergekit-moe-ext",
        *arguments,
        "--per-device-train-batch-size",
        "4",
        "-o",
        "one",
        cwd=moe,
        env=ON_CPU,
    )
    assert one.returncode == 0, one.stderr
    arguments += ["--per-device-train-batch-size", "2", "--save-steps", "2", "-o", "two"]
    command = (*TWO_PROCESSES, "interrupted.py", "mergekit_moe_ext", "3")
    stopped = run(*command, *arguments, cwd=moe, env=SPLIT_ON_CPU)
    assert stopped.returncode != 0 and not (moe / "two").exists()
    checkpoint = moe / "two.checkpoints" / "checkpoint-2"
    whole = read_tensors(moe / "one")
    for part in (1, 2):  # each process has written half of every tensor
        kept = load_file(checkpoint / f"trained-{part}-of-2.safetensors")
        numbers = sum(tensor.numel() for tensor in kept.values())
        assert numbers == sum(tensor.numel() for tensor in whole.values()) / 2
        assert (checkpoint / f"optimizer-{part}-of-2.pt").exists()
    resumed = (*TWO_PROCESSES, "-m", "mergekit_moe_ext", *arguments, "--resume")
    refused = run(*resumed, cwd=moe, env=ON_CPU)
    assert refused.returncode != 0 and "had another fsdp: True, not False" in refused.stderr
    two = run(*resumed, cwd=moe, env=SPLIT_ON_CPU)
    assert two.returncode == 0, two.stderr
    assert one.stdout == two.stdout
    # bfloat16 rounds what differs in the last bits of float32.
    same_files(moe / "one", moe / "two")
    assert not (moe / "two.checkpoints").exists()


def test_interrupted_and_resumed_equals_uninterrupted(moe, caplog):
    settings = recipe(
        max_steps=7,
        save_steps=2,
        held_out=0,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    data = ["news.jsonl", "law.jsonl"]
    held_out = ["law.jsonl"]
    train("moe", "whole", "all", data, READING, settings, eval_data=held_out)
    calls = []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 11:  # in the middle of step 6, after the checkpoint of step 4
            raise KeyboardInterrupt
        return stock(self, *args)

    stock = trainers.MoeTrainer.training_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainers.MoeTrainer, "training_step", interrupted)
        train("moe", "out", "all", data, READING, settings, eval_data=held_out)
    assert not (moe / "out").exists()
    assert "out.checkpoints has checkpoints: a resumed run goes on from the last" in caplog.text
    assert (moe / "out.checkpoints" / "checkpoint-4" / "trained.safetensors").exists()
    with pytest.raises(click.ClickException, match="--resume goes on"):
        train("moe", "out", "all", data, READING, settings, eval_data=held_out)
    with pytest.raises(click.ClickException, match="had another learning rate"):
        train(
            "moe",
            "out",
            "all",
            data,
            READING,
            recipe(**{**vars(settings), "learning_rate": 0.5}),
            eval_data=held_out,
            resume=True,
        )
    with pytest.raises(click.ClickException, match="had another held out data"):
        train("moe", "out", "all", data, READING, settings, eval_data=["news.jsonl"], resume=True)
    monitored = logging.getLogger("transformers")
    monitored.addHandler(caplog.handler)
    caplog.clear()
    (moe / "out.checkpoints" / "checkpoint-6").mkdir()  # killed while it was written
    train("moe", "out", "all", data, READING, settings, eval_data=held_out, resume=True)
    monitored.removeHandler(caplog.handler)
    assert "trainer_state.json" not in caplog.text  # 0.1 of the steps are no other number of steps
    expected, got = read_tensors(moe / "whole"), read_tensors(moe / "out")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    assert not (moe / "out.checkpoints").exists()
    with pytest.raises(click.ClickException, match="no checkpoint"):
        train("moe", "other", "all", data, READING, settings, resume=True)


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True}, {"bf16": True}], ids=lambda c: next(iter(c))
)
def test_ways_to_save_memory_train_the_same(moe, changes):
    plain = recipe(router_aux_loss=0.1, learning_rate=0.001)
    train("moe", "plain", "gates", ["news.jsonl"], READING, plain)
    train("moe", "saving", "gates", ["news.jsonl"], READING, recipe(**{**vars(plain), **changes}))
    before, expected, got = (read_tensors(moe / name) for name in ("moe", "plain", "saving"))
    for name, tensor in expected.items():
        if name.endswith(ROUTER):
            moved, same = (tensor - before[name]).flatten(), (got[name] - before[name]).flatten()
            alike = torch.cosine_similarity(moved, same, dim=0)
            assert alike > (0.8 if "bf16" in changes else 0.9999)
        else:
            assert torch.equal(tensor, got[name])


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "granitemoe"])
def test_gates_of_a_bfloat16_model(tmp_path, monkeypatch, family):
    """Its other weights stay in bfloat16 while it trains, and its gates, kept in float32 meanwhile,
    move.
    """
    monkeypatch.chdir(tmp_path)
    one = (
        1 if family == "olmoe" else 2
    )  # where one expert is chosen, the check for a gradient runs as well
    make_moe(tmp_path / "moe", family, **{**FAMILIES[family], "num_experts_per_tok": one})
    AutoModelForCausalLM.from_pretrained("moe", dtype=torch.bfloat16).save_pretrained("moe")
    write(tmp_path / "news.jsonl", words(1, 8))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        stock = trainers.MoeTrainer.training_step
        patch.setattr(
            trainers.MoeTrainer,
            "training_step",
            lambda self, model, *rest: (
                seen.append({p.dtype for p in model.parameters() if not p.requires_grad})
                or stock(self, model, *rest)
            ),
        )
        train("moe", "out", "gates", ["news.jsonl"], READING, recipe(learning_rate=0.1))
    assert seen[0] == {torch.bfloat16}
    before, after = read_tensors(tmp_path / "moe"), read_tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".gate." in name or ".router." in name for name in changed)


def test_packing_joins_texts_and_loses_none(moe):
    rows = [[5, 6, 7], [8], [9, 10, 11, 12]]
    packed = pack(Dataset.from_dict({"input_ids": rows}), 4, 1)["input_ids"]
    assert list(packed) == [[5, 6, 7, 1], [8, 1, 9, 10], [11, 12, 1]]
    many = pack(Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2500}), 64, 1)["input_ids"]
    assert sum(map(len, many)) == 10_000 and sorted(set(map(len, many))) == [16, 32, 64]
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        stock = trainers.MoeTrainer.training_step
        patch.setattr(
            trainers.MoeTrainer,
            "training_step",
            lambda self, model, inputs, *rest: (
                steps.append(inputs["input_ids"]) or stock(self, model, inputs, *rest)
            ),
        )
        train(
            "moe",
            "out",
            "gates",
            ["news.jsonl"],
            READING,
            recipe(packing=True, max_steps=-1, num_train_epochs=1),
        )
    tokenizer = AutoTokenizer.from_pretrained("moe")
    total = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in words(1, 12))
    assert {ids.shape[1] for ids in steps} <= {24} and 0 <= sum(
        ids.numel() for ids in steps
    ) - total < 24


def test_sources_are_drawn_by_their_weights_whatever_their_sizes():
    sources = {
        "a": Dataset.from_dict({"input_ids": [[0]] * 90}),
        "b": Dataset.from_dict({"input_ids": [[1]] * 300}),
    }
    mixed = shared_training.mixed(sources, {"a": 3.0}, 0)
    assert sum(row["input_ids"][0] for row in mixed) / len(mixed) == pytest.approx(0.25, abs=0.05)
    assert sum(row["input_ids"][0] for row in shared_training.mixed(sources, {}, 0)) == 300
    assert len(shared_training.mixed(sources, {}, 0)) == 390


# The load-balancing loss.


def test_load_balancing_is_that_of_transformers_in_one_layer():
    torch.manual_seed(0)
    logits = torch.randn(2 * 7, 5)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    choice = Choice(logits, logits.softmax(-1).topk(2).values, logits.topk(2).indices)
    real = RealTokens(mask.bool(), mask.bool())
    loss = load_balancing_loss({"gate": choice}, real)
    assert loss.item() == pytest.approx(
        load_balancing_loss_func((logits,), 5, 2, mask).item(), abs=1e-5
    )
    every_layer = load_balancing_loss({"one": choice, "two": choice}, real)
    assert every_layer.item() == pytest.approx(loss.item(), abs=1e-6)


def test_load_balancing_by_hand_with_encoder_and_decoder():
    torch.manual_seed(0)
    logits = {name: torch.randn(6, 3) for name in ("encoder.gate", "decoder.gate")}
    experts = {name: of_gate.argmax(-1, keepdim=True) for name, of_gate in logits.items()}
    experts["decoder.gate"][2] = -1  # chose none
    real = RealTokens(
        inputs=torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(),
        targets=torch.tensor([[1, 1, 1], [0, 1, 1]]).bool(),
    )
    tokens_of = {"encoder.gate": real.inputs.flatten(), "decoder.gate": real.targets.flatten()}
    choices = {
        name: Choice(of_gate, torch.ones(6, 1), experts[name]) for name, of_gate in logits.items()
    }
    total = 0.0
    for name, of_gate in logits.items():
        rows = tokens_of[name].nonzero().flatten().tolist()
        for expert in range(3):
            f = sum(int(experts[name][i]) == expert for i in rows) / len(rows)
            p = sum(of_gate[i].softmax(0)[expert].item() for i in rows) / len(rows)
            total += 3 * f * p / 2
    assert load_balancing_loss(choices, real).item() == pytest.approx(total, abs=1e-6)


def test_load_balancing_does_not_depend_on_the_expert_capacity(tmp_path):
    config = {**SWITCH, "expert_capacity": 1 << 30}
    model = make_moe(tmp_path / "moe", "switch_transformers", **config)
    routers = [module for module in model.modules() if hasattr(module, "expert_capacity")]
    mask = torch.ones(2, 9, dtype=torch.bool)
    losses = []
    for capacity in (1 << 30, 1):
        with torch.no_grad(), recorded(model) as choices:
            for router in routers:
                router.expert_capacity = capacity
                torch.manual_seed(0)
                router(torch.randn(2, 9, 32))
        losses.append(load_balancing_loss(choices, RealTokens(mask, mask)).item())
    assert len(choices) == 3 and losses[0] == losses[1]


def test_the_load_balancing_loss_balances(moe):
    def imbalance(path):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(path),
            AutoTokenizer.from_pretrained(path),
        )
        counts = torch.zeros(3, 4)
        with torch.no_grad(), recorded(model) as choices:
            for ids in ids_of(words(1, 12), tokenizer):
                model(ids)
                counts += torch.stack(
                    [torch.bincount(c.experts.flatten(), minlength=4) for c in choices.values()]
                )
        shares = counts / counts.sum(dim=1, keepdim=True)
        return (shares - 0.25).abs().sum()

    train(
        "moe", "out", "gates", ["news.jsonl"], READING, recipe(max_steps=40, router_aux_loss=10.0)
    )
    assert imbalance("out") < 0.7 * imbalance("moe")


# Mistakes.


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_gates_without_a_gradient_are_refused(tmp_path, monkeypatch, caplog, family):
    monkeypatch.chdir(tmp_path)
    ernie = {"moe_num_experts": 4, "moe_k": 1}
    make_moe(tmp_path / "moe", family, **{**FAMILIES.get(family, ernie), "num_experts_per_tok": 1})
    write(tmp_path / "news.jsonl", words(1, 6))
    with pytest.raises(click.ClickException, match="no gradient for them"):
        train("moe", "out", "gates", ["news.jsonl"], READING, recipe())
    assert not list(tmp_path.glob("out*"))
    with caplog.at_level(logging.WARNING):
        train("moe", "out", "all", ["news.jsonl"], READING, recipe(max_steps=1))
    assert "no gradient for them" in caplog.text
    train(
        "moe",
        "balanced",
        "gates",
        ["news.jsonl"],
        READING,
        recipe(max_steps=1, router_aux_loss=0.1),
    )


def test_one_expert_whose_weight_is_its_probability_has_a_gradient(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "olmoe", **{**FAMILIES["olmoe"], "num_experts_per_tok": 1})
    write(tmp_path / "news.jsonl", words(1, 6))
    train("moe", "out", "gates", ["news.jsonl"], READING, recipe(max_steps=1))
    name = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(
        read_tensors(tmp_path / "out")[name], read_tensors(tmp_path / "moe")[name]
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "nowhere.jsonl"], "does not exist"),
        (["--data", "news.jsonl", "--weight", "law=2"], "no such source"),
        (["--data", "news.jsonl", "--weight", "news=0"], "is not above 0"),
        (["--data", "news.jsonl", "--weight", "news"], "write NAME=NUMBER"),
        (["--data", "news.jsonl"], "32 are to be held out: give more rows, or --held-out"),
        (["--data", "one.jsonl", "--held-out", "0"], "no row with a token to predict"),
        (["--data", "news.jsonl", "-o", "full"], "not empty"),
        (["--data", "news.jsonl", "--held-out", "0", "--resume"], "no checkpoint"),
        (["--data", "news.jsonl", "--lr-scheduler-type", "wrong"], "is not one of 'linear'"),
        (["--data", "news.jsonl", "--adam-beta2", "1"], "must be at least 0 and below 1"),
        (["--data", "news.jsonl", "--held-out", "0", "--eval-steps", "0"], "must be above 0"),
        (["--data", "news.jsonl", "--train", "experts"], "is not one of 'gates', 'router', "),
        (["--data", "news.jsonl", "--train", "projectors"], "this model has no projectors"),
        (["--data", "news.jsonl", "--projector-learning-rate", "1"], "no projectors to train"),
        (["--data", "news.jsonl", "--train", "all", "--device-map", "auto"], "leaves no room"),
    ],
)
def test_mistakes_are_found_before_work_starts(moe, arguments, complaint):
    write(moe / "one.jsonl", [{"text": "w1"}])
    (moe / "full").mkdir()
    (moe / "full" / "mine.txt").touch()
    if "-o" not in arguments:
        arguments = [*arguments, "-o", "out"]
    done = run(
        "mergekit-moe-ext", "train", "moe", "--train", "gates", "--quiet", *arguments, cwd=moe
    )
    assert done.returncode != 0 and complaint in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr and not list(moe.glob("out*"))


def test_a_dense_model_is_not_trained(here):
    make_model(here / "dense", 0)
    save_tokenizer(here / "dense", 96)
    write(here / "news.jsonl", words(1, 6))
    with pytest.raises(click.ClickException, match="no router"):
        train("./dense", "out", "all", ["news.jsonl"], READING, recipe())
