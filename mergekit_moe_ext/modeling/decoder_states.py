"""Hidden states and attentions of a sequence MoE, put together from those of its decoders."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

HIDDEN_STATES = "hidden_states"
ATTENTIONS = "attentions"


class DecoderStates:
    """What the decoders that a batch chose give besides logits, by layer.

    A sequence with one expert has that expert's own. A sequence with several has their sum, weighed
    by its coefficients: of the last hidden states it is what a shared head reads, unless projectors
    come between.
    """

    def __init__(self, rows: int, hidden_states: Any, attentions: Any) -> None:
        """`rows` is the number of sequences; the others are what the decoders are asked for."""
        self.rows = rows
        # The arguments that a decoder's `forward` needs, and what it calls what it then gives.
        self.arguments: dict[str, Any] = {}
        if hidden_states:
            self.arguments[f"output_{HIDDEN_STATES}"] = hidden_states
        if attentions:
            self.arguments[f"output_{ATTENTIONS}"] = attentions
        self.parts: list[tuple[Tensor, Tensor | None, Any]] = []

    def take(self, rows: Tensor, weights: Tensor | None, output: Any) -> None:
        """Take what a decoder gave for these rows of the batch.

        `weights` are their coefficients; None where the whole batch has this decoder alone.
        """
        self.parts.append((rows, weights, output))

    def of_batch(self, name: str) -> tuple[Tensor | None, ...] | None:
        """A tensor (batch, …) per layer, of `hidden_states` or `attentions`.

        None if these were not asked for, and for a layer of which a decoder gives none.
        `ValueError` where decoders of different sizes were chosen.
        """
        if f"output_{name}" not in self.arguments:
            return None
        of_decoders = [tuple(getattr(output, name) or ()) for _, _, output in self.parts]
        if len({len(layers) for layers in of_decoders}) > 1:
            raise ValueError(_refusal(name, "numbers of layers"))
        return tuple(self._sum(name, layers) for layers in zip(*of_decoders, strict=True))

    def _sum(self, name: str, of_decoders: Sequence[Tensor | None]) -> Tensor | None:
        """One layer's tensors (rows, …) of all decoders that were chosen, as one (batch, …)."""
        tensors = [tensor for tensor in of_decoders if tensor is not None]
        if len(tensors) < len(of_decoders):
            return None
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            raise ValueError(_refusal(name, "sizes"))
        first = tensors[0]
        total = first.new_zeros(self.rows, *first.shape[1:])
        for (rows, weights, _), tensor in zip(self.parts, tensors, strict=True):
            if weights is None:
                return tensor
            column = weights.to(total).reshape(-1, *[1] * (total.ndim - 1))
            total = total.index_add(0, rows.to(total.device), column * tensor.to(total))
        return total


def _refusal(name: str, what: str) -> str:
    return (
        f"output_{name}: the experts that were chosen here are of different {what}, so that theirs "
        "do not fit into one tensor; give one sequence at a time, with coefficients= that choose "
        "one expert"
    )
