"""Time each way of mixing a module's experts, and judge the rule of `peft_routing.mixing` by it.

    python benchmarks/routed_lora_rule.py          # CPU, some minutes
    python benchmarks/routed_lora_rule.py --fit    # prints constants for the rule as well

Every way is timed on a grid of sizes, experts, ranks, k and tokens, forward and forward with
backward: the processor time of one thread, so that other work on the machine does not count, the
ways in turn and the best of several rounds. The rule's regret is what its choice takes beyond the
best way. `--fit` finds the constants that estimate the forward times with the least mean squared
relative error.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import numpy as np
import torch
from measuring import best_in_turn
from scipy.optimize import nnls
from torch import Tensor

from peft_routing import mixing

LARGEST = 1 << 26  # numbers that `gathered` may copy


@dataclass(frozen=True)
class Case:
    """A size of the problem."""

    tokens: int
    experts: int
    rank: int
    k: int
    sizes: tuple[int, int]  # in and out

    def __str__(self) -> str:
        return (
            f"{self.sizes[0]:>5} x {self.sizes[1]:<4} {self.experts:>4} {self.rank:>3} "
            f"{self.k:>2} {self.tokens:>6}"
        )

    def work(self) -> dict[mixing.Way, Sequence[float]]:
        """The units of work of each way, by which the rule estimates its time."""
        units = mixing.work(self.tokens, self.experts, self.rank, self.k, sum(self.sizes))
        return dict(zip(mixing.COSTS, units, strict=True))

    def ways(
        self, dtype: torch.dtype
    ) -> tuple[dict[mixing.Way, Callable[[], Tensor]], list[mixing.Way]]:
        """The ways that are possible, and which one the rule chooses for each of `WORKS`."""
        torch.manual_seed(0)
        in_features, out_features = self.sizes
        a = torch.randn(self.experts * self.rank, in_features).mul(0.02).to(dtype)
        b = torch.randn(self.experts * self.rank, out_features).mul(0.02).to(dtype)
        x = torch.randn(self.tokens, in_features).to(dtype).requires_grad_()
        scores = torch.randn(self.tokens, self.experts).topk(self.k, dim=-1)
        coefficients = torch.zeros(self.tokens, self.experts).scatter(
            -1, scores.indices, scores.values.softmax(-1)
        )
        coefficients.requires_grad_()
        arguments = (x, a, b, coefficients, coefficients, mixing.full)
        ways: dict[mixing.Way, Callable[[], Tensor]] = {"dense": partial(mixing.dense, *arguments)}
        if self.tokens * self.k * self.rank * sum(self.sizes) < LARGEST:
            ways["gathered"] = partial(mixing.of_chosen, *arguments, self.k, "gathered")
        if mixing.can_be_grouped(x, a, b, self.rank):
            ways["grouped"] = partial(mixing.of_chosen, *arguments, self.k, "grouped")
        choices = []
        for work in WORKS:
            gradients = work is forward_and_backward
            choices.append(mixing.cheapest(x, a, b, self.experts, self.k, gradients=gradients))
        return ways, choices


def forward(way: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        way()


def forward_and_backward(way: Callable[[], Tensor]) -> None:
    way().sum().backward()


WORKS = (forward, forward_and_backward)
NOT_CHOSEN = ("gathered", forward_and_backward)  # it would keep its copies


@dataclass(frozen=True)
class Timed:
    """A row of the table: a case whose ways were timed.

    milliseconds: by way and work.
    choices: the way that the rule chooses for each of `WORKS`.
    """

    case: Case
    ways: list[mixing.Way]
    milliseconds: dict[tuple[mixing.Way, Callable[..., None]], float]
    choices: list[mixing.Way]

    def __str__(self) -> str:
        cells = []
        for way in self.ways:
            times = []
            for work, choice in zip(WORKS, self.choices, strict=True):
                star = "*" if way == choice else ""
                times.append(f" {self.milliseconds[way, work]:.2f}{star}")
            cells.append(way + "/".join(times))
        return f"{self.case}  {'  '.join(cells)}"

    def regrets(self) -> list[float]:
        """The share by which the rule's choice takes longer than the best way, for each work."""
        regrets = []
        for work, choice in zip(WORKS, self.choices, strict=True):
            times = [self.milliseconds[way, work] for way in self.ways if (way, work) != NOT_CHOSEN]
            regrets.append(self.milliseconds[choice, work] / min(times) - 1)
        return regrets


def timed(case: Case, dtype: torch.dtype) -> Timed:
    """The case with the best time of each way, forward and forward with backward."""
    ways, choices = case.ways(dtype)
    works = {}
    for (name, way), work in itertools.product(ways.items(), WORKS):
        works[name, work] = partial(work, way)
    best = best_in_turn(works, "cpu", 0.3)
    milliseconds = {key: seconds * 1e3 for key, seconds in best.items()}
    return Timed(case, list(ways), milliseconds, choices)


@click.command()
@click.option(
    "--experts",
    "counts",
    type=int,
    multiple=True,
    default=[8, 64, 256],
    show_default=True,
    help="Number of experts; several may be given, as of the next four options.",
)
@click.option(
    "--rank",
    "ranks",
    type=int,
    multiple=True,
    default=[4, 16],
    show_default=True,
    help="Rank of each expert.",
)
@click.option(
    "--tokens",
    type=int,
    multiple=True,
    default=[1, 4, 16, 64, 512],
    show_default=True,
    help="Number of tokens in a pass.",
)
@click.option(
    "--k",
    "ks",
    type=int,
    multiple=True,
    default=[1, 4],
    show_default=True,
    help="Number of experts that a token chooses.",
)
@click.option(
    "--shape",
    "shapes",
    type=(int, int),
    multiple=True,
    default=[(512, 512), (2048, 2048), (2048, 8192)],
    show_default=True,
    help="Inputs and outputs of the module.",
)
@click.option("--dtype", default="float32", show_default=True, help="Type of all numbers.")
@click.option("--fit", is_flag=True, help="Print constants for the rule.")
def main(
    counts: list[int],
    ranks: list[int],
    tokens: list[int],
    ks: list[int],
    shapes: Any,
    dtype: str,
    fit: bool,
) -> None:
    """Print a table of milliseconds, and the rule's regret."""
    torch.set_num_threads(1)
    click.echo(f"torch {torch.__version__}, {dtype}; forward/forward and backward")
    click.echo(
        f"{'in x out':>12} {'E':>4} {'r':>3} {'k':>2} {'tokens':>6}  ms, and * for the rule's "
        "choice"
    )
    measured: list[Timed] = []
    for sizes, experts, rank, k, count in itertools.product(shapes, counts, ranks, ks, tokens):
        if k < experts:
            row = timed(Case(count, experts, rank, k, sizes), getattr(torch, dtype))
            click.echo(str(row))
            measured.append(row)
    for index, name_of_work in enumerate(("forward", "forward and backward")):
        regrets = [row.regrets()[index] for row in measured]
        click.echo(
            f"{name_of_work}: the rule takes {np.mean(regrets):.1%} more than the best "
            f"way, at worst {max(regrets):.0%}"
        )
    if fit:
        for name_of_way in mixing.COSTS:
            constants = ", ".join(f"{constant:.3g}" for constant in fitted(measured, name_of_way))
            click.echo(f'    "{name_of_way}": ({constants}),')


def fitted(measured: Sequence[Timed], way: mixing.Way) -> Any:
    """The non-negative milliseconds per unit of work with the least mean squared relative error."""
    rows = []
    for row in measured:
        if way in row.ways:
            rows.append(np.array(row.case.work()[way]) / row.milliseconds[way, forward])
    return nnls(np.stack(rows), np.ones(len(rows)))[0]


if __name__ == "__main__":
    main()
