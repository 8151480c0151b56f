"""Repeat MergeME's Table 1 and figures 5 and 10 at small scale: one model, three domains and seeds.

    python examples/mergeme_homogeneous.py --output mergeme/

1. Continue the pretraining of SmolLM2-135M-Instruct on bible, music (ABC notation) and code
   (Python): three experts. They are trained once and kept.
2. Per seed, merge base and experts into a mixture of four: BTX, TIES, DARE, and sparse upcycling
   (of the base alone).
3. Train each with the same tokens of all three domains, and BTX once more with its gates alone.
4. Write the held-out losses (`results.json`, `table.md`), their curves (`figure10.png`) and which
   expert each domain is routed to (`figure5.png`). Print the losses and which of the paper's
   orderings hold.

Besides the size, two things differ from the paper. Its rows are accuracies on benchmarks, ours are
losses on held-out text. Its sparse upcycling trains on as many tokens as the experts and the
mixture together, ours on as many as the other mixtures. All takes about an hour on two cores;
`--steps 2 --seeds 1` shows that it runs. What is measured is written to `results.json` at once, so
the same command goes on after an interruption.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
import yaml
from demo import BLOCK, DOMAINS, blocks, table, write_blocks
from demo import Recipe as ExpertRecipe
from demo import train as train_dense
from real_data import SMOLLM2, Domain, cache_dir, domains, smollm2, written_at_once
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from verdicts import judge

from mergekit_moe_ext import Reading, Recipe, UserError, count_usage, train
from mergekit_moe_ext.analysis import pyplot, routing_probability

EXPERT = ExpertRecipe(steps=40, batch=2, learning_rate=1e-4)
HELD_OUT_BLOCKS = 4  # per domain
BATCH = 2  # blocks per step of the mixtures
LEARNING_RATES = {"all": 1e-4, "gates": 1e-2}
NAMES = ["base", *DOMAINS]
READING = Reading(max_length=BLOCK, quiet=True)
SHARED: dict[str, dict[str, Any]] = {
    "BTX merging": {"merge_method": "moe_linear"},
    "Ties merging": {
        "merge_method": "moe_ties",
        "parameters": {"density": 0.8, "weight": 1.0, "normalize": False, "lambda": 1 / 3},
    },
    "Dare merging": {
        "merge_method": "moe_dare",
        "parameters": {"density": 0.8, "weight": 1.0, "lambda": 1 / 3},
    },
    "MoE upcycling": {"merge_method": "moe_linear"},
}


# The rows, each with the mixture that it trains, and what of it.
ROWS = {"Router fine-tuning": ("BTX merging", "gates"), **{row: (row, "all") for row in SHARED}}


@dataclass
class Run:
    """One trained mixture: held-out losses by domain at each measured step, and the routing
    probability of each expert by domain.
    """

    steps: list[int]
    losses: dict[str, list[float]]
    routing: dict[str, list[float]]


class Results:
    """The losses of dense models and the measured mixtures, row by row and in the order of the
    seeds, in a file that is rewritten after each measurement. Where learning rates are searched
    for, their validation losses too.

    `UserError` where the file holds what was measured with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], rows: Iterable[str]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as they are read back
        self.dense: dict[str, dict[str, float]] = {}
        self.validation: dict[str, dict[str, float]] = {}  # by row and rate, the mean
        self.runs: dict[str, list[Run]] = {row: [] for row in rows}
        if path.is_file():
            content = json.loads(path.read_text())
            if content.get("settings") != self.settings:
                raise UserError(f"{path} is of other settings; name another directory")
            self.dense = content["dense"]
            self.validation = content["validation"]
            for row, of_seeds in content["runs"].items():
                self.runs[row] = [Run(**of_seed) for of_seed in of_seeds]

    def write(self) -> None:
        runs: dict[str, list[dict[str, Any]]] = {}
        for row, of_seeds in self.runs.items():
            runs[row] = [asdict(of_seed) for of_seed in of_seeds]
        content = {
            "settings": self.settings,
            "dense": self.dense,
            "validation": self.validation,
            "runs": runs,
        }
        unfinished = self.path.with_suffix(".partial")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(self.path)

    def best_rate(self, row: str) -> float:
        """The learning rate with the lowest loss on validation texts."""
        of_rates = self.validation[row]
        return float(min(of_rates, key=lambda rate: of_rates[rate]))

    def table_of_rates(self) -> str:
        """The validation losses of each row by learning rate; the best has a star."""
        lines = ["Mean validation loss by learning rate:"]
        for row, of_rates in self.validation.items():
            best = min(of_rates.values())
            cells = []
            for rate in sorted(of_rates, key=float):
                star = "*" if of_rates[rate] == best else " "
                cells.append(f"{rate}: {of_rates[rate]:.3f}{star}")
            lines.append(f"{row:18}  " + "  ".join(cells))
        return "\n".join(lines)


def make_experts(
    base: Path,
    texts: dict[str, Domain],
    recipe: ExpertRecipe = EXPERT,
    names: Sequence[str] = DOMAINS,
) -> dict[str, Path]:
    """The base, and one model per domain with all parameters trained further on it."""
    # SmolLM2 lies in the cache itself; a base of our own in a folder named by its training.
    identity = SMOLLM2.sha256 if base.parent == cache_dir() else base.parent.name
    content = [texts[name].train for name in names]
    settings = json.dumps([identity, asdict(recipe), BLOCK, content])
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    folders = {name: cache_dir() / f"mergeme-{key}" / name for name in names}
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, folder in folders.items():
        if folder.is_dir():
            continue
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        data = blocks(tokenizer, texts[name].train, recipe.steps * recipe.batch)
        with (
            written_at_once(folder) as partial,
            tqdm(total=recipe.steps, desc=f"expert {name}") as bar,
        ):
            train_dense(model, data, recipe, bar)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return {"base": base, **folders}


def write_texts(
    folder: Path, tokenizer: Any, texts: dict[str, Domain], steps: int
) -> dict[str, list[str]]:
    """Writes files to train on, from documents that no expert has read, and files to measure on.
    Returns the `--data` of each.
    """
    per_domain = -(-steps * BATCH // len(DOMAINS)) + 1
    named: dict[str, list[str]] = {"train": [], "held_out": []}
    for name in DOMAINS:
        for part, documents, count in (
            ("train", texts[name].train[::-1], per_domain),
            ("held_out", texts[name].held_out, HELD_OUT_BLOCKS),
        ):
            path = folder / f"{name}-{part}.jsonl"
            write_blocks(path, tokenizer, blocks(tokenizer, documents, count))
            named[part].append(f"{name}={path}")
    return named


def merge(row: str, models: dict[str, Path], output: Path, seed: int) -> None:
    """Merges the mixture of a row of the table."""
    names = ["base"] * len(NAMES) if row == "MoE upcycling" else NAMES
    run_mergekit(SHARED[row], [models[name] for name in names], models["base"], output, seed)


def run_mergekit(
    method: dict[str, Any], models: Sequence[Path], base: Path, output: Path, seed: int = 0
) -> None:
    """Runs `mergekit-yaml` on a configuration, whose merge method and parameters are `method`."""
    config = {
        **method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        "dtype": "float32",
    }
    config_file = output.with_suffix(".yml")
    config_file.write_text(yaml.safe_dump(config))
    script = shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or "mergekit-yaml"
    command = [script, str(config_file), str(output), "--random-seed", str(seed), "--quiet"]
    subprocess.run(command, check=True, capture_output=True)


def recipe_of(part: str, seed: int, steps: int) -> Recipe:
    """How a mixture of SmolLM2 is trained."""
    return Recipe(
        learning_rate=LEARNING_RATES[part],
        lr_scheduler_type="cosine",
        warmup_steps=min(2, steps - 1),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=2,
        held_out=0,
        eval_steps=max(1, steps // 3),
        seed=seed,
    )


def run(merged: Path, part: Any, data: list[str], measured_on: list[str], recipe: Recipe) -> Run:
    """Trains a merged mixture on some data, and measures it on other data."""
    trained = merged.with_name(f"{merged.name}-{part}")
    train(
        str(merged),
        data,
        part,
        output=str(trained),
        recipe=recipe,
        reading=READING,
        eval_data=measured_on,
    )
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    losses: dict[str, list[float]] = {name: [] for name in DOMAINS}
    measured_steps = []
    for entry in history:
        for name in DOMAINS:
            if f"eval_{name}_loss" in entry:
                losses[name].append(entry[f"eval_{name}_loss"])
        if f"eval_{DOMAINS[0]}_loss" in entry:
            measured_steps.append(entry["step"])
    usage = count_usage(str(trained), measured_on, reading=READING, batch_size=2)
    assert usage is not None  # this is the only process
    shutil.rmtree(trained)
    routing = {name: routing_probability(usage.tasks[name]) for name in DOMAINS}
    return Run(measured_steps, losses, routing)


@torch.inference_mode()
def dense_losses(
    model: Path, tokenizer: Any, texts: dict[str, Domain], count: int = HELD_OUT_BLOCKS
) -> dict[str, float]:
    """The mean loss of a dense model on `count` held-out blocks, by domain."""
    network: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    result = {}
    for name in DOMAINS:
        ids = blocks(tokenizer, texts[name].held_out, count)
        losses = [network(row[None], labels=row[None]).loss.item() for row in ids]
        result[name] = statistics.mean(losses)
    return result


def orderings(
    dense: dict[str, dict[str, float]], rows: dict[str, list[dict[str, float]]]
) -> list[str]:
    """The paper's claims about Table 1. What is said of the mixtures has a verdict by the rule of
    `verdicts.py`; the experts were trained once, so that no rule can judge them.
    """
    lines = []
    for name in DOMAINS:
        best = min(dense, key=lambda model: dense[model][name])
        says = "is" if best == f"{name} expert" else "is not"
        lines.append(f"one training: on {name} its expert {says} the best dense model")
        others = [other for other in DOMAINS if other != name]
        forgets = any(dense[f"{name} expert"][other] > dense["base"][other] for other in others)
        says = "is" if forgets else "is not"
        lines.append(f"one training: the {name} expert {says} worse than the base elsewhere")
    claims = [
        ("BTX merging", "Random routing"),
        ("BTX merging", "Router fine-tuning"),
        ("Ties merging", "BTX merging"),
        ("Dare merging", "BTX merging"),
        ("Dare merging", "Ties merging"),
        ("MoE upcycling", "Dare merging"),
    ]
    for better, worse in claims:
        differences = []
        for lower, higher in zip(rows[better], rows[worse], strict=True):
            differences.append([higher[name] - lower[name] for name in DOMAINS])
        verdict = judge(differences).text()
        lines.append(f"{better} is better than {worse} on average: {verdict}")
    return lines


def means(rows: Iterable[Sequence[float]]) -> list[float]:
    """The mean of each column."""
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def draw_curves(runs: dict[str, list[Run]], path: Path, batch: int = BATCH) -> None:
    """Draws figure 10: the held-out loss against the tokens of the fine-tuning, the mean and the
    range over seeds. A step has `batch` blocks.

    Where some are trained for longer than others, tokens are on a logarithmic scale.
    """
    first_steps = [of_row[0].steps[1] for of_row in runs.values()]
    last_steps = {of_row[0].steps[-1] for of_row in runs.values()}
    plt = pyplot()
    figure, panels = plt.subplots(1, len(DOMAINS) + 1, figsize=(3 * (len(DOMAINS) + 1), 3.2))
    for axes, name in zip(panels, [*DOMAINS, "mean"], strict=True):
        for row, of_row in runs.items():
            tokens = [step * batch * BLOCK for step in of_row[0].steps]
            curves = []
            for run in of_row:
                curves.append(means(run.losses.values()) if name == "mean" else run.losses[name])
            (line,) = axes.plot(tokens, means(curves), marker="o", ms=3, label=row)
            low = [min(column) for column in zip(*curves, strict=True)]
            high = [max(column) for column in zip(*curves, strict=True)]
            axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("tokens")
        if len(last_steps) > 1:
            # From the first measurement on: before it the scale is linear, down to 0.
            axes.set_xscale("symlog", linthresh=min(first_steps) * batch * BLOCK)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_routing(runs: dict[str, list[Run]], path: Path) -> None:
    """Draws figure 5: which expert each domain is routed to, per method, as means over seeds."""
    plt = pyplot()
    rows = [row for row in runs if row != "MoE upcycling"]  # its experts belong to no domain
    figure, panels = plt.subplots(1, len(DOMAINS), figsize=(3.4 * len(DOMAINS), 3), sharey=True)
    for axes, domain in zip(panels, DOMAINS, strict=True):
        for index, row in enumerate(rows):
            heights = means([run.routing[domain] for run in runs[row]])
            width = 0.8 / len(rows)
            offset = (index - (len(rows) - 1) / 2) * width
            positions = [expert + offset for expert in range(len(NAMES))]
            axes.bar(positions, heights, width * 0.92, label=row)
        axes.set_xticks(range(len(NAMES)), NAMES)
        axes.set_title(f"text: {domain}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("routing probability")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def losses_at(runs: Sequence[Run], index: int) -> list[dict[str, float]]:
    """The losses of each run by domain, at one of its measured steps."""
    losses = []
    for run in runs:
        losses.append({name: values[index] for name, values in run.losses.items()})
    return losses


def report(dense: dict[str, dict[str, float]], runs: dict[str, list[Run]]) -> str:
    """Table 1, the means seed by seed, and the paper's orderings."""
    rows = {"Random routing": losses_at(runs["BTX merging"], 0)}  # before any training
    for row in ("Router fine-tuning", *SHARED):
        rows[row] = losses_at(runs[row], -1)
    over_seeds: dict[str, dict[str, float]] = {}
    lines = []
    for row, of_seeds in rows.items():
        over_seeds[row] = {}
        for name in DOMAINS:
            over_seeds[row][name] = statistics.mean(losses[name] for losses in of_seeds)
        over_domains = [statistics.mean(losses.values()) for losses in of_seeds]
        lines.append(f"{row:18}" + "".join(f"{value:9.3f}" for value in over_domains))
    parts = [
        table({**dense, **over_seeds}),
        "\n".join(["Mean over domains, seed by seed:", *lines]),
        "\n".join(orderings(dense, rows)),
    ]
    return "\n\n".join(parts)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the results; a run goes on where an earlier one ended.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Number of training steps of each mixture.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of seeds."
)
def main(output: Path, steps: int, seeds: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": steps,
        "batch": BATCH,
        "block": BLOCK,
        "held_out": HELD_OUT_BLOCKS,
        "rates": LEARNING_RATES,
        "expert": asdict(EXPERT),
    }
    results = Results(output / "results.json", settings, ROWS)
    base = smollm2()
    texts = domains()
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = make_experts(base, texts)
    for name, path in models.items():
        row = name if name == "base" else f"{name} expert"
        if row not in results.dense:
            results.dense[row] = dense_losses(path, tokenizer, texts)
            results.write()
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        named = write_texts(Path(scratch), tokenizer, texts, steps)
        for seed in range(seeds):
            for row in tqdm(ROWS, desc=f"seed {seed}"):
                if len(results.runs[row]) > seed:
                    continue
                mixture, part = ROWS[row]
                merged = Path(scratch) / "merged"
                merge(mixture, models, merged, seed)
                recipe = recipe_of(part, seed, steps)
                measured = run(merged, part, named["train"], named["held_out"], recipe)
                results.runs[row].append(measured)
                results.write()
                shutil.rmtree(merged)
    click.echo(write_report(results.dense, results.runs, output, BATCH))


def write_report(
    dense: dict[str, dict[str, float]], runs: dict[str, list[Run]], output: Path, batch: int
) -> str:
    """Writes the table and the figures, and returns the former; the batch is in blocks."""
    text = report(dense, runs)
    (output / "table.md").write_text(f"```\n{text}\n```\n")
    draw_curves(runs, output / "figure10.png", batch)
    draw_routing(runs, output / "figure5.png")
    return text


if __name__ == "__main__":
    main()
