"""DARE: random elements of task vectors are dropped and the rest rescaled, by a mask that is
computed, not stored.

A hash of an element's flat index and a key decides whether it is kept, so that the same elements
are kept whatever the device, the chunks and the order of execution.
"""

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
    """Booleans (piece.stop - piece.start,): whether each element of this piece of a flat tensor is
    kept, which it is with probability `density`.
    """
    if not 0 < density < 1:
        return torch.full((piece.stop - piece.start,), density >= 1, device=device)
    # The upper half of the index is one number for all of a piece, so that a piece may not cross a
    # multiple of 2**32.
    if piece.start >> 32 != (piece.stop - 1) >> 32:
        middle = (piece.stop - 1) >> 32 << 32
        halves = slice(piece.start, middle), slice(middle, piece.stop)
        return torch.cat([random_mask(key, half, density, device) for half in halves])
    # The index and the key have 64 bits and the hash 32: the lower halves are mixed first, then the
    # upper ones, so that every bit of both counts. int32 wraps around, and so does every sum and
    # product below. The factor, an arbitrary odd number, sets the upper halves of indices apart
    # from those of keys.
    index = torch.arange(piece.stop - piece.start, dtype=torch.int32, device=device)
    hashed = _mix(index.add_(_signed(piece.start + key)))
    hashed = _mix(hashed.add_(_signed((key >> 32) + (piece.start >> 32) * 0x3C6EF373)))
    return hashed < hash_bound(density)


def hash_bound(density: float) -> int:
    """The bound below which `density` of all signed 32-bit hashes lie: all of them from 1 on."""
    if density >= 1:
        return 2**31
    return min(round(max(density, 0) * 2**32) - 2**31, 2**31 - 1)


def rescaled(weights: Sequence[float], densities: Sequence[float]) -> list[float]:
    """The factor of what is kept of each task vector: its weight divided by its density.

    So the expected sum is what it was before elements were dropped. With a density of 0 nothing is
    left to rescale.
    """
    factors = []
    for weight, density in zip(weights, densities, strict=True):
        factors.append(weight / min(density, 1.0) if density > 0 else 0.0)
    return factors


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
    density), in the shape and dtype of `base`.

    MergeME 3.1.2 and DARE (arXiv 2311.03099); `keys` seed the masks. With `elect_sign` only the
    values that agree with TIES' elected sign are summed. For 16-bit types sums are in float32.
    """
    flat_base = base.reshape(-1)
    flat_tensors = [tensor.reshape(-1) for tensor in tensors]
    factors = rescaled(weights, densities)
    wide = torch.promote_types(base.dtype, torch.float32)
    result = torch.empty_like(flat_base)
    for piece in chunks(flat_base):
        base_piece = flat_base[piece].to(wide)
        thinned = []
        for tensor, density, key, factor in zip(
            flat_tensors, densities, keys, factors, strict=True
        ):
            mask = random_mask(key, piece, density, base.device).to(wide)
            thinned.append((tensor[piece] - base_piece) * mask * factor)
        mixed = elected_sum(thinned) if elect_sign else sum(thinned[1:], start=thinned[0])
        result[piece] = (base_piece + mixed * scale).to(base.dtype)
    return result.view(base.shape)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The lowbias32 hash, in place: a bijection of int32 in which every output bit depends on every
    input bit.
    """
    # A signed shift copies the sign bit; each mask leaves what an unsigned shift would.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _signed(number: int) -> int:
    """The lowest 32 bits of a number, as an int32."""
    return (number + 2**31) % 2**32 - 2**31
