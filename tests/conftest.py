"""Tiny models, and the real commands to run on them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import mergekit_moe_ext  # noqa: F401  (registers the methods)
from tests.forking import (
    command_of,
    program_at,
    program_of,
    run_forked,
    run_group,
    same_imports,
)

# These hold for every process that a test starts, too.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the tests themselves run in parallel
torch.set_num_threads(1)
BIN = Path(sys.executable).parent
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
SPECIAL_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}  # some families' defaults are beyond 96


def processes(number: int) -> tuple[str, ...]:
    """What starts so many: `accelerate launch` starts one only where there is no GPU."""
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    return ("torchrun", "--nproc-per-node", str(number), *meeting)


TWO_PROCESSES = processes(2)
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true"}
# As `accelerate launch --use_fsdp --fsdp_version 2` sets them.
SPLIT_ON_CPU = {**ON_CPU, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# A program that runs another module's command line until a step of its training.
INTERRUPTED = """
import runpy, sys
from _mergekit_moe_ext_common.training import BarTrainer

module, last = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
stock, steps = BarTrainer.training_step, []

def interrupted(self, *arguments, **keywords):
    steps.append(len(steps))
    if len(steps) == last:
        raise KeyboardInterrupt
    return stock(self, *arguments, **keywords)

BarTrainer.training_step = interrupted
runpy.run_module(module, run_name="__main__")
"""
NAMES = ("base", "math", "code", "law")


def every_other_layer(model: Any, device: torch.device) -> dict[str, Any]:
    """A device map by which only every other layer, from the second, lies on a device for good.

    The rest lies in main memory. `torch.device("cpu")` stands for a GPU: only the text `cpu` means
    main memory to accelerate.
    """
    layers: list[str] = []
    places: dict[str, Any] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules:
            layers.append(f"{name}.")
            places[name] = device if len(layers) % 2 == 0 else "cpu"
        elif not name.startswith(tuple(layers)) and list(module.parameters(recurse=False)):
            places[name] = "cpu"
    return places


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="Device of tests/gpu: cuda, or cpu to try them without one.")


def make_model(
    path: Path, seed: int, *, family: str = "llama", dtype: Any = torch.float32, **config: Any
) -> Path:
    """A random dense model; fine-tunes are the base (seed 0) plus noise of their own."""
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(family, **{**TINY, **SPECIAL_TOKENS, **config}))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if seed:
                parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    model.to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base, math, code and law: tiny Llamas, the last three fine-tunes of the
    first.
    """
    root = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(NAMES):
        make_model(root / name, seed)
    return root


@pytest.fixture
def here(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory from which the sources are `./base`, `./math`, `./code` and
    `./law`.
    """
    for name in NAMES:
        (tmp_path / name).symlink_to(sources / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory `examples/`, whose modules can be imported.

    They are imported anew for each test: one makes their sizes tiny, and another may hold a module
    that has imported them before. Those that register something stay, as they can do it only once.
    """
    folder = Path(__file__).parents[1] / "examples"
    names = {path.stem for path in folder.iterdir() if not path.stem.startswith("extending_")}

    def forget() -> None:
        for name in list(sys.modules):
            if name.partition(".")[0] in names:
                del sys.modules[name]

    monkeypatch.syspath_prepend(str(folder))
    forget()
    yield folder
    forget()


def document(
    method: str = "moe_linear", models: Any = NAMES, base: str | None = "./base", **keys: Any
) -> dict:
    """A merge configuration; `parameters` and further keys as given."""
    listed = [{"model": f"./{name}"} if isinstance(name, str) else name for name in models]
    return {
        "merge_method": method,
        **({"base_model": base} if base else {}),
        "models": listed,
        **keys,
    }


def merge(config: dict, out: str = "out", **options: Any) -> Path:
    """Run a merge in this process, as `mergekit-yaml` would."""
    from mergekit.merge import run_merge

    source = yaml.safe_dump(config, sort_keys=False)
    parsed = MergeConfiguration.model_validate(yaml.safe_load(source))
    merge_options = MergeOptions(**{"quiet": True, **options})
    threads = torch.get_num_threads()
    torch.set_num_threads(merge_options.num_threads or threads)
    try:
        run_merge(parsed, out, merge_options, config_source=source)
    finally:
        torch.set_num_threads(threads)
    return Path(out)


def run(*command: str | Path, **keywords: Any) -> subprocess.CompletedProcess:
    """Run a command; one that is installed with the package is found by its name, and runs in a
    fork, and what `processes` starts in as many (`tests/forking.py`).
    """
    arguments = [str(argument) for argument in command]
    environment = keywords.get("env", os.environ)
    directory = Path(keywords.get("cwd", Path.cwd()))
    installed = command_of(arguments[0])
    if installed and same_imports(environment):
        return run_forked(program_of(installed), arguments, environment, directory, 300)
    if arguments[0] == "torchrun" and same_imports(environment):
        count = int(arguments[2])
        python = arguments[len(processes(count)) :]
        own = python[1:] if python[0] == "-m" else python
        return run_group(program_at(python), own, environment, directory, 300, count)
    return start(*command, **keywords)


def start(*command: str | Path, **keywords: Any) -> subprocess.CompletedProcess:
    """Run a command in a process that imports everything itself."""
    program = BIN / str(command[0])
    return subprocess.run(
        [str(program if program.exists() else command[0]), *map(str, command[1:])],
        capture_output=True,
        text=True,
        timeout=300,
        **keywords,
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = {}
    for shard in sorted(path.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    return names == sorted(path.name for path in second.iterdir()) and all(
        (first / name).read_bytes() == (second / name).read_bytes()
        for name in names
        if name != "README.md"
    )
