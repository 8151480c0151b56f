"""What adaptation lowers, the entropy of predictions, and what watches it: a guard against
collapse, and patience.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

_FLOOR = 0.5  # of a task's first entropy of the mean prediction; the guard acts below it
_PER_CLASS = 4  # predictions in the guard's running mean
_LEAST_WEIGHT = 0.01  # of a batch in it
_MOMENTUM = 0.9  # of the objective's running mean
_LEAST_GAIN = 1e-3  # the part by which the objective falls while there is progress


def entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits), in nats: (…, classes) to (…) (equation 5)."""
    logs = logits.log_softmax(-1)
    return _entropy(logs.exp(), logs)


def _entropy(p: Tensor, logs: Tensor) -> Tensor:
    return -(p * logs.clamp(min=torch.finfo(p.dtype).min)).sum(-1)


class Guard:
    """Adds to the loss of a task whose predictions go to a few classes, whatever the input.

    That is seen by the entropy of their running mean: where it falls below a floor, the penalty is
    the difference. The mean runs over about four predictions per class, so that it shows all
    classes and yet no step too late; the floor is a share of the most that its entropy was while it
    filled, since a small first batch has few of the classes. Its gradient is taken as if all of it
    had moved as the last batch did. Together, entropy and penalty are the information-maximisation
    loss of SHOT (Liang et al. 2020), below the floor.
    """

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.floor: dict[str, Tensor] = {}
        self.acted: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}

    def penalty(self, task: str, mean: Tensor, number: float) -> Tensor:
        """A scalar, of the mean (classes,) of the predictions in a batch of the task, and their
        number.
        """
        now, weight = mean.detach(), min(1.0, max(_LEAST_WEIGHT, number / (_PER_CLASS * len(mean))))
        if task not in self.mean:
            self.mean[task], self.floor[task] = now.clone(), now.new_zeros(())
            self.acted[task] = self.steps[task] = torch.zeros((), dtype=torch.int64)
        else:
            self.mean[task] = (1 - weight) * self.mean[task].to(now.device) + weight * now
        self.steps[task] = self.steps[task] + 1
        if self.steps[task] == 1 or self.steps[task] * weight <= 1:
            self.floor[task] = (
                self.floor[task].to(now.device).maximum(_FLOOR * _entropy_of(self.mean[task]))
            )
        missing = self.floor[task].to(now.device) - _entropy_of(self.mean[task] + mean - now)
        if missing > 0:
            self.acted[task] = self.acted[task] + 1
        return missing.clamp(min=0)


def _entropy_of(p: Tensor) -> Tensor:
    return _entropy(p, p.clamp(min=torch.finfo(p.dtype).tiny).log())


class Patience(TrainerCallback):
    """Stops the training once the running mean of the objective falls no more."""

    def __init__(self, steps: int | None):
        self.steps = steps
        self.running = self.best = torch.full((), torch.nan, dtype=torch.float64)
        self.waited = torch.zeros((), dtype=torch.int64)
        self._of_this_step = 0.0

    def add(self, value: Tensor) -> None:
        """What one task adds to the objective in this step."""
        self._of_this_step += value.item()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = torch.tensor(self._of_this_step, dtype=torch.float64)
        self._of_this_step = 0.0
        self.running = (
            now if self.running.isnan() else _MOMENTUM * self.running + (1 - _MOMENTUM) * now
        )
        if self.best.isnan() or self.running < (1 - _LEAST_GAIN) * self.best:
            self.best, self.waited = self.running, torch.zeros_like(self.waited)
        else:
            self.waited = self.waited + 1
        if (
            self.steps is not None
            and self.waited >= self.steps
            and not control.should_training_stop
        ):
            control.should_training_stop = control.should_evaluate = True
