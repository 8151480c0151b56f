"""Repeat MergeME's Table 1 with more training: a small base, 144 steps, three seeds.

    python examples/mergeme_small.py --output small/

This is the experiment of `mergeme_homogeneous.py` with a Llama of one million parameters that is
pretrained here, since two cores cannot train SmolLM2's mixtures for long. Its texts are the same:
bible, music (ABC notation) and code (Python).

Base, experts and mixtures read different documents, in amounts that stand to each other about as
the paper's do (250, 100 and 40 billion tokens). Sparse upcycling has the paper's budget: what the
experts and a mixture have read together. The learning rate of each row is the best of three on
validation texts, which no model is trained or measured on; then each row is trained with three
seeds and measured on held-out texts.

What is measured is written to `results.json` at once, so the same command goes on after an
interruption. The table and the figures are those of `mergeme_homogeneous.py`.
"""

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
from demo import BLOCK, DOMAINS, blocks, write_blocks
from demo import Recipe as ExpertRecipe
from mergeme_homogeneous import (
    ROWS,
    SHARED,
    Results,
    Run,
    dense_losses,
    make_experts,
    merge,
    run,
    write_report,
)
from real_data import Domain, domains
from small_models import make_small_base
from tqdm import tqdm
from transformers import AutoTokenizer

from mergekit_moe_ext import Recipe

# By the name of a share, what part of the texts it has. Nothing is in two shares.
SHARES = {"base": 0.35, "experts": 0.45, "mixtures": 0.15, "validation": 0.05}
RATES = {
    "Router fine-tuning": (1e-3, 1e-2, 1e-1),
    **dict.fromkeys(SHARED, (1e-4, 3e-4, 1e-3)),
    "MoE upcycling": (3e-4, 1e-3, 3e-3),  # which is trained for longer
}


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    steps: of a mixture.
    batch: blocks per step.
    validation, held_out: blocks per domain.
    measured: how often a mixture is measured while it is trained.
    """

    base: ExpertRecipe
    expert: ExpertRecipe
    steps: int
    batch: int
    validation: int
    held_out: int
    measured: int

    @property
    def upcycling_steps(self) -> int:
        """The steps that read what all experts and a mixture have read."""
        of_experts = len(DOMAINS) * self.expert.steps * self.expert.batch
        return of_experts // self.batch + self.steps


SCALES = {
    "small": Scale(
        base=ExpertRecipe(steps=900, batch=4, learning_rate=2e-3),
        expert=ExpertRecipe(steps=360, batch=4, learning_rate=1e-3),
        steps=144,
        batch=4,
        validation=16,
        held_out=32,
        measured=8,
    ),
    "quick": Scale(
        base=ExpertRecipe(steps=2, batch=2, learning_rate=2e-3),
        expert=ExpertRecipe(steps=2, batch=2, learning_rate=1e-3),
        steps=2,
        batch=2,
        validation=1,
        held_out=1,
        measured=1,
    ),
}


def divided(texts: dict[str, Domain]) -> dict[str, dict[str, Domain]]:
    """The texts of each domain by the name of a share, divided between documents."""
    parts: dict[str, dict[str, Domain]] = {share: {} for share in SHARES}
    for name, domain in texts.items():
        total = sum(len(document) for document in domain.train)
        first = 0  # of the documents that no share has yet
        passed = 0  # characters
        end = 0.0  # of the share, in characters
        for share, fraction in SHARES.items():
            end += fraction * total
            last = first
            while last < len(domain.train) and passed + len(domain.train[last]) <= end:
                passed += len(domain.train[last])
                last += 1
            parts[share][name] = replace(domain, train=domain.train[first:last])
            first = last
    return parts


def make_models(texts: dict[str, Domain], scale: Scale, seed: int = 0) -> dict[str, Path]:
    """The base, and the expert of each domain. The base is drawn by the seed, so that its experts
    differ, too.
    """
    shares = divided(texts)
    base = make_small_base(shares["base"], scale.base, seed)
    return make_experts(base, shares["experts"], scale.expert)


def write_data(
    folder: Path, tokenizer: Any, texts: dict[str, Domain], scale: Scale
) -> dict[str, list[str]]:
    """Writes what mixtures and sparse upcycling are trained on, and what they are measured on.
    Returns the `--data` of each.
    """
    shares = divided(texts)
    of_mixture = -(-scale.steps * scale.batch // len(DOMAINS))  # blocks per domain
    of_expert = scale.expert.steps * scale.expert.batch
    named: dict[str, list[str]] = {}
    for name in DOMAINS:
        read_by_mixture = blocks(tokenizer, shares["mixtures"][name].train, of_mixture)
        read_by_expert = blocks(tokenizer, shares["experts"][name].train, of_expert)
        parts = {
            "mixture": read_by_mixture,
            "upcycling": torch.cat([read_by_expert, read_by_mixture]),
            "validation": blocks(tokenizer, shares["validation"][name].train, scale.validation),
            "held_out": blocks(tokenizer, texts[name].held_out, scale.held_out),
        }
        for part, ids in parts.items():
            path = folder / f"{name}-{part}.jsonl"
            write_blocks(path, tokenizer, ids)
            named.setdefault(part, []).append(f"{name}={path}")
    return named


@dataclass
class Bench:
    """The models and the texts, and what trains and measures a mixture of these."""

    models: dict[str, Path]
    data: dict[str, list[str]]
    scale: Scale
    scratch: Path

    @contextmanager
    def merged(self, row: str, seed: int) -> Iterator[Path]:
        """The merged mixture of a row, which is removed at the end."""
        output = self.scratch / "merged"
        mixture, _ = ROWS[row]
        merge(mixture, self.models, output, seed)
        try:
            yield output
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def run(self, row: str, merged: Path, rate: float, seed: int, measured_on: str) -> Run:
        """Trains the mixture of a row at a learning rate, and measures it on some part."""
        _, trained = ROWS[row]
        is_upcycled = row == "MoE upcycling"
        steps = self.scale.upcycling_steps if is_upcycled else self.scale.steps
        recipe = Recipe(
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, steps - 1),
            max_steps=steps,
            per_device_train_batch_size=self.scale.batch,
            per_device_eval_batch_size=8,
            held_out=0,
            eval_steps=max(1, steps // self.scale.measured),
            seed=seed,
        )
        data = self.data["upcycling" if is_upcycled else "mixture"]
        return run(merged, trained, data, self.data[measured_on], recipe)


def search(bench: Bench, results: Results) -> None:
    """Measures all learning rates on validation texts, with one seed."""
    for row in ROWS:
        of_rates = results.validation.setdefault(row, {})
        missing = [rate for rate in RATES[row] if f"{rate:g}" not in of_rates]
        if not missing:
            continue
        with bench.merged(row, seed=0) as merged:
            for rate in tqdm(missing, desc=f"rates of {row}"):
                measured = bench.run(row, merged, rate, 0, "validation")
                last = [losses[-1] for losses in measured.losses.values()]
                of_rates[f"{rate:g}"] = statistics.mean(last)
                results.write()


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the results; a run goes on where an earlier one ended.",
)
@click.option(
    "--scale",
    "scale_name",
    type=click.Choice(list(SCALES)),
    default="small",
    show_default=True,
    help="Size of the experiment: an hour and a half, or minutes that show that it runs.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of seeds."
)
def main(output: Path, scale_name: str, seeds: int) -> None:
    scale = SCALES[scale_name]
    output.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(scale), "block": BLOCK, "rates": RATES, "shares": SHARES}
    results = Results(output / "results.json", settings, ROWS)
    texts = domains()
    models = make_models(texts, scale)
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    for name, path in models.items():
        row = name if name == "base" else f"{name} expert"
        if row not in results.dense:
            results.dense[row] = dense_losses(path, tokenizer, texts, scale.held_out)
            results.write()
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        data = write_data(Path(scratch), tokenizer, texts, scale)
        bench = Bench(models, data, scale, Path(scratch))
        search(bench, results)
        for seed in range(seeds):
            for row in tqdm(ROWS, desc=f"seed {seed}"):
                if len(results.runs[row]) > seed:
                    continue
                with bench.merged(row, seed) as merged:
                    rate = results.best_rate(row)
                    results.runs[row].append(bench.run(row, merged, rate, seed, "held_out"))
                results.write()
    text = write_report(results.dense, results.runs, output, scale.batch)
    click.echo(f"{results.table_of_rates()}\n\n{text}")


if __name__ == "__main__":
    main()
