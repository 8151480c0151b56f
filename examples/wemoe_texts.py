"""WEMoE's Table 2 in small, on texts: three fine-tunes of a real decoder, adapted to texts without
labels.

    python examples/wemoe_texts.py -o wemoe_texts.json

The base and the three experts (bible, music, code) are those of `mergeme_homogeneous.py`, trained
once and kept. They are merged by stock methods and by `wemoe` and `ewemoe`. The latter are adapted
to the held-out texts themselves, as in the paper: routers lower the entropy of the predicted next
token. One row, for comparison, is given the next tokens of other texts (`supervised`). Every row is
measured by its loss on the held-out texts, behind the first 32 tokens, which choose the
coefficients.

The paper's predictions are classes. Low entropy of a next token need not mean that the guess is
right: this shows how far the idea carries. What is done is kept in the output file, and a second
run goes on from there.
"""

import json
import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
from demo import BLOCK, DOMAINS, blocks
from mergeme_homogeneous import make_experts, run_mergekit
from real_data import domains, smollm2
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe_ext import Adaptation, Reading, UserError, adapt

PREFIX = 32  # tokens; as `routing_tokens` has it
BATCH = 1  # blocks of each task per step
LAMBDA = 0.3  # the paper's, for all methods
ROUTERS, CONSTANTS = (
    1e-4,
    1e-2,
)  # learning rates; few steps ask more of constants, and decoders less of routers


@dataclass(frozen=True)
class Row:
    """How a model is merged, and how it is adapted."""

    merge_method: str
    parameters: dict[str, Any]
    objective: str | None = None  # None: not at all
    learning_rate: float = 0.0


def _wemoe(
    method: str = "wemoe",
    objective: str = "entropy",
    learning_rate: float = ROUTERS,
    **parameters: Any,
) -> Row:
    return Row(
        method, {"lambda": LAMBDA, "init_lambda": LAMBDA, **parameters}, objective, learning_rate
    )


ROWS = {
    "weight averaging": Row("linear", {"weight": 1.0}),
    "task arithmetic": Row("task_arithmetic", {"weight": 1.0, "lambda": LAMBDA}),
    "TIES": Row("ties", {"weight": 1.0, "lambda": LAMBDA, "density": 0.2, "normalize": False}),
    "AdaMerging, task-wise": _wemoe(
        upscale="all", router_layers=0, shared_router=True, learning_rate=CONSTANTS
    ),
    "AdaMerging, layer-wise": _wemoe(upscale="all", router_layers=0, learning_rate=CONSTANTS),
    "WEMoE, 0 layers": _wemoe(router_layers=0, learning_rate=CONSTANTS),
    "WEMoE, 1 layer": _wemoe(router_layers=1),
    "WEMoE, 2 layers": _wemoe(router_layers=2),
    "WEMoE, 2 layers, at the paper's 1e-3": _wemoe(router_layers=2, learning_rate=1e-3),
    "E-WEMoE, 90 %": _wemoe("ewemoe", sparsity=0.9),
    "WEMoE, 2 layers, supervised": _wemoe(objective="supervised", router_layers=2),
}
Losses = dict[str, float]


class Results:
    """Losses by row, seed and domain, in a file that is written after each."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path, self._settings = path, settings
        self.losses: dict[str, dict[str, Losses]] = {}
        if path and path.is_file():
            kept = json.loads(path.read_text())
            if kept["settings"] != settings:
                raise UserError(
                    f"{path} is of other settings ({kept['settings']}): name another file"
                )
            self.losses = kept["losses"]

    def has(self, row: str, seed: int = 0) -> bool:
        return str(seed) in self.losses.get(row, {})

    def add(self, row: str, losses: Losses, seed: int = 0) -> None:
        self.losses.setdefault(row, {})[str(seed)] = losses
        if self._path:
            self._path.write_text(
                json.dumps({"settings": self._settings, "losses": self.losses}, indent=1) + "\n"
            )

    def text(self) -> str:
        """The mean over seeds, with the standard deviation of the mean over domains."""
        width = max(map(len, self.losses))
        lines = [" " * width + "".join(f"{name:>9}" for name in [*DOMAINS, "mean"]) + "     sd"]
        for row, by_seed in self.losses.items():
            of_seeds = list(by_seed.values())
            values = [statistics.mean(losses[name] for losses in of_seeds) for name in DOMAINS]
            means = [statistics.mean(losses.values()) for losses in of_seeds]
            line = f"{row:{width}}" + "".join(
                f"{value:9.3f}" for value in [*values, statistics.mean(means)]
            )
            lines.append(line + (f"  {statistics.stdev(means):5.3f}" if len(means) > 1 else ""))
        return "\n".join(lines)


@torch.inference_mode()
def losses_of(folder: Path, held_out: dict[str, Tensor]) -> Losses:
    """Mean loss of the tokens behind the prefix."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    losses = {}
    for name, sequences in held_out.items():
        of_each = []
        for ids in sequences:
            logits = model(ids[None], use_cache=False).logits[0, PREFIX - 1 : -1]
            of_each.append(torch.nn.functional.cross_entropy(logits.float(), ids[PREFIX:]).item())
        losses[name] = statistics.mean(of_each)
    return losses


def write_texts(folder: Path, tokenizer: Any, sequences: dict[str, Tensor]) -> list[str]:
    """A file per domain, a block per line: the `--data` of `adapt`."""
    folder.mkdir()
    named = []
    for name, ids in sequences.items():
        path = folder / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": tokenizer.decode(block)}) + "\n" for block in ids)
        )
        named.append(f"{name}={path}")
    return named


def run(
    row: Row,
    models: dict[str, Path],
    data: dict[str, list[str]],
    held_out: dict[str, Tensor],
    scratch: Path,
    steps: int,
    seed: int,
) -> Losses:
    """Merge, adapt and measure one row; `data` is by objective."""
    base, experts = models["base"], [models[name] for name in DOMAINS]
    merged, adapted = scratch / "merged", scratch / "adapted"
    method = {"merge_method": row.merge_method, "parameters": row.parameters}
    try:
        run_mergekit(method, experts, base, merged, seed)
        if row.objective is None:
            return losses_of(merged, held_out)
        adaptation = Adaptation(
            objective=row.objective,  # type: ignore[arg-type]
            steps=steps,
            learning_rate=row.learning_rate,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            seed=seed,
        )
        reading = Reading(max_length=BLOCK, quiet=True)
        inputs = data[row.objective]
        adapt(str(merged), inputs, output=str(adapted), adaptation=adaptation, reading=reading)
        return losses_of(adapted, held_out)
    finally:
        for folder in (merged, adapted):
            shutil.rmtree(folder, ignore_errors=True)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the numbers: *.json.",
)
@click.option(
    "--only", multiple=True, type=click.Choice(list(ROWS)), help="Some rows. [default: all]"
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Of the routers and the data.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=30, show_default=True, help="Of the adaptation."
)
@click.option(
    "--held-out",
    "count",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help=f"Texts of {BLOCK} tokens per domain.",
)
def main(output: Path | None, only: tuple[str, ...], seeds: int, steps: int, count: int) -> None:
    results = Results(output, {"steps": steps, "held_out": count})
    base, texts = smollm2(), domains()
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = make_experts(base, texts)
    held_out = {name: blocks(tokenizer, texts[name].held_out, count) for name in DOMAINS}
    for name, folder in models.items():
        row = name if name == "base" else f"{name} expert"
        if not results.has(row):
            results.add(row, losses_of(folder, held_out))
    wanted = [
        (row, seed)
        for seed in range(seeds)
        for row in only or ROWS
        if not results.has(row, seed) and (seed == 0 or ROWS[row].objective)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        others = {
            name: blocks(tokenizer, texts[name].train[::-1], steps * BATCH) for name in DOMAINS
        }
        data = {
            "entropy": write_texts(scratch / "entropy", tokenizer, held_out),
            "supervised": write_texts(scratch / "supervised", tokenizer, others),
        }
        for row, seed in tqdm(wanted, desc="models"):
            results.add(row, run(ROWS[row], models, data, held_out, scratch, steps, seed), seed)
    click.echo(results.text())


if __name__ == "__main__":
    main()
