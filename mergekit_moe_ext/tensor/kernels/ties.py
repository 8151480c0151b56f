"""TIES: trim task vectors, elect a sign per parameter, and add up the values that agree with it."""

from collections.abc import Sequence

import torch

from mergekit_moe_ext.tensor.kernels import chunks
from mergekit_moe_ext.tensor.kernels.trim import magnitude_threshold


def merge_ties(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """base + scale · (the agreeing part of the trimmed, weighted task vectors), of the shape of
    `base`.

    MergeME 3.1.2 (whose task vectors have the other sign, which cancels out) and TIES (arXiv
    2306.01708). The sign of a parameter is that of the sum of all its trimmed values. `normalize`
    divides by the summed weights of those that agree, as TIES does; MergeME adds them up.
    """
    flat_base = base.reshape(-1)
    flat = [tensor.reshape(-1) for tensor in tensors]
    thresholds = [
        magnitude_threshold(tensor, density, flat_base)
        for tensor, density in zip(flat, densities, strict=True)
    ]
    result = torch.empty_like(flat_base)
    for piece in chunks(flat_base):
        base_piece = flat_base[piece]
        values = [
            threshold.trim(tensor[piece] - base_piece, piece.start) * weight
            for tensor, threshold, weight in zip(flat, thresholds, weights, strict=True)
        ]
        mixed = elected_sum(values, weights if normalize else None)
        result[piece] = base_piece + (mixed if scale == 1 else mixed * scale)
    return result.view(base.shape)


def elected_sum(
    values: Sequence[torch.Tensor], weights: Sequence[float] | None = None
) -> torch.Tensor:
    """The sum, element by element, of the values whose sign is that of the sum of all; zero counts
    as positive.

    With `weights`, divided by the summed weights of those values (of which a zero is never one).

    >>> elected_sum([torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -2.0])])
    tensor([ 3., -3.])
    """
    # Comparisons and `where` cost several times what arithmetic does on a CPU, hence signs.
    sign = torch.sign(torch.sign(_sum(values)) + 0.5)  # 1 for zero
    agreeing = [torch.relu(value * sign) for value in values]
    total = _sum(agreeing) * sign
    if weights is None:
        return total
    divisor = _sum(
        [torch.sign(value) * weight for value, weight in zip(agreeing, weights, strict=True)]
    )
    return total / (divisor + (1 - torch.sign(divisor).abs()))  # 1 where it is zero


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """From the first on, in float32 at least and rounded once, as torch sums a stack."""
    dtype = values[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = values[0].to(wide)
    for value in values[1:]:
        total = total + value
    return total.to(dtype)
