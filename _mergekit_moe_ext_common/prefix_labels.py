"""What follows from a prefix for labels: those inside it are left out of the loss.

A choice that is made from a prefix already knows the tokens in it, and a loss over them would say
nothing of what the model predicts.

The Trainer divides a sum of losses by a number of labels that it counts before any is left out. In
training that number is of all batches of a step, on all processes, and is kept as it is: a batch
that corrected it by its own labels would weigh otherwise than the batches beside it, and a step
would depend on how it is cut into batches. So the training loss is the mean over the labels that
count times their share in all labels, unless the collator leaves out the prefix first. In
evaluation the number is of one batch, and is corrected, so that the loss is the mean.

This file stands in two places, `_mergekit_moe_ext_common/` and `mergekit_moe_ext/modeling/`, the
same to the letter (a test compares them): what is copied beside a model's weights can import
nothing from outside its own folder.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

IGNORED = -100  # the label that losses leave out


def without_prefix_labels(
    arguments: Mapping[str, Any],
    prefix: Tensor,
    *,
    training: bool,
) -> dict[str, Any]:
    """The arguments of a forward pass, with `labels` (batch, length) left out inside the prefix.

    `prefix` (batch, length) says which tokens choose. `shift_labels`, where they are given, are
    left out too: the label at a position is there that of the next token. `num_items_in_batch` is
    corrected where the model is not `training`. `ValueError` where labels are given and none is
    left, since a mean over none is NaN.
    """
    labels = arguments["labels"]
    prefix = prefix.to(labels.device)
    changed = {**arguments, "labels": labels.masked_fill(prefix, IGNORED)}
    shifted = arguments.get("shift_labels")
    if shifted is not None:
        # The target of the last position lies behind the row's end, or is padding.
        of_next = functional.pad(prefix[:, 1:], (0, shifted.shape[1] - prefix.shape[1] + 1))
        changed["shift_labels"] = shifted.masked_fill(of_next.to(shifted.device), IGNORED)
    before = _number(arguments)
    left = _number(changed)
    if left == 0 and before > 0:
        raise ValueError(
            "no label is left for the loss: all are of tokens in the prefix that chooses, which "
            f"has routing_tokens tokens, and the rows here have {labels.shape[1]}. Leave out texts "
            "that are so short, or choose a smaller routing_tokens"
        )
    items = arguments.get("num_items_in_batch")
    if items is not None and left and not training:
        changed["num_items_in_batch"] = items * left / before
    return changed


def predicted_labels(arguments: Mapping[str, Any]) -> Tensor:
    """The labels that a causal model's loss is taken over; nothing predicts the first token."""
    shifted = arguments.get("shift_labels")
    return arguments["labels"][:, 1:] if shifted is None else shifted


def _number(arguments: Mapping[str, Any]) -> int:
    return int((predicted_labels(arguments) != IGNORED).sum())
