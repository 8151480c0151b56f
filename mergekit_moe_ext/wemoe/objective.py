"""The objective of adaptation, the entropy of predictions, and what watches it: a guard against
collapse, and patience.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

_FLOOR = 0.5  # the share of the mean prediction's first entropy below which the guard acts
_PER_CLASS = 4  # the number of predictions per class in the guard's running mean
_LEAST_WEIGHT = 0.01  # the least weight of a batch in that mean
_MOMENTUM = 0.9  # that of the objective's running mean
_LEAST_GAIN = 1e-3  # the share by which the objective must fall to count as progress


def entropy(logits: Tensor) -> Tensor:
    """The entropy of softmax(logits), in nats: (…, classes) to (…) (WEMoE, equation 5)."""
    logs = logits.log_softmax(-1)
    return _minus_mean_log(logs.exp(), logs)


def _entropy_of_probabilities(p: Tensor) -> Tensor:
    """The entropy of probabilities p, in nats: (…, classes) to (…)."""
    return _minus_mean_log(p, p.clamp(min=torch.finfo(p.dtype).tiny).log())


def _minus_mean_log(p: Tensor, logs: Tensor) -> Tensor:
    """Minus the sum of p log p over the classes, where the logarithms are known."""
    # A probability of zero has a logarithm of minus infinity, and 0 times that would be NaN.
    return -(p * logs.clamp(min=torch.finfo(p.dtype).min)).sum(-1)


class Guard:
    """A penalty on the loss of a task whose predictions go to a few classes, whatever the input.

    The entropy of their running mean shows such a collapse: where it falls below a floor, the
    penalty is the difference. The mean runs over about four predictions per class, enough to show
    all classes, and few enough to show a collapse in time. The floor is a share of the highest
    entropy that the mean had while it filled, since a small first batch has few of the classes. The
    gradient is taken as if all of the mean had moved as the last batch did. Below the floor,
    entropy and penalty together are the information-maximisation loss of SHOT (Liang et al. 2020).

    Checkpoints hold its state, each a tensor by task:

    mean: the running mean of the predictions (classes,).
    floor: the least entropy of that mean that costs nothing, a scalar.
    acted: the number of steps in which the guard acted.
    steps: the number of steps.
    """

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.floor: dict[str, Tensor] = {}
        self.acted: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}

    def penalty(self, task: str, mean: Tensor, number: float) -> Tensor:
        """The penalty, a scalar, for the mean (classes,) of the predictions in a batch of the task,
        and their number.
        """
        batch_mean = mean.detach()
        self._take(task, batch_mean, number)
        floor = self.floor[task].to(batch_mean.device)
        # `mean - batch_mean` is zero, and carries the gradient into the running mean.
        shortfall = floor - _entropy_of_probabilities(self.mean[task] + mean - batch_mean)
        if shortfall > 0:
            self.acted[task] = self.acted[task] + 1
        return shortfall.clamp(min=0)

    def _take(self, task: str, batch_mean: Tensor, number: float) -> None:
        """Take a batch's mean prediction (classes,), of that number, into the running mean, and
        raise the floor while that mean fills.
        """
        weight = min(1.0, max(_LEAST_WEIGHT, number / (_PER_CLASS * len(batch_mean))))
        if task not in self.mean:
            self.mean[task] = batch_mean.clone()
            self.floor[task] = batch_mean.new_zeros(())
            self.acted[task] = torch.zeros((), dtype=torch.int64)
            self.steps[task] = torch.zeros((), dtype=torch.int64)
        else:
            before = self.mean[task].to(batch_mean.device)
            self.mean[task] = (1 - weight) * before + weight * batch_mean
        self.steps[task] = self.steps[task] + 1
        # The mean fills until the weights of its batches sum up to 1.
        if self.steps[task] == 1 or self.steps[task] * weight <= 1:
            floor = self.floor[task].to(batch_mean.device)
            share = _FLOOR * _entropy_of_probabilities(self.mean[task])
            self.floor[task] = floor.maximum(share)


class Patience(TrainerCallback):
    """A callback that stops the training once the running mean of the objective has not fallen for
    `steps` steps; with None it never does.
    """

    def __init__(self, steps: int | None):
        self.steps = steps
        self.running = torch.full((), torch.nan, dtype=torch.float64)
        self.best = self.running
        self.waited = torch.zeros((), dtype=torch.int64)
        self._objective = 0.0

    def add(self, value: Tensor) -> None:
        """Add the objective of one task to that of this step."""
        self._objective += value.item()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        objective = torch.tensor(self._objective, dtype=torch.float64)
        self._objective = 0.0
        if self.running.isnan():
            self.running = objective
        else:
            self.running = _MOMENTUM * self.running + (1 - _MOMENTUM) * objective
        if self.best.isnan() or self.running < (1 - _LEAST_GAIN) * self.best:
            self.best = self.running
            self.waited = torch.zeros_like(self.waited)
        else:
            self.waited = self.waited + 1
        is_over = self.steps is not None and self.waited >= self.steps
        if is_over and not control.should_training_stop:
            control.should_training_stop = True
            control.should_evaluate = True  # so that the last step is measured, too
