"""The load-balancing loss of a forward pass: its value in the loss, its gradient at each module.

Reentrant gradient checkpointing runs a layer first without a graph, and again, with one, when the
loss is differentiated. What a layer gives to the loss of the first run has no gradient. So the
model's loss takes up the load-balancing loss as a number, and says, when it is differentiated
itself, by how much that number is multiplied. Each module's coefficients have their gradient later
in the same backward pass, in whatever run of the layer it reaches, and there the module's own part
is differentiated.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable


class Balance:
    """The load-balancing losses of the modules that one forward pass goes through."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._losses: list[Tensor] = []
        self._is_complete = False
        # What a module's loss is multiplied by in the backward pass that is running, once that has
        # been through the model's loss.
        self._factor: Tensor | None = None
        self._was_differentiated = False
        self._was_missed = False

    def __bool__(self) -> bool:
        return bool(self._losses)

    def with_gradient(self, coefficients: Tensor, loss: Tensor) -> Tensor:
        """A module's coefficients, whose backward pass differentiates its loss, a scalar, too."""
        # Checkpointing comes by again when the pass is over.
        if not self._is_complete:
            self._losses.append(loss.detach())
        return _AtModule.apply(coefficients, loss, self)

    def added_to(self, loss: Tensor, share: Any) -> Tensor:
        """The model's loss plus this one, of which the pass has this share in a step."""
        self._is_complete = True
        factor = self.weight * share / len(self._losses)
        total = torch.stack([part.to(loss.device) for part in self._losses]).sum()
        return _InLoss.apply(loss, total * factor, factor, self)

    def begin_backward(self, factor: Tensor) -> None:
        self._factor = factor
        self._was_differentiated = True
        # A later backward pass of the same graph may start elsewhere than at the loss.
        Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._factor = None

    def factor(self) -> Tensor | None:
        """What a module's loss is multiplied by now; None where the loss is not differentiated.

        A warning says so where the model's loss was never differentiated.
        """
        if not self._was_differentiated:
            self.warn_of_no_loss()
        return self._factor

    def warn_of_no_loss(self) -> None:
        """Say, once, that this training pass does without the load-balancing loss, and why."""
        self._is_complete = True
        if self._was_missed:
            return
        self._was_missed = True
        warnings.warn(
            f"router_aux_loss_coef={self.weight} has no effect in this training pass: the "
            "load-balancing loss is added to the loss that the model returns, and what is "
            "differentiated is another one. The Trainer makes its own with label_smoothing_factor "
            "or compute_loss_func: leave these out, or give labels to the model and train with "
            "its loss",
            stacklevel=2,
        )


class _AtModule(torch.autograd.Function):
    """A module's coefficients as they are; see `Balance.with_gradient`."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, loss: Tensor, balance: Balance) -> Tensor:
        ctx.balance = balance
        ctx.of_loss = {"device": loss.device, "dtype": loss.dtype}
        return coefficients.view_as(coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        factor = ctx.balance.factor()
        return gradient, None if factor is None else factor.to(**ctx.of_loss), None


class _InLoss(torch.autograd.Function):
    """The model's loss plus a number; see `Balance.added_to`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, number: Tensor, factor: Any, balance: Balance) -> Tensor:
        ctx.balance = balance
        ctx.factor = factor
        return loss + number.to(loss.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.balance.begin_backward(gradient * ctx.factor)
        return gradient, None, None, None
