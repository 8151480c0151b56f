"""The coefficients that the routers of a weight-ensembling model give to task vectors (WEMoE, 4.4,
figures 11 and 12).

`examples/wemoe_routing.py` prints and draws what is measured here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError


@dataclass(frozen=True)
class EnsembleRouting:
    """The coefficients of the inputs of each task, in float64.

    tasks: the names of the tasks.
    groups: the names of the modules whose input a router reads, from first to last layer.
    experts: the names of the task vectors.
    samples: per task, the number of inputs.
    mean: (tasks, groups, experts), the mean over the inputs of a task.
    spread: (tasks, groups, experts), the standard deviation of these inputs (not an estimate for
        others), 0 for a single one.
    first_choice: (tasks, groups, experts), the share of a task's inputs for which the expert's
        coefficient is the highest. Of k experts that share the highest, each gets 1/k of the input.
    """

    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    experts: tuple[str, ...]
    samples: tuple[int, ...]
    mean: Tensor
    spread: Tensor
    first_choice: Tensor

    def own_expert(self) -> Tensor:
        """The matrix (tasks, groups) of figure 12: how often the task's own expert, by name, is the
        first choice.

        The row of a task without an expert of its name is NaN.
        """
        shares = torch.full_like(self.first_choice[:, :, 0], torch.nan)
        for row, task in enumerate(self.tasks):
            if task in self.experts:
                shares[row] = self.first_choice[row, :, self.experts.index(task)]
        return shares


@torch.no_grad()
def ensemble_routing(
    model: Any, batches: Mapping[str, Iterable[Mapping[str, Tensor]]]
) -> EnsembleRouting:
    """The coefficients that a loaded model, in evaluation mode, gives to batches of inputs, per
    task.

    A batch holds the arguments of the model's `forward`, without labels. `UserError` for a task
    without inputs, for coefficients that are not finite, and for models that have more than one set
    of coefficients per input: decoders in mode `running` and encoder-decoders, unless
    `router_layers` is 0.
    """
    by_task = {}
    for task, task_batches in batches.items():
        by_task[task] = _coefficients(model, task, task_batches)
    return EnsembleRouting(
        tasks=tuple(by_task),
        groups=tuple(model.ensembling.groups),
        experts=tuple(model.ensembling.experts),
        samples=tuple(map(len, by_task.values())),
        mean=torch.stack([c.mean(0) for c in by_task.values()]),
        spread=torch.stack([c.std(0, correction=0) for c in by_task.values()]),
        first_choice=torch.stack([_first_choice(c) for c in by_task.values()]),
    )


def _coefficients(model: Any, task: str, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """The coefficients (samples, groups, experts) of all inputs of a task."""
    arguments: dict[str, Any] = {"use_cache": False} if model.can_generate() else {}
    heads = list(model.ensembling.heads)
    if heads:
        arguments["task"] = heads[0]  # coefficients do not depend on the head
    rows = []
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        c = model.coefficients(**inputs, **arguments).cpu().double()
        rows.append(c.expand(len(next(iter(inputs.values()))), -1, -1))  # constants come once
    if not rows:
        raise UserError(f"there are no inputs of {task!r}")
    coefficients = torch.cat(rows)
    if not coefficients.isfinite().all():
        raise UserError(f"the coefficients of some inputs of {task!r} are not finite")
    return coefficients


def _first_choice(coefficients: Tensor) -> Tensor:
    """The shares (groups, experts) of samples for which an expert has the highest coefficient."""
    highest = (coefficients == coefficients.amax(-1, keepdim=True)).double()
    return (highest / highest.sum(-1, keepdim=True)).mean(0)
