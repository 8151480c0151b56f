"""The Trainers of mixtures of experts: the Hugging Face Trainer, where it goes wrong with them.

- The loss is the mean over all tokens of a step, whatever the processes, accumulation steps and
  padding. The tokens by which a text chose its experts are none of them.
- The load-balancing loss is averaged over processes and accumulation steps, not added up. That of
  a sequence MoE is of all texts of a step, since a batch has few.
- Held-out losses hold no load-balancing loss.
- With a `TaskSampler` a step has batches of every task, and its loss is the mean over tasks of each
  task's mean over tokens.
- A checkpoint holds what is trained, in float32, by the names in the model. (The stock Trainer
  writes a fused expert as single experts, and on resuming drops them for names that it does not
  know.)
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from _mergekit_moe_ext_common.data import real_tokens
from _mergekit_moe_ext_common.training import TokenTrainer, TrainedOnly
from mergekit_moe_ext.mixtures.per_task import TaskSampler
from mergekit_moe_ext.mixtures.routers import load_balancing_loss, recorded
from mergekit_moe_ext.mixtures.sequences import balance_of_texts, count_choices, recorded_scores

# What a batch of a `TaskSampler` holds besides its tensors: the divisor of the sum of its losses.
_DIVISOR = "loss_divisor"


class MoeTrainer(TrainedOnly, TokenTrainer):
    """The Trainer as the top of this file describes it, for routers that choose per token."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        router_aux_loss: float | None,
        learning_rates: Mapping[str, float],
        sampler: TaskSampler | None = None,
        scorer: Callable[[Any], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        """`learning_rates` are by the names of the parameters.

        Without a `sampler` the rows of all tasks are shuffled, as the stock Trainer does. A
        `scorer` measures the model by more than held-out losses, whenever these are measured.
        """
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of a step
        self._router_aux_loss = router_aux_loss or 0.0
        self._learning_rates = learning_rates
        self._sampler = sampler
        self._scorer = scorer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # The stock method calls this one again for each held-out data set.
        if self._scorer is None or metric_key_prefix != "eval":
            return metrics
        self.model.eval()
        with self.compute_loss_context_manager():
            scores = self._scorer(self.model)
        scores = {f"eval_{name}": score for name, score in scores.items()}
        self.log(scores)
        return {**metrics, **scores}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._sampler or super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step; with a `TaskSampler`, each with the divisor of its loss."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._sampler is None:
            return batches, items
        number = self._sampler.tasks
        per_task = len(batches) // number
        tokens = torch.zeros(number, device=self.args.device)
        for index, batch in enumerate(batches):
            tokens[index // per_task] += (batch["labels"] != -100).sum()
        # The loss of a task is the mean over its tokens of all processes.
        tokens = self.accelerator.reduce(tokens)
        for index, batch in enumerate(batches):
            batch[_DIVISOR] = number * tokens[index // per_task]
        return batches, items

    def create_optimizer(self, model: Any = None) -> Any:
        """transformers' own, whose groups are divided by learning rates."""
        super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        rates = {id(parameter): self._learning_rates[name] for name, parameter in named}
        groups = []
        for group in self.optimizer.param_groups:
            # One without parameters stays: checkpoints of earlier versions hold it, too.
            by_rate: dict[float, list[torch.nn.Parameter]] = {} if group["params"] else {0.0: []}
            for parameter in group["params"]:
                by_rate.setdefault(rates[id(parameter)], []).append(parameter)
            for rate, parameters in by_rate.items():
                groups.append({**group, "params": parameters, "lr": rate})
        self.optimizer.param_groups = groups
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        divisor = inputs.pop(_DIVISOR, num_items_in_batch)
        is_balanced = bool(self._router_aux_loss) and model.training
        # Choices are recorded only here, and not when gradient checkpointing runs the layers again:
        # what it recomputes would stay.
        recording: Any = self.recorded_choices() if is_balanced else nullcontext({})
        with recording as choices:
            outputs = model(**without_labels(inputs), use_cache=False)
        losses, counts = self.token_losses(outputs.logits, inputs["labels"])
        # The Trainer averages gradients over the processes: times their number it is the mean over
        # the tokens of all of them.
        tokens = counts.sum() if divisor is None else divisor
        loss = losses.sum() / tokens * self.accelerator.num_processes
        if is_balanced:
            loss = loss + self._router_aux_loss * self.balance(choices, inputs)
        return (loss, outputs) if return_outputs else loss

    def recorded_choices(self) -> Any:
        """A context with what `balance` needs of the next forward pass."""
        return recorded(self.model)

    def balance(self, choices: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a batch adds to the load-balancing loss of its step, a scalar."""
        loss = load_balancing_loss(choices, real_tokens(inputs))
        return loss / self.current_gradient_accumulation_steps


class SequenceTrainer(MoeTrainer):
    """The Trainer as the top of this file describes it, for a router that chooses per text."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step; how many of its texts choose each expert is counted here."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._router_aux_loss:
            counts = count_choices(self.model, batches, self.args.device)
            self._choices_of_step = self.accelerator.reduce(counts)
        return batches, items

    def recorded_choices(self) -> Any:
        return recorded_scores(self.model)

    def balance(self, choices: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        k = self.model.config.experts_per_sequence
        loss = balance_of_texts(choices[0], self._choices_of_step, k)
        return loss * self.accelerator.num_processes  # which the Trainer divides by


def without_labels(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
