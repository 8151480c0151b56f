"""Damaged inputs and killed commands: nothing may end in a traceback, a wrong or a partial output.

    python benchmarks/robustness.py --mutations 10000 --kills 1000

Each trial works in a directory of its own, on tiny models, in a fork of this process (so that the
hosts are imported once), and is drawn from the seed and its number: `--only config:17` repeats one.
A trial takes about a third of a second of one core.

A mutation damages one file, runs one command on it, and is one of

    refused     one sentence, an exit status other than 0, nothing left behind
    accepted    exit status 0, and what was written is whole: a model loads with every tensor
                there and finite, a JSON file is read and has no NaN
    failed      a traceback, a death by signal, or no end in time (`--limit`)
    partial     refused, and something was left behind
    wrong       accepted, and what was written is not whole

A kill sends SIGINT, SIGTERM or SIGKILL at a random moment. Afterwards the output is absent or
whole. The exit status is 0 where nothing failed, was partial or was wrong.
"""

import copy
import gc
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import click
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import mergekit_moe_ext
import mergekit_moe_ext.cli
import peft_routing
import peft_routing.cli

# What the commands import late, so that their forks find it imported.
LATE = (
    "datasets",
    "mergekit.merge",
    "mergekit_moe_ext.methods",
    "mergekit_moe_ext.mixtures.training",
    "mergekit_moe_ext.mixtures.usage",
    "mergekit_moe_ext.upcycling.families.cohere",
    "mergekit_moe_ext.wemoe.adaptation",
    "mergekit_moe_ext.wemoe.unloading",
    "peft_routing.inspection",
    "peft_routing.training",
    "scipy.io",
    "transformers.trainer",
)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
KILL = "kill "  # before the name of a command, in the kind of a trial
TRAINING = "--max-steps 2 --held-out 2 --save-steps 1 --quiet"


@dataclass(frozen=True)
class Command:
    """A command line, the file that it reads first, and what it writes."""

    line: str
    output: str


COMMANDS = {
    "moe": Command("mergekit-moe-ext yaml moe.yml out", "out"),
    "wemoe": Command("mergekit-moe-ext yaml wemoe.yml out", "out"),
    "seq_moe": Command("mergekit-moe-ext yaml seq_moe.yml out", "out"),
    "caem": Command("mergekit-moe-ext yaml caem.yml out", "out"),
    "fast_ties": Command("mergekit-moe-ext yaml fast_ties.yml out", "out"),
    "usage": Command("mergekit-moe-ext usage mixture --data rows.jsonl -o out.json", "out.json"),
    "train": Command(
        f"mergekit-moe-ext train mixture --train gates --data rows.jsonl -o out {TRAINING}", "out"
    ),
    "adapt": Command(
        "mergekit-moe-ext adapt ensemble --data text=rows.jsonl -o out --steps 2 --quiet", "out"
    ),
    "unload": Command("mergekit-moe-ext unload constants -o out", "out"),
    "compose": Command("peft-route compose base --expert one --expert two -o out", "out"),
    "inspect": Command("peft-route inspect routed --data rows.jsonl -o out.json", "out.json"),
    "export": Command("peft-route export routed -o out", "out"),
    "train adapter": Command(
        f"peft-route train learned --data rows.jsonl -o out {TRAINING} --learning-rate 0.01", "out"
    ),
}
# What each kind of mutation damages, and by which commands it is read.
MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "yaml": [(f"{name}.yml", name) for name in ("moe", "wemoe", "seq_moe", "caem", "fast_ties")],
    "config": [
        ("one-model/config.json", "moe"),
        ("one-model/config.json", "wemoe"),
        ("base/config.json", "seq_moe"),
        ("mixture/config.json", "usage"),
        ("mixture/config.json", "train"),
        ("mixture/config.json", "caem"),
        ("ensemble/config.json", "adapt"),
        ("constants/config.json", "unload"),
        ("base/config.json", "compose"),
        ("base/config.json", "inspect"),
    ],
    "shards": [
        ("one-model/model.safetensors", "moe"),
        ("one-model/model.safetensors", "fast_ties"),
        ("mixture/model.safetensors", "usage"),
        ("mixture/model.safetensors", "train"),
        ("ensemble/model.safetensors", "adapt"),
        ("constants/model.safetensors", "unload"),
        ("base/model.safetensors", "inspect"),
    ],
    "index": [
        ("sharded/model.safetensors.index.json", "usage"),
        ("sharded/model.safetensors.index.json", "train"),
        ("sharded/model.safetensors.index.json", "caem"),
    ],
    "adapter": [
        ("one/adapter_config.json", "compose"),
        ("one/adapter_model.safetensors", "compose"),
        ("routed/adapter_config.json", "inspect"),
        ("routed/adapter_model.safetensors", "inspect"),
        ("routed/adapter_config.json", "export"),
        ("routed/adapter_model.safetensors", "export"),
        ("learned/adapter_config.json", "train adapter"),
        ("learned/adapter_model.safetensors", "train adapter"),
    ],
    "usage": [("first.usage.json", "caem")],
    "tokenizer": [
        ("mixture/tokenizer.json", "usage"),
        ("mixture/tokenizer_config.json", "train"),
        ("base/tokenizer.json", "inspect"),
    ],
    "rows": [
        ("rows.jsonl", "usage"),
        ("rows.jsonl", "train"),
        ("rows.jsonl", "adapt"),
        ("rows.jsonl", "inspect"),
        ("rows.jsonl", "train adapter"),
    ],
}
# How many of a hundred mutations are of each kind.
SHARES = {
    "yaml": 25,
    "config": 20,
    "shards": 20,
    "adapter": 12,
    "rows": 8,
    "usage": 5,
    "index": 5,
    "tokenizer": 5,
}
_seconds: dict[str, float] = {}  # that each command takes alone, once it was measured


# The inputs, whole.


def make_template(directory: Path) -> None:
    """Everything that the commands read, in one directory."""
    with inside(directory):
        base = _dense("base", 0)
        _dense("one-model", 1)
        _dense("two-model", 2)
        _write_documents()
        rows = [json.dumps({"text": _words(index)}) for index in range(12)]
        Path("rows.jsonl").write_text("\n".join(rows) + "\n")
        _must("mergekit-moe-ext yaml moe.yml mixture")
        _must("mergekit-moe-ext yaml wemoe.yml ensemble")
        _must("mergekit-moe-ext yaml constants.yml constants")
        _must("mergekit-moe-ext usage mixture --data text=rows.jsonl -o first.usage.json --quiet")
        AutoModelForCausalLM.from_pretrained("mixture").save_pretrained(
            "sharded", max_shard_size="20KB"
        )
        _tokenizer("sharded")
        for seed, name in enumerate(("one", "two")):
            _adapter(base, name, seed)
        _must("peft-route compose base --expert one --expert two -o routed")
        _must("peft-route compose base --expert one --expert two --router linear -o learned")


def _words(index: int) -> str:
    draw = random.Random(index)
    return " ".join(f"w{draw.randrange(90)}" for _ in range(48))


def _tokenizer(directory: str) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1}
    for index in range(94):
        vocabulary[f"w{index}"] = index + 2
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def _dense(directory: str, seed: int) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(directory)
    _tokenizer(directory)
    return model


def _adapter(base: Any, directory: str, seed: int) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(directory)


def _write_documents() -> None:
    sources = [{"model": "./one-model"}, {"model": "./two-model"}]
    documents = {
        "moe": {"merge_method": "moe_ties", "parameters": {"density": 0.5}},
        "wemoe": {"merge_method": "wemoe", "parameters": {"lambda": 0.3}},
        "constants": {"merge_method": "wemoe", "parameters": {"router_layers": 0}},
        "seq_moe": {"merge_method": "seq_moe", "parameters": {"routing": "perplexity"}},
        "fast_ties": {"merge_method": "fast_ties", "parameters": {"density": 0.5, "weight": 1.0}},
    }
    for name, document in documents.items():
        _write_yaml(name, {"base_model": "./base", "models": sources, **document})
    mixtures = [{"model": "./mixture"}, {"model": "./sharded"}]
    for mixture in mixtures:
        mixture["parameters"] = {"usage": "./first.usage.json"}  # type: ignore[assignment]
    parameters = {"num_experts": 2}
    _write_yaml("caem", {"merge_method": "caem", "models": mixtures, "parameters": parameters})


def _write_yaml(name: str, document: dict[str, Any]) -> None:
    Path(f"{name}.yml").write_text(yaml.safe_dump(document, sort_keys=False))


def _must(line: str) -> None:
    """Runs a command whose input is whole."""
    end = run(line, Path.cwd())
    if end.status != 0:
        raise click.ClickException(f"{line}\n{end.text}")


# Running one command in a fork.


@dataclass(frozen=True)
class End:
    """How a command ended: its exit status, minus a signal's number, or None where it hung."""

    status: int | None
    text: str


def run(
    line: str, directory: Path, kill: tuple[float, int] | None = None, limit: float = 180
) -> End:
    """Runs a command in a fork, in `directory`, for `limit` seconds at most.

    `kill` is seconds and a signal.
    """
    log = directory.parent / f"{directory.name}.log"
    log.touch()  # a child that is killed at once opens no log
    child = os.fork()
    if child == 0:
        _become(line, directory, log)
    deadline = time.monotonic() + (kill[0] if kill else limit)
    status = _wait(child, deadline)
    if status is None and kill:
        os.kill(child, kill[1])
        status = _wait(child, time.monotonic() + limit)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return End(status, log.read_text(errors="replace"))


def _wait(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _become(line: str, directory: Path, log: Path) -> None:
    """What the fork does; it never returns."""
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(directory)
        torch.set_num_threads(1)
        program, *arguments = line.split()
        package = {"mergekit-moe-ext": mergekit_moe_ext, "peft-route": peft_routing}[program]
        package.cli.main(arguments, prog_name=program)
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else 1
        if isinstance(end.code, int):
            status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


# Damage.


def damage(path: Path, draw: random.Random) -> None:
    """Changes one thing in a file, by its kind; a tenth of the times its bytes."""
    if draw.random() < 0.1:
        _damage_bytes(path, draw)
    elif path.suffix == ".safetensors":
        _damage_tensors(path, draw)
    elif path.suffix == ".jsonl":
        _damage_rows(path, draw)
    else:
        is_yaml = path.suffix == ".yml"
        tree = yaml.safe_load(path.read_text()) if is_yaml else json.loads(path.read_text())
        tree = _damage_tree(tree, draw)
        path.write_text(yaml.safe_dump(tree, sort_keys=False) if is_yaml else json.dumps(tree))


def _damage_bytes(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = draw.randrange(max(1, min(len(content), 4096)))
    kind = draw.choice(["cut", "flip", "insert", "empty", "pointer", "missing", "directory"])
    if kind == "cut":
        del content[place:]
    elif kind == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "insert":
        content[place:place] = draw.randbytes(draw.randrange(1, 9))
    elif kind == "empty":
        content.clear()
    elif kind == "pointer":
        content[:] = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\n"
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content)


def _damage_tree(tree: Any, draw: random.Random) -> Any:
    places = list(_places(tree))
    if not places:
        return _anything(draw)
    parent, key = draw.choice(places)
    kind = draw.choice(["replace", "replace", "drop", "rename", "add", "swap", "scale"])
    if kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        name = str(key)
        place = draw.randrange(len(name) + 1)
        parent[name[:place] + draw.choice("xs_ A") + name[place + 1 :]] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent[draw.choice(["extra", "auto_map", "dtype", "weight", "quantization_config"])] = (
            _anything(draw)
        )
    elif kind == "swap":
        other, other_key = draw.choice(places)
        parent[key], other[other_key] = copy.deepcopy((other[other_key], parent[key]))
    elif kind == "scale" and isinstance(parent[key], int | float):
        parent[key] = parent[key] * draw.choice([-1, 0, 2, 0.5, 1000])
    else:
        parent[key] = _anything(draw)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in children:
        yield tree, key
        if isinstance(child, dict | list):
            yield from _places(child)


def _anything(draw: random.Random) -> Any:
    values: list[Any] = [None, True, 0, -1, 3, 10**9, 0.5, math.nan, math.inf, "", "x", "../base"]
    values += [[], [1, "a"], {}, {"a": 1}, "1e-5", "base\n- x", [[0.5]], "*", -0.0, "./rows.jsonl"]
    return copy.deepcopy(draw.choice(values))


def _damage_tensors(path: Path, draw: random.Random) -> None:
    kind = draw.choice(["header", "header", "drop", "rename", "shape", "nan", "dtype", "add"])
    if kind == "header":
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = _damage_tree(json.loads(content[8 : 8 + length]), draw)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        return
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        prefix = draw.choice(["_orig_mod.", "module.", "x", "base_model.model."])
        names = sorted(tensors) if draw.random() < 0.5 else [name]
        for each in names:
            tensors[prefix + each] = tensors.pop(each)
    elif kind == "shape":
        rows = max(0, tensor.shape[0] + draw.choice([-1, 1, 7]))
        tensors[name] = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype)
    elif kind == "nan" and tensor.is_floating_point() and tensor.numel():
        value = draw.choice([math.nan, math.inf])
        tensors[name].view(-1)[draw.randrange(tensor.numel())] = value
    elif kind == "dtype":
        tensors[name] = tensor.to(draw.choice([torch.int32, torch.bool, torch.float16]))
    else:
        tensors[f"{name}.extra"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})


def _damage_rows(path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines()
    lines = lines[: draw.choice([0, 1, 2, len(lines)])]
    for _ in range(draw.randrange(3) + 1):
        place = draw.randrange(len(lines) + 1)
        value = _anything(draw)
        row = draw.choice([{"text": value}, {"other": "w1 w2"}, {}, value, {"text": "w1 " * 500}])
        text = json.dumps(row)
        lines.insert(place, draw.choice([text, text, text[: len(text) // 2], "", "\x00\udcff"]))
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


# Judgement.


def fault_of(output: Path, directory: Path) -> str:
    """A sentence on what a command wrote, if that is not whole; "" if it is."""
    if output.suffix == ".json":
        text = output.read_text()
        json.loads(text)
        return "NaN in it" if re.search(r"\b(NaN|Infinity)\b", text) else ""
    log = directory.parent / f"{directory.name}.log"
    log.touch()  # a child that is killed at once opens no log
    child = os.fork()
    if child == 0:
        verdict = "cannot be judged"
        try:
            with inside(directory):
                verdict = _fault_of_model(output)
        except BaseException as error:
            verdict = f"does not load: {type(error).__name__}: {str(error)[:200]}"
        finally:
            log.write_text(verdict)
            os._exit(0)
    os.waitpid(child, 0)
    return log.read_text()


def _fault_of_model(output: Path) -> str:
    """The same for a model, an adapter or a directory of adapters, in a process of its own."""
    for file in output.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{name} is not finite"
    if (output / "config.json").exists():
        model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        for fault, names in info.items():
            if names:
                return f"{fault}: {sorted(map(str, names))[:3]}"
        ids = torch.arange(2, 42)[None]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        return "" if logits.isfinite().all() else "its logits are not finite"
    return ""


def judge(end: End, directory: Path, before: set[str], output: str) -> tuple[str, str]:
    """A verdict on a command that read a damaged file, and what was seen."""
    last = end.text.strip().splitlines()[-1:] or [""]
    if end.status is None:
        return "failed", "no end"
    if "Traceback (most recent call last)" in end.text or end.status < 0:
        return "failed", f"status {end.status}: {last[0][:300]}"
    new = {path.name for path in directory.iterdir()} - before
    if end.status != 0:
        left = new - {".cache"}
        return ("partial", f"{sorted(left)}") if left else ("refused", last[0][:300])
    if new - {output}:
        return "partial", f"{sorted(new - {output})} beside the output"
    if output not in new:
        return "wrong", "exit status 0 and no output"
    fault = fault_of(directory / output, directory)
    return ("wrong", fault) if fault else ("accepted", "")


@dataclass(frozen=True)
class Trial:
    """A mutation of a kind of file, or a kill of a command; drawn from its number and the seed.

    limit: the seconds that a command may take before it counts as hanging.
    """

    kind: str
    number: int
    seed: int
    limit: float


@dataclass(frozen=True)
class Outcome:
    """The verdict on a trial, what was seen, and all that the command printed."""

    verdict: str
    seen: str
    text: str


def attempt(template: Path, trial: Trial) -> Outcome:
    """A trial, tried."""
    draw = random.Random(f"{trial.seed}:{trial.kind}:{trial.number}")
    with tempfile.TemporaryDirectory(dir=template.parent) as root:
        directory = Path(root) / "work"
        shutil.copytree(template, directory)
        if trial.kind.startswith(KILL):
            return _killed(trial, directory, template, draw)
        return _mutated(trial, directory, draw)


def _mutated(trial: Trial, directory: Path, draw: random.Random) -> Outcome:
    file, name = draw.choice(MUTATIONS[trial.kind])
    damage(directory / file, draw)
    before = {path.name for path in directory.iterdir()}
    command = COMMANDS[name]
    end = run(command.line, directory, limit=trial.limit)
    verdict, seen = judge(end, directory, before, command.output)
    return Outcome(verdict, f"{name}, {file}: {seen}", end.text)


def _killed(trial: Trial, directory: Path, template: Path, draw: random.Random) -> Outcome:
    name = trial.kind.removeprefix(KILL)
    command = COMMANDS[name]
    if name not in _seconds:
        _seconds[name] = _seconds_alone(command.line, template)
    signal_sent = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    moment = draw.random() * _seconds[name]
    end = run(command.line, directory, (moment, signal_sent), limit=trial.limit)
    output = directory / command.output
    seen = f"{signal_sent.name} after {moment:.2f} of {_seconds[name]:.2f} s, status {end.status}"
    if end.status is None:
        return Outcome("failed", f"no end after {seen}", end.text)
    if not output.exists():
        return Outcome("absent", seen, end.text)
    fault = fault_of(output, directory)
    if fault:
        return Outcome("partial", f"{seen}: {fault}", end.text)
    return Outcome("whole", seen, end.text)


def _seconds_alone(line: str, template: Path) -> float:
    """How long a command takes when nobody kills it."""
    with tempfile.TemporaryDirectory(dir=template.parent) as root:
        directory = Path(root) / "work"
        shutil.copytree(template, directory)
        started = time.monotonic()
        run(line, directory)
        return time.monotonic() - started


# The command.


@click.command()
@click.option("--mutations", type=int, default=1000, show_default=True, help="Number of mutations.")
@click.option("--kills", type=int, default=100, show_default=True, help="Number of kills.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all of them.")
@click.option("--jobs", type=int, default=2, show_default=True, help="Number of trials at a time.")
@click.option(
    "--limit",
    type=float,
    default=180,
    show_default=True,
    help="Seconds that a command may take before it counts as hanging.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([*SHARES, KILL.strip()]),
    help="Kind of trials, to the exclusion of others. May be repeated.",
)
@click.option("--verbose", is_flag=True, help="Print how every trial ended.")
@click.option(
    "--only",
    multiple=True,
    metavar="KIND:NUMBER",
    help="Trial to repeat, with its whole output. May be repeated.",
)
def main(
    mutations: int,
    kills: int,
    seed: int,
    jobs: int,
    limit: float,
    kinds: Sequence[str],
    verbose: bool,
    only: Sequence[str],
) -> None:
    """Try damaged inputs and kills, and print how each kind ended."""
    with tempfile.TemporaryDirectory(prefix="robustness-") as root:
        template = Path(root) / "template"
        template.mkdir()
        for variable in ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
            os.environ[variable] = str(Path(root) / variable)
        for module in LATE:
            importlib.import_module(module)
        make_template(template)
        # tqdm's own lock is one for all forks, and a killed one may have held it.
        tqdm.set_lock(threading.RLock())
        gc.freeze()  # so that a fork's collections do not copy all of this process's pages
        if only:
            for each in only:
                kind, number_of_trial = each.rsplit(":", 1)
                outcome = attempt(template, Trial(kind, int(number_of_trial), seed, limit))
                click.echo(f"{outcome.text}\n{each} {outcome.verdict}: {outcome.seen}")
            return
        trials = []
        for number, kind in enumerate(kinds_of(mutations)):
            trials.append(Trial(kind, number, seed, limit))
        names = list(COMMANDS)
        for number in range(kills):
            trials.append(Trial(KILL + names[number % len(names)], number, seed, limit))
        if kinds:
            trials = [trial for trial in trials if trial.kind.split()[0] in kinds]
        random.Random(seed).shuffle(trials)  # one that is stopped has tried all kinds
        sys.exit(report(trials, template, jobs, verbose=verbose))


def kinds_of(count: int) -> list[str]:
    kinds = []
    for kind, share in SHARES.items():
        kinds += [kind] * round(count * share / 100)
    return kinds


def report(trials: Sequence[Trial], template: Path, jobs: int, *, verbose: bool) -> int:
    """Runs all trials, prints each that went wrong and a table; returns the exit status."""
    verdicts: dict[str, Counter[str]] = {}
    bad = 0
    started = time.monotonic()
    # Each trial forks, which only a process without threads can do safely: no pool of threads.
    with get_context("fork").Pool(jobs) as pool:
        outcomes = pool.imap(partial(attempt, template), trials)
        for trial, outcome in zip(trials, outcomes, strict=True):
            verdicts.setdefault(trial.kind, Counter())[outcome.verdict] += 1
            is_bad = outcome.verdict in ("failed", "partial", "wrong")
            bad += is_bad
            if is_bad or verbose:
                line = f"{trial.kind}:{trial.number} {outcome.verdict}: {outcome.seen}"
                print(line, flush=True)
    columns = ["refused", "accepted", "absent", "whole", "failed", "partial", "wrong"]
    click.echo(f"{'kind':20}{'tried':>8}" + "".join(f"{column:>10}" for column in columns))
    for kind, counts in verdicts.items():
        cells = "".join(f"{counts[column]:10}" for column in columns)
        click.echo(f"{kind:20}{counts.total():8}{cells}")
    seconds = time.monotonic() - started
    click.echo(f"{len(trials)} trials in {seconds:.0f} s, {len(trials) / seconds:.1f} a second")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
