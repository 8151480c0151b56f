"""Which experts are of use: the choice of one per task, and of few for all (Trade-offs 2.4, 5.1,
B.6).

Losses are (tasks, experts + 1), the base model's in the last column, as `Table.losses` has them.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_routing.fusion.tables import Table


@dataclass(frozen=True)
class Selection:
    """Experts in the order in which they were selected, and the loss with the first k of them.

    order: the indices of the experts.
    curve: the mean loss over tasks with the first 0, 1, 2 … experts, where every task gets the
    best of them or the base model.
    elbow: the number of experts at which the curve bends most.
    """

    order: list[int]
    curve: list[float]
    elbow: int


@dataclass(frozen=True)
class NotFirst:
    """An expert that is not the best one on its own task (5.1).

    better: the expert that is, by validation.
    difference: the mean over the test texts of the loss of the own expert less that of the better
    one, in nats per text.
    standard_error: of that mean; NaN for a single text.
    texts: the number of test texts.
    """

    expert: str
    better: str
    difference: float
    standard_error: float
    texts: int


def best_expert(losses: Tensor) -> int:
    """The index of the expert with the least mean loss over tasks; the base is no choice."""
    return int(losses[:, :-1].mean(dim=0).argmin())


def best_per_task(losses: Tensor) -> list[int]:
    """For each task the column with the least loss, the base model's among them."""
    return losses.argmin(dim=1).tolist()


def own_experts(table: Table, own: Mapping[str, str] | None = None) -> list[int | None]:
    """For each task the index of the expert that was trained on it, None where there is none.

    `own` names the expert of a task; that of the task's own name, if not given.
    """
    places = []
    for task in table.tasks:
        name = (own or {}).get(task, task)
        places.append(table.experts.index(name) if name in table.experts else None)
    return places


def greedy(losses: Tensor) -> Selection:
    """Experts by how much each lowers the mean loss, given those before it (B.6).

    F(S) = mean over tasks of L_base - min(L_base, min over i in S of L_i) is monotone and
    submodular, since the base model is always a choice. So the first k have at least 1 - 1/e of
    what the best k have, and a gain that was computed earlier bounds the gain now: only what leads
    by its bound is computed again.
    """
    of_experts = losses[:, :-1]
    so_far = losses[:, -1]
    curve = [so_far.mean().item()]

    def gain(expert: int) -> float:
        return (so_far - of_experts[:, expert]).clamp(min=0).mean().item()

    # The expert with the largest bound comes first; of equal ones, the first expert.
    bounds = [(-gain(expert), expert) for expert in range(of_experts.shape[1])]
    heapq.heapify(bounds)
    order: list[int] = []
    while bounds:
        _, expert = heapq.heappop(bounds)
        now = (-gain(expert), expert)
        # Another's bound is larger than this gain, which is a bound from now on.
        if bounds and bounds[0] < now:
            heapq.heappush(bounds, now)
            continue
        order.append(expert)
        so_far = torch.minimum(so_far, of_experts[:, expert])
        curve.append(so_far.mean().item())
    return Selection(order, curve, elbow_of(curve))


def curve_on(order: Sequence[int], choosing: Tensor, losses: Tensor) -> list[float]:
    """The mean of `losses` over tasks with the first 0, 1, 2 … experts of an order.

    Which of them a task gets, or the base model, is chosen by the losses `choosing`.
    """
    columns = [losses.shape[1] - 1]
    curve = []
    for expert in [None, *order]:
        if expert is not None:
            columns.append(expert)
        chosen = choosing[:, columns].argmin(dim=1, keepdim=True)
        curve.append(losses[:, columns].gather(1, chosen).mean().item())
    return curve


def random_curves(losses: Tensor, *, draws: int = 20, seed: int = 0) -> Tensor:
    """(draws, experts + 1): the curves of `greedy` for experts in random order, as a control."""
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for _ in range(draws):
        order = torch.randperm(losses.shape[1] - 1, generator=generator).tolist()
        curves.append(curve_on(order, losses, losses))
    return torch.tensor(curves, dtype=torch.float64)


def elbow_of(curve: Sequence[float]) -> int:
    """Where a falling curve is farthest below the line from its first to its last point."""
    last = len(curve) - 1
    distances = []
    for place, value in enumerate(curve):
        share = place / last if last else 0.0
        distances.append(curve[0] + share * (curve[-1] - curve[0]) - value)
    return max(range(len(curve)), key=distances.__getitem__)


def least_that_reaches(curve: Sequence[float], loss: float) -> int | None:
    """The least number of experts with which a curve is at or below a loss; None if it never is."""
    return next((count for count, value in enumerate(curve) if value <= loss), None)


def not_first(validation: Table, test: Table, own: Sequence[int | None]) -> list[NotFirst]:
    """The experts that another beats on their own task: found on validation, tested on test texts.

    `own` has the expert of each task, as `own_experts` gives it.
    """
    beaten = []
    losses = validation.losses[:, :-1]
    for task, expert in enumerate(own):
        if expert is None:
            continue
        better = int(losses[task].argmin())
        if losses[task, better] == losses[task, expert]:
            continue
        differences = _differences_of_texts(test, task, expert, better)
        beaten.append(
            NotFirst(
                expert=test.experts[expert],
                better=test.experts[better],
                difference=differences.mean().item(),
                standard_error=standard_error(differences),
                texts=len(differences),
            )
        )
    return beaten


def _differences_of_texts(table: Table, task: int, expert: int, other: int) -> Tensor:
    """(texts,): for each text of a task, the loss of an expert less that of another, in nats."""
    # A text is one observation: its tokens are not independent of each other.
    is_of_task = table.tasks_of == task
    of_task = table.log_probabilities[is_of_task].double()
    _texts, text_of_token = table.texts_of[is_of_task].unique_consecutive(return_inverse=True)
    differences = torch.zeros(int(text_of_token.max()) + 1, dtype=torch.float64)
    differences.index_add_(0, text_of_token, of_task[:, other] - of_task[:, expert])
    return differences


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of values (n,); NaN for one value."""
    if len(values) < 2:
        return math.nan
    return (values.double().std() / math.sqrt(len(values))).item()
