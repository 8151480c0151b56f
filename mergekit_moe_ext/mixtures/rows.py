"""Training of some experts' rows of the gates alone, while the other rows stay as they are, bit for
bit.

Gradients of the other rows are zero before anything sums over them (clipping does), and what the
optimizer does to these rows all the same (weight decay, for one) is undone after each step.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.mixtures.experts import index_of_expert, num_experts
from mergekit_moe_ext.mixtures.routers import Choice, recorded, routers_of


def indices_of(config: Any, experts: Sequence[str]) -> list[int]:
    """The indices of the experts that are given by name or number, ascending."""
    return sorted({index_of_expert(config, expert) for expert in experts})


class OtherRowsFixed(TrainerCallback):
    """A callback that keeps all rows of the gates but those of some experts.

    A router's parameters have one row per expert, along their first axis.
    """

    def __init__(self, model: Any, free: Sequence[int]) -> None:
        number = num_experts(model.config)
        fixed = [index for index in range(number) if index not in free]
        self._rows: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for name, router in routers_of(model).items():
            for parameter in router.parameters():
                if not parameter.requires_grad:
                    continue
                if len(parameter) != number:
                    raise UserError(f"{name} does not hold a row per expert: train all of it")
                rows = torch.tensor(fixed, device=parameter.device)
                self._rows.append((parameter, rows, parameter.detach()[rows].clone()))
                parameter.register_hook(_without_rows(fixed))

    def on_optimizer_step(self, *_arguments: Any, **_keywords: Any) -> None:
        with torch.no_grad():
            for parameter, rows, values in self._rows:
                parameter[rows.to(parameter.device)] = values.to(parameter.device)


def _without_rows(rows: Sequence[int]) -> Any:
    """A hook that sets these rows of a gradient to zero."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[rows] = 0
        return gradient

    return hook


def check_chosen(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], free: Sequence[int]
) -> None:
    """`UserError` where no token of these batches chooses any of the experts.

    No loss has a gradient for the row of an expert that nothing is sent to.
    """
    model.eval()
    for batch in batches:
        with torch.no_grad(), recorded(model) as choices:
            model(**batch, use_cache=False)
        if any(_is_chosen(choice, free) for choice in choices.values()):
            return
    raise UserError(
        "no token of the first texts chooses an expert of --only-experts, so the loss has no "
        "gradient for their rows; give --router-aux-loss, or add them with `gate_init: prompts`"
    )


def _is_chosen(choice: Choice, experts: Sequence[int]) -> bool:
    return bool(torch.isin(choice.experts.cpu(), torch.tensor(list(experts))).any())
