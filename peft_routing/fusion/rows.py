"""The rows of the report: how good each fusion is, what it costs, and what runs for it."""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import torch

from peft_routing.fusion.cache import Cache, Measured, Subject, Texts, milliseconds_per_token
from peft_routing.fusion.candidates import Candidate
from peft_routing.fusion.report import Row
from peft_routing.fusion.strategies import BY_TASK, CACHED, ENSEMBLE, Outcome, Tables
from peft_routing.fusion.subjects import base_alone, mixture_of, one_expert
from peft_routing.fusion.tables import Table, joined


def table_of(
    cache: Cache, experts: Sequence[str], columns: Sequence[Subject], texts: Sequence[Texts]
) -> Table:
    """The table of one split, from the cache."""
    values = []
    for each in texts:
        values.append([cache.read(subject, each).log_probabilities for subject in columns])
    return joined(experts, [each.task for each in texts], values, [each.counts for each in texts])


def costs_of(
    cache: Cache, columns: Sequence[Subject], texts: Sequence[Texts]
) -> list[float | None]:
    """The milliseconds per token of each column's passes; None as of `milliseconds_per_token`."""
    costs = []
    for subject in columns:
        measured = [cache.read(subject, each) for each in texts]
        costs.append(milliseconds_per_token(measured))
    return costs


def rows_of_tables(
    tables: Tables,
    wanted: Collection[str],
    costs: Sequence[float | None],
    sizes: Sequence[int],
    left_out: dict[str, str],
) -> list[Row]:
    """The rows of the strategies that take no passes but the experts' own."""
    rows = []
    for name, strategy in CACHED.items():
        if name not in wanted:
            continue
        outcome = strategy(tables)
        if isinstance(outcome, str):
            left_out[name] = outcome
            continue
        used = list(chain.from_iterable(outcome.used))
        size = sum(sizes[column] for column in set(used) if column < len(sizes))
        count = len(outcome.used)
        cost = _sum([costs[column] for column in used])
        mean_cost = None if cost is None else cost / count
        passes = len(used) / count
        rows.append(_row(name, outcome, tables, passes=passes, cost=mean_cost, size=size))
    return rows


def _sum(costs: Sequence[float | None]) -> float | None:
    """The sum of costs; None where one is not known."""
    known = [cost for cost in costs if cost is not None]
    return math.fsum(known) if len(known) == len(costs) else None


def rows_of_candidates(
    candidates: Mapping[str, Candidate],
    cache: Cache,
    texts: Mapping[str, Sequence[Texts]],
    tables: Tables,
) -> list[Row]:
    """The rows of what was put on the base model and measured."""
    rows = []
    for name, candidate in candidates.items():
        measured: dict[str, list[Measured]] = {}
        for split in ("validation", "test"):
            measured[split] = [cache.read(candidate.subject, each) for each in texts[split]]
        outcome = Outcome(
            candidate.kind,
            torch.cat([each.log_probabilities for each in measured["validation"]]),
            torch.cat([each.log_probabilities for each in measured["test"]]),
            used=[],
            parameters=candidate.parameters,
            note=candidate.note,
            values=candidate.values,
        )
        cost = milliseconds_per_token(measured["test"])
        row = _row(name, outcome, tables, passes=candidate.passes, cost=cost, size=candidate.size)
        rows.append(row)
    return rows


def _row(
    name: str,
    outcome: Outcome,
    tables: Tables,
    *,
    passes: float,
    cost: float | None,
    size: int,
) -> Row:
    """The row of an outcome, whose passes per text cost so many milliseconds per token, and for
    which `size` bytes are kept.
    """
    return Row(
        name=name,
        kind=outcome.kind,
        validation=tables.validation.task_losses(outcome.validation).tolist(),
        test=tables.test.task_losses(outcome.test).tolist(),
        passes=passes,
        milliseconds=cost,
        megabytes=size / 1e6,
        parameters=outcome.parameters,
        note=outcome.note,
        values=outcome.values,
    )


def coefficients_of(row: Row, experts: Collection[str]) -> dict[str, float]:
    """The coefficients of an ensemble's experts, by name."""
    # A posterior ensemble starts from equal coefficients, and names none.
    return row.values.get("coefficients", dict.fromkeys(experts, 1 / len(experts)))


def subject_of(
    row: Row,
    experts: Mapping[str, str],
    candidates: Mapping[str, Candidate],
    task: str | None = None,
) -> Subject:
    """What runs for a row; for one that goes by the task, on that task."""
    if row.name in candidates:
        return candidates[row.name].subject
    if row.kind == ENSEMBLE:
        beta = row.values.get("beta", 0.0)
        return mixture_of(row.name, experts, coefficients_of(row, experts), beta=beta)
    expert = row.values["by_task"][task] if row.kind == BY_TASK else row.note
    if isinstance(expert, list):  # a cluster
        return mixture_of(row.name, experts, dict.fromkeys(expert, 1 / len(expert)))
    return one_expert(expert, experts[expert]) if expert in experts else base_alone()
