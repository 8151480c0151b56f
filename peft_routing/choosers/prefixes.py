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

    On the right it changes nothing: positions count from the first real token, and no token looks
    to its right.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor  # -100 for padding and special tokens

    @classmethod
    def read(
        cls, input_ids: Tensor, attention_mask: Tensor | None, special_ids: Sequence[int]
    ) -> "Prefixes":
        """The sequences of a batch. `ValueError` if the mask is of another shape."""
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.bool()
        if input_ids.ndim != 2 or real.shape != input_ids.shape:
            raise ValueError(
                "input_ids and attention_mask are (batch, length), not "
                f"{tuple(input_ids.shape)} and {tuple(real.shape)}"
            )
        # A stable sort by the mask moves padding behind the real tokens, which keep their order.
        order = real.long().argsort(dim=1, descending=True, stable=True)
        ids = input_ids.gather(1, order)
        mask = real.gather(1, order)
        special = torch.tensor(list(special_ids), dtype=ids.dtype, device=ids.device)
        is_special = torch.isin(ids, special)
        return cls(ids, mask.long(), ids.masked_fill(~mask | is_special, -100))

    def of(self, rows: Tensor) -> "Prefixes":
        """Some of the sequences, cut to the length of the longest one."""
        length = int(self.mask[rows].sum(dim=1).max())
        return Prefixes(
            self.ids[rows, :length], self.mask[rows, :length], self.labels[rows, :length]
        )

    def scored(self) -> Tensor:
        """The indices of the sequences in which some token is scored."""
        return self.counts().nonzero()[:, 0]

    def counts(self) -> Tensor:
        """(batch,): the number of scored tokens: not the first, not padding, and not special."""
        return (self.labels[:, 1:] != -100).sum(dim=1)

    def losses(self, model: Any, coefficients: Tensor) -> Tensor:
        """(batch,): the mean negative log-likelihood of the scored tokens, in nats."""
        output = model(
            input_ids=self.ids, attention_mask=self.mask, coefficients=coefficients, use_cache=False
        )
        # One sequence at a time: the logits of all of them in float32 would take much memory.
        losses = []
        for logits, labels in zip(output.logits, self.labels, strict=True):
            losses.append(functional.cross_entropy(wide(logits[:-1]), labels[1:]))
        return torch.stack(losses)


def check_language_model(model: Any) -> None:
    """`UserError` for a model whose logits do not predict the tokens that it reads."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    can_generate = getattr(model, "can_generate", lambda: False)()
    if is_encoder_decoder or not can_generate:
        raise UserError(
            "this chooser needs a causal language model, which predicts the tokens of its own "
            "prompt"
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout and gradient checkpointing; afterwards each module is as before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
