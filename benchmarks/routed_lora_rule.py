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
    measured: list[tuple[Case, dict[mixing.Way, float]]] = []
    regrets: list[tuple[float, ...]] = []
    for sizes, experts, rank, k, count in itertools.product(shapes, counts, ranks, ks, tokens):
        if k < experts:
            case = Case(count, experts, rank, k, sizes)
            ways, choices = case.ways(getattr(torch, dtype))
            works = {}
            for (name, way), work in itertools.product(ways.items(), WORKS):
                works[name, work] = partial(work, way)
            best = {
                name: seconds * 1e3 for name, seconds in best_in_turn(works, "cpu", 0.3).items()
            }
            cells = []
            for name in ways:
                times = []
                for work, choice in zip(WORKS, choices, strict=True):
                    times.append(f" {best[name, work]:.2f}{'*' if name == choice else ''}")
                cells.append(name + "/".join(times))
            click.echo(f"{case}  {'  '.join(cells)}")
            measured.append((case, {name: best[name, forward] for name in ways}))
            of_works = []
            for work, choice in zip(WORKS, choices, strict=True):
                least = min(best[name, work] for name in ways if (name, work) != NOT_CHOSEN)
                of_works.append(best[choice, work] / least - 1)
            regrets.append(tuple(of_works))
    titles = ("forward", "forward and backward")
    for title, of_work in zip(titles, zip(*regrets, strict=True), strict=True):
        click.echo(
            f"{title}: the rule takes {np.mean(of_work):.1%} more than the best way, at worst "
            f"{max(of_work):.0%}"
        )
    if fit:
        for name in mixing.COSTS:
            constants = ", ".join(f"{constant:.3g}" for constant in fitted(measured, name))
            click.echo(f'    "{name}": ({constants}),')


def fitted(measured: Sequence[tuple[Case, dict[mixing.Way, float]]], way: mixing.Way) -> Any:
    """The non-negative milliseconds per unit of work with the least mean squared relative error."""
    rows = [np.array(case.work()[way]) / best[way] for case, best in measured if way in best]
    return nnls(np.stack(rows), np.ones(len(rows)))[0]


if __name__ == "__main__":
    main()
