"""The installed commands in forks of one process that has imported their hosts.

A command on a tiny model is nine parts import and one part work. Each process of the test run
starts one server (the standard library's) which imports torch, transformers and mergekit once; a
command is then a fork of it, with its own arguments, environment, directory, output and exit
status. What a command imports, and in which order, is tested by real processes (`test_autoload`,
`test_public_face`, `test_stock_tools`).
"""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm

IMPORTED = [
    "mergekit.scripts.multimerge",
    "mergekit.scripts.run_yaml",
    "mergekit_moe_ext.cli",
    "mergekit_moe_ext.commands",
    "peft_routing.cli",
    "peft_routing.commands",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
]
# These decide what is imported, so that a fork cannot stand for a process that has them.
OF_IMPORTS = ("PYTHONPATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
CONTEXT = get_context("forkserver")


def command_of(name: str) -> EntryPoint | None:
    """The installed command of that name, where it belongs to this package or to mergekit."""
    for command in entry_points(group="console_scripts", name=name):
        if command.module.split(".")[0] in ("mergekit", "mergekit_moe_ext", "peft_routing"):
            return command
    return None


def same_imports(environment: Mapping[str, str]) -> bool:
    return all(environment.get(name) == os.environ.get(name) for name in OF_IMPORTS)


def program_of(command: EntryPoint) -> Callable[[], object]:
    return partial(_start, command)


def program_at(arguments: list[str]) -> Callable[[], object]:
    """As Python would run it by these arguments: `-m` and a module, or a file, and its own."""
    return partial(_run_python, arguments)


def _run_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def program_from(code: str) -> Callable[[], object]:
    """As `python -c` would run it."""
    return partial(exec, code, {"__name__": "__main__"})


def run_forked(
    program: Callable[[], object],
    arguments: list[str],
    environment: Mapping[str, str],
    directory: Path,
    timeout: float,
) -> subprocess.CompletedProcess:
    """What `subprocess.run` gives for the program, with its output as text. The first of the
    arguments is its name.
    """
    CONTEXT.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as written:
        output = Path(written, "stdout")
        errors = Path(written, "stderr")
        process = CONTEXT.Process(
            target=_run,
            args=(program, arguments, dict(environment), directory, output, errors),
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(
            arguments, process.exitcode, output.read_text(), errors.read_text()
        )


def run_group(
    program: Callable[[], object],
    arguments: list[str],
    environment: Mapping[str, str],
    directory: Path,
    timeout: float,
    count: int,
) -> subprocess.CompletedProcess:
    """What `torchrun` gives for so many processes of the program: their output one after the other,
    and the exit status of one that failed. The others are ended then.
    """
    CONTEXT.set_forkserver_preload(IMPORTED)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost"}
    with tempfile.TemporaryDirectory() as written:
        outputs = [Path(written, f"stdout-{rank}") for rank in range(count)]
        errors = [Path(written, f"stderr-{rank}") for rank in range(count)]
        group = []
        for rank in range(count):
            own = {**shared, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
            own_environment = {**environment, **{name: str(value) for name, value in own.items()}}
            target = (program, arguments, own_environment, directory, outputs[rank], errors[rank])
            group.append(CONTEXT.Process(target=_run, args=target))
        for process in group:
            process.start()
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in group):
            has_failed = any(process.exitcode for process in group)
            if has_failed or time.monotonic() > end:
                for process in group:
                    process.kill()
            wait([process.sentinel for process in group if process.is_alive()], timeout=1)
        # One that was killed here has a negative status.
        statuses = sorted((process.exitcode or 0 for process in group), reverse=True)
        return subprocess.CompletedProcess(
            arguments,
            statuses[0] or statuses[-1],
            "".join(path.read_text() for path in outputs),
            "".join(path.read_text() for path in errors),
        )


def _start(command: EntryPoint) -> object:
    return command.load()()


def _run(
    program: Callable[[], object],
    arguments: list[str],
    environment: dict[str, str],
    directory: Path,
    output: Path,
    errors: Path,
) -> None:
    """Be that program until its exit."""
    for path, number in ((output, 1), (errors, 2)):
        opened = os.open(path, os.O_CREAT | os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = arguments
    # tqdm's own lock is one for all forks, and a killed one may have held it.
    tqdm.set_lock(threading.RLock())
    sys.exit(program())
