"""The one rule by which the examples judge what a paper says: holds, does not hold, or unclear.

A claim is that one thing is above another. It is judged by paired differences: both are measured
with the same seed, on the same test data of the same task. A difference is positive where it is as
the paper says. The rule:

- Each seed has a mean over the tasks. The mean of these must be so far from 0 that its interval of
  90 percent, by Student's t and the standard error over seeds, leaves 0 out. With three seeds, the
  fewest that count, that is 2.92 standard errors.
- More than half of the tasks, each with its mean over seeds, must point the same way. So no mean
  over tasks is carried by one task against the others.
- Then the claim **holds** where the mean is above 0, and **does not hold** where it is below. All
  else is **unclear**.
- Where nothing is drawn at random, there are no seeds. Then the tasks stand in their place, if they
  are five or more.

What is no mean over tasks counts as a single task. If two things were alike, normal noise would
give a false "holds" in at most 5 percent of such comparisons, and as many a false "does not hold".
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH_SEEDS = 3
ENOUGH_TASKS = 5  # where nothing is drawn at random
HOLDS = "holds"
FAILS = "does not hold"
UNCLEAR = "unclear"
# Student's t that is exceeded with a probability of 5 percent, by degrees of freedom. Beyond the
# last it falls to 1.64 at most, so the last is taken, which is the more careful.
STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83)


@dataclass(frozen=True)
class Verdict:
    """What differences say of a claim.

    word: `HOLDS`, `FAILS` or `UNCLEAR`.
    of_seeds: the mean over tasks of each seed.
    of_tasks: the mean over seeds of each task.
    error: the standard error of the mean, over seeds, or over tasks where there are no seeds; None
        of a single number.
    """

    word: str
    of_seeds: tuple[float, ...]
    of_tasks: tuple[float, ...]
    error: float | None

    @property
    def mean(self) -> float:
        """The mean over seeds and tasks."""
        return statistics.mean(self.of_seeds)

    @property
    def seeds(self) -> str:
        """The number of seeds whose mean over tasks is as the paper says: 2 of 3."""
        return _count(self.of_seeds)

    @property
    def tasks(self) -> str:
        """The number of tasks whose mean over seeds is as the paper says: 5 of 8."""
        return _count(self.of_tasks)

    def text(self, digits: int = 3) -> str:
        """The verdict with what it rests on."""
        numbers = f"{self.mean:+.{digits}f}"
        if self.error is not None:
            numbers += f" ± {self.error:.{digits}f}"
        counts = f"{self.seeds} seeds"
        if len(self.of_tasks) > 1:
            counts += f", {self.tasks} tasks"
        return f"{self.word} ({numbers}, {counts})"


def judge(differences: Sequence[Sequence[float]], is_drawn: bool = True) -> Verdict:
    """The verdict on differences of shape (seeds, tasks), by the rule at the head of this file.

    is_drawn: whether anything is drawn at random. If not, there is one row.
    """
    of_seeds = tuple(statistics.mean(of_seed) for of_seed in differences)
    of_tasks = tuple(statistics.mean(of_task) for of_task in zip(*differences, strict=True))
    if is_drawn:
        repeated = of_seeds
        enough = ENOUGH_SEEDS
    else:
        repeated = of_tasks
        enough = ENOUGH_TASKS
    mean = statistics.mean(repeated)
    error = None
    if len(repeated) > 1:
        error = statistics.stdev(repeated) / len(repeated) ** 0.5
    word = UNCLEAR
    if error is not None and len(repeated) >= enough and abs(mean) > _student(repeated) * error:
        pointing_alike = sum(of_task * mean > 0 for of_task in of_tasks)
        if 2 * pointing_alike > len(of_tasks):
            word = HOLDS if mean > 0 else FAILS
    return Verdict(word, of_seeds, of_tasks, error)


def single(differences: Sequence[float]) -> Verdict:
    """The verdict on one difference per seed."""
    return judge([[difference] for difference in differences])


def _student(values: Sequence[float]) -> float:
    """How many standard errors the mean of so many values has to be from 0."""
    return STUDENT[min(len(values) - 1, len(STUDENT)) - 1]


def _count(values: Sequence[float]) -> str:
    return f"{sum(value > 0 for value in values)} of {len(values)}"
