"""TIES: task vectors are trimmed, a sign is elected per parameter, and the values that agree with
it are added up.
"""

from collections.abc import Sequence

import torch

from mergekit_moe_ext.tensor.kernels import chunks, on_threads
from mergekit_moe_ext.tensor.kernels.trim import Threshold, magnitude_threshold


def merge_ties(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """base + scale · (the agreeing part of the trimmed, weighted task vectors), in the shape of
    `base`.

    MergeME 3.1.2 (whose task vectors have the other sign, which cancels out) and TIES (arXiv
    2306.01708). The sign of a parameter is that of the sum of all its trimmed values. `normalize`
    divides by the summed weights of those that agree, as TIES does; MergeME only adds them up.
    """
    flat_base = base.reshape(-1)
    flat_tensors = [tensor.reshape(-1) for tensor in tensors]

    def threshold_of(source: tuple[torch.Tensor, float]) -> Threshold:
        tensor, density = source
        return magnitude_threshold(tensor, density, flat_base)

    # A threshold depends on a whole tensor, so all of them come before the first chunk is merged.
    sources = list(zip(flat_tensors, densities, strict=True))
    thresholds = on_threads(threshold_of, sources, flat_base)
    result = torch.empty_like(flat_base)

    def merge_piece(piece: slice) -> None:
        base_piece = flat_base[piece]
        values = []
        for tensor, threshold, weight in zip(flat_tensors, thresholds, weights, strict=True):
            value = threshold.trim(tensor[piece] - base_piece, piece.start)
            values.append(value if weight == 1 else value.mul_(weight))
        mixed = elected_sum(values, weights if normalize else None)
        result[piece] = base_piece + (mixed if scale == 1 else mixed.mul_(scale))

    on_threads(merge_piece, list(chunks(flat_base)), flat_base, *flat_tensors)
    return result.view(base.shape)


def elected_sum(
    values: Sequence[torch.Tensor], weights: Sequence[float] | None = None
) -> torch.Tensor:
    """The sum, element by element, of the values whose sign is that of the sum of all, where zero
    counts as positive.

    With `weights` it is divided by the summed weights of those values, among which a zero never is.

    >>> elected_sum([torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -2.0])])
    tensor([ 3., -3.])
    """
    # Comparisons and `where` cost several times what arithmetic does on a CPU. So a value times the
    # elected sign is positive where the two agree, and relu drops the rest. Operations on 16-bit
    # numbers cost as much, so the values, which float32 holds as they are, are widened once.
    dtype = values[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    # Copies are changed in place from here on, so that they stay in the CPU's caches.
    agreeing = [value.to(wide, copy=True) for value in values]
    sign = _sum(agreeing).detach().sign_().add_(0.5).sign_()  # 1 for zero
    for value in agreeing:
        value.mul_(sign).relu_()
    total = _sum(agreeing).mul_(sign).to(dtype)
    if weights is None:
        return total
    # Where no value agrees, total and divisor are zero; the divisor then becomes 1.
    agreeing_weights = []
    for value, weight in zip(agreeing, weights, strict=True):
        rounded = torch.tensor(weight, dtype=dtype, device="cpu").item()
        agreeing_weights.append(torch.sign(value) * rounded)
    divisor = _sum(agreeing_weights).to(dtype)
    return total / (divisor + (1 - torch.sign(divisor).abs()))


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, from the first on, as torch sums a stack; a tensor of its own."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total
