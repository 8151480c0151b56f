"""The mixed batches of CAEM-MoE (4.3): every step has batches of every task, and an epoch as many
rows of each, whatever the tasks' sizes.
"""

import math
from collections.abc import Iterator, Sequence

import numpy
from torch.utils.data import Sampler


class TaskSampler(Sampler[int]):
    """The order in which the rows of several tasks are read, which lie one task after the other.

    Of each task the rows are read in a random order, then all of them in another order, and so on.
    An epoch takes the next `samples` of each task, rounded up to whole steps, and the epoch after
    it goes on from there, so that larger tasks are read to their end, too. The order depends on
    nothing but the seed and the number of the epoch.
    """

    def __init__(self, sizes: Sequence[int], samples: int, rows_per_step: int, seed: int) -> None:
        """`sizes` are the numbers of rows of the tasks; a step has `rows_per_step` of each."""
        self.tasks = len(sizes)
        self.sizes = list(sizes)
        self._rows_per_step = rows_per_step
        self._rows_per_epoch = math.ceil(samples / rows_per_step) * rows_per_step
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        """The number of rows of an epoch, those of all tasks."""
        return self.tasks * self._rows_per_epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        orders = [self._order(task) for task in range(self.tasks)]
        for start in range(0, self._rows_per_epoch, self._rows_per_step):
            for order in orders:
                yield from order[start : start + self._rows_per_step]

    def _order(self, task: int) -> list[int]:
        """The indices of this epoch's rows of one task, in the order in which they are read."""
        size = self.sizes[task]
        offset = sum(self.sizes[:task])
        position = self._epoch * self._rows_per_epoch
        end = position + self._rows_per_epoch
        order: list[int] = []
        while position < end:
            # Each reading of the whole task has a random order of its own.
            reading, start = divmod(position, size)
            shuffled = numpy.random.default_rng([self._seed, task, reading]).permutation(size)
            taken = shuffled[start : start + end - position]
            order += (offset + taken).tolist()
            position += len(taken)
        return order
