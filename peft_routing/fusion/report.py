"""What `compare` found: a table, a sentence per budget, JSON and figures."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from _mergekit_moe_ext_common.cards import in_markdown
from _mergekit_moe_ext_common.figures import pyplot
from _mergekit_moe_ext_common.tables import in_columns
from peft_routing.fusion.beside import REPORT, Beside
from peft_routing.fusion.selection import NotFirst, own_experts, standard_error
from peft_routing.fusion.strategies import BY_TASK, ENSEMBLE, OTHER, PLAIN, ROUTED, Tables

# The factors of the standard error that 95 percent of a mean's distribution lie within, by degrees
# of freedom from 1 on (Student); beyond them 1.96 + 2.5 / degrees is exact to 0.02.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
_COLOURS = {
    PLAIN: "tab:blue",
    ROUTED: "tab:green",
    OTHER: "tab:purple",
    ENSEMBLE: "tab:orange",
    BY_TASK: "tab:grey",
}
# As lm_eval marks whether a metric is the better the higher, or the lower it is.
_ARROWS = {True: " ↑", False: " ↓", None: ""}
_HEADINGS = (
    "strategy",
    "test loss",
    "± s.e.",
    "to the best",
    "± s.e.",
    "passes",
    "ms/token",
    "MB",
    "learned",
)


@dataclass(frozen=True)
class HarnessScore:
    """What lm_eval measured on one of its tasks.

    metric: the first that lm_eval lists, with its filter's name where it has one.
    value, standard_error: of that metric; None where lm_eval gives no error.
    higher_is_better: None where lm_eval does not say.
    metrics: all that it measured, by its own names.
    """

    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One fusion: how good it is, and what it costs.

    validation, test: the loss of each task, in nats per token.
    passes: the forward passes per text, a mean over tasks; 1 is the base model's own.
    milliseconds: of these passes, per token, as measured here; None where any was measured on
    another machine.
    megabytes: what is kept beside the base model.
    parameters: how many numbers were learned.
    scores: of each task by the metric, on the test; None without one.
    lm_eval: by its tasks what lm_eval measured; empty for a row that goes by our task.
    """

    name: str
    kind: str
    validation: list[float]
    test: list[float]
    passes: float
    milliseconds: float | None
    megabytes: float
    parameters: int
    note: str
    values: dict[str, Any]
    scores: list[float] | None = None
    lm_eval: dict[str, HarnessScore] = field(default_factory=dict)

    @property
    def validation_loss(self) -> float:
        return _mean(self.validation)

    @property
    def test_loss(self) -> float:
        return _mean(self.test)

    def difference(self, other: "Row") -> tuple[float, float]:
        """The mean over tasks of this test loss less the other one, and its standard error."""
        differences = torch.tensor(self.test).double() - torch.tensor(other.test).double()
        return differences.mean().item(), standard_error(differences)


@dataclass(frozen=True)
class Selected:
    """Experts in the order of their greedy selection on validation, with its curves (B.6).

    validation, test: the mean loss over tasks with the first 0, 1, 2 … of them.
    random: that on validation with experts in random order, the mean of many orders.
    elbow: the number of experts at which the validation curve bends most.
    reaches_own: the fewest that are as good on validation as each task's own expert; None where
    they never are, or a task has none.
    """

    order: list[str]
    validation: list[float]
    test: list[float]
    random: list[float]
    elbow: int
    reaches_own: int | None


@dataclass(frozen=True)
class Calibration:
    """How much a router loses where it keeps one expert (B.4).

    one, many: the rows with one expert and with more.
    gap: the mean over tasks of the test loss of the first less that of the other.
    standard_error: of that mean.
    """

    one: str
    many: str
    gap: float
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """Which fusions are best for a set of adapters.

    model: the sha256 of the base model.
    texts: by task the sha256 of the test.
    best: the name of the row with the least validation loss among those that need no task id.
    sentences: the best of each budget, in words.
    left_out: why a strategy has no row, by its name.
    not_first: experts that another beats on their own task.
    calibration: what each router loses with one expert.
    tables: what all this was computed from.
    beside: the fusions that earlier reports of other adapters have, too.
    metric: the name of what answers are measured by, where they are.
    """

    base: str
    model: str
    texts: dict[str, str]
    experts: dict[str, str]
    rows: list[Row]
    best: str
    sentences: list[str]
    left_out: dict[str, str]
    selected: Selected
    not_first: list[NotFirst]
    calibration: list[Calibration]
    tables: Tables
    beside: list[Beside] = field(default_factory=list)
    metric: str | None = None

    @property
    def headings(self) -> list[str]:
        """The heading of the table."""
        headings = [*_HEADINGS]
        if self.metric:
            headings += [self.metric, "± s.e."]
        for task, score in self.harness.items():
            headings += [f"{task}: {score.metric}{_ARROWS[score.higher_is_better]}", "± s.e."]
        return headings

    @property
    def harness(self) -> dict[str, HarnessScore]:
        """By lm_eval's tasks what it measured of the base model, and with it of what has a
        column.
        """
        return self.row("base").lm_eval

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.tables.test.tasks

    def row(self, name: str) -> Row:
        """The row of a strategy, by its name."""
        return next(row for row in self.rows if row.name == name)

    def cells(self) -> list[list[str]]:
        """The table as text, row by row, without its heading."""
        best = self.row(self.best)
        lines = []
        for row in self.rows:
            difference, error = row.difference(best)
            own_error = standard_error(torch.tensor(row.test))
            cells = [
                row.name,
                f"{row.test_loss:.4f}",
                _number(own_error),
                "" if row is best else f"{difference:+.4f}",
                "" if row is best else _number(error),
                f"{row.passes:.3g}",
                "" if row.milliseconds is None else f"{row.milliseconds:.3g}",
                f"{row.megabytes:.3g}",
                str(row.parameters),
            ]
            if row.scores is not None:
                error_of_score = standard_error(torch.tensor(row.scores))
                cells += [f"{_mean(row.scores):.3f}", _number(error_of_score)]
            for task in self.harness:
                cells += _harness_cells(row.lm_eval.get(task))
            lines.append(cells)
        return lines

    def write(self, directory: Path) -> None:
        """Writes `report.json` and `report.md` into a directory that exists."""
        text = json.dumps(self._as_json(), indent=1, allow_nan=False)
        (directory / REPORT).write_text(text + "\n", encoding="utf-8")
        (directory / "report.md").write_text(self._as_markdown(), encoding="utf-8")

    def _as_json(self) -> dict[str, Any]:
        best = self.row(self.best)
        rows = []
        for row in self.rows:
            difference, error = row.difference(best)
            values = asdict(row)
            values["test_loss"] = row.test_loss
            values["validation_loss"] = row.validation_loss
            values["standard_error"] = _finite(standard_error(torch.tensor(row.test)))
            values["difference_to_best"] = difference
            values["standard_error_of_difference"] = _finite(error)
            rows.append(values)
        return {
            "base": self.base,
            "model": self.model,
            "texts": self.texts,
            "experts": self.experts,
            "tasks": list(self.tasks),
            "best": self.best,
            "metric": self.metric,
            "sentences": self.sentences,
            "rows": rows,
            "left_out": self.left_out,
            "selected": asdict(self.selected),
            "not_first": [_with_finite_error(each) for each in self.not_first],
            "calibration": [_with_finite_error(gap) for gap in self.calibration],
            "beside": [_with_finite_error(pair) for pair in self.beside],
            "losses": {
                "columns": [*self.experts, "base model"],
                "validation": self.tables.validation.losses.tolist(),
                "test": self.tables.test.losses.tolist(),
            },
        }

    def _as_markdown(self) -> str:
        lines = [
            "# Fusions compared",
            "",
            f"Base model {in_markdown(self.base)}, {len(self.experts)} adapters, tasks "
            f"{in_markdown(', '.join(self.tasks))}.",
            "",
            *[f"- {in_markdown(sentence)}" for sentence in self.sentences],
            "",
            f"| {' | '.join(in_markdown(each) for each in self.headings)} |",
            "|---|" + "---:|" * (len(self.headings) - 1),
        ]
        for name, *numbers in self.cells():
            lines.append(f"| {' | '.join([in_markdown(name), *numbers])} |")
        lines += ["", *[f"- {in_markdown(line)}" for line in notes(self)], ""]
        for other in dict.fromkeys(pair.other for pair in self.beside):
            lines += self._beside_as_markdown(other)
        return "\n".join(lines)

    def _beside_as_markdown(self, other: str) -> list[str]:
        """The fusions that another report has, too, as the lines of a table."""
        lines = [
            f"## Beside {in_markdown(other)}",
            "",
            f"| strategy | test loss | of {in_markdown(other)} | difference | ± s.e. |",
            "|---|---:|---:|---:|---:|",
        ]
        for pair in self.beside:
            if pair.other == other:
                numbers = [
                    f"{self.row(pair.name).test_loss:.4f}",
                    f"{_mean(pair.test):.4f}",
                    f"{pair.difference:+.4f}",
                    _number(pair.standard_error),
                ]
                lines.append(f"| {' | '.join([in_markdown(pair.name), *numbers])} |")
        return [*lines, ""]


def _harness_cells(score: HarnessScore | None) -> list[str]:
    """A score of lm_eval and its standard error, empty where there is none."""
    if score is None:
        return ["", ""]
    error = "" if score.standard_error is None else _number(score.standard_error)
    return [f"{score.value:.3f}", error]


def table(comparison: Comparison) -> str:
    """The table for a terminal."""
    return in_columns([comparison.headings, *comparison.cells()], labels=1)


def notes(comparison: Comparison) -> list[str]:
    """What the table has no column for, a sentence each."""
    lines = [f"{row.name}: {row.note}" for row in comparison.rows if row.note]
    lines += [f"{name} is left out: {why}" for name, why in comparison.left_out.items()]
    if any(row.milliseconds is None for row in comparison.rows):
        lines.append("ms/token is left out where passes were measured on another machine")
    if comparison.harness and any(not row.lm_eval for row in comparison.rows):
        lines.append("lm_eval's tasks have no figure where the adapter goes by our task")
    selected = comparison.selected
    line = f"greedy selection bends most at {selected.elbow} of {len(selected.order)} experts"
    if selected.reaches_own == 0:
        line += ", and the base model alone is as good as each task's own"
    elif selected.reaches_own is not None:
        line += f", and the first {selected.reaches_own} of it do as well as each task's own"
    lines.append(line)
    for pair in comparison.beside:
        lines.append(
            f"{pair.name} is {pair.difference:+.4f}{_give_or_take(pair.standard_error)} to that "
            f"of {pair.other}: {'clear' if _is_clear_pair(pair) else 'not distinguishable'}"
        )
    for gap in comparison.calibration:
        lines.append(
            f"calibration (B.4): {gap.one} is {gap.gap:+.4f}{_give_or_take(gap.standard_error)} "
            f"to {gap.many}"
        )
    tables = comparison.tables
    own = sum(place is not None for place in own_experts(tables.test, tables.own))
    if own:
        beaten = comparison.not_first
        clear = 0
        for each in beaten:
            is_clear = _is_clear(each.difference, each.standard_error, each.texts - 1)
            clear += is_clear and each.difference > 0  # the test may say the contrary
        lines.append(
            f"{len(beaten)} of {own} experts are not first on their own task, {clear} of them "
            "clearly so on the test"
        )
    return lines


def budget_sentences(rows: Sequence[Row], metric: str | None = None) -> list[str]:
    """The best fusion of each budget by validation loss, from the smallest budget on.

    `metric` is the name of what the rows' scores are by.
    """
    budgets: list[tuple[str, Callable[[Row], bool]]] = [
        ("one pass, one plain LoRA", lambda row: row.kind == PLAIN),
        ("one pass", lambda row: row.kind in (PLAIN, ROUTED, OTHER)),
        ("any number of passes", lambda row: row.kind != BY_TASK),
        (
            "one plain LoRA per request, the task known",
            lambda row: row.kind in (PLAIN, BY_TASK) and row.passes == 1,
        ),
    ]
    sentences: list[str] = []
    told: list[Row] = []
    for budget, is_within in budgets:
        within = [row for row in rows if is_within(row)]
        if not within:
            continue
        best = min(within, key=lambda row: row.validation_loss)
        sentences.append(f"{budget}: {_told(best, told, metric)}")
        told.append(best)
    return sentences


def _told(best: Row, told: Sequence[Row], metric: str | None) -> str:
    """The best of a budget in words, after those of smaller budgets."""
    if best in told:
        return f"{best.name} again"
    name = f"{best.name} ({best.note})" if best.kind == PLAIN and best.note else best.name
    passes = "1 pass" if best.passes == 1 else f"{best.passes:.3g} passes"
    text = f"{name}, test loss {best.test_loss:.4f}{_scores_told(best, metric)}, {passes}"
    if not told:
        return text
    difference, error = best.difference(told[0])
    text += f", {difference:+.4f} to {told[0].name}"
    if not _is_clear(difference, error, len(best.test) - 1):
        text += ": not distinguishable"
    return text


def _scores_told(row: Row, metric: str | None) -> str:
    """What a row's answers are worth, and what lm_eval says of it, with a comma before each."""
    text = ""
    if metric is not None and row.scores is not None:
        text += f", {metric} {_mean(row.scores):.3f}"
    for task, score in row.lm_eval.items():
        text += f", {task} {score.metric} {score.value:.3f}"
    return text


def _is_clear(difference: float, error: float, degrees: int) -> bool:
    """Whether a mean is further from 0 than chance would have it 19 times in 20.

    `degrees` of freedom are those of its standard error, which is NaN without any.
    """
    if degrees < 1:
        return False
    is_few = degrees <= len(_STUDENT)
    factor = _STUDENT[degrees - 1] if is_few else 1.96 + 2.5 / degrees
    return abs(difference) > factor * error


def _is_clear_pair(pair: Beside) -> bool:
    return _is_clear(pair.difference, pair.standard_error, len(pair.test) - 1)


def draw(comparison: Comparison, directory: Path) -> None:
    """Draws the losses of all fusions (figure 2), loss against cost, the loss matrix, learned
    coefficients (figure 6), the selection (figure 7) and, where there are other reports, the losses
    of theirs beside these (figure 4).
    """
    _draw_losses(comparison, directory)
    _draw_pareto(comparison, directory)
    _draw_matrix(comparison, directory)
    _draw_coefficients(comparison, directory)
    _draw_selection(comparison, directory)
    if comparison.beside:
        _draw_beside(comparison, directory)


def _draw_losses(comparison: Comparison, directory: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.32 * len(comparison.rows)))
    rows = comparison.rows[::-1]
    for place, row in enumerate(rows):
        error = standard_error(torch.tensor(row.test))
        axes.errorbar(
            row.test_loss,
            place,
            xerr=0 if math.isnan(error) else error,
            fmt="o",
            color=_COLOURS[row.kind],
            capsize=3,
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    for kind, colour in _COLOURS.items():
        axes.plot([], [], "o", color=colour, label=kind)
    axes.legend(fontsize=7)
    axes.set_xlabel("test loss, mean and standard error over tasks (nats per token)")
    _save(figure, directory / "losses.png")


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows than which none is both cheaper and better on test, from the cheapest on.

    Cost is passes, and of equally many the smaller files are cheaper.
    """
    best = math.inf
    front = []
    for row in sorted(rows, key=lambda row: (row.passes, row.megabytes, row.test_loss)):
        if row.test_loss < best:
            front.append(row)
            best = row.test_loss
    return front


def _draw_pareto(comparison: Comparison, directory: Path) -> None:
    """Loss against passes; the line joins what nothing cheaper beats. Who must know the task is
    apart.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for row in comparison.rows:
        axes.plot(row.passes, row.test_loss, "o", color=_COLOURS[row.kind])
    front = pareto([row for row in comparison.rows if row.kind != BY_TASK])
    axes.plot([row.passes for row in front], [row.test_loss for row in front], color="black")
    for row in front:
        axes.annotate(
            row.name, (row.passes, row.test_loss), fontsize=7, xytext=(4, 4),
            textcoords="offset points",
        )  # fmt: skip
    for kind in dict.fromkeys(row.kind for row in comparison.rows):
        axes.plot([], [], "o", color=_COLOURS[kind], label=kind)
    axes.legend(fontsize=7)
    axes.set_xlabel("forward passes per text")
    axes.set_ylabel("test loss (nats per token)")
    _save(figure, directory / "pareto.png")


def _draw_matrix(comparison: Comparison, directory: Path) -> None:
    plt = pyplot()
    matrix = comparison.tables.test.losses
    columns = [*comparison.experts, "base model"]
    figure, axes = plt.subplots(figsize=(1.5 + 0.3 * len(columns), 1.5 + 0.3 * len(matrix)))
    # Of each task relative to its best, since tasks differ more than experts do.
    image = axes.imshow(matrix - matrix.amin(dim=1, keepdim=True), cmap="Blues", aspect="auto")
    if len(columns) <= 64:
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(matrix)), comparison.tasks, fontsize=7)
    figure.colorbar(image, label="test loss above the task's least")
    _save(figure, directory / "loss_matrix.png")


def _draw_coefficients(comparison: Comparison, directory: Path) -> None:
    """The coefficients of each ensemble whose coefficients are not all alike, from the largest on.

    There is no figure where there is no such ensemble.
    """
    by_row = {}
    for row in comparison.rows:
        coefficients = sorted(row.values.get("coefficients", {}).values(), reverse=True)
        if coefficients and coefficients[0] > coefficients[-1]:
            by_row[row.name] = coefficients
    if not by_row:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for name, coefficients in by_row.items():
        count = sum(coefficient > 0 for coefficient in coefficients)
        places = range(1, len(coefficients) + 1)
        axes.plot(places, coefficients, ".-", label=f"{name}, {count} above 0")
    axes.set_xlabel("experts, from the largest coefficient on")
    axes.set_ylabel("coefficient")
    axes.legend(fontsize=7)
    _save(figure, directory / "coefficients.png")


def _draw_selection(comparison: Comparison, directory: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.2))
    selected = comparison.selected
    axes.plot(selected.validation, label="greedy, validation")
    axes.plot(selected.test, label="the same, test")
    axes.plot(selected.random, "--", label="random, validation")
    axes.axvline(selected.elbow, color="grey", linewidth=0.8)
    axes.set_xlabel("number of experts")
    axes.set_ylabel("mean loss with the best per task")
    axes.legend(fontsize=7)
    _save(figure, directory / "selection.png")


def _draw_beside(comparison: Comparison, directory: Path) -> None:
    """The mean loss of each fusion that another report has, too: a mark for each report."""
    plt = pyplot()
    names = list(dict.fromkeys(pair.name for pair in comparison.beside))
    figure, axes = plt.subplots(figsize=(7, 1 + 0.35 * len(names)))
    own = [comparison.row(name).test_loss for name in names]
    axes.plot(own, range(len(names)), "o", label="these adapters")
    for number, other in enumerate(dict.fromkeys(pair.other for pair in comparison.beside)):
        pairs = [pair for pair in comparison.beside if pair.other == other]
        axes.plot(
            [_mean(pair.test) for pair in pairs],
            [names.index(pair.name) for pair in pairs],
            "sD^v"[number % 4],
            label=other,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    axes.set_xlabel("test loss, mean over tasks (nats per token)")
    _save(figure, directory / "beside.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot().close(figure)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _with_finite_error(compared: NotFirst | Calibration | Beside) -> dict[str, Any]:
    """The fields for JSON, which has no number for the standard error of a single value."""
    return {**asdict(compared), "standard_error": _finite(compared.standard_error)}


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _give_or_take(error: float) -> str:
    """A standard error in brackets, with a space before it; nothing where one task gives none."""
    return "" if math.isnan(error) else f" (± {error:.4f})"
