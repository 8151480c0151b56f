"""The same merges and the same trim as Triton kernels, for GPUs: each element is read once, and no
temporary is as large as a tensor.

Every operation is rounded as its PyTorch counterpart is, so that the result is the same bit for
bit. `ready` tries that on the device before the kernels are used there.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements of one program


@triton.jit
def _index(block: tl.constexpr):
    """The flat indices of this program's elements."""
    return tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """A value in float32 that a tensor of this dtype could hold: rounded as PyTorch would."""
    return value.to(dtype).to(tl.float32)


@triton.jit
def _magnitude(value, dtype: tl.constexpr):
    """Integers that order as the magnitudes of the values do, NaN above everything."""
    if dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = value.to(dtype).to(tl.int16, bitcast=True) & 0x7FFF
    return bits.to(tl.int64)


@triton.jit
def _relu(value):
    """Zero for what is negative. NaN stays NaN, as in PyTorch."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def _elected(total):
    """The sign of a sum, 1 for zero and for NaN, whose sign is 0 in PyTorch."""
    return tl.where(total < 0, -1.0, 1.0)


@triton.jit
def _trimmed(tensor, base, rules, number, weight, at, inside, dtype: tl.constexpr):
    """The trimmed and weighted task vector of one source at some elements.

    rules: per source the magnitude above which elements are kept, and the index before which those
        equal to it are.
    """
    value = tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)
    value = _rounded(value - base, dtype)
    magnitude = _magnitude(value, dtype)
    threshold = tl.load(rules + 2 * number)
    end = tl.load(rules + 2 * number + 1)
    is_kept = (magnitude > threshold) | ((magnitude == threshold) & (at < end))
    return _rounded(tl.where(is_kept, value, 0.0) * weight, dtype)


@triton.jit
def _ties(
    bases, tensors, rules, weights, result, numel, scale, normalize: tl.constexpr,
    block: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = result.dtype.element_ty
    at = _index(block)
    inside = at < numel
    base = tl.load(bases + at, mask=inside, other=0.0).to(tl.float32)
    # The values are computed twice, for the sign and for the sum: the second time they come from a
    # cache, and holding them all would take more registers than there are.
    total = tl.zeros((block,), tl.float32)
    for number in tl.static_range(len(tensors)):
        weight = tl.load(weights + number)
        total += _trimmed(tensors[number], base, rules, number, weight, at, inside, dtype)
    sign = _elected(_rounded(total, dtype))
    total = tl.zeros((block,), tl.float32)
    divisor = tl.zeros((block,), tl.float32)
    for number in tl.static_range(len(tensors)):
        weight = tl.load(weights + number)
        value = _trimmed(tensors[number], base, rules, number, weight, at, inside, dtype)
        agreeing = _relu(_rounded(value * sign, dtype))
        total += agreeing
        divisor += _rounded(tl.where(agreeing > 0, weight, agreeing * weight), dtype)
    mixed = _rounded(_rounded(total, dtype) * sign, dtype)
    if normalize:
        divisor = _rounded(divisor, dtype)
        divisor = tl.where(divisor == 0, 1.0, divisor)
        mixed = _rounded(tl.div_rn(mixed, divisor), dtype)
    mixed = _rounded(mixed * scale, dtype)
    tl.store(result + at, (base + mixed).to(dtype), mask=inside)


@triton.jit
def _mixed_bits(x):
    """The lowbias32 hash of 32-bit integers."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _is_kept(at, keys, bounds, number):
    """The elements that `random_mask` keeps of a source: those whose hash is below a bound."""
    low = at.to(tl.uint32)
    high = (at >> 32).to(tl.uint32)
    low_key = tl.load(keys + 2 * number).to(tl.uint32)
    high_key = tl.load(keys + 2 * number + 1).to(tl.uint32)
    hashed = _mixed_bits(low + low_key)
    hashed = _mixed_bits(hashed + high_key + high * 0x3C6EF373)
    return hashed.to(tl.int32, bitcast=True).to(tl.int64) < tl.load(bounds + number)


@triton.jit
def _dare(
    bases, tensors, keys, bounds, factors, result, numel, scale, elect_sign: tl.constexpr,
    block: tl.constexpr
):  # fmt: skip
    at = _index(block)
    inside = at < numel
    base = tl.load(bases + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((block,), tl.float32)
    for number in tl.static_range(len(tensors)):
        value = tl.load(tensors[number] + at, mask=inside, other=0.0).to(tl.float32)
        mask = _is_kept(at, keys, bounds, number).to(tl.float32)
        total += (value - base) * mask * tl.load(factors + number)
    if elect_sign:
        sign = _elected(total)
        total = tl.zeros((block,), tl.float32)
        for number in tl.static_range(len(tensors)):
            value = tl.load(tensors[number] + at, mask=inside, other=0.0).to(tl.float32)
            mask = _is_kept(at, keys, bounds, number).to(tl.float32)
            total += _relu((value - base) * mask * tl.load(factors + number) * sign)
        total *= sign
    tl.store(result + at, (base + total * scale).to(result.dtype.element_ty), mask=inside)


# Numbers that differ from tensor to tensor are not compiled in.
@triton.jit(do_not_specialize=["low", "high", "room"])
def _count(
    tensor, bases, counters, collected, numel, low, high, room, has_base: tl.constexpr,
    block: tl.constexpr
):  # fmt: skip
    """Adds to two counters the elements above the bracket [low, high] and those inside, and puts
    the latter anywhere among the collected, as many as there is room for.
    """
    dtype: tl.constexpr = tensor.dtype.element_ty
    at = _index(block)
    inside = at < numel
    value = tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)
    if has_base:
        base = tl.load(bases + at, mask=inside, other=0.0).to(tl.float32)
        value = _rounded(value - base, dtype)
    magnitude = _magnitude(value, dtype)
    is_above = inside & (magnitude > high)
    is_collected = inside & (magnitude >= low) & (magnitude <= high)
    above = tl.sum(is_above.to(tl.int64), 0)
    here = tl.sum(is_collected.to(tl.int64), 0)
    tl.atomic_add(counters, above)
    first = tl.atomic_add(counters + 1, here)
    place = first + tl.cumsum(is_collected.to(tl.int64), 0) - 1
    tl.store(collected + place, magnitude.to(tl.int32), mask=is_collected & (place < room))


def _launch(kernel: Any, numel: int, device: torch.device, *arguments: Any, **options: Any) -> None:
    """Run a kernel over so many elements, on the device that its tensors are on."""
    if device.type == "cuda":
        # A product and a sum are rounded one after the other, as PyTorch's operations are.
        options["enable_fp_fusion"] = False
        with torch.cuda.device(device):
            kernel[(triton.cdiv(numel, _BLOCK),)](*arguments, block=_BLOCK, **options)
    else:  # Triton's interpreter, in tests
        kernel[(triton.cdiv(numel, _BLOCK),)](*arguments, block=_BLOCK, **options)


def merge_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    rules: Sequence[tuple[int, int]],
    weights: Sequence[float],
    *,
    normalize: bool,
    scale: float,
) -> Tensor:
    """What `ties.merge_ties` gives for flat tensors, by the magnitude and the end of each
    threshold.
    """
    result = torch.empty_like(base)
    _launch(
        _ties,
        base.numel(),
        base.device,
        base,
        tuple(tensors),
        torch.tensor(rules, dtype=torch.int64, device=base.device),
        torch.tensor(weights, dtype=torch.float32, device=base.device),
        result,
        base.numel(),
        float(scale),
        normalize,
    )
    return result


def merge_dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    keys: Sequence[int],
    bounds: Sequence[int],
    factors: Sequence[float],
    *,
    scale: float,
    elect_sign: bool,
) -> Tensor:
    """What `drop.merge_dare` gives for flat tensors.

    keys: a source's key in 64 bits; bounds: the bound below which a signed hash keeps an element.
    """
    halves = [(key & 0xFFFFFFFF, key >> 32) for key in keys]
    result = torch.empty_like(base)
    _launch(
        _dare,
        base.numel(),
        base.device,
        base,
        tuple(tensors),
        torch.tensor(halves, dtype=torch.int64, device=base.device),
        torch.tensor(bounds, dtype=torch.int64, device=base.device),
        torch.tensor(factors, dtype=torch.float32, device=base.device),
        result,
        base.numel(),
        float(scale),
        elect_sign,
    )
    return result


def count(
    tensor: Tensor, base: Tensor | None, low: int, high: int, room: int
) -> tuple[int, int, Tensor]:
    """The number of elements of a flat tensor, less the base, whose magnitude is above `high`, the
    number in [low, high], and the magnitudes of the latter, in any order, at most `room`.
    """
    counters = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    collected = torch.empty(room, dtype=torch.int32, device=tensor.device)
    _launch(
        _count,
        tensor.numel(),
        tensor.device,
        tensor,
        tensor if base is None else base,
        counters,
        collected,
        tensor.numel(),
        low,
        high,
        room,
        base is not None,
    )
    above, inside = counters.tolist()
    return above, inside, collected[:inside]
