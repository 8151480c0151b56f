"""Tables 2 to 5, the paper's orderings, and figures 2 to 4, from the records of the runs."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caem_switch.experiment import COMPARISONS, CONFIGURATIONS, SOUPS
from caem_switch.texts import METRICS, TASKS
from mergekit_moe_ext import Usage
from mergekit_moe_ext.analysis import layer_entropies, mean_entropies, plot_usage, pyplot

ENOUGH_SEEDS = 3  # for a verdict
KEPT = 0.8  # share of the Overall Performance that a soup of Table 4 keeps, as in the paper
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

    def likeness(self, first: str, second: str, stack: str, when: str = "after") -> float:
        """The CKA of two models, the mean over tasks and the layers of a stack."""
        record = self.record(f"cka of {first} and {second}, {when}")
        return statistics.mean(statistics.mean(record[task][stack]) for task in TASKS)


def orderings(seed: Results) -> dict[str, bool]:
    """What the paper says of its tables and figures, and whether it is so in this seed."""
    overall = seed.overall
    of_others = [overall(name) for name in CONFIGURATIONS if name != "CAEM-8"]
    gains = {}
    for task in TASKS:
        baseline = max(seed.score("Baseline-8", f"{task}_score"), 0.001)
        gains[task] = seed.score("CAEM-8", f"{task}_score") / baseline
    holds = {
        "Table 2: CAEM-8 is above Baseline-8": overall("CAEM-8") > overall("Baseline-8"),
        "Table 2: CAEM-16 is above Baseline-16": overall("CAEM-16") > overall("Baseline-16"),
        "Table 2: CAEM-8-to-16 is above Baseline-16": overall("CAEM-8-to-16")
        > overall("Baseline-16"),
        "Table 2: CAEM-8 is the best of all": overall("CAEM-8") > max(of_others),
        "Table 2: CAEM-8 is above CAEM-8-to-16": overall("CAEM-8") > overall("CAEM-8-to-16"),
        "Table 2: CAEM-8-to-16 is above CAEM-16": overall("CAEM-8-to-16") > overall("CAEM-16"),
        "Table 2: CAEM-8 is above CAEM-8-Avg": overall("CAEM-8") > overall("CAEM-8-Avg"),
        "Table 2: CAEM-16 is above CAEM-16-Avg": overall("CAEM-16") > overall("CAEM-16-Avg"),
        "Table 2: CAEM-8-Avg is above Baseline-8": overall("CAEM-8-Avg") > overall("Baseline-8"),
        "Table 2: CAEM-8 gains most on generation": max(gains, key=gains.__getitem__) == "code",
        "Table 2: CAEM-8 is above CAEM-8-Avg on generation": seed.score("CAEM-8", "code_score")
        > seed.score("CAEM-8-Avg", "code_score"),
    }
    holds |= _orderings_of_entropies(seed)
    holds |= _orderings_of_soups(seed)
    holds |= _orderings_of_layers(seed)
    return holds


def _orderings_of_entropies(seed: Results) -> dict[str, bool]:
    encoder = {name: seed.entropy(name, "encoder") for name in CONFIGURATIONS}
    decoder = {name: seed.entropy(name, "decoder") for name in CONFIGURATIONS}
    sources = {task: seed.source_entropy(8, task, "all") for task in TASKS}
    return {
        "3.2: generation has a higher entropy than classification": sources["code"]
        > sources["news"],
        "Table 3: in the encoder CAEM-8 is highest, CAEM-8-to-16 lowest": encoder["CAEM-8"]
        > encoder["CAEM-16"]
        > encoder["CAEM-8-to-16"],
        "Table 3: in the decoder CAEM-8 is highest, CAEM-16 lowest": decoder["CAEM-8"]
        > decoder["CAEM-8-to-16"]
        > decoder["CAEM-16"],
    }


def _orderings_of_soups(seed: Results) -> dict[str, bool]:
    all_kept = True
    all_collapsed = True
    for first, second in SOUPS:
        if first == "CAEM-8-to-16":
            all_collapsed &= seed.soup(first, second) < COLLAPSED
        else:
            worse = min(seed.overall(first), seed.overall(second))
            all_kept &= seed.soup(first, second) > KEPT * worse
    holds = {
        f"Table 4: every soup keeps {KEPT:.0%} of the worse model": all_kept,
        f"Table 5: every soup falls below {COLLAPSED}": all_collapsed,
    }
    for experts in (8, 16):
        caem = f"CAEM-{experts}"
        others = [
            seed.soup(caem, f"Baseline-{experts}"),
            seed.soup(f"{caem}-Avg", f"Baseline-{experts}"),
        ]
        holds[f"Table 4: {caem} with {caem}-Avg is the best soup"] = seed.soup(
            caem, f"{caem}-Avg"
        ) > max(others)
    return holds


def _orderings_of_layers(seed: Results) -> dict[str, bool]:
    change = {}
    for experts in (8, 16):
        for stack in ("encoder", "decoder"):
            pair = (f"CAEM-{experts}", f"Baseline-{experts}", stack)
            change[experts, stack] = seed.likeness(*pair) - seed.likeness(*pair, "before")
    with_8 = seed.likeness("CAEM-8-to-16", "CAEM-8", "encoder")
    with_16 = seed.likeness("CAEM-8-to-16", "CAEM-16", "encoder")
    with_baseline = seed.likeness("CAEM-8-to-16", "Baseline-16", "encoder")
    return {
        "Figure 2: training brings encoders together (8 experts)": change[8, "encoder"] > 0,
        "Figure 2: training brings encoders together (16 experts)": change[16, "encoder"] > 0,
        "Figure 2: training brings decoders together (8 experts)": change[8, "decoder"] > 0,
        "Figure 2: training drives decoders apart (16 experts)": change[16, "decoder"] < 0,
        "Figure 4: CAEM-8-to-16 is nearer to CAEM-8 than to CAEM-16": with_8 > with_16,
        "Figure 4: CAEM-8-to-16 is nearer to Baseline-16 than to CAEM-16": with_baseline > with_16,
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
    """Each ordering with a verdict: holds or does not hold where all of three seeds or more agree,
    else unclear.
    """
    per_seed = [orderings(seed) for seed in results]
    rows = {}
    for name in per_seed[0]:
        count = sum(holds[name] for holds in per_seed)
        verdict = "unclear"
        if len(per_seed) >= ENOUGH_SEEDS and count in (0, len(per_seed)):
            verdict = "holds" if count else "does not hold"
        rows[name] = [f"{count} of {len(per_seed)}", verdict]
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
        len(pairs), 2, squeeze=False, sharey=True, figsize=(8, 2.6 * len(pairs))
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
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
