"""Drop random elements of task vectors and rescale the rest (DARE), by a mask that is computed, not
stored.

Whether an element is kept is a hash of its flat index and a key, so the same elements are kept
whatever the device, the chunks and the order of execution.
"""

import functools
import hashlib
from collections.abc import Sequence

import torch

from mergekit_moe_ext.tensor.kernels import chunks
from mergekit_moe_ext.tensor.kernels.ties import elected_sum


def mask_key(seed: int, position: int, name: str) -> int:
    """A 64-bit key for one source's mask of one tensor."""
    return int.from_bytes(
        hashlib.sha256(f"{seed}:{position}:{name}".encode()).digest()[:8], "little"
    )


def random_mask(key: int, piece: slice, density: float, device: torch.device) -> torch.Tensor:
    """Which of the elements `piece` of a flat tensor are kept, each with probability `density`:
    booleans.
    """
    if not 0 < density < 1:
        return torch.full((piece.stop - piece.start,), density >= 1, device=device)
    if piece.start >> 32 != (piece.stop - 1) >> 32:
        middle = (piece.stop - 1) >> 32 << 32
        halves = slice(piece.start, middle), slice(middle, piece.stop)
        return torch.cat([random_mask(key, half, density, device) for half in halves])
    # int32 wraps around, and so does every sum and product below.
    index = torch.arange(piece.stop - piece.start, dtype=torch.int32, device=device)
    hashed = _mix(index.add_(_signed(piece.start + key)))
    hashed = _mix(hashed.add_(_signed((key >> 32) + (piece.start >> 32) * 0x3C6EF373)))
    # A signed hash is uniform over [-2**31, 2**31).
    return hashed < min(round(density * 2**32) - 2**31, 2**31 - 1)


def merge_dare(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    keys: Sequence[int],
    *,
    scale: float,
    elect_sign: bool,
) -> torch.Tensor:
    """base + scale · (the sum of the weighted task vectors, randomly thinned and rescaled by 1 /
    density).

    MergeME 3.1.2 and DARE (arXiv 2311.03099); `keys` seed the masks. With `elect_sign` only the
    values that agree with TIES' elected sign are summed. Sums are made in float32 for 16-bit types.
    """
    flat_base = base.reshape(-1)
    flat = [tensor.reshape(-1) for tensor in tensors]
    factors = [w / min(d, 1.0) if d > 0 else 0.0 for w, d in zip(weights, densities, strict=True)]
    wide = torch.promote_types(base.dtype, torch.float32)
    result = torch.empty_like(flat_base)
    for piece in chunks(flat_base):
        base_piece = flat_base[piece].to(wide)
        kept = [
            (tensor[piece] - base_piece)
            * random_mask(key, piece, density, base.device).to(wide)
            * factor
            for tensor, density, key, factor in zip(flat, densities, keys, factors, strict=True)
        ]
        mixed = elected_sum(kept) if elect_sign else functools.reduce(torch.add, kept)
        result[piece] = (base_piece + mixed * scale).to(base.dtype)
    return result.view(base.shape)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """In place, a bijection of int32 whose every output bit depends on every input bit
    (lowbias32)."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _signed(number: int) -> int:
    """The int32 that has the lowest 32 bits of a number."""
    return (number + 2**31) % 2**32 - 2**31
