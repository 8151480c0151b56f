"""Repeat WEMoE's Table 2 at small scale, on texts: fine-tunes of a decoder, merged and adapted.

    python examples/wemoe_texts.py -o wemoe_texts.json

The base and the three experts (bible, music, code) are those of `mergeme_homogeneous.py`, trained
once and kept. They are merged by stock methods and by `wemoe` and `ewemoe`. The latter are adapted
to the held-out texts themselves, as in the paper, without labels: training lowers the entropy of
the predicted next token. For comparison, one row learns from the next tokens of other texts
(`supervised`).

The table that is printed has the loss of every row on the held-out texts, after the first 32
tokens, which choose the coefficients. Losses are written to the output file as they are measured,
and a second run goes on from there.

The paper's predictions are classes. Low entropy of a next token need not mean that the guess is
right: this shows how far the idea carries.
"""

import itertools
import json
import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
from demo import BLOCK, DOMAINS, blocks, write_blocks
from mergeme_homogeneous import EXPERT, make_experts, run_mergekit
from real_data import domains, smollm2
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe_ext import Adaptation, Reading, UserError, adapt

PREFIX = 32  # tokens; as `routing_tokens` has it
BATCH = 1  # blocks of each task per step
LAMBDA = 0.3  # the paper's, for all methods
# learning rates; few steps ask more of constants, and decoders less of routers
ROUTERS = 1e-4
CONSTANTS = 1e-2


@dataclass(frozen=True)
class Row:
    """A row of the table: how its model is merged, and how it is adapted."""

    merge_method: str
    parameters: dict[str, Any]
    objective: str | None = None  # None: it is not adapted
    learning_rate: float = 0.0


def _wemoe(
    method: str = "wemoe",
    objective: str = "entropy",
    learning_rate: float = ROUTERS,
    **parameters: Any,
) -> Row:
    """A row that is adapted, with the paper's lambda."""
    parameters = {"lambda": LAMBDA, "init_lambda": LAMBDA, **parameters}
    return Row(method, parameters, objective, learning_rate)


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
    """The losses by row, seed and domain, in a file that is written after each."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path = path
        self._settings = settings
        self.losses: dict[str, dict[str, Losses]] = {}
        if path and path.is_file():
            content = json.loads(path.read_text())
            if content["settings"] != settings:
                raise UserError(
                    f"{path} is of other settings ({content['settings']}): name another file"
                )
            self.losses = content["losses"]

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
            means = [statistics.mean(losses.values()) for losses in of_seeds]
            line = f"{row:{width}}"
            for name in DOMAINS:
                line += f"{statistics.mean(losses[name] for losses in of_seeds):9.3f}"
            line += f"{statistics.mean(means):9.3f}"
            if len(means) > 1:
                line += f"  {statistics.stdev(means):5.3f}"
            lines.append(line)
        return "\n".join(lines)


@torch.inference_mode()
def losses_of(folder: Path, held_out: dict[str, Tensor]) -> Losses:
    """The mean loss of the tokens after the prefix, by domain."""
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
    """Writes a file per domain, a block per line, and returns the `--data` of `adapt`."""
    folder.mkdir()
    named = []
    for name, ids in sequences.items():
        path = folder / f"{name}.jsonl"
        write_blocks(path, tokenizer, ids)
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
    """Merges, adapts and measures one row; `data` is by objective."""
    experts = [models[name] for name in DOMAINS]
    merged = scratch / "merged"
    adapted = scratch / "adapted"
    method = {"merge_method": row.merge_method, "parameters": row.parameters}
    try:
        run_mergekit(method, experts, models["base"], merged, seed)
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
    help="File for the losses: *.json; a run goes on where an earlier one ended.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(ROWS)),
    help="Row to measure; several may be given. [default: all]",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of seeds of the routers and the data.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Number of steps of each adaptation.",
)
@click.option(
    "--expert-steps",
    type=click.IntRange(min=1),
    default=EXPERT.steps,
    show_default=True,
    help="Number of steps of each fine-tune.",
)
@click.option(
    "--held-out",
    "count",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help=f"Number of held-out texts of {BLOCK} tokens per domain.",
)
def main(
    output: Path | None,
    only: tuple[str, ...],
    seeds: int,
    steps: int,
    expert_steps: int,
    count: int,
) -> None:
    settings = {"steps": steps, "expert_steps": expert_steps, "held_out": count}
    results = Results(output, settings)
    base = smollm2()
    texts = domains()
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = make_experts(base, texts, replace(EXPERT, steps=expert_steps))
    held_out = {name: blocks(tokenizer, texts[name].held_out, count) for name in DOMAINS}
    for name, folder in models.items():
        row = name if name == "base" else f"{name} expert"
        if not results.has(row):
            results.add(row, losses_of(folder, held_out))
    runs = []
    for seed, row in itertools.product(range(seeds), only or ROWS):
        # stock merges draw nothing, so one seed is enough
        repeated = seed > 0 and ROWS[row].objective is None
        if not repeated and not results.has(row, seed):
            runs.append((row, seed))
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        others = {
            name: blocks(tokenizer, texts[name].train[::-1], steps * BATCH) for name in DOMAINS
        }
        data = {
            "entropy": write_texts(scratch / "entropy", tokenizer, held_out),
            "supervised": write_texts(scratch / "supervised", tokenizer, others),
        }
        for row, seed in tqdm(runs, desc="models"):
            losses = run(ROWS[row], models, data, held_out, scratch, steps, seed)
            results.add(row, losses, seed)
    click.echo(results.text())


if __name__ == "__main__":
    main()
