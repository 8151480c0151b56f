"""Task vectors as dense tiles of rows, however they are stored, and how large a tile is.

`stored` is one tensor of dense vectors (experts, rows, columns), or three of sparse ones: their
values and columns (experts, kept), sorted by row, and the number of elements up to the end of each
row (experts, rows).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .wemoe_kernel import can_spread, spread


class Rule(NamedTuple):
    """Which of the ways to compute a product a kind of device takes.

    merging: from this many tokens with one set of coefficients on, weights are merged.
    sparse: up to this many tokens in all, sparse task vectors are multiplied as they are; beyond
        it, and always with 0, they are made dense.
    tile: elements of weights or vectors that are held at once.
    """

    merging: int
    sparse: int
    tile: int


# As `benchmarks/wemoe.py --rule` measured them, by torch's names of kinds of devices. On a CPU a
# tile stays in a cache.
RULES = {"cpu": Rule(merging=8, sparse=128, tile=2**20)}
# For what was not measured, and in compiled code, where loops are unrolled: dense vectors, whole.
PLAIN = Rule(merging=8, sparse=0, tile=2**27)
_ROWS = 32  # the rows of a tile are a multiple of this; products with fewer are slow


def rule_of(device: torch.device) -> Rule:
    """The rule of a device; compiled code takes the plain one."""
    return PLAIN if torch.compiler.is_compiling() else RULES.get(device.type, PLAIN)


def samples_of_tile(weight: Tensor, samples: int) -> int:
    """The number of samples whose weights are merged at once, about the same in every turn."""
    if not samples:
        return 1
    # As many as fit with the smallest tile, spread evenly: 9 samples of at most 8 are 5 and 4, not
    # 8 and 1. Both divisions round up.
    most = max(1, rule_of(weight.device).tile // (_ROWS * weight.shape[1]))
    turns = -(-samples // most)
    return max(1, -(-samples // turns))


def rows_of_tile(weight: Tensor, held: int) -> int:
    """The number of rows of a tile, `held` copies of which are in memory at once."""
    blocks = rule_of(weight.device).tile // (held * weight.shape[1] * _ROWS)
    return min(max(1, blocks) * _ROWS, weight.shape[0])


def slices_of(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def tiles_of(
    weight: Tensor,
    stored: Sequence[Tensor],
    rows: int,
    *,
    is_sum: bool = False,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tiles of the weight: the slice of rows, these rows, and those of the dense vectors.

    The vectors are (experts, rows, columns); with `is_sum`, which is for sparse ones alone, their
    sum (1, rows, columns).
    """
    slices = slices_of(weight.shape[0], rows)
    if len(stored) == 1:
        for tile in slices:
            yield tile, weight[tile], stored[0][:, tile]
        return
    if len(slices) == 1 and not is_sum:
        yield slices[0], weight, made_dense(weight, *stored)
        return
    values, columns, row_ends = stored
    # Computed once for all tiles, since each step of it goes over all elements.
    places = places_in_tile(columns, row_ends, weight.shape[1], rows)
    # Elements are sorted by row, so that those of a tile are one stretch, which ends where its last
    # row does.
    edges = []
    for ends in row_ends[:, rows - 1 : -1 : rows].tolist():
        edges.append([0, *ends, values.shape[1]])
    for number, tile in enumerate(slices):
        base_rows = weight[tile]
        vectors = values.new_zeros(1 if is_sum else len(values), base_rows.numel())
        for index, expert_edges in enumerate(edges):
            stretch = slice(expert_edges[number], expert_edges[number + 1])
            dense = vectors[0 if is_sum else index]
            dense.index_add_(0, places[index, stretch], values[index, stretch])
        yield tile, base_rows, vectors.unflatten(1, base_rows.shape)


def made_dense(weight: Tensor, values: Tensor, columns: Tensor, row_ends: Tensor) -> Tensor:
    """Sparse vectors as dense ones, (experts, rows, columns)."""
    if can_spread(weight, (values, columns, row_ends)):
        return spread(weight, values, columns, row_ends)
    vectors = values.new_zeros(len(values), *weight.shape)
    width = weight.shape[1]
    if _searches(values.device):
        places = _places_by_search(columns, row_ends, width, len(weight))
        vectors.view(len(values), -1).scatter_(1, places.long(), values)
    else:
        places = _places_by_counts(columns, row_ends, width)
        vectors.view(-1).index_add_(0, places.flatten(), values.flatten())
    return vectors


def places_in_tile(columns: Tensor, row_ends: Tensor, width: int, rows: int) -> Tensor:
    """Where each kept element (experts, kept) lies in its flattened tile, which is so many rows of
    a weight of this width: its row's start there, and its column.
    """
    # They are not kept for further passes: they would take more memory than columns do, which are
    # stored because they are small.
    if _searches(columns.device):
        return _places_by_search(columns, row_ends, width, rows)
    return _places_by_counts(columns, row_ends, width, rows)


def _searches(device: torch.device) -> bool:
    """Whether a device takes the way with the fewest operations, though each of them does more."""
    return device.type != "cpu"


def _places_by_counts(
    columns: Tensor, row_ends: Tensor, width: int, rows: int | None = None
) -> Tensor:
    """Places as `places_in_tile` gives; without `rows`, in all vectors, one after the other."""
    counts = torch.diff(row_ends, prepend=row_ends.new_zeros(len(row_ends), 1), dim=1)
    numbers = torch.arange(row_ends.numel(), dtype=torch.int32, device=row_ends.device)
    if rows is not None:
        numbers = numbers % row_ends.shape[1] % rows
    starts = numbers * width
    places = starts.repeat_interleave(counts.flatten(), output_size=columns.numel())
    places = places.view(columns.shape)
    places += columns.int()
    return places


def _places_by_search(columns: Tensor, row_ends: Tensor, width: int, rows: int) -> Tensor:
    numbers = torch.arange(columns.shape[1], dtype=torch.int32, device=columns.device)
    numbers = numbers.repeat(len(columns), 1)
    # The row of the k-th element is the number of rows that end before it.
    found = torch.searchsorted(row_ends, numbers, right=True, out_int32=True)
    if rows < row_ends.shape[1]:
        found = found % rows
    # Numbers without a sign cannot be added to others. With a sign the same bits are the same
    # numbers, up to half of what the type holds.
    is_narrow = columns.dtype == torch.uint16 and width <= 2**15
    signed = columns.view(torch.int16) if is_narrow else columns.int()
    return torch.add(signed, found, alpha=width)
