"""The allocation of a merged layer's experts to its sources: CAEM's equation 1 and appendix A.2.

These are pure functions of numbers, to be read beside the paper. Where A.2 leaves something open
(more than three tasks, a second round, ties), the docstrings say what we do.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["allocate", "most_used", "normalised_entropy"]


def normalised_entropy(counts: Sequence[int]) -> float:
    """The entropy of the experts' usage, divided by log n_s (equation 1); between 0 and 1.

    >>> normalised_entropy([5, 5, 5, 5])
    1.0
    >>> normalised_entropy([9, 0, 0, 0])
    0.0

    0 log 0 is 0, and a single expert has no entropy. `ValueError` if nothing was counted.
    """
    total = sum(counts)
    if total == 0:
        raise ValueError("no expert was ever chosen")
    if len(counts) == 1:
        return 0.0
    # An expert that was never chosen adds nothing, as 0 log 0 is 0.
    shares = [count / total for count in counts if count > 0]
    entropy = -math.fsum(share * math.log(share) for share in shares) / math.log(len(counts))
    return min(1.0, max(0.0, entropy))  # rounding may overstep


def allocate(entropies: Sequence[float], num_experts: int, capacities: Sequence[int]) -> list[int]:
    """The number of experts that each source gives to `num_experts` (Algorithm 1, lines 6 to 8).

    >>> allocate([0.2, 0.7, 0.9], 8, [8, 8, 8])
    [1, 3, 4]

    Each source gives at least one expert and at most its capacity, and the sum is `num_experts`.
    Ties go to the source that is named first. Where all entropies are zero the sources share
    evenly. `ValueError` where no allocation exists.
    """
    if num_experts < len(entropies):
        raise ValueError(
            f"{len(entropies)} sources give at least one expert each; {num_experts} are too few"
        )
    if num_experts > sum(capacities):
        raise ValueError(
            f"the sources have {sum(capacities)} experts together; {num_experts} are too many"
        )
    # Shares in proportion to the entropies, as exact fractions: in floating point three equal
    # shares of nine experts might come out just below 3, and be rounded down to 2.
    weights = [Fraction(entropy) for entropy in entropies]
    if not any(weights):
        weights = [Fraction(1)] * len(entropies)
    ideal = [num_experts * weight / sum(weights) for weight in weights]
    remainders = [share - math.floor(share) for share in ideal]
    # Rounding down and the limits of a source may miss the total, in either direction. A.2 repairs
    # it by the remainders.
    allocation = []
    for share, capacity in zip(ideal, capacities, strict=True):
        allocation.append(min(max(math.floor(share), 1), capacity))
    excess = sum(allocation) - num_experts
    if excess > 0:
        _take(allocation, remainders, excess)
    elif excess < 0:
        _give(allocation, remainders, capacities, -excess)
    return allocation


def _take(allocation: list[int], remainders: Sequence[Fraction], excess: int) -> None:
    """Take experts away one after the other, each from the largest allocation; of several such from
    the one with the smallest remainder (A.2, case 1).
    """
    # Only a source that was raised to one expert causes an excess. Taking from the largest never
    # leaves a source without an expert.
    for _ in range(excess):
        largest = max(allocation)
        candidates = [i for i, number in enumerate(allocation) if number == largest]
        allocation[min(candidates, key=lambda i: remainders[i])] -= 1


def _give(
    allocation: list[int], remainders: Sequence[Fraction], capacities: Sequence[int], deficit: int
) -> None:
    """Give away the experts that are lacking, by the remainders (A.2, case 2).

    The paper has three tasks; with more we do as it does with three, round after round.
    """
    by_remainder = sorted(range(len(allocation)), key=lambda i: -remainders[i])
    open_tasks = [i for i in by_remainder if allocation[i] < capacities[i]]
    # Two sources that still have room share the deficit in halves, the larger half to the one with
    # the larger remainder, as far as the room of both allows.
    if len(open_tasks) == 2:
        first, second = open_tasks
        free = [capacities[i] - allocation[i] for i in open_tasks]
        to_second = min(max(deficit // 2, deficit - free[0]), free[1])
        allocation[first] += deficit - to_second
        allocation[second] += to_second
        return
    # Else each that has room gets one per round, in the order of the remainders. A single one takes
    # them all.
    while deficit:
        for i in open_tasks:
            if deficit and allocation[i] < capacities[i]:
                allocation[i] += 1
                deficit -= 1


def most_used(counts: Sequence[int], number: int) -> list[int]:
    """The indices of the most used experts (of equally used ones the first), ascending.

    >>> most_used([3, 9, 9, 1], 2)
    [1, 2]
    """
    # Sorting is stable, so that equally used experts stay in their order.
    by_usage = sorted(range(len(counts)), key=lambda i: -counts[i])
    return sorted(by_usage[:number])
