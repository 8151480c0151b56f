"""Time a whole merge of four models by ours, by mergekit, and by the physical limit.

    python benchmarks/merge.py            # four bfloat16 Llamas of 0.54 GB
    python benchmarks/merge.py --layers 2 # a quick look
    python benchmarks/merge.py --width 4096 --layers 11 --cold --repeats 1  # 20 GB, from the disk

A copy is what any merge has to do: read every input file once and write as many bytes as the
output has. A merge is stated in copies, of its own output's size, beyond the import of mergekit,
which takes the same time whatever the models. mergekit-moe does less than ours: it copies
everything that is not an expert from the base instead of merging it. mergekit's `linear` writes one
dense model. All write to the same disk; ours and the copies end with an fsync, mergekit's commands
do not. The inputs are in the page cache, as far as they fit there, or with `--cold` in none of it.
Runs are interleaved, and medians are shown.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ("base", "math", "code", "law")
BIN = Path(sys.executable).parent
IMPORT = "import mergekit only"
COMMANDS = {
    "moe_linear": ("mergekit-yaml", "moe_linear.yml", "out", "--quiet", "--random-seed", "0"),
    "moe_ties": ("mergekit-yaml", "moe_ties.yml", "out", "--quiet", "--random-seed", "0"),
    "linear": ("mergekit-yaml", "linear.yml", "out", "--quiet", "--random-seed", "0"),
    "mergekit-moe": ("mergekit-moe", "mergekit-moe.yml", "out", "--quiet"),
}


def make_sources(root: Path, layers: int, width: int) -> None:
    """Four random Llamas: of width 1024, 66 M parameters of embeddings and 13 M per layer."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    torch.set_default_dtype(torch.bfloat16)
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(root / name)
    torch.set_default_dtype(torch.float32)
    # mergekit-moe wants a tokenizer even for random gates
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="</s>", eos_token="</s>")
    tokenizer.save_pretrained(root / "base")


def write_configs(root: Path) -> None:
    """Writes a configuration for each tool."""
    listed = [{"model": f"./{name}"} for name in NAMES]
    ours = {"base_model": "./base", "models": listed, "dtype": "bfloat16"}
    for method, parameters in (("moe_linear", {}), ("moe_ties", {"density": 0.8})):
        text = yaml.safe_dump({"merge_method": method, "parameters": parameters, **ours})
        (root / f"{method}.yml").write_text(text)
    dense = [{"model": f"./{name}", "parameters": {"weight": 0.25}} for name in NAMES]
    linear = {"merge_method": "linear", "models": dense, "dtype": "bfloat16"}
    (root / "linear.yml").write_text(yaml.safe_dump(linear))
    experts = [{"source_model": f"./{name}", "positive_prompts": [""]} for name in NAMES]
    moe = {"base_model": "./base", "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    (root / "mergekit-moe.yml").write_text(yaml.safe_dump(moe))


# The wall seconds of a run, its peak anonymous memory and its peak resident memory, both in GB.
Run = tuple[float, float, float]


def run_measured(command: Sequence[str | Path], root: Path) -> Run:
    """The wall seconds of a command, its peak anonymous memory and its peak resident memory (with
    mapped files), both in GB.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=root, stdout=log, stderr=log
        )
        anonymous = 0
        resident = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            fields = dict(line.split(":", 1) for line in status.splitlines())
            anonymous = max(anonymous, int(fields.get("RssAnon", "0 kB").split()[0]))
            resident = max(resident, int(fields.get("VmHWM", "0 kB").split()[0]))
            time.sleep(0.02)
        if process.wait() != 0:
            log.seek(0)
            raise click.ClickException(log.read().decode()[-2000:])
    return time.perf_counter() - started, anonymous / 1e6, resident / 1e6


def copy_measured(inputs: Sequence[Path], target: Path, size: int) -> float:
    """The seconds to read every input and write `size` bytes to the disk."""
    started = time.perf_counter()
    block = bytearray(16 << 20)
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    with target.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def forget(paths: Sequence[Path]) -> None:
    """Takes files out of the page cache, so that the next reader has them from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not yet on the disk cannot be forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_turn(
    tools: Mapping[str, Sequence[str | Path]],
    root: Path,
    inputs: Sequence[Path],
    repeats: int,
    cold: bool = False,
) -> tuple[dict[str, list[Run]], dict[str, list[float]]]:
    """The runs of the tools, which take turns, and after each run of a merge the seconds of a copy
    of its output's size.

    cold: whether every run and every copy reads the inputs from the disk.
    """
    runs: dict[str, list[Run]] = {name: [] for name in tools}
    copies: dict[str, list[float]] = {name: [] for name in tools if name != IMPORT}
    for _ in range(repeats):
        for name, command in tools.items():
            if cold:
                forget(inputs)
            runs[name].append(run_measured(command, root))
            size = sum(path.stat().st_size for path in root.glob("out/*.safetensors"))
            shutil.rmtree(root / "out", ignore_errors=True)
            if name in copies:
                if cold:
                    forget(inputs)
                copies[name].append(copy_measured(inputs, root / "copy.bin", size))
    return runs, copies


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--layers", default=16, show_default=True, help="Number of layers of each source model."
)
@click.option("--width", default=1024, show_default=True, help="Hidden size of the source models.")
@click.option("--repeats", default=5, show_default=True, help="Number of runs of each tool.")
@click.option("--cold", is_flag=True, help="Read the inputs from the disk in every run.")
@click.option(
    "--only",
    type=click.Choice(list(COMMANDS)),
    multiple=True,
    help="Tool to measure; several may be given.  [default: all]",
)
def main(layers: int, width: int, repeats: int, cold: bool, only: tuple[str, ...]) -> None:
    tools: dict[str, list[str | Path]] = {}
    for name in only or COMMANDS:
        program, *arguments = COMMANDS[name]
        tools[name] = [BIN / program, *arguments]
    tools[IMPORT] = [sys.executable, "-c", "import mergekit.scripts.run_yaml"]
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-") as directory:
        root = Path(directory)
        make_sources(root, layers, width)
        write_configs(root)
        inputs = [root / name / "model.safetensors" for name in NAMES]
        bytes_read = sum(path.stat().st_size for path in inputs)
        runs, copies = in_turn(tools, root, inputs, repeats, cold)
    source = " from the disk" if cold else ""
    click.echo(
        f"read {bytes_read / 1e9:.2f} GB{source}; {repeats} runs each: medians, and the range of "
        f"seconds; torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    click.echo(report(runs, copies))


def report(
    runs: Mapping[str, Sequence[Run]],
    copies: Mapping[str, Sequence[float]],
) -> str:
    """A line per tool: the median of its seconds, of those that a copy takes and of its peak
    memory, and how many copies it takes beyond the import.
    """
    lines = [
        f"{'':22}{'seconds':>9}{'range':>15}{'a copy':>9}{'copies':>9}{'anon GB':>9}"
        f"{'resident GB':>13}"
    ]
    of_import = statistics.median(seconds for seconds, *_ in runs[IMPORT])
    for name, measured in runs.items():
        seconds, anonymous, resident = zip(*measured, strict=True)
        median = statistics.median(seconds)
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        of_copy = ""
        number = ""
        if name in copies:
            copy = statistics.median(copies[name])
            of_copy = f"{copy:.2f}"
            number = f"{(median - of_import) / copy:.2f}"
        lines.append(
            f"{name:22}{median:9.2f}{spread:>15}{of_copy:>9}{number:>9}"
            f"{statistics.median(anonymous):9.2f}{statistics.median(resident):13.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
