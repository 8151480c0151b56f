"""The trim of TIES: the largest magnitudes of a tensor are kept, without sorting it.

Floats without their sign bits, read as integers, order as their magnitudes do, with NaN above
everything. The threshold is therefore searched for among integers: a sample brackets it, and one
pass over the tensor counts the elements above the bracket and collects the few percent inside,
among which the threshold is selected. Where the sample misleads (with many equal values, say), the
bracket is halved until it holds few elements or a single value. The sample decides how long this
takes, never the result.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mergekit_moe_ext.tensor.kernels import chunks

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
Magnitudes = Callable[[slice], torch.Tensor]
_SAMPLE = 1 << 16  # about this many elements of a tensor are sampled
_MOST_COLLECTED = 16  # at most 1/16 of a tensor is collected at once


@dataclass(frozen=True)
class Threshold:
    """The rule by which elements of a flat tensor are kept: those with a magnitude above
    `magnitude`, and of those equal to it the ones with a flat index before `end`.

    `magnitude` is a float without its sign bit, read as an integer.
    """

    magnitude: int
    end: int = 0

    def trim(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """`values`, which begin at flat index `start`, with zeros for those that are not kept."""
        integer = _INTEGERS[values.dtype]
        if self.magnitude <= 0:
            return values
        if self.magnitude > torch.iinfo(integer).max:
            return torch.zeros_like(values)
        # hardshrink, one fast operation, keeps what is strictly larger than its bound, and every
        # NaN. So before `end`, where values equal to the threshold stay, the bound is the next
        # smaller float.
        split = min(max(self.end - start, 0), len(values))
        trimmed = []
        for part, magnitude in (
            (values[:split], self.magnitude - 1),
            (values[split:], self.magnitude),
        ):
            if len(part):
                bits = torch.tensor(magnitude, dtype=integer, device="cpu")
                largest_dropped = bits.view(values.dtype).item()
                # NaN as a bound would keep everything.
                bound = math.inf if math.isnan(largest_dropped) else largest_dropped
                trimmed.append(functional.hardshrink(part, bound))
        return torch.cat(trimmed) if len(trimmed) > 1 else trimmed[0]


KEEP_ALL = Threshold(-1)
KEEP_NONE = Threshold(2**63)


def trim(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """`tensor` with all but its largest magnitudes set to zero.

    It keeps max(1, floor(density * numel)) elements: none for a density of 0 or less, all from 1
    on. Of equal magnitudes at the threshold those with the lowest flat indices stay. NaN counts as
    the largest magnitude and always stays.

    >>> trim(torch.tensor([3.0, -1.0, -4.0, 1.0]), 0.75)
    tensor([ 3., -1., -4.,  0.])
    """
    threshold = magnitude_threshold(tensor, density)
    flat = tensor.reshape(-1)
    result = torch.empty_like(flat)
    for piece in chunks(flat):
        result[piece] = threshold.trim(flat[piece], piece.start)
    return result.view(tensor.shape)


def kept_count(numel: int, density: float) -> int:
    """How many elements `trim` keeps of so many, if there are no NaN beyond them."""
    if density >= 1:
        return numel
    return max(1, int(density * numel)) if density > 0 and numel else 0


def magnitude_threshold(
    tensor: torch.Tensor, density: float, base: torch.Tensor | None = None
) -> Threshold:
    """The threshold by which `trim` keeps elements of `tensor`, or of `tensor - base`.

    The difference is made chunk by chunk and never held whole.
    """
    count = kept_count(tensor.numel(), density)
    if density >= 1:
        return KEEP_ALL
    if count == 0:
        return KEEP_NONE
    flat = tensor.detach().reshape(-1)
    flat_base = None if base is None else base.detach().reshape(-1)

    def magnitudes(piece: slice) -> torch.Tensor:
        """Integers that order as the magnitudes of the elements do."""
        if flat_base is None:
            return flat[piece].abs().view(_INTEGERS[flat.dtype])
        difference = flat[piece] - flat_base[piece]
        return difference.abs_().view(_INTEGERS[difference.dtype])

    with torch.no_grad():
        return _select(magnitudes, flat, count)


def _select(magnitudes: Magnitudes, flat: torch.Tensor, count: int) -> Threshold:
    """The threshold that keeps `count` elements; 1 <= count < numel."""
    room = max(1 << 16, flat.numel() // _MOST_COLLECTED)
    # The threshold lies between `least` and `most`, ends included. Each turn tries a narrower
    # bracket [low, high], of which the counts tell whether the threshold lies above, below or
    # inside it.
    least = 0
    most = torch.iinfo(magnitudes(slice(0, 1)).dtype).max
    low, high = _bracket(magnitudes, flat.numel(), count, most)
    while True:
        above, inside, collected = _count(magnitudes, flat, low, high, room)
        if above >= count:
            least = high + 1
        elif above + inside < count:
            most = low - 1
        elif low < high and collected is None:  # inside, and too many to select from
            least = low
            most = high
        else:
            break
        # The upper half, or the single value that is left.
        low = (least + most) // 2
        if least < most:
            low += 1
        high = most
    # `count - above` elements of the bracket are kept: those above the magnitude, and of those
    # equal to it as many as are still lacking.
    magnitude = low
    ties = count - above
    equal = inside
    if collected is not None:
        (magnitude,) = _order_statistics(collected, [inside - ties])
        ties -= int((collected > magnitude).count_nonzero())
        equal = int((collected == magnitude).count_nonzero())
    end = _end(magnitudes, flat, magnitude, ties) if ties < equal else flat.numel()
    return Threshold(magnitude, end)


def _order_statistics(values: torch.Tensor, ranks: Sequence[int]) -> list[int]:
    """The values of these ranks, counted from 0, the smallest first."""
    if values.device.type == "cpu":
        return np.partition(values.numpy(), ranks)[ranks].tolist()
    return values.sort().values[ranks].tolist()  # what selects on a GPU uses a part of it


def _bracket(magnitudes: Magnitudes, numel: int, count: int, most: int) -> tuple[int, int]:
    """Two magnitudes between which the threshold very probably lies, from the order statistics of a
    sample.
    """
    # The stride is odd, so that the sample does not stay in a few columns of a matrix, whose widths
    # are mostly powers of two.
    sample = magnitudes(slice(0, numel, numel // _SAMPLE | 1))
    size = len(sample)
    # The number of sampled elements above the threshold is binomial: four standard deviations hold
    # it almost always, and the 2 helps where the deviation is tiny.
    expected = count / numel * size
    margin = 4 * math.sqrt(expected * (1 - count / numel)) + 2
    first = size - 1 - math.floor(expected - margin)
    last = size - 1 - math.ceil(expected + margin)
    low, high = _order_statistics(sample, [max(last, 0), min(first, size - 1)])
    # Beyond the ends of the sample there is no bound but those of all magnitudes.
    if last < 0:
        low = 0
    if first >= size:
        high = most
    return low, high


def _count(
    magnitudes: Magnitudes, flat: torch.Tensor, low: int, high: int, room: int
) -> tuple[int, int, torch.Tensor | None]:
    """The number of elements above `high`, the number in [low, high], and these themselves; None in
    their place where they are many or the bracket is a single value.
    """
    # numpy compares, counts and selects several times faster than torch does on a CPU
    on_cpu = flat.device.type == "cpu"
    count_true: Callable[[Any], Any] = np.count_nonzero if on_cpu else torch.count_nonzero

    above = 0
    inside = 0
    collected: list[torch.Tensor] = []
    for piece in chunks(flat):
        values: Any = magnitudes(piece).numpy() if on_cpu else magnitudes(piece)
        is_above = values > high
        is_inside = (values >= low) ^ is_above
        above += int(count_true(is_above))
        # Once there are too many to collect, the rest is only counted.
        if low < high and inside <= room:
            indices = np.flatnonzero(is_inside) if on_cpu else is_inside
            # Not by `as_tensor`, which would move it to the default device.
            found = values[indices]
            collected.append(torch.from_numpy(found) if on_cpu else found)
            inside += len(collected[-1])
        else:
            inside += int(count_true(is_inside))
    is_complete = low < high and inside <= room
    return above, inside, torch.cat(collected) if is_complete else None


def _end(magnitudes: Magnitudes, flat: torch.Tensor, magnitude: int, ties: int) -> int:
    """The flat index before which exactly `ties` elements have this magnitude."""
    for piece in chunks(flat):
        # torch's own comparing and finding take several times as long on a CPU
        if flat.device.type == "cpu":
            equal = torch.as_tensor(np.flatnonzero(magnitudes(piece).numpy() == magnitude))
        else:
            equal = (magnitudes(piece) == magnitude).nonzero().reshape(-1)
        if len(equal) >= ties:
            return piece.start + int(equal[ties - 1]) + 1
        ties -= len(equal)
    raise AssertionError("fewer elements have the threshold's magnitude than were counted")
