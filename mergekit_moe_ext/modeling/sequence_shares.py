"""Which rows of a batch each expert of a sequence MoE computes, and the sum of what comes out."""

from typing import NamedTuple

import torch
from torch import Tensor


class Share(NamedTuple):
    """The part of a batch that one expert computes: the rows that chose it, and how they weigh it.

    `weights` is None where all rows of the batch have this expert alone, with the coefficient 1.
    """

    expert: int
    rows: Tensor
    is_all: bool
    weights: Tensor | None


def shares_of(coefficients: Tensor, device: torch.device) -> list[Share]:
    """The share of each expert that a sequence chose, with its rows on the batch's device."""
    experts = coefficients.any(dim=0).nonzero()[:, 0].tolist()
    # The output of one expert that weighs 1 is the result as it is. Coefficients that are trained
    # keep their gradient.
    if len(experts) == 1 and not coefficients.requires_grad:
        is_alone = bool((coefficients[:, experts[0]] == 1).all())
    else:
        is_alone = False
    shares = []
    for expert in experts:
        rows = coefficients[:, expert].nonzero()[:, 0]
        weights = None if is_alone else coefficients[rows, expert]
        is_all = len(rows) == len(coefficients)
        shares.append(Share(expert, rows.to(device), is_all, weights))
    return shares


def added(
    total: Tensor | None,
    output: Tensor,
    share: Share,
    rows: int,
    in_logarithms: bool,
) -> Tensor:
    """The total so far (rows, …), with the weighed output of an expert for those that chose it.

    Either both are logarithms of what is added up, or neither is.
    """
    if share.weights is None:
        return output
    weights = share.weights.to(output)[:, None, None]
    if total is None:
        start = float("-inf") if in_logarithms else 0
        total = output.new_full((rows, *output.shape[1:]), start)
    indices = share.rows.to(total.device)
    if not in_logarithms:
        return total.index_add(0, indices, (weights * output).to(total))
    sums = torch.logaddexp(total[indices], (weights.log() + output).to(total))
    return total.index_copy(0, indices, sums)
