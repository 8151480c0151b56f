"""What follows from a prefix for labels: those inside it are left out of the loss.

A choice that is made from a prefix already knows the tokens in it, and a loss over them would say
nothing of what the model predicts. The number of items in a batch, by which the Trainer has a sum
of losses divided, was counted before that, and shrinks with them.

This file stands in two places, `_mergekit_moe_ext_common/` and `mergekit_moe_ext/modeling/`, the
same to the letter (a test compares them): what is copied beside a model's weights can import
nothing from outside its own folder.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

IGNORED = -100  # the label that losses leave out


def without_prefix_labels(arguments: Mapping[str, Any], prefix: Tensor) -> dict[str, Any]:
    """The arguments of a forward pass, with `labels` (batch, length) left out inside the prefix.

    `prefix` (batch, length) says which tokens choose. `num_items_in_batch`, where it is given,
    shrinks in the proportion in which this batch's labels do, since other batches of the same step
    are not known here.
    """
    labels = arguments["labels"]
    kept = labels.masked_fill(prefix.to(labels.device), IGNORED)
    changed = {**arguments, "labels": kept}
    items = arguments.get("num_items_in_batch")
    if items is not None:
        changed["num_items_in_batch"] = items * _predicted(kept) / _predicted(labels)
    return changed


def _predicted(labels: Tensor) -> Tensor:
    """The number of tokens that count in the loss, at least 1; nothing predicts the first one."""
    return (labels[:, 1:] != IGNORED).sum().clamp(min=1)
