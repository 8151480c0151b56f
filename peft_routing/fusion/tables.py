"""The table that ensembles and choices of experts are computed from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """The log-probabilities, in nats, of the target tokens of several tasks.

    experts: the names of the adapters, in the order of the columns.
    tasks: the names of the tasks.
    log_probabilities: float32 (tokens, experts + 1); the base model's are the last column.
    tasks_of: the index of each token's task (tokens,).
    texts_of: the index of each token's text (tokens,), which never falls: a text's tokens are one
    after the other, as they were read.
    """

    experts: tuple[str, ...]
    tasks: tuple[str, ...]
    log_probabilities: Tensor
    tasks_of: Tensor
    texts_of: Tensor

    @property
    def of_experts(self) -> Tensor:
        """(tokens, experts): the log-probabilities in float64, without the base model's."""
        return self.log_probabilities[:, :-1].double()

    @property
    def weights(self) -> Tensor:
        """(tokens,): 1 / (tasks x tokens of the token's task), which sum to 1 (2.3)."""
        counts = torch.bincount(self.tasks_of, minlength=len(self.tasks)).double()
        return 1 / (len(self.tasks) * counts[self.tasks_of])

    @property
    def losses(self) -> Tensor:
        """(tasks, experts + 1): the mean loss of each column over the tokens of each task."""
        return task_means(-self.log_probabilities, self.tasks_of, len(self.tasks))

    def task_losses(self, log_probabilities: Tensor) -> Tensor:
        """(tasks,): the mean loss over the tokens of each task, by a fusion's (tokens,)."""
        return task_means(-log_probabilities, self.tasks_of, len(self.tasks))


def task_means(values: Tensor, tasks_of: Tensor, tasks: int) -> Tensor:
    """(tasks, …): the mean over the tokens of each task, in float64, for values (tokens, …)."""
    counts = torch.bincount(tasks_of, minlength=tasks).double()
    sums = torch.zeros(tasks, *values.shape[1:], dtype=torch.float64)
    sums.index_add_(0, tasks_of, values.double())
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def joined(
    experts: Sequence[str],
    tasks: Sequence[str],
    columns: Sequence[Sequence[Tensor]],
    counts: Sequence[Sequence[int]],
) -> Table:
    """The table of what was measured.

    Args:
        columns: for each task the log-probabilities (tokens,) of each expert and, last, the base.
        counts: for each task the number of target tokens of each text, in the same order.
    """
    tasks_of = []
    texts_of = []
    texts = 0
    for index, of_texts in enumerate(counts):
        numbers = torch.arange(texts, texts + len(of_texts))
        texts_of.append(numbers.repeat_interleave(torch.tensor(of_texts)))
        tasks_of.append(torch.full((sum(of_texts),), index))
        texts += len(of_texts)
    rows = [torch.stack(list(of_task), dim=1) for of_task in columns]
    return Table(
        tuple(experts), tuple(tasks), torch.cat(rows), torch.cat(tasks_of), torch.cat(texts_of)
    )
