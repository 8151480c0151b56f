"""Mixed batches of several tasks (CAEM-MoE 4.3): against plain loops, interrupted and on two
processes.
"""

import json
import zlib

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from _mergekit_moe_ext_common.data import Source, tokenise
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.mixtures import trainers
from mergekit_moe_ext.mixtures.per_task import TaskSampler
from mergekit_moe_ext.mixtures.tasks import read_tasks
from mergekit_moe_ext.mixtures.training import train
from mergekit_moe_ext.recipes import Recipe
from tests.conftest import ON_CPU, TWO_PROCESSES, read_tensors, run
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, SWITCH, make_moe, words, write

READING = Reading(max_length=24, quiet=True)
COLUMNS = ("input", "target")
TASKS = ["news.jsonl", "law.jsonl"]


def recipe(**changes):
    settings = {
        "held_out": 0,
        "mixing": "per-task",
        "per_device_train_batch_size": 3,
        "learning_rate": 0.01,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "completions_only": True,
    }
    return Recipe(**{**settings, **changes})


@pytest.fixture
def moe(tmp_path, monkeypatch):
    """A working directory with ./moe (a Mixtral), and two tasks of 6 and 8 rows."""
    monkeypatch.chdir(tmp_path)
    make_moe(tmp_path / "moe", "mixtral", **FAMILIES["mixtral"])
    write(tmp_path / "news.jsonl", words(1, 6, COLUMNS))
    write(tmp_path / "law.jsonl", words(2, 8, COLUMNS))
    return tmp_path


def test_every_step_has_rows_of_every_task_and_epochs_go_on_where_the_last_one_ended():
    sampler = TaskSampler([4, 10], samples=4, rows_per_step=2, seed=1)
    epochs = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 8
    for rows in epochs:
        is_second = [row >= 4 for row in rows]
        assert is_second == [False, False, True, True] * 2
        assert sorted(row for row in rows if row < 4) == [0, 1, 2, 3]
    second = [row for rows in epochs for row in rows if row >= 4]
    # 20 rows of a task of 10: each once, and then each once more in another order.
    assert sorted(second[:10]) == sorted(second[10:]) == list(range(4, 14))
    assert second[:10] != second[10:]
    sampler.set_epoch(3)
    assert list(sampler) == epochs[3]
    assert list(TaskSampler([4, 10], samples=4, rows_per_step=2, seed=2)) != epochs[0]


def test_samples_are_rounded_up_to_whole_steps():
    assert len(TaskSampler([5, 9], samples=5, rows_per_step=3, seed=0)) == 2 * 6
    assert len(TaskSampler([2, 2], samples=1, rows_per_step=5, seed=0)) == 2 * 5


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_gradients_are_the_mean_over_tasks_of_their_mean_losses(tmp_path, monkeypatch, family):
    """One step on two tasks of 6 and 8 rows, whole, in batches of 3; the second is read on from its
    first six rows in an epoch that the smaller one decides.
    """
    monkeypatch.chdir(tmp_path)
    is_decoder = family == "mixtral"
    without_noise = {**SWITCH, "dropout_rate": 0.0, "router_jitter_noise": 0.0}
    make_moe(tmp_path / "moe", family, **(FAMILIES[family] if is_decoder else without_noise))
    rows = {"news": words(1, 6, COLUMNS), "law": words(2, 8, COLUMNS)}
    for name, of_task in rows.items():
        write(tmp_path / f"{name}.jsonl", of_task)
    steps = []
    stock = trainers.MoeTrainer.get_batch_samples

    def recording(self, *args, **kwargs):
        batches, items = stock(self, *args, **kwargs)
        steps.append([rows_of(batch) for batch in batches])
        return batches, items

    gradients = {}
    stock_step = trainers.MoeTrainer.training_step

    def with_gradients(self, model, *args):
        loss = stock_step(self, model, *args)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        return loss

    monkeypatch.setattr(trainers.MoeTrainer, "get_batch_samples", recording)
    monkeypatch.setattr(trainers.MoeTrainer, "training_step", with_gradients)
    settings = recipe(gradient_accumulation_steps=2, completions_only=is_decoder)
    train("moe", "out", "all", TASKS, READING, settings)
    (batches,) = steps
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]

    # A plain loop over unpadded rows, those that the step had.
    factory = AutoModelForCausalLM if is_decoder else AutoModelForSeq2SeqLM
    model, tokenizer = factory.from_pretrained("moe"), AutoTokenizer.from_pretrained("moe")
    for task, name in enumerate(rows):
        labels_of = dict(encoded(row, tokenizer, is_decoder) for row in rows[name])
        total, tokens = 0.0, 0
        for ids in [*batches[2 * task], *batches[2 * task + 1]]:
            labels = labels_of[ids]
            number = sum(label != -100 for label in labels[int(is_decoder) :])
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            total = total + loss * number
            tokens += number
        (total / tokens / 2).backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-6), name
    assert len(gradients) > 5


def rows_of(batch):
    """The token ids of a batch's rows, without padding."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [
        tuple(ids[:length])
        for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)
    ]


def encoded(row, tokenizer, is_decoder):
    """The token ids of a row, and its labels."""
    if is_decoder:
        prompt = tokenizer(row["input"])["input_ids"][:24]
        answer = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, tokenizer.eos_token_id][:24]
        return tuple(ids), [-100] * len(prompt) + ids[len(prompt) :]
    ids = tokenizer(row["input"], truncation=True, max_length=24)["input_ids"]
    return tuple(ids), tokenizer(row["target"], truncation=True, max_length=24)["input_ids"]


def test_interrupted_in_the_middle_of_an_epoch_and_resumed_equals_uninterrupted(moe):
    """Two steps an epoch, three epochs, a checkpoint in the middle of the second."""
    settings = recipe(num_train_epochs=3, save_steps=3, adam_beta2=0.98, adam_epsilon=1e-16)
    train("moe", "whole", "all", TASKS, READING, settings)
    stock = trainers.MoeTrainer.training_step
    calls = []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 8:  # in the middle of step 4
            raise KeyboardInterrupt
        return stock(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainers.MoeTrainer, "training_step", interrupted)
        train("moe", "out", "all", TASKS, READING, settings)
    with pytest.raises(UserError, match="had another mixing"):
        shuffled = recipe(**{**vars(settings), "mixing": "shuffled"})
        train("moe", "out", "all", TASKS, READING, shuffled, resume=True)
    train("moe", "out", "all", TASKS, READING, settings, resume=True)
    expected, got = read_tensors(moe / "whole"), read_tensors(moe / "out")
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    assert expected.keys() == got.keys()


def checksum(answers, references):
    """A metric of one's own that tells all answers, and their order."""
    return zlib.crc32("\n".join([*answers, *references]).encode()) / 2**32


def test_two_processes_train_on_the_batches_of_one_and_give_its_answers(moe):
    tasks = {}
    # A number of rows that two processes do not share evenly, and one that leaves one without any.
    for name, rows in (("news", 5), ("law", 1)):
        write(moe / f"{name}-validation.jsonl", words(rows, rows, COLUMNS))
        tasks[name] = {
            "data": f"{name}.jsonl",
            "eval_data": f"{name}-validation.jsonl",
            "prompt": "{input}",
            "metric": f"{__name__}:checksum",
            "max_new_tokens": 4,
        }
    (moe / "tasks.yml").write_text(yaml.safe_dump(tasks, sort_keys=False))
    arguments = ["train", "moe", "--train", "all", "--tasks", "tasks.yml", "--mixing", "per-task"]
    arguments += ["--held-out", "0", "--per-device-eval-batch-size", "2", "--quiet"]
    arguments += ["--max-length", "24", "--learning-rate", "0.001", "--num-train-epochs", "2"]
    of_two = [*arguments, "--per-device-train-batch-size", "2", "-o", "two"]
    two = run(*TWO_PROCESSES, "-m", "mergekit_moe_ext", *of_two, cwd=moe, env=ON_CPU)
    assert two.returncode == 0, two.stderr
    train(
        "moe",
        "one",
        "all",
        [],
        READING,
        recipe(
            per_device_train_batch_size=4,
            learning_rate=0.001,
            num_train_epochs=2,
            lr_scheduler_type="linear",
        ),
        tasks=read_tasks(moe / "tasks.yml"),
    )
    first, second, before = (read_tensors(moe / name) for name in ("one", "two", "moe"))
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 1e-5, name
        assert not torch.equal(tensor, before[name]), name
    scores = scores_of(moe / "one")
    assert scores_of(moe / "two") == scores
    assert len(scores) == 6  # of two tasks, before the training and after each of two epochs


def scores_of(model):
    """What was measured of the answers, in order."""
    history = json.loads((model / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history for key in entry if key.endswith("_score")]


def test_inputs_and_targets_are_cut_one_by_one(moe):
    tokenizer = AutoTokenizer.from_pretrained("moe")
    rows = Dataset.from_list([{"input": "a b c d e f", "target": "g h i j"}])
    ids = tokenizer("a b c d e f")["input_ids"]
    answer = tokenizer("g h i j", add_special_tokens=False)["input_ids"]
    options = {"max_length": 4, "max_target_length": 2}
    (row,) = tokenise(
        rows, Source("task", "task.jsonl"), tokenizer, completions_only=True, **options
    )
    assert (
        row["input_ids"][:4] == tokenizer("a b c d e f", truncation=True, max_length=4)["input_ids"]
    )
    assert row["input_ids"][4:] == answer[:2] and row["labels"] == [-100] * 4 + answer[:2]
    assert len(ids) > 4
    (pair,) = tokenise(
        rows, Source("task", "task.jsonl"), tokenizer, encoder_decoder=True, **options
    )
    assert len(pair["input_ids"]) == 4 and len(pair["labels"]) == 2
    texts = Dataset.from_list([{"text": "a b c"}])
    with pytest.raises(UserError, match="for inputs with their targets"):
        tokenise(texts, Source("task", "task.jsonl"), tokenizer, **options)


@pytest.mark.parametrize(
    "settings, weights, data, complaint",
    [
        ({"mixing": "shuffled", "samples_per_task": 4}, {}, TASKS, "--samples-per-task is for"),
        ({}, {"news": 2.0}, TASKS, "--weight is for shuffled rows"),
        ({}, {}, TASKS[:1], "for several sources"),
    ],
)
def test_options_of_the_other_way_of_mixing_are_refused(moe, settings, weights, data, complaint):
    with pytest.raises(UserError, match=complaint):
        train("moe", "out", "all", data, READING, recipe(**settings), weights=weights)
    assert not list(moe.glob("out*"))
