"""Which task vectors the routers of a weight-ensembling model give weight to (WEMoE, 4.4, figures
11 and 12).

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
    """Coefficients of the inputs of each task, in float64.

    tasks: whose inputs were given. groups: names of the modules whose input a router reads, from
    first to last layer.
    experts: what the task vectors are called. samples: per task the number of inputs.
    mean, spread: (tasks, groups, experts), over the inputs of a task; the spread is the standard
    deviation of these inputs (not an estimate for others), 0 for a single one.
    first_choice: (tasks, groups, experts), the share of a task's inputs to which the router gives
    this expert the highest coefficient. Where k experts have the same, each gets 1/k of the input.
    """

    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    experts: tuple[str, ...]
    samples: tuple[int, ...]
    mean: Tensor
    spread: Tensor
    first_choice: Tensor

    def own_expert(self) -> Tensor:
        """Figure 12's matrix (tasks, groups): how often the task's own expert, by name, is the
        first choice.

        NaN in the row of a task that no expert is called by.
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
    """What the routers of a loaded model, in evaluation mode, give to batches of inputs, per task.

    A batch is what the model's `forward` takes, without labels. `UserError` for a task without
    inputs, for coefficients that are not finite, and for models that have no one set of
    coefficients per input: decoders in mode `running` and encoder-decoders, unless `router_layers`
    is 0.
    """
    found = {task: _coefficients(model, task, of_task) for task, of_task in batches.items()}
    return EnsembleRouting(
        tasks=tuple(found),
        groups=tuple(model.ensembling.groups),
        experts=tuple(model.ensembling.experts),
        samples=tuple(map(len, found.values())),
        mean=torch.stack([c.mean(0) for c in found.values()]),
        spread=torch.stack([c.std(0, correction=0) for c in found.values()]),
        first_choice=torch.stack([_first_choice(c) for c in found.values()]),
    )


def _coefficients(model: Any, task: str, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """(samples, groups, experts)"""
    always: dict[str, Any] = {"use_cache": False} if model.can_generate() else {}
    if heads := list(model.ensembling.heads):
        always["task"] = heads[0]  # coefficients do not depend on the head
    rows = []
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        c = model.coefficients(**inputs, **always).cpu().double()
        rows.append(c.expand(len(next(iter(inputs.values()))), -1, -1))  # constants come once
    if not rows:
        raise UserError(f"there are no inputs of {task!r}")
    coefficients = torch.cat(rows)
    if not coefficients.isfinite().all():
        raise UserError(f"the coefficients of some inputs of {task!r} are not finite")
    return coefficients


def _first_choice(coefficients: Tensor) -> Tensor:
    """(samples, groups, experts) to shares (groups, experts)"""
    highest = (coefficients == coefficients.amax(-1, keepdim=True)).double()
    return (highest / highest.sum(-1, keepdim=True)).mean(0)
