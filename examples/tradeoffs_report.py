"""Compare all that can be done with eight LoRA adapters of real texts: `peft-route compare`.

    python examples/tradeoffs_report.py --output tradeoffs-report/

1. Train a LoRA of SmolLM2-135M-Instruct for each of eight domains of text, and the paper's shared
   expert, one on all of them (`tradeoffs_routers.py` does it, and they are kept).
2. `cached/`: the report of `compare` on these adapters, with all that follows from one pass of
   each, and `private/`, with the merges, Arrow and the shared expert, too.
3. `merging-seed0/`, `routing-seed0/`: reports with the trained routers. Of four learning rates
   each keeps the best on validation texts, which it is then trained at with the other seeds, too.
4. `mbc/`: cluster the adapters, train one per cluster on the texts of all its adapters, and write
   the report of these (Trade-offs, 5.2 and figure 4).
5. The trained routers with the other seeds.

After each step `summary.md`, `summary.json` and `figure2.png` hold what is known so far: the
losses, and which of the paper's orderings hold. A second run goes on where the first ended.

Orderings are judged by the rule of `verdicts.py`. Routers are trained with seeds; where an ordering
has none of them, nothing in it is drawn at random.

What differs from the paper: the model (135 M parameters, dequantised from 4 bits; the paper's is
Phi-2), the tasks (8 domains of running text, not 256 tasks of Flan), and minutes of training.
"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
from demo import BLOCK, blocks, write_blocks
from real_data import Domain, Unavailable, debian_version, domains, smollm2
from tradeoffs_routers import BATCH, SHARED, Lora, loras, make_lora
from transformers import AutoTokenizer
from verdicts import judge

from mergekit_moe_ext import UserError
from mergekit_moe_ext.analysis import pyplot
from peft_routing import Reading, compare
from peft_routing.library import add, cluster_library

DOMAINS = ("bible", "math", "news", "french", "dictionary", "code", "music", "german")
READING = Reading(max_length=BLOCK, quiet=True)
CACHED = (
    "best_expert",
    "own_expert",
    "best_per_task",
    "uniform_ensemble",
    "learned_ensemble",
    "sparse_ensemble",
    "posterior_ensemble",
    "program_ensemble",
    "worst_case_ensemble",
)
UNTRAINED = (
    *CACHED,
    "uniform_low_rank",
    "uniform_full",
    "arrow_top1",
    "arrow_top4",
    "arrow_all",
    "ties",
    "dare",
    "logit_ensemble",
)
# What the paper's figure 4 has of both libraries.
OF_CLUSTERS = ("own_expert", "uniform_ensemble", "uniform_low_rank", "arrow_top4", "arrow_all")
MERGING = ("global", "layer")
ROUTING = ("linear", "linear_arrow", "hierarchical", "hierarchical_arrow")
# The paper's rates are 1e-5, 1e-4 and 1e-3, for many more steps. A step of Adam moves a number by
# its rate at most, so that the tens of steps here want higher ones. The last of each line
# was too high here. A coefficient of `global` or `layer` is such a number itself.
LEARNING_RATES = {"merging": (1e-2, 1e-1, 1.0, 10.0), "routing": (1e-3, 1e-2, 1e-1, 1.0)}
MBC = "MBC "
# The first is better than the second, as the paper says.
CLAIMS = [
    ("own_expert", "linear", "figure 2: nothing beats the oracle"),
    ("linear", "learned_ensemble", "figure 2: learned routing beats learned ensembling"),
    ("learned_ensemble", "uniform_ensemble", "figure 2: learning improves the ensemble"),
    ("learned_ensemble", "global", "figure 2: ensembling beats merging"),
    ("uniform_ensemble", "uniform_low_rank", "figure 2: uniform ensembling beats uniform merging"),
    ("uniform_ensemble", SHARED, "figure 2: uniform ensembling beats the shared expert"),
    ("uniform_low_rank", SHARED, "figure 2: uniform merging beats the shared expert alone"),
    ("arrow_top4", "uniform_low_rank", "figure 2: Arrow beats uniform merging"),
    ("global", "uniform_low_rank", "figure 2: learning improves the merge"),
    ("global", "layer", "figure 2: global merging beats merging per layer"),
    ("linear", "global", "figure 2: learned routing beats learned merging"),
    ("linear", "arrow_top4", "figure 2: learned routing beats Arrow"),
    ("hierarchical_arrow", "hierarchical", "figure 2: Arrow is the better start of clusters"),
    ("hierarchical_arrow", "global", "figure 2: Arrow HC beats all merging"),
    (f"{MBC}own_expert", "own_expert", "figure 4: the oracle is better with MBC experts"),
    (f"{MBC}uniform_ensemble", "uniform_ensemble", "figure 4: so is uniform ensembling"),
    (f"{MBC}uniform_low_rank", "uniform_low_rank", "figure 4: so is uniform merging"),
    ("arrow_top4", f"{MBC}arrow_top4", "figure 4: Arrow is better with private experts"),
    ("uniform_ensemble", "logit_ensemble", "figure 5: probabilities are better than logits"),
    ("uniform_full", "uniform_low_rank", "figure 5: full rank is a little better than low rank"),
    ("uniform_ensemble", "program_ensemble", "B.5: the program's worst case costs the mean"),
    ("arrow_top4", "arrow_top1", "B.4: Arrow needs more than one expert"),
    ("linear", "linear, top 1", "B.4: so does a learned router"),
]
COLOURS = {
    "plain LoRA": "tab:blue",
    "routed": "tab:green",
    "other adapter": "tab:purple",
    "ensemble": "tab:orange",
}


@dataclass(frozen=True)
class Measured:
    """One row of all reports together.

    is_trained: whether it is a router that is trained, with a seed.
    of_seeds: by seed the test loss of each task, in nats per token; by 0 where nothing is trained.
    of_rates: by learning rate the validation loss, with the first seed, of what is trained.
    """

    kind: str
    is_trained: bool
    of_seeds: dict[int, list[float]]
    of_rates: dict[str, float] = field(default_factory=dict)

    @property
    def of_tasks(self) -> list[float]:
        """The loss of each task, the mean over seeds."""
        return [statistics.mean(losses) for losses in zip(*self.of_seeds.values(), strict=True)]

    @property
    def mean(self) -> float:
        return statistics.mean(self.of_tasks)


def write_texts(
    folder: Path, tokenizer: Any, texts: Mapping[str, Domain], count: int
) -> dict[str, str]:
    """Writes a file for each task and split, and returns the `tasks` of `compare`.

    Train and test have `count` blocks of each task, validation has half as many. Train and
    validation are of documents that no expert has read, test is held out.
    """
    folder.mkdir(exist_ok=True)
    tasks = {}
    for name, text in texts.items():
        unread = blocks(tokenizer, text.train[::-1], count + max(1, count // 2))
        splits = {
            "train": unread[:count],
            "validation": unread[count:],
            "test": blocks(tokenizer, text.held_out, count),
        }
        paths = []
        for split, rows in splits.items():
            path = folder / f"{name}-{split}.jsonl"
            write_blocks(path, tokenizer, rows)
            paths.append(str(path))
        tasks[name] = ",".join(paths)
    return tasks


def cluster_loras(own: Sequence[Lora], clusters: Mapping[int, Sequence[str]]) -> list[Lora]:
    """An adapter per cluster, to be trained on the data of all its members, a block of each in
    turn, with as many steps as they had together.
    """
    data = {lora.name: lora.data for lora in own}
    adapters = []
    for number, members in clusters.items():
        together = torch.stack([data[name] for name in members], dim=1).flatten(0, 1)
        steps = own[0].steps * len(members)
        adapters.append(Lora(f"cluster{number}", steps, together))
    return adapters


class Reports:
    """The reports of `compare` in a directory, one per name, which share what was measured."""

    def __init__(self, output: Path, base: Path, tasks: Mapping[str, str]) -> None:
        self.output = output
        self.base = base
        self.tasks = tasks

    def write(self, name: str, experts: Mapping[str, Path], **options: Any) -> None:
        """Writes a report, unless it is there, and then the summary of all so far."""
        if not (self.output / name).is_dir():
            click.echo(f"compare: {name}", err=True)
            directories = {expert: str(path) for expert, path in experts.items()}
            compare(
                str(self.base),
                directories,
                self.tasks,
                str(self.output / name),
                cache=str(self.output / "cache"),
                reading=READING,
                batch_size=BATCH,
                **options,
            )
        self.summarise()

    def rows(self) -> dict[str, Measured]:
        """The rows of all reports by their name; those of the clusters' adapters by `MBC` and it.

        Of one that several reports have, which is the same in all, the first is taken.
        """
        rows: dict[str, Measured] = {}
        for path in sorted(self.output.glob("*/report.json")):
            folder = path.parent.name
            seed = int(folder.partition("seed")[2] or 0)
            of_report = json.loads(path.read_text())["rows"]
            names = {row["name"] for row in of_report}
            for row in of_report:
                name = row["name"]
                if name == "arrow_all" and "arrow_top4" not in names:
                    name = "arrow_top4"  # there are no more than four
                if folder == "mbc" and name != "base":
                    name = f"{MBC}{name}"
                is_trained = name.partition(", ")[0] in {*MERGING, *ROUTING}
                # Of what is not trained one measurement counts, whatever the seeds of the others.
                if is_trained or seed == 0:
                    measured = rows.setdefault(name, Measured(row["kind"], is_trained, {}))
                    measured.of_seeds.setdefault(seed, row["test"])
                if is_trained and seed == 0:
                    for rate, loss in row["values"]["validation_losses"].items():
                        if loss is not None:  # as it is where the training diverged
                            measured.of_rates[rate] = loss
        return rows

    def summarise(self) -> None:
        """Writes the table, the orderings and the figure of all reports so far."""
        rows = self.rows()
        content = {
            name: {"kind": row.kind, "mean": row.mean, "of_seeds": row.of_seeds}
            for name, row in rows.items()
        }
        for name, row in rows.items():
            if row.of_rates:
                content[name]["of_rates"] = row.of_rates
        verdicts = orderings(rows)
        summary = {"tasks": list(self.tasks), "rows": content, "orderings": verdicts}
        (self.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        lines = [*table(rows, list(self.tasks)), "", *[f"- {verdict}" for verdict in verdicts], ""]
        if any(row.of_rates for row in rows.values()):
            lines += [*table_of_rates(rows), ""]
        (self.output / "summary.md").write_text("\n".join(lines))
        draw(rows, self.output / "figure2.png")


def orderings(rows: Mapping[str, Measured]) -> list[str]:
    """For each claim of the paper whether it holds here, by the rule of `verdicts.py`."""
    verdicts = []
    for better, worse, claim in CLAIMS:
        if better in rows and worse in rows:
            is_drawn = rows[better].is_trained or rows[worse].is_trained
            verdict = judge(gains(rows[better], rows[worse]), is_drawn)
            verdicts.append(f"{claim} ({better}, {worse}): {verdict.text(4)}")
    return verdicts


def gains(better: Measured, worse: Measured) -> list[list[float]]:
    """By how much the first has the lower loss, (seeds, tasks). What is not trained stands beside
    every seed of the other.
    """
    seeds = set(better.of_seeds) & set(worse.of_seeds)
    if better.is_trained != worse.is_trained:
        trained = better if better.is_trained else worse
        seeds = set(trained.of_seeds)
    differences = []
    for seed in sorted(seeds):
        low = better.of_seeds[seed if better.is_trained else 0]
        high = worse.of_seeds[seed if worse.is_trained else 0]
        differences.append([second - first for first, second in zip(low, high, strict=True)])
    return differences


def table(rows: Mapping[str, Measured], tasks: Sequence[str]) -> list[str]:
    """The lines of a table of test losses, the best mean first."""
    lines = [
        f"| | mean | range over seeds | {' | '.join(tasks)} |",
        "|---|---:|---|" + "---:|" * len(tasks),
    ]
    for name, row in sorted(rows.items(), key=lambda item: item[1].mean):
        seeds = ""
        if len(row.of_seeds) > 1:
            means = [statistics.mean(losses) for losses in row.of_seeds.values()]
            seeds = f"{min(means):.4f} to {max(means):.4f} ({len(means)} seeds)"
        cells = [f"{row.mean:.4f}", seeds, *[f"{loss:.3f}" for loss in row.of_tasks]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def table_of_rates(rows: Mapping[str, Measured]) -> list[str]:
    """The lines of a table of validation losses by learning rate; the best has a star."""
    lines = ["| | mean validation loss by learning rate |", "|---|---|"]
    for name, row in rows.items():
        if not row.of_rates or ", top" in name:  # the same router, read with fewer experts
            continue
        best = min(row.of_rates.values())
        cells = []
        for rate in sorted(row.of_rates, key=float):
            star = "*" if row.of_rates[rate] == best else ""
            cells.append(f"{rate}: {row.of_rates[rate]:.4f}{star}")
        lines.append(f"| {name} | {', '.join(cells)} |")
    return lines


def draw(rows: Mapping[str, Measured], path: Path) -> None:
    """Draws the mean test loss of every row, with a small dot per seed."""
    plt = pyplot()
    ordered = sorted(rows.items(), key=lambda item: item[1].mean, reverse=True)
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.24 * len(ordered)))
    for place, (_, row) in enumerate(ordered):
        colour = COLOURS.get(row.kind, "tab:grey")
        axes.plot(row.mean, place, "o", color=colour)
        if len(row.of_seeds) > 1:
            means = [statistics.mean(losses) for losses in row.of_seeds.values()]
            axes.plot(means, [place] * len(means), ".", color="black", markersize=3)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    for kind, colour in {**COLOURS, "the task is known": "tab:grey"}.items():
        axes.plot([], [], "o", color=colour, label=kind)
    axes.legend(fontsize=7, loc="lower left")
    axes.set_xlabel("test loss, mean over tasks (nats per token); small dots are seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the reports; a run goes on where an earlier one ended.",
)
@click.option(
    "--domains",
    "number",
    type=click.IntRange(2, len(DOMAINS)),
    default=len(DOMAINS),
    show_default=True,
    help=f"Number of domains, the first of {', '.join(DOMAINS)}.",
)
@click.option(
    "--blocks",
    "count",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help=f"Number of blocks of {BLOCK} tokens of each task's train and test texts.",
)
@click.option(
    "--expert-steps",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help=f"Number of training steps of each adapter, of {BATCH * BLOCK} tokens.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Number of times that each router reads the train texts.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of seeds of the routers.",
)
@click.option(
    "--clusters",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Number of clusters of adapters.",
)
def main(
    output: Path,
    number: int,
    count: int,
    expert_steps: int,
    epochs: int,
    seeds: int,
    clusters: int,
) -> None:
    names = DOMAINS[:number]
    try:
        base = smollm2()
        texts = domains(names=names)
    except Unavailable as error:
        raise UserError(str(error)) from None
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tasks = write_texts(output / "texts", tokenizer, texts, count)
    own, shared = loras(tokenizer, texts, expert_steps, long=False)
    settings = {
        "experts": [lora.folder.name for lora in (*own, *shared)],
        "epochs": epochs,
        "learning_rates": LEARNING_RATES,
        "clusters": clusters,
        "blocks": count,
        "debian": {name: debian_version(name) for name in names if debian_version(name)},
    }
    check_settings(output / "settings.json", settings)
    experts = {lora.name: lora.folder for lora in own}
    reports = Reports(output, base, tasks)
    make_loras(base, own)
    reports.write("cached", experts, strategies=CACHED)
    make_loras(base, shared)
    fusions = {SHARED: str(shared[0].folder)}
    reports.write("private", experts, strategies=UNTRAINED, fusions=fusions)

    clusters_file = output / "clusters.json"
    write_clusters(clusters_file, base, experts, clusters)
    train_routers(reports, experts, clusters_file, epochs, seed=0)
    compare_clusters(reports, own, clusters_file)
    for seed in range(1, seeds):
        train_routers(reports, experts, clusters_file, epochs, seed)
    click.echo((output / "summary.md").read_text())


def write_clusters(path: Path, base: Path, experts: Mapping[str, Path], count: int) -> None:
    """Clusters the adapters by the cosines of their updates, unless that was done."""
    if path.exists():
        return
    library = str(path.with_name("library"))
    directories = {name: str(folder) for name, folder in experts.items()}
    add(library, directories, READING, base=str(base))
    cluster_library(library, READING, k=count, output=str(path), plot=str(path.with_suffix(".png")))


def train_routers(
    reports: Reports, experts: Mapping[str, Path], clusters: Path, epochs: int, seed: int
) -> None:
    """Writes the reports of all routers that are trained, with one seed: with the first at all
    learning rates, with another at that which was the best with the first.
    """
    for kind, strategies in {"merging": MERGING, "routing": ROUTING}.items():
        parts: dict[str, tuple[Sequence[str], Sequence[float]]] = {}
        if seed == 0:
            parts[f"{kind}-seed0"] = (strategies, LEARNING_RATES[kind])
        else:
            by_rate = by_best_rate(reports.rows(), strategies)
            for rate, of_rate in by_rate.items():
                parts[f"{kind}-{rate}-seed{seed}"] = (of_rate, [float(rate)])
        for name, (of_part, rates) in parts.items():
            reports.write(
                name,
                experts,
                strategies=of_part,
                clusters_from=str(clusters) if kind == "routing" else None,
                num_train_epochs=epochs,
                learning_rates=rates,
                seed=seed,
            )


def by_best_rate(rows: Mapping[str, Measured], strategies: Sequence[str]) -> dict[str, list[str]]:
    """By learning rate the routers that had the lowest validation loss at it."""
    by_rate: dict[str, list[str]] = {}
    for name in strategies:
        of_rates = rows[name].of_rates
        if not of_rates:
            raise UserError(f"{name} diverged at every learning rate")
        best = min(of_rates, key=lambda rate: of_rates[rate])
        by_rate.setdefault(best, []).append(name)
    return by_rate


def compare_clusters(reports: Reports, own: Sequence[Lora], clusters: Path) -> None:
    """Trains an adapter per cluster, and writes their report beside that of the private ones."""
    members: dict[int, list[str]] = {}
    for name, cluster in json.loads(clusters.read_text())["clusters"].items():
        members.setdefault(cluster, []).append(name)
    adapters = cluster_loras(own, members)
    make_loras(reports.base, adapters)
    own_clusters: dict[str, str] = {}
    for cluster, tasks in members.items():
        own_clusters |= dict.fromkeys(tasks, f"cluster{cluster}")
    reports.write(
        "mbc",
        {lora.name: lora.folder for lora in adapters},
        strategies=OF_CLUSTERS,
        own=own_clusters,
        beside={"private": str(reports.output / "private")},
    )


def make_loras(base: Path, adapters: Sequence[Lora]) -> None:
    """Trains the adapters that are not there yet, one after the other."""
    for lora in adapters:
        click.echo(f"adapter: {lora.name}", err=True)
        make_lora(base, lora)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Notes the settings of a run. `UserError` for a directory of a run with others."""
    written = json.dumps(settings, indent=1, sort_keys=True)
    if path.exists() and path.read_text() != written:
        raise UserError(f"{path} is of other settings. Remove the directory, or name another.")
    path.write_text(written)


if __name__ == "__main__":
    main()
