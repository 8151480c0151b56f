"""The Trainers of mixtures of experts: the Hugging Face Trainer, where it goes wrong with them.

- The loss is the mean over all tokens of a step, whatever the processes, accumulation steps and
  padding. The tokens by which a text chose its experts are none of them.
- The load-balancing loss is averaged over processes and accumulation steps, not added up. That of
  a sequence MoE is of all texts of a step, since a batch has few.
- Held-out losses hold no load-balancing loss.
- A checkpoint holds what is trained, in float32, by the names in the model. (The stock Trainer
  writes a fused expert as single experts, and on resuming drops them for names that it does not
  know.)
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from _mergekit_moe_ext_common.data import real_tokens
from _mergekit_moe_ext_common.training import TokenTrainer, TrainedOnly
from mergekit_moe_ext.mixtures.routers import load_balancing_loss, recorded
from mergekit_moe_ext.mixtures.sequences import balance_of_texts, count_choices, recorded_scores


class MoeTrainer(TrainedOnly, TokenTrainer):
    """The Trainer as the top of this file describes it, for routers that choose per token."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        router_aux_loss: float | None,
        learning_rates: Mapping[str, float],
        **kwargs: Any,
    ):
        """`learning_rates` are by the names of the parameters."""
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of a step
        self._router_aux_loss = router_aux_loss or 0.0
        self._learning_rates = learning_rates

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
        is_balanced = bool(self._router_aux_loss) and model.training
        # Choices are recorded only here, and not when gradient checkpointing runs the layers again:
        # what it recomputes would stay.
        recording: Any = self.recorded_choices() if is_balanced else nullcontext({})
        with recording as choices:
            outputs = model(**without_labels(inputs), use_cache=False)
        losses, counts = self.token_losses(outputs.logits, inputs["labels"])
        # The Trainer averages gradients over the processes: times their number it is the mean over
        # the tokens of all of them.
        tokens = counts.sum() if num_items_in_batch is None else num_items_in_batch
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
