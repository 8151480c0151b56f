"""The output appears whole or not at all, whatever happens, and running again succeeds."""

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import click
import pytest
import yaml

from _mergekit_moe_ext_common.staging import check_room, staged
from tests.conftest import BIN, document, merge, same_files
from tests.forking import program_from, run_forked

# In a process of its own: raise a signal when a function is called for the n-th time.
KILLER = """
import importlib, os, signal, sys
import mergekit.merge
# It is ignored where the tests run in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)
where, nth, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module, _, path = where.partition(":")
*owners, name = path.split(".")
owner = importlib.import_module(module)
for part in owners:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0
def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == nth:
        os.kill(os.getpid(), number)
    return original(*args, **kwargs)
setattr(owner, name, killing)
sys.argv = ["mergekit-yaml", "config.yml", "out", "--quiet", "--out-shard-size", "20000"]
from mergekit.scripts.run_yaml import main
main()
"""
STAGES = {
    "planning": ("mergekit_moe_ext.upcycling.method:read_headers", 1),
    "staged": ("mergekit.plan:MergePlanner.plan_to_disk", 1),
    "first tensor": ("mergekit_moe_ext.merging.writer:BehindWriter.save_tensor", 1),
    "middle shard": ("mergekit_moe_ext.merging.writer:_Shard._close", 3),
    "naming shards": ("mergekit.io.tensor_writer:TensorWriter.finalize", 1),
    "config": ("transformers:PretrainedConfig.save_pretrained", 1),
    "card": ("pathlib:Path.write_text", 1),
    "flush": ("_mergekit_moe_ext_common.staging:_flush_to_disk", 1),
    "rename": ("pathlib:Path.rename", 1),
}


@pytest.fixture
def ready(here):
    (here / "config.yml").write_text(
        yaml.safe_dump(document("moe_ties", parameters={"density": 0.8}))
    )
    return here


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sources)
        out = tmp_path_factory.mktemp("whole") / "out"
        return merge(
            document("moe_ties", parameters={"density": 0.8}), str(out), out_shard_size=20_000
        )


def hidden(directory):
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def runs_again(here, whole):
    merge(document("moe_ties", parameters={"density": 0.8}), out_shard_size=20_000)
    names = {path.name for path in (here / "out").iterdir()}
    assert names == {path.name for path in whole.iterdir()}
    for path in whole.glob("*.safetensors"):
        assert (here / "out" / path.name).read_bytes() == path.read_bytes()
    assert hidden(here) == []


def merge_until(where: str, nth: int, number: signal.Signals) -> subprocess.CompletedProcess:
    """A merge in a process of its own that gets a signal when a function is called for the n-th
    time.
    """
    arguments = ["-c", where, str(nth), str(int(number))]
    return run_forked(program_from(KILLER), arguments, os.environ, Path.cwd(), 120)


@pytest.mark.parametrize("stage", STAGES)
def test_killed(ready, whole, stage):
    process = merge_until(*STAGES[stage], signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (ready / "out").exists()
    runs_again(ready, whole)


@pytest.mark.parametrize("stage", ["first tensor", "flush"])
def test_ctrl_c(ready, whole, stage):
    process = merge_until(*STAGES[stage], signal.SIGINT)
    assert process.returncode not in (0, -signal.SIGKILL)
    assert not (ready / "out").exists() and hidden(ready) == []
    runs_again(ready, whole)


def test_killed_after_the_rename_leaves_a_whole_output(ready, whole):
    process = merge_until("shutil:rmtree", 1, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in (ready / "out").iterdir()} == {
        path.name for path in whole.iterdir()
    }
    assert all(
        (ready / "out" / p.name).read_bytes() == p.read_bytes() for p in whole.glob("*.safetensors")
    )


@pytest.mark.slow
def test_killed_at_random_moments(ready, whole):
    started = time.monotonic()
    command = [
        str(BIN / "mergekit-yaml"),
        "config.yml",
        "out",
        "--quiet",
        "--out-shard-size",
        "20000",
    ]
    subprocess.run(command, check=True, capture_output=True)
    duration = time.monotonic() - started
    for moment in [random.uniform(0.5, 1.0) * duration for _ in range(3)]:
        if (ready / "out").exists():
            (ready / "out").rename(ready / f"out-{moment}")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        process.kill()
        process.wait()
        if (ready / "out").exists():
            assert {path.name for path in (ready / "out").iterdir()} == {
                path.name for path in whole.iterdir()
            }
        else:
            runs_again(ready, whole)


def test_no_room_on_the_disk(ready, whole):
    process = subprocess.run(
        [str(BIN / "mergekit-yaml"), "config.yml", "out", "--quiet"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert process.returncode == 1
    assert "Error: no room to write" in process.stderr and "Traceback" not in process.stderr
    assert not (ready / "out").exists() and hidden(ready) == []
    runs_again(ready, whole)


def test_too_little_room_is_found_before_the_merge(tmp_path):
    with pytest.raises(click.ClickException, match=r"takes 1000000000\.0 GB"):
        check_room(tmp_path / "not" / "yet", 10**18)


def test_an_output_that_is_filled_during_the_merge_is_left_alone(tmp_path):
    with (
        pytest.raises(click.ClickException, match="written to by something else"),
        staged(tmp_path / "out"),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine").exists()


def test_names_that_look_like_patterns_are_names(tmp_path):
    with staged(tmp_path / "modela"), staged(tmp_path / "model[ab]"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"modela", "model[ab]"}


def test_two_merges_to_one_output(tmp_path):
    with (
        staged(tmp_path / "out"),
        pytest.raises(click.ClickException, match="another command is writing"),
    ):
        staged(tmp_path / "out").__enter__()
    assert (tmp_path / "out").is_dir()


def test_a_failure_leaves_nothing_and_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out") as directory:
        (directory / "half").write_text("x")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_second_merge_in_one_process_reads_its_sources_anew(here):
    import shutil

    shutil.copytree(here / "math", here / "mine")
    config = document(models=["base", "mine"])
    first = merge(config, "first")
    shutil.rmtree(here / "mine")
    shutil.copytree(here / "code", here / "mine")
    second = merge(config, "second")
    assert not same_files(first, second)
    assert same_files(second, merge(config, "third"))
