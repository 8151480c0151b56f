"""The fusions that `compare` knows, and what each gives for every token (Trade-offs 2.4 to 4, B).

A strategy of the first kind is computed from the tables of all experts: coefficients are learned on
train, choices are made on validation. One of the second kind is an adapter that is put on the base
model and measured. One of the third kind is trained before that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peft_routing.fusion.ensembles import (
    Learned,
    learned,
    learned_beta,
    loss_of,
    mixture,
    posterior,
    sparse,
    uniform,
)
from peft_routing.fusion.merges import MERGES
from peft_routing.fusion.selection import best_expert, best_per_task, own_experts
from peft_routing.fusion.tables import Table
from peft_routing.fusion.worst_case import WorstCase, linear_program, true_worst_case

PLAIN = "plain LoRA"  # one adapter that any server loads
ROUTED = "routed"  # one pass, and a router
OTHER = "other adapter"  # one pass, of an adapter that is neither
ENSEMBLE = "ensemble"  # a pass per expert
BY_TASK = "by task"  # an adapter per request, for which the task must be known


@dataclass(frozen=True)
class Outcome:
    """What a strategy gives.

    validation, test: the log-probabilities (tokens,) of the target tokens.
    used: for each task the columns whose passes it takes; the base model's is the last.
    parameters: how many numbers were learned.
    note: what was chosen or learned, in words.
    values: the same for JSON.
    """

    kind: str
    validation: Tensor
    test: Tensor
    used: list[list[int]]
    parameters: int = 0
    note: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tables:
    """The table of each split; all have the same experts and tasks.

    own: by task the expert that was trained on it, where it does not have the task's name.
    clusters: the cluster of each expert; None without any.
    """

    train: Table
    validation: Table
    test: Table
    own: Mapping[str, str] = field(default_factory=dict)
    clusters: Mapping[str, int] | None = None

    @cached_property
    def learned(self) -> Learned:
        """The coefficients of the least loss on train, which two strategies start from."""
        return learned(self.train.of_experts, self.train.weights)


def base(tables: Tables) -> Outcome:
    """The base model alone."""
    return _one_for_all(tables, len(tables.test.experts), "")


def best_of_all(tables: Tables) -> Outcome:
    """The expert with the least mean loss on validation."""
    chosen = best_expert(tables.validation.losses)
    return _one_for_all(tables, chosen, tables.test.experts[chosen])


def _one_for_all(tables: Tables, column: int, note: str) -> Outcome:
    return Outcome(
        PLAIN,
        tables.validation.log_probabilities[:, column],
        tables.test.log_probabilities[:, column],
        [[column]] * len(tables.test.tasks),
        note=note,
    )


def own_of_each_task(tables: Tables) -> Outcome | str:
    """The oracle: the expert that was trained on the task (2.4).

    A sentence in its place where a task has none.
    """
    own = _own_columns(tables)
    return own if isinstance(own, str) else _by_task(tables, own)


def own_cluster_of_each_task(tables: Tables) -> Outcome | str:
    """The oracle of clusters: the uniform ensemble of all experts in the cluster of the one that
    was trained on the task.

    A sentence in its place where a task has none, or there are no clusters.
    """
    if tables.clusters is None:
        return NEEDS_CLUSTERS
    own = _own_columns(tables)
    if isinstance(own, str):
        return own
    clusters = [tables.clusters[name] for name in tables.test.experts]
    members = []  # by task, the columns of the cluster
    for own_column in own:
        cluster = clusters[own_column]
        members.append([column for column, other in enumerate(clusters) if other == cluster])

    def log_probabilities_in(table: Table) -> Tensor:
        values = torch.empty(len(table.tasks_of), dtype=torch.float64)
        for task, columns in enumerate(members):
            is_of_task = table.tasks_of == task
            of_cluster = table.of_experts[is_of_task][:, columns]
            values[is_of_task] = mixture(of_cluster, uniform(len(columns)))
        return values

    by_task = {}
    for task, columns in zip(tables.test.tasks, members, strict=True):
        by_task[task] = [tables.test.experts[column] for column in columns]
    return Outcome(
        BY_TASK,
        log_probabilities_in(tables.validation),
        log_probabilities_in(tables.test),
        members,
        values={"by_task": by_task},
    )


def _own_columns(tables: Tables) -> list[int] | str:
    """The column of the expert that was trained on each task; a sentence where one has none."""
    columns = []
    for task, column in zip(tables.test.tasks, own_experts(tables.test, tables.own), strict=True):
        if column is None:
            return f"no expert is called {task!r}, as the task is, or is said to be of that task"
        columns.append(column)
    return columns


def best_of_each_task(tables: Tables) -> Outcome:
    """The best column of each task on validation, the base model's among them."""
    return _by_task(tables, best_per_task(tables.validation.losses))


def _by_task(tables: Tables, columns: Sequence[int]) -> Outcome:
    chosen = torch.tensor(columns)

    def log_probabilities_in(table: Table) -> Tensor:
        return table.log_probabilities.gather(1, chosen[table.tasks_of][:, None])[:, 0]

    names = [*tables.test.experts, "base model"]
    by_task = {}
    for task, column in zip(tables.test.tasks, columns, strict=True):
        by_task[task] = names[column]
    return Outcome(
        BY_TASK,
        log_probabilities_in(tables.validation),
        log_probabilities_in(tables.test),
        [[column] for column in columns],
        values={"by_task": by_task},
    )


def uniform_ensemble(tables: Tables) -> Outcome:
    """The mean of the experts' probabilities (3.1)."""
    return _ensemble(tables, uniform(len(tables.test.experts)))


def learned_ensemble(tables: Tables) -> Outcome:
    """The coefficients of the least loss on train (3.2.1)."""
    solution = tables.learned
    return _ensemble(
        tables,
        solution.coefficients,
        parameters=len(solution.coefficients),
        note=f"within {solution.certificate:.1e} nats of the least loss on train",
        values={"certificate": solution.certificate},
    )


def sparse_ensemble(tables: Tables) -> Outcome:
    """The fewest experts within 0.01 nats of the least loss on train."""
    whole = tables.learned
    solution = sparse(tables.train.of_experts, tables.train.weights, whole)
    count = int((solution.coefficients > 0).sum())
    return _ensemble(
        tables,
        solution.coefficients,
        parameters=count,
        note=f"{len(solution.coefficients) - count} passes fewer for "
        f"{solution.loss - whole.loss:.4f} nats on train",
        values={"certificate": solution.certificate},
    )


def posterior_ensemble(tables: Tables) -> Outcome:
    """Coefficients that follow each text, from uniform ones; beta is chosen on validation."""
    prior = uniform(len(tables.test.experts))
    train = tables.train
    of_train = learned_beta(train.of_experts, train.texts_of, prior, train.weights)
    validation = tables.validation
    outcomes = {}
    for beta in (0.0, 0.5, 1.0, of_train):
        outcomes[beta] = posterior(validation.of_experts, validation.texts_of, prior, beta)
    beta = min(outcomes, key=lambda each: loss_of(outcomes[each], validation.weights))
    is_learned = beta == of_train
    return Outcome(
        ENSEMBLE,
        outcomes[beta],
        posterior(tables.test.of_experts, tables.test.texts_of, prior, beta),
        [list(range(len(prior)))] * len(tables.test.tasks),
        parameters=int(is_learned),
        note=f"beta {beta:.2f}{', learned' if is_learned else ''}",
        values={"beta": beta},
    )


def program_ensemble(tables: Tables) -> Outcome:
    """The paper's linear program for the worst task, by losses on validation (B.5)."""
    return _for_the_worst_task(tables, linear_program, "by the program")


def worst_case_ensemble(tables: Tables) -> Outcome:
    """The coefficients with the least worst task on validation."""
    return _for_the_worst_task(tables, true_worst_case, "at least")


def _for_the_worst_task(
    tables: Tables, solve: Callable[[Tensor, Tensor, int], WorstCase], bound_is: str
) -> Outcome:
    """An ensemble that is solved for on validation; `bound_is` says what its bound is."""
    table = tables.validation
    solution = solve(table.of_experts, table.tasks_of, len(table.tasks))
    return _ensemble(
        tables,
        solution.coefficients,
        parameters=len(solution.coefficients),
        note=f"worst task on validation {solution.worst:.4f}, {bound_is} {solution.bound:.4f}",
        values={"worst": solution.worst, "bound": solution.bound},
    )


# What is below it changes no probability, and needs no pass.
_NO_COEFFICIENT = 1e-6


def _ensemble(
    tables: Tables,
    coefficients: Tensor,
    *,
    parameters: int = 0,
    note: str = "",
    values: Mapping[str, Any] | None = None,
) -> Outcome:
    kept = torch.where(coefficients > _NO_COEFFICIENT, coefficients, 0)
    kept = kept / kept.sum()
    columns = kept.nonzero()[:, 0].tolist()
    by_expert = dict(zip(tables.test.experts, kept.tolist(), strict=True))
    return Outcome(
        ENSEMBLE,
        mixture(tables.validation.of_experts, kept),
        mixture(tables.test.of_experts, kept),
        [columns] * len(tables.test.tasks),
        parameters,
        note,
        {"coefficients": by_expert, **(values or {})},
    )


# In the order of the table. A strategy returns its outcome, or why it has none.
CACHED: dict[str, Callable[[Tables], Outcome | str]] = {
    "base": base,
    "best_expert": best_of_all,
    "own_expert": own_of_each_task,
    "own_cluster": own_cluster_of_each_task,
    "best_per_task": best_of_each_task,
    "uniform_ensemble": uniform_ensemble,
    "learned_ensemble": learned_ensemble,
    "sparse_ensemble": sparse_ensemble,
    "posterior_ensemble": posterior_ensemble,
    "program_ensemble": program_ensemble,
    "worst_case_ensemble": worst_case_ensemble,
}
_PAPERS_TOP_K = 4


def composed_of(experts: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """By strategy its kind, and the options of the routed adapter of so many experts.

    A linear router that starts from zero is the uniform mixture, until it is trained, and so is a
    global one.
    """
    strategies: dict[str, tuple[str, dict[str, Any]]] = {
        # The mean of the experts' logits (B.3), which needs the whole vocabulary.
        "logit_ensemble": (ENSEMBLE, {"router": "uniform", "mixing": "full"}),
        "uniform_low_rank": (PLAIN, {"router": "uniform", "mixing": "low_rank"}),
        "uniform_full": (PLAIN, {"router": "uniform", "mixing": "full"}),
    }
    for name, top_k in (("arrow_top1", 1), ("arrow_top4", _PAPERS_TOP_K), ("arrow_all", experts)):
        # With so few experts they would be the same.
        if name == "arrow_all" or top_k < experts:
            strategies[name] = (ROUTED, {"router": "arrow", "top_k": top_k})
    return strategies


# By strategy its kind, and the options of the routed adapter that is trained. Where coefficients do
# not depend on the input, it is one plain LoRA afterwards.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "global": (PLAIN, {"router": "global"}),
    "layer": (PLAIN, {"router": "layer"}),
    "linear": (ROUTED, {"router": "linear"}),
    "linear_arrow": (ROUTED, {"router": "linear", "init": "arrow"}),
    "hierarchical": (ROUTED, {"router": "hierarchical"}),
    "hierarchical_arrow": (ROUTED, {"router": "hierarchical", "init": "arrow"}),
}

# Those that need the cluster of each expert, and what is said where that is not known.
OF_CLUSTERS = ("own_cluster", "hierarchical", "hierarchical_arrow")
NEEDS_CLUSTERS = "it needs the cluster of each expert: give --clusters-from"

STRATEGIES = (*CACHED, *composed_of(_PAPERS_TOP_K + 1), *MERGES, *TRAINED)
