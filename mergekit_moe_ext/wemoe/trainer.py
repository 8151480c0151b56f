"""The Hugging Face Trainer as test-time adaptation needs it.

A step's objective is a sum over tasks. A guard acts where predictions collapse, and patience ends
the training where the objective falls no more.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import SequentialSampler

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.training import BarTrainer, TrainedOnly
from mergekit_moe_ext.recipes import Adaptation
from mergekit_moe_ext.wemoe.objective import Guard, Patience, entropy
from mergekit_moe_ext.wemoe.predictions import Predictions

LOG = logging.getLogger(__name__)
_RUNNING = "running.safetensors"
# Models that adapted well had coefficients up to 3, and those that a high rate ruined 16 and more
# (docs/wemoe_images.md).
_LARGEST = 6.0


class AdaptationTrainer(TrainedOnly, BarTrainer):
    """A Trainer that lowers the objective, task by task. Batches are `{task: inputs}`."""

    def __init__(self, *args: Any, predictions: Predictions, adaptation: Adaptation, **kwargs: Any):
        super().__init__(
            *args,
            data_collator=predictions.batch,
            compute_metrics=predictions.measures,
            **kwargs,
        )
        self._predictions = predictions
        self._is_supervised = adaptation.objective == "supervised"
        self._has_warned = False
        self.guard = None if adaptation.no_guard or self._is_supervised else Guard()
        self.patience = Patience(adaptation.patience)
        self.add_callback(self.patience)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        model.eval()  # the Trainer turns dropout on before every batch
        ((task, batch),) = inputs.items()
        logits, classes, _rows = self._predictions.of(model, task, batch)
        if not self._has_warned and self.is_world_process_zero():
            self._check_coefficients(task)
        # The mean is that of all predictions, however many of them each process has.
        count = self._over_processes(torch.tensor(float(len(logits)), device=logits.device))
        if self._is_supervised:
            assert classes is not None
            losses = functional.cross_entropy(logits, classes, reduction="none")
        else:
            losses = entropy(logits)
        loss = self._over_processes(losses.sum()) / count
        if not loss.isfinite():
            step = self.state.global_step
            raise UserError(f"the predictions of {task} are not finite at step {step}")
        self.patience.add(loss.detach())
        if self.guard is not None:
            mean = self._over_processes(logits.softmax(-1).sum(0)) / count
            loss = loss + self._penalty(task, mean, count.item())
        # The objective is the sum over tasks, and the Trainer takes their mean.
        return loss * self.current_gradient_accumulation_steps

    def guarded_steps(self) -> dict[str, int]:
        """The number of steps in which the guard acted, for the tasks where it did."""
        if self.guard is None:
            return {}
        return {task: int(count) for task, count in self.guard.acted.items() if count}

    def _check_coefficients(self, task: str) -> None:
        """One warning in a training, where coefficients leave the range of those that work. It
        needs no labels.
        """
        chosen = self._predictions.model._current.last
        largest = torch.stack([values.abs().max() for values in chosen.values()]).max()
        if largest > _LARGEST:
            self._has_warned = True
            LOG.warning(
                "step %d: a coefficient of %s has a magnitude of %.0f, where those of good models "
                "are at most 3: the --learning-rate is too high",
                self.state.global_step + 1,
                task,
                largest,
            )

    def _penalty(self, task: str, mean: Tensor, number: float) -> Tensor:
        """The guard's part of a task's loss, with one warning when it acts for the first time."""
        assert self.guard is not None
        penalty = self.guard.penalty(task, mean, number)
        if penalty > 0 and self.guard.acted[task] == 1 and self.is_world_process_zero():
            LOG.warning(
                "step %d: the predictions of %s go to ever fewer classes (the entropy of their "
                "mean is %.3f, below the floor of %.3f): the guard acts",
                self.state.global_step + 1,
                task,
                self.guard.floor[task] - penalty.detach(),
                self.guard.floor[task],
            )
        return penalty

    def _over_processes(self, value: Tensor) -> Tensor:
        """The sum of a value over all processes, with a gradient for this process's part."""
        # Gradients are averaged over the processes: scaled by their number they are the sum's, too.
        own = value * self.accelerator.num_processes
        return own + (self.accelerator.reduce(value.detach(), "sum") - own.detach())

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[None, Tensor, Tensor]:
        ((task, batch),) = self._prepare_inputs(inputs).items()
        with torch.no_grad(), self.compute_loss_context_manager():
            values, counts = self._predictions.by_row(model, task, batch)
        return None, values, counts

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        super()._save(output_dir, state_dict)
        # The guard and patience go on from what they have seen when the training resumes.
        tensors = {}
        # Copies, since safetensors refuses tensors that share memory, as `best` and `running` may.
        for name in ("running", "best", "waited"):
            tensors[f"patience.{name}"] = getattr(self.patience, name).clone()
        if self.guard is not None:
            for name in ("mean", "floor", "acted", "steps"):
                for task, value in getattr(self.guard, name).items():
                    tensors[f"guard.{name}.{task}"] = value.clone()
        directory = Path(output_dir or self.args.output_dir)
        save_file(tensors, directory / _RUNNING)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for key, tensor in load_file(Path(resume_from_checkpoint) / _RUNNING).items():
            # `patience.<name>`, or `guard.<name>.<task>`, in which a task may have dots.
            owner, _, rest = key.partition(".")
            if owner == "patience":
                setattr(self.patience, rest, tensor)
                continue
            name, _, task = rest.partition(".")
            getattr(self.guard, name)[task] = tensor
