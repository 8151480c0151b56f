"""The same merges as Triton kernels, for GPUs: no temporary is as large as a tensor, and nothing
waits for the device.

Every operation is rounded as its PyTorch counterpart is, so that the result is the same bit for
bit. `on_gpu` tries that on the device before the kernels are used there.

The thresholds of TIES are found by radix selection. Magnitudes, read as integers, are taken digit
by digit, 8 bits each, from the highest on. A pass over the tensors counts each digit among the
elements whose higher digits are those of the threshold. The counts say which digit the threshold
has next, and how many of the elements with that digit are to be kept. After the last digit that
is how many of those equal to the threshold are kept, and a last pass finds where these end.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements of one program of a merge
# Elements that a program counts at a time. The more each warp has, the less it costs to add up the
# histograms of warps, and the more registers it takes: here a thread has 16.
_COUNTED_BLOCK = 2048
_COUNTING_WARPS = 4
# A program that counts walks over many blocks, since it adds a whole histogram of each source to
# the totals at its end. There are 16 programs for each of the 132 multiprocessors of an H100 or
# H200, and fewer where some would have a single block. By the registers of what Triton 3.6 compiles
# a multiprocessor runs seven at a time with one source, and three with more. These are the fastest
# sizes that were tried on an H100.
_COUNTING_PROGRAMS = 2112
_LEAST_BLOCKS = 2
# Up to so many elements of a block are added to the totals one by one: for the lower digits, which
# few elements reach, a histogram of the whole block takes longer.
_FEW = 32
# Sources that are counted in one pass: the kernels repeat their code for each of them.
_COUNTED_AT_ONCE = 8
_DIGIT_BITS = tl.constexpr(8)
_DIGITS = tl.constexpr(256)

# Rules of sources of which all is kept, and nothing: see `_trimmed`.
_KEEP_ALL = (-1, 0)
_KEEP_NONE = (2**31 - 1, 0)


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
    """Integers that order as the magnitudes of the values, rounded to a dtype, do, NaN above
    everything.
    """
    if dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = value.to(dtype).to(tl.int16, bitcast=True) & 0x7FFF
    return bits.to(tl.int32)


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
        equal to it are. So NaN is kept unless the magnitude is the largest integer: the magnitude
        is never that of a NaN otherwise.
    """
    value = tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)
    value = _rounded(value - base, dtype)
    magnitude = _magnitude(value, dtype)
    threshold = tl.load(rules + 2 * number).to(tl.int32)
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


# Numbers that only differ from pass to pass, or from tensor to tensor, are not compiled in.
@triton.jit(do_not_specialize=["shift"])
def _count_digits(
    bases, tensors, states, counts, numel, shift, few: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr
):  # fmt: skip
    """Adds to the counts of each source how many of its elements have which digit, among those
    whose higher digits are the ones found so far.

    shift: the bits below the digit; padded: a power of two, not below the number of sources.
    """
    dtype: tl.constexpr = bases.dtype.element_ty
    rows = tl.arange(0, padded)[:, None]
    columns = tl.arange(0, _DIGITS)[None, :]
    held = tl.zeros((padded, _DIGITS), tl.int32)
    step = tl.num_programs(0) * block
    for first in range(tl.program_id(0).to(tl.int64) * block, numel, step):
        at = first + tl.arange(0, block)
        inside = at < numel
        base = tl.load(bases + at, mask=inside, other=0.0).to(tl.float32)
        for number in tl.static_range(len(tensors)):
            value = tl.load(tensors[number] + at, mask=inside, other=0.0).to(tl.float32)
            rest = _magnitude(value - base, dtype) >> shift
            higher = tl.load(states + 3 * number).to(tl.int32)
            # Two shifts, since one by all 32 bits would be undefined.
            is_counted = inside & ((rest >> _DIGIT_BITS) == higher)
            digit = rest & (_DIGITS - 1)
            if tl.sum(is_counted.to(tl.int32), 0) > few:
                histogram = tl.histogram(digit, _DIGITS, mask=is_counted)
                held += tl.where(rows == number, histogram[None, :], 0)
            else:
                places = counts + number * _DIGITS + digit
                tl.atomic_add(places, 1, mask=is_counted, sem="relaxed")
    tl.atomic_add(
        counts + rows * _DIGITS + columns, held.to(tl.int64), mask=held > 0, sem="relaxed"
    )


@triton.jit
def _choose_digit(states, counts):
    """Adds to what is known of a source's threshold its next digit. One program per source.

    A state is the digits found so far, how many of the elements that have them are kept, and how
    many elements that is of.
    """
    state = states + 3 * tl.program_id(0)
    digits = tl.arange(0, _DIGITS)
    count = tl.load(counts + tl.program_id(0) * _DIGITS + digits)
    kept = tl.load(state + 1)
    # The elements with this digit or a higher one become fewer from digit to digit. The highest
    # digit for which they suffice is the threshold's.
    not_lower = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    digit = tl.sum((not_lower >= kept).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(digits > digit, count, 0), 0)
    tl.store(state, tl.load(state) * _DIGITS + digit)
    tl.store(state + 1, kept - above)
    tl.store(state + 2, tl.sum(tl.where(digits == digit, count, 0), 0))


@triton.jit
def _are_equal(bases, tensor, state, at, numel, dtype: tl.constexpr):
    """Which elements are equal to the threshold. It is not asked, and none are said to be, where
    all of them are kept.
    """
    is_asked = at < tl.where(tl.load(state + 1) < tl.load(state + 2), numel, 0)
    base = tl.load(bases + at, mask=is_asked, other=0.0).to(tl.float32)
    value = tl.load(tensor + at, mask=is_asked, other=0.0).to(tl.float32)
    return is_asked & (_magnitude(value - base, dtype) == tl.load(state).to(tl.int32))


@triton.jit
def _count_equal(bases, tensors, states, equal, numel, block: tl.constexpr):
    """Puts into (sources, blocks) how many elements of each block are equal to the threshold."""
    at = _index(block)
    for number in tl.static_range(len(tensors)):
        state = states + 3 * number
        is_equal = _are_equal(bases, tensors[number], state, at, numel, bases.dtype.element_ty)
        place = equal + number * tl.num_programs(0) + tl.program_id(0)
        tl.store(place, tl.sum(is_equal.to(tl.int32), 0))


@triton.jit(do_not_specialize=["count"])
def _make_rules(
    bases, tensors, states, equal, blocks, rules, numel, count, infinity, block: tl.constexpr
):  # fmt: skip
    """Puts each source's threshold, and the index where the elements equal to it cease to be kept,
    into the rules of `_trimmed`. One program per source.

    equal: (sources, count), how many elements equal to the threshold a block and all before it
        have; blocks: in which block the last of those that are kept is.
    """
    for number in tl.static_range(len(tensors)):
        if tl.program_id(0) == number:
            state = states + 3 * number
            dtype: tl.constexpr = bases.dtype.element_ty
            own_block = tl.load(blocks + number)
            at = own_block * block + tl.arange(0, block)
            is_equal = _are_equal(bases, tensors[number], state, at, numel, dtype)
            before = number * count + own_block - 1
            rank = tl.cumsum(is_equal.to(tl.int32), 0)
            rank += tl.load(equal + before, mask=own_block > 0, other=0)
            is_last = is_equal & (rank == tl.load(state + 1))
            end = tl.sum(tl.where(is_last, at + 1, 0), 0)
            # Where no end was asked for there is no last one, and all are kept.
            end = tl.where(end == 0, numel, end)
            threshold = tl.load(state)
            # NaN are not told apart: if one is the threshold, all are kept, and nothing else is.
            tl.store(rules + 2 * number, tl.minimum(threshold, infinity))
            tl.store(rules + 2 * number + 1, tl.where(threshold > infinity, 0, end))


def _launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any
) -> None:
    """Run so many programs of a kernel on the device that its tensors are on."""
    if device.type == "cuda":
        # A product and a sum are rounded one after the other, as PyTorch's operations are.
        options["enable_fp_fusion"] = False
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **options)
    else:  # Triton's interpreter, in tests
        kernel[(programs,)](*arguments, **options)


def _on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on a device, which is not waited for."""
    # First on the CPU, whatever is the default device: otherwise it would be waited for.
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def _rules(base: Tensor, tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The rules (sources, 2) by which so many elements are kept of each tensor less the base."""
    rules = [_KEEP_ALL if count else _KEEP_NONE for count in counts]
    made = _on_device(rules, torch.int64, base.device)
    chosen = [number for number, count in enumerate(counts) if 0 < count < base.numel()]
    for start in range(0, len(chosen), _COUNTED_AT_ONCE):
        group = chosen[start : start + _COUNTED_AT_ONCE]
        selected = _selected_rules(
            base, [tensors[number] for number in group], [counts[number] for number in group]
        )
        made.index_copy_(0, _on_device(group, torch.int64, base.device), selected)
    return made


def _selected_rules(base: Tensor, tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """`_rules` of sources whose thresholds depend on their elements."""
    device = base.device
    numel = base.numel()
    sources = len(tensors)
    blocks = triton.cdiv(numel, _COUNTED_BLOCK)
    programs = max(1, min(_COUNTING_PROGRAMS, blocks // _LEAST_BLOCKS))
    options = {"block": _COUNTED_BLOCK, "num_warps": _COUNTING_WARPS}
    padded = triton.next_power_of_2(sources)
    states = _on_device([(0, count, numel) for count in counts], torch.int64, device)
    shifts = range(0, torch.finfo(base.dtype).bits, _DIGIT_BITS.value)[::-1]
    totals = torch.zeros(len(shifts), sources, _DIGITS.value, dtype=torch.int64, device=device)
    inputs = base, tuple(tensors), states
    for shift, total in zip(shifts, totals, strict=True):
        _launch(
            _count_digits, programs, device, *inputs, total, numel, shift, _FEW, padded, **options
        )
        _launch(_choose_digit, sources, device, states, total)
    equal = torch.empty(sources, blocks, dtype=torch.int32, device=device)
    _launch(_count_equal, blocks, device, *inputs, equal, numel, **options)
    equal = equal.cumsum(1)
    last = torch.searchsorted(equal, states[:, 1:2].contiguous())
    rules = torch.empty(sources, 2, dtype=torch.int64, device=device)
    integer = torch.int32 if base.dtype == torch.float32 else torch.int16
    infinity = int(torch.tensor(torch.inf, dtype=base.dtype, device="cpu").view(integer))
    _launch(
        _make_rules, sources, device, *inputs, equal, last, rules, numel, blocks, infinity,
        **options
    )  # fmt: skip
    return rules


def merge_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    weights: Sequence[float],
    *,
    normalize: bool,
    scale: float,
) -> Tensor:
    """What `ties.merge_ties` gives for flat tensors.

    counts: how many elements are kept of each task vector.
    """
    result = torch.empty_like(base)
    _launch(
        _ties,
        triton.cdiv(base.numel(), _BLOCK),
        base.device,
        base,
        tuple(tensors),
        _rules(base, tensors, counts),
        _on_device(weights, torch.float32, base.device),
        result,
        base.numel(),
        float(scale),
        normalize,
        block=_BLOCK,
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
        triton.cdiv(base.numel(), _BLOCK),
        base.device,
        base,
        tuple(tensors),
        _on_device(halves, torch.int64, base.device),
        _on_device(bounds, torch.int64, base.device),
        _on_device(factors, torch.float32, base.device),
        result,
        base.numel(),
        float(scale),
        elect_sign,
        block=_BLOCK,
    )
    return result
