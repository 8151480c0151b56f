"""The sequences that a chooser reads: what is padding, what is scored, and a loss per sequence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.routers import wide


@dataclass(frozen=True)
class Prefixes:
    """Sequences (batch, length) with their padding on the right, whichever side it came on.

    There it has no part in anything: positions count from the first real token, and none looks to
    its right.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor  # -100 for padding and special tokens

    @classmethod
    def read(
        cls, input_ids: Tensor, attention_mask: Tensor | None, special_ids: Sequence[int]
    ) -> "Prefixes":
        """`ValueError` if the mask is not the input's."""
        real = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.bool()
        )
        if input_ids.ndim != 2 or real.shape != input_ids.shape:
            raise ValueError(
                "input_ids and attention_mask are (batch, length), not "
                f"{tuple(input_ids.shape)} and {tuple(real.shape)}"
            )
        order = real.long().argsort(dim=1, descending=True, stable=True)
        ids, mask = input_ids.gather(1, order), real.gather(1, order)
        special = torch.isin(
            ids, torch.tensor(list(special_ids), dtype=ids.dtype, device=ids.device)
        )
        return cls(ids, mask.long(), ids.masked_fill(~mask | special, -100))

    def of(self, rows: Tensor) -> "Prefixes":
        """Some of them, as long as the longest."""
        length = int(self.mask[rows].sum(dim=1).max())
        return Prefixes(*(part[rows, :length] for part in (self.ids, self.mask, self.labels)))

    def scored(self) -> Tensor:
        """The rows in which some token is predicted: not the first, no padding, not special."""
        return self.counts().nonzero()[:, 0]

    def counts(self) -> Tensor:
        """(batch,): how many tokens are."""
        return (self.labels[:, 1:] != -100).sum(dim=1)

    def losses(self, model: Any, coefficients: Tensor) -> Tensor:
        """(batch,): the mean negative log-likelihood of the scored tokens, in nats."""
        output = model(
            input_ids=self.ids, attention_mask=self.mask, coefficients=coefficients, use_cache=False
        )
        return torch.stack(  # one by one: in float32 the logits are large
            [
                functional.cross_entropy(wide(logits[:-1]), labels[1:])
                for logits, labels in zip(output.logits, self.labels, strict=True)
            ]
        )


def check_language_model(model: Any) -> None:
    config, can_generate = (
        getattr(model, "config", None),
        getattr(model, "can_generate", lambda: False),
    )
    if getattr(config, "is_encoder_decoder", False) or not can_generate():
        raise UserError(
            "this chooser needs a causal language model, which predicts the tokens of its own "
            "prompt"
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing; each module goes back to what it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
