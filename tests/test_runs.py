"""Runs: the table of before and after, and which training an interrupted one is taken for."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.runs import Run, before_and_after, first_and_last


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
    (run.checkpoints / "settings.json").write_text(json.dumps({**settings, "processes": 1}))


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


def test_nothing_to_resume_is_an_error(run):
    with pytest.raises(UserError, match="no checkpoint"):
        run.begin({}, resume=True)
    run.checkpoints.mkdir()
    keep(run)
    run.begin({}, resume=True, parts=["one"], finished=["one"])  # trained, and not yet written


@pytest.mark.parametrize("host", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_model_that_would_be_split_is_refused(run, host):
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False)
    setattr(trainer, host, True)
    with pytest.raises(UserError, match="FSDP and DeepSpeed are not supported"):
        run.train(trainer)
    assert not run.checkpoints.exists()


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
