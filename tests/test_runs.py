"""Runs: the table of before and after, and which training an interrupted one is taken for."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from _mergekit_moe_ext_common import runs
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading, TrainingOptions
from _mergekit_moe_ext_common.runs import (
    Run,
    before_and_after,
    checkpoint_bytes,
    checkpoints_written,
    first_and_last,
)
from _mergekit_moe_ext_common.training import BarTrainer
from tests.conftest import run as run_command


def test_a_table_of_losses():
    losses = {"news": (4.56789, 3.2), "a source of a long name": (10.0, 12345.678)}
    assert before_and_after(losses).splitlines() == [
        "held-out loss              before       after",
        "news                       4.5679      3.2000",
        "a source of a long name   10.0000  12345.6780",
    ]
    assert before_and_after(losses, markdown=True).splitlines() == [
        "| held-out loss | before | after |",
        "|---|---:|---:|",
        "| news | 4.5679 | 3.2000 |",
        "| a source of a long name | 10.0000 | 12345.6780 |",
    ]


def test_a_table_of_measures():
    measures = {
        "sun": {"entropy": (1.0, 0.5), "accuracy": (0.25, 0.75)},
        "cars": {"entropy": (2.0, 1.0)},
    }
    assert before_and_after(measures).splitlines() == [
        "task  measure     before     after",
        "sun   entropy     1.0000    0.5000",
        "sun   accuracy    0.2500    0.7500",
        "cars  entropy     2.0000    1.0000",
    ]
    assert before_and_after(measures, markdown=True).splitlines()[:3] == [
        "| task | measure | before | after |",
        "|---|---|---:|---:|",
        "| sun | entropy | 1.0000 | 0.5000 |",
    ]


def test_the_first_and_the_last_measurement_count():
    history = [
        {"eval_a_loss": 3.0},
        {"loss": 1.0},
        {"eval_a_loss": 2.0, "eval_b_entropy": 1.0},
        {"eval_a_loss": 1.0},
    ]
    assert first_and_last(history, ["a", "b", "c"]) == {
        "a": {"loss": (3.0, 1.0)},
        "b": {"entropy": (1.0, 1.0)},
    }


@pytest.fixture
def run(tmp_path):
    return Run(str(tmp_path / "out"), Reading(quiet=True))


def checkpoint(run, part, step):
    directory = run.checkpoints / part / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    (directory / "trainer_state.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, directory / "trained.safetensors")
    return str(directory)


def keep(run, **settings):
    (run.checkpoints / "settings.json").write_text(
        json.dumps({**settings, "processes": 1, "fsdp": False})
    )


def test_a_run_starts_where_each_part_was_interrupted(run):
    run.begin({"seed": 1}, resume=False, parts=["one", "two"])
    assert run.starts == {"one": None, "two": None}
    checkpoint(run, "one", 9)
    last = checkpoint(run, "one", 10)
    (run.checkpoints / "one" / "checkpoint-11").mkdir()  # killed while it was written
    keep(run, seed=1)
    with pytest.raises(UserError, match="holds an unfinished training; --resume goes on with it"):
        run.begin({"seed": 1}, resume=False, parts=["one", "two"])
    with pytest.raises(UserError, match="unfinished training"):  # of a part that is not wanted now
        run.begin({"seed": 1}, resume=False, parts=["two"])
    with pytest.raises(UserError, match="had another seed: 1, not 2"):
        run.begin({"seed": 2}, resume=True, parts=["one", "two"])
    run.begin({"seed": 1}, resume=True, parts=["one", "two"])
    assert run.starts == {"one": last, "two": None}


def test_a_run_from_before_models_could_be_split_is_resumed(run):
    run.begin({}, resume=False)
    last = checkpoint(run, "", 1)
    (run.checkpoints / "settings.json").write_text(json.dumps({"seed": 1, "processes": 1}))
    run.begin({"seed": 1}, resume=True)
    assert run.starts == {"": last}


def test_nothing_to_resume_is_an_error(run):
    with pytest.raises(UserError, match="no checkpoint"):
        run.begin({}, resume=True)
    run.checkpoints.mkdir()
    keep(run)
    run.begin({}, resume=True, parts=["one"], finished=["one"])  # trained, and not yet written


@pytest.mark.parametrize(
    ("environment", "splits", "complaint"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, True, "DeepSpeed is not supported; use FSDP2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, False, "DeepSpeed .* --multi_gpu"),
        ({"ACCELERATE_USE_FSDP": "true"}, True, "version 1 .* `fsdp_version: 2`"),
        ({"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "1"}, True, "version 1 .*--fsdp_version"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, False, "FSDP is not .*--multi_gpu"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            True,
            "--gradient-checkpointing",
        ),
    ],
)
def test_what_accelerate_cannot_be_told_is_refused(
    tmp_path, monkeypatch, environment, splits, complaint
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint):
        Run(str(tmp_path / "out"), Reading(quiet=True), splits=splits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [1, 2])
def test_processes_that_were_not_started_are_missed(run, number, tmp_path):
    """`accelerate launch --cpu` starts one process; a program beside it says so."""
    script = tmp_path / "begin.py"
    script.write_text(
        "from _mergekit_moe_ext_common.options import Reading, TrainingOptions\n"
        "from _mergekit_moe_ext_common.runs import Run\n"
        "run = Run('there', Reading(quiet=True))\n"
        "run.arguments(TrainingOptions(), learning_rate=1, measure=False)\n"
        "run.begin({}, resume=False)\n"
    )
    command = ("accelerate", "launch", "--cpu", "--num_processes", str(number), str(script))
    result = run_command(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    complaint = "accelerate was asked for several processes and has started one"
    assert (complaint in result.stderr) == (number == 2)


def test_processes_that_the_environment_counts_are_missed(run, monkeypatch, caplog):
    run.begin({}, resume=False)
    assert not caplog.records
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    run.begin({}, resume=False)
    assert "OMPI_COMM_WORLD_SIZE asks for 4 processes, and there is 1" in caplog.text


def test_finishing_removes_checkpoints_and_leaves_what_others_put_there(run):
    run.begin({}, resume=False, parts=["one"])
    checkpoint(run, "one", 1)
    keep(run)
    (run.checkpoints / "notes.txt").touch()
    with run.finish() as directory:
        (directory / "model").touch()
        assert not run.out.exists() and (run.checkpoints / "one").exists()
    assert (run.out / "model").exists()
    assert [path.name for path in run.checkpoints.iterdir()] == ["notes.txt"]


def test_finishing_a_run_of_one_part_leaves_nothing(run):
    run.begin({}, resume=False)
    checkpoint(run, "", 1)
    keep(run)
    with run.finish():
        pass
    assert not run.checkpoints.exists()


class Failing:
    """A Trainer whose training of each part is the next of these functions."""

    def __init__(self, *trainings):
        self.trainings = iter(trainings)

    def train(self, resume_from_checkpoint):
        next(self.trainings)()
        raise KeyboardInterrupt


def interrupted(run, trainer, part=""):
    with pytest.raises(KeyboardInterrupt):
        run.train(trainer, part)


def test_an_interrupted_run_leaves_what_can_go_on_and_nothing_else(run):
    run.begin({}, resume=False)
    interrupted(run, Failing(lambda: None))
    assert not run.checkpoints.exists()

    run.begin({}, resume=False)
    interrupted(run, Failing(lambda: checkpoint(run, "", 1)))
    assert (run.checkpoints / "checkpoint-1").exists()


def test_a_part_that_is_interrupted_leaves_the_finished_ones(run):
    run.begin({}, resume=False, parts=["one", "two"])
    trainer = Failing(lambda: None, lambda: None)
    interrupted(run, trainer, "one")
    assert not run.checkpoints.exists()

    run.begin({}, resume=False, parts=["one", "two"])
    (run.checkpoints / "one").mkdir(parents=True)
    (run.checkpoints / "one" / "result.json").touch()
    interrupted(run, trainer, "two")
    assert (run.checkpoints / "one" / "result.json").exists()


def test_a_run_that_begins_beside_another_one_removes_nothing_of_it(run):
    run.checkpoints.mkdir()
    keep(run)
    run.begin({}, resume=False)
    interrupted(run, Failing(lambda: None))
    assert (run.checkpoints / "settings.json").exists()


def test_a_directory_without_settings_is_not_resumed(run):
    run.begin({}, resume=False)
    checkpoint(run, "", 1)
    with pytest.raises(UserError, match=r"has no settings\.json"):
        run.begin({}, resume=True)


class Count(TrainerCallback):
    """Counts the checkpoints that a Trainer writes."""

    def __init__(self):
        self.written = 0

    def on_save(self, args, state, control, **kwargs):
        self.written += 1


@pytest.mark.parametrize("save_steps", [1, 3, 4, 0.3])
@pytest.mark.parametrize(
    "length", [{"max_steps": 7}, {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2}]
)
def test_as_many_checkpoints_are_foreseen_as_the_trainer_writes(run, length, save_steps):
    recipe = TrainingOptions(
        **length, save_steps=save_steps, per_device_train_batch_size=2, eval_steps=100
    )
    arguments = run.arguments(recipe, learning_rate=0.1, measure=False)
    rows = [{"x": torch.ones(2), "labels": torch.ones(1)} for _ in range(15)]
    count = Count()
    trainer = BarTrainer(Line(), arguments, train_dataset=rows, callbacks=[count])
    trainer.train()
    assert checkpoints_written(arguments, len(rows)) == count.written > 0


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.frozen = torch.nn.Linear(2, 1).requires_grad_(False)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


def test_a_checkpoint_has_what_is_trained_and_its_two_means():
    assert checkpoint_bytes(Line()) == 3 * (2 + 1) * 4


def test_room_is_wanted_for_the_checkpoints_that_lie_there_at_once(run, monkeypatch):
    wanted = []
    monkeypatch.setattr(runs, "check_room", lambda out, *sizes: wanted.append(sizes))
    arguments = run.arguments(
        TrainingOptions(max_steps=100, save_steps=10), learning_rate=1, measure=False
    )
    run.begin({}, resume=False, parts=["one", "two"])
    run.check_room(1000, 10, arguments, rows=5)
    checkpoint(run, "one", 10)
    checkpoint(run, "one", 20)
    run.check_room(1000, 10, arguments, rows=5)
    few = run.arguments(
        TrainingOptions(max_steps=10, save_steps=500), learning_rate=1, measure=False
    )
    run.check_room(1000, 10, few, rows=5)
    # Two of each part are kept, and one more is written before the oldest goes.
    assert wanted == [(1000, 50), (1000, 30), (1000, 0)]


def test_names_stay_in_their_cells():
    table = before_and_after({"a|b*\n": (1.0, 2.0)}, markdown=True)
    assert table.splitlines()[-1] == "| a\\|b\\* | 1.0000 | 2.0000 |"
