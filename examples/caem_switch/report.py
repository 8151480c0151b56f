"""Tables 2 to 5, the paper's orderings, and figures 2 to 4, from the records of the runs."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from verdicts import judge

from caem_switch.experiment import COMPARISONS, CONFIGURATIONS, SOUPS
from caem_switch.texts import METRICS, TASKS
from mergekit_moe_ext import Usage
from mergekit_moe_ext.analysis import layer_entropies, mean_entropies, plot_usage, pyplot

KEPT = 0.8  # share of the Overall Performance that a soup of Table 4 keeps, as in the paper
LEAST_SCORE = 0.001  # of a single-task model, as in `experiment.py`
COLLAPSED = 0.1  # Overall Performance, which in Table 5 is near 0


@dataclass(frozen=True)
class Results:
    """The records of a seed."""

    folder: Path

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def score(self, name: str, measure: str) -> float:
        """A score on the test rows: of a task, as `<task>_score`, or `overall_performance`."""
        return self.record(name)["scores"][measure]

    def overall(self, name: str) -> float:
        return self.score(name, "overall_performance")

    def relative(self, name: str) -> list[float]:
        """The scores of the tasks by those of the single-task models, whose mean is the Overall
        Performance.
        """
        experts = CONFIGURATIONS[name].experts
        ratios = []
        for task in TASKS:
            single = self.score(f"single-{experts}-{task}", f"{task}_score")
            ratios.append(self.score(name, f"{task}_score") / max(single, LEAST_SCORE))
        return ratios

    def ahead(self, better: str, worse: str) -> list[float]:
        """By how much one configuration is above another, task by task."""
        pairs = zip(self.relative(better), self.relative(worse), strict=True)
        return [first - second for first, second in pairs]

    def soup(self, first: str, second: str) -> float:
        """The Overall Performance of the mean of two models."""
        return self.overall(f"soup of {first} and {second}")

    def entropy(self, name: str, stack: str) -> float:
        """The mean over tasks of the entropy of the choices in a stack (Table 3)."""
        entropies = self.record(name)["entropies"]
        return statistics.mean(entropies[task][stack] for task in TASKS)

    def source_entropy(self, experts: int, task: str, stack: str) -> float:
        """The entropy of the choices of a single-task model, by which experts are allotted."""
        path = self.folder / "models" / f"single-{experts}-{task}.usage.json"
        usage = Usage.model_validate_json(path.read_text())
        return mean_entropies(layer_entropies(usage.tasks[task].layers))[stack]

    def likeness(self, first: str, second: str, stack: str, when: str = "after") -> list[float]:
        """The CKA of two models on each task, the mean over the layers of a stack."""
        record = self.record(f"cka of {first} and {second}, {when}")
        return [statistics.mean(record[task][stack]) for task in TASKS]


def orderings(seed: Results) -> dict[str, list[float]]:
    """What the paper says of its tables and figures, and by how much it is so in this seed.

    A margin is positive where the paper is right. What is a mean over tasks has a margin per task,
    all else has one. Of several things that have to be so at once it is the least margin.
    """
    overall = seed.overall
    of_others = [overall(name) for name in CONFIGURATIONS if name != "CAEM-8"]
    gains = {}
    for task in TASKS:
        baseline = max(seed.score("Baseline-8", f"{task}_score"), LEAST_SCORE)
        gains[task] = seed.score("CAEM-8", f"{task}_score") / baseline
    other_gains = [gain for task, gain in gains.items() if task != "code"]
    on_generation = seed.score("CAEM-8", "code_score") - seed.score("CAEM-8-Avg", "code_score")
    margins: dict[str, list[float]] = {}
    for better, worse in (
        ("CAEM-8", "Baseline-8"),
        ("CAEM-16", "Baseline-16"),
        ("CAEM-8-to-16", "Baseline-16"),
        ("CAEM-8", "CAEM-8-to-16"),
        ("CAEM-8-to-16", "CAEM-16"),
        ("CAEM-8", "CAEM-8-Avg"),
        ("CAEM-16", "CAEM-16-Avg"),
        ("CAEM-8-Avg", "Baseline-8"),
    ):
        margins[f"Table 2: {better} is above {worse}"] = seed.ahead(better, worse)
    margins |= {
        "Table 2: CAEM-8 is the best of all": [overall("CAEM-8") - max(of_others)],
        "Table 2: CAEM-8 gains most on generation": [gains["code"] - max(other_gains)],
        "Table 2: CAEM-8 is above CAEM-8-Avg on generation": [on_generation],
    }
    margins |= _orderings_of_entropies(seed)
    margins |= _orderings_of_soups(seed)
    margins |= _orderings_of_layers(seed)
    return margins


def _orderings_of_entropies(seed: Results) -> dict[str, list[float]]:
    encoder = {name: seed.entropy(name, "encoder") for name in CONFIGURATIONS}
    decoder = {name: seed.entropy(name, "decoder") for name in CONFIGURATIONS}
    sources = {task: seed.source_entropy(8, task, "all") for task in TASKS}
    return {
        "3.2: generation has a higher entropy than classification": [
            sources["code"] - sources["news"]
        ],
        "Table 3: in the encoder CAEM-8 is highest, CAEM-8-to-16 lowest": [
            _least_step(encoder, ["CAEM-8", "CAEM-16", "CAEM-8-to-16"])
        ],
        "Table 3: in the decoder CAEM-8 is highest, CAEM-16 lowest": [
            _least_step(decoder, ["CAEM-8", "CAEM-8-to-16", "CAEM-16"])
        ],
    }


def _least_step(values: dict[str, float], falling: Sequence[str]) -> float:
    """The least difference of neighbours, which is positive where the values fall in this order."""
    return min(values[first] - values[second] for first, second in pairwise(falling))


def _orderings_of_soups(seed: Results) -> dict[str, list[float]]:
    kept = []
    collapsed = []
    for first, second in SOUPS:
        soup = seed.soup(first, second)
        if first == "CAEM-8-to-16":
            collapsed.append(COLLAPSED - soup)
        else:
            kept.append(soup - KEPT * min(seed.overall(first), seed.overall(second)))
    margins = {
        f"Table 4: every soup keeps {KEPT:.0%} of the worse model": [min(kept)],
        f"Table 5: every soup falls below {COLLAPSED}": [min(collapsed)],
    }
    for experts in (8, 16):
        caem = f"CAEM-{experts}"
        others = [
            seed.soup(caem, f"Baseline-{experts}"),
            seed.soup(f"{caem}-Avg", f"Baseline-{experts}"),
        ]
        best = seed.soup(caem, f"{caem}-Avg")
        margins[f"Table 4: {caem} with {caem}-Avg is the best soup"] = [best - max(others)]
    return margins


def _orderings_of_layers(seed: Results) -> dict[str, list[float]]:
    """CKA is a mean over tasks, so that these have a margin per task."""
    change = {}
    for experts in (8, 16):
        for stack in ("encoder", "decoder"):
            pair = (f"CAEM-{experts}", f"Baseline-{experts}", stack)
            after = seed.likeness(*pair)
            before = seed.likeness(*pair, "before")
            change[experts, stack] = [b - a for a, b in zip(before, after, strict=True)]
    with_8 = seed.likeness("CAEM-8-to-16", "CAEM-8", "encoder")
    with_16 = seed.likeness("CAEM-8-to-16", "CAEM-16", "encoder")
    with_baseline = seed.likeness("CAEM-8-to-16", "Baseline-16", "encoder")
    apart = [-each for each in change[16, "decoder"]]
    return {
        "Figure 2: training brings encoders together (8 experts)": change[8, "encoder"],
        "Figure 2: training brings encoders together (16 experts)": change[16, "encoder"],
        "Figure 2: training brings decoders together (8 experts)": change[8, "decoder"],
        "Figure 2: training drives decoders apart (16 experts)": apart,
        "Figure 4: CAEM-8-to-16 is nearer to CAEM-8 than to CAEM-16": [
            a - b for a, b in zip(with_8, with_16, strict=True)
        ],
        "Figure 4: CAEM-8-to-16 is nearer to Baseline-16 than to CAEM-16": [
            a - b for a, b in zip(with_baseline, with_16, strict=True)
        ],
    }


def report(folder: Path, seeds: int) -> str:
    """The tables and orderings of the first `seeds` seeds."""
    results = [Results(folder / f"seed-{number}") for number in range(1, seeds + 1)]
    parts = [f"Seeds: {seeds}. Of several, the mean and the standard deviation."]
    pretraining = []
    for experts in (8, 16):
        path = folder / "pretrained" / f"switch-{experts}" / "pretraining.json"
        if path.is_file():
            facts = json.loads(path.read_text())
            pretraining.append(
                f"Switch-{experts}: {facts['parameters'] / 1e6:.2f} M parameters, pretraining loss "
                f"{facts['loss_before']:.2f} before, {facts['loss_after']:.2f} after"
            )
    if pretraining:
        parts.append("\n".join(pretraining))
    parts += [
        _table_2(results),
        _table_3(results),
        _table_of_soups(results),
        _table_of_orderings(results),
    ]
    return "\n\n".join(parts) + "\n"


def _table_2(results: Sequence[Results]) -> str:
    columns = ["overall", *(f"{task} ({METRICS[task]})" for task in TASKS), "before training*"]
    rows = {}
    for experts in (8, 16):
        cells = [""]
        for task in TASKS:
            name = f"single-{experts}-{task}"
            cells.append(_cell([seed.score(name, f"{task}_score") for seed in results]))
        rows[f"single-task, {experts}"] = [*cells, ""]
    for name in CONFIGURATIONS:
        cells = [_cell([seed.overall(name) for seed in results])]
        for task in TASKS:
            cells.append(_cell([seed.score(name, f"{task}_score") for seed in results]))
        before = [seed.record(name)["epochs"][0] for seed in results]
        rows[name] = [*cells, _cell(before)]
    table = _table("Table 2: scores on test rows", columns, rows)
    return f"{table}\n* overall, on validation rows: what the training starts from"


def _table_3(results: Sequence[Results]) -> str:
    stacks = ("encoder", "decoder")
    trained: dict[str, list[str]] = {}
    for name in CONFIGURATIONS:
        trained[name] = []
        for stack in stacks:
            trained[name].append(_cell([seed.entropy(name, stack) for seed in results]))
    sources = {}
    for experts in (8, 16):
        for task in TASKS:
            cells = []
            for stack in stacks:
                values = [seed.source_entropy(experts, task, stack) for seed in results]
                cells.append(_cell(values))
            sources[f"single-task, {experts}, {task}"] = cells
    return "\n\n".join(
        [
            _table("Table 3: normalised entropies of the trained models", stacks, trained),
            _table("Entropies of the single-task models, by which CAEM allots", stacks, sources),
        ]
    )


def _table_of_soups(results: Sequence[Results]) -> str:
    rows = {}
    for first, second in SOUPS:
        rows[f"{first}, {second}"] = [_cell([seed.soup(first, second) for seed in results])]
    return _table("Tables 4 and 5: soups", ["overall"], rows)


def _table_of_orderings(results: Sequence[Results]) -> str:
    """Each ordering with a verdict, by the rule of `verdicts.py`."""
    per_seed = [orderings(seed) for seed in results]
    rows = {}
    for name in per_seed[0]:
        verdict = judge([margins[name] for margins in per_seed])
        rows[name] = [verdict.seeds, verdict.word]
    return _table("What the paper says", ["seeds", "verdict"], rows)


def _cell(values: Sequence[float]) -> str:
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text


def _table(title: str, columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    first = max(map(len, rows))
    widths = []
    for place, column in enumerate(columns):
        widths.append(max(len(column), *(len(cells[place]) for cells in rows.values())) + 2)
    lines = [title, " " * first + "".join(map(str.rjust, columns, widths))]
    for name, cells in rows.items():
        lines.append((name.ljust(first) + "".join(map(str.rjust, cells, widths))).rstrip())
    return "\n".join(lines)


def draw(folder: Path, seeds: int) -> None:
    """Writes figures 2, 3 and 4: CKA as means over the first `seeds` seeds, usage of the first."""
    results = [Results(folder / f"seed-{number}") for number in range(1, seeds + 1)]
    before_too = [pair[:2] for pair in COMPARISONS if pair[2]]
    after_only = [pair[:2] for pair in COMPARISONS if not pair[2]]
    _draw_similarities(results, before_too, ["before", "after"], folder / "figure-2.png")
    _draw_similarities(results, after_only, ["after"], folder / "figure-4.png")
    usage = folder / "seed-1" / "models" / "CAEM-8.usage.json"
    figure_3 = folder / "figure-3.png"
    figure_3.unlink(missing_ok=True)
    plot_usage(Usage.model_validate_json(usage.read_text()), figure_3)


def _draw_similarities(
    results: Sequence[Results], pairs: Sequence[tuple[str, str]], times: Sequence[str], path: Path
) -> None:
    """Draws a row of panels per pair of models and a panel per stack. A line is a task: dashed
    before the training, solid after it.
    """
    stacks = ("encoder", "decoder")
    figure, panels = pyplot().subplots(
        len(pairs),
        2,
        squeeze=False,
        sharey=True,
        figsize=(8, 2.6 * len(pairs)),
        layout="constrained",
    )
    for (first, second), row in zip(pairs, panels, strict=True):
        for stack, axes in zip(stacks, row, strict=True):
            axes.set_title(f"{first} and {second}, {stack}", fontsize=9)
            axes.set_xlabel("layer")
            for when in times:
                records = [seed.record(f"cka of {first} and {second}, {when}") for seed in results]
                for place, task in enumerate(TASKS):
                    of_seeds = [record[task][stack] for record in records]
                    line = [statistics.mean(values) for values in zip(*of_seeds, strict=True)]
                    style = "--" if when == "before" else "-"
                    axes.plot(line, style, color=f"C{place}", marker="o", label=f"{task}, {when}")
            axes.set_xticks(range(len(line)))
        row[0].set_ylabel("linear CKA")
    # Below the panels: within one it would hide points.
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
