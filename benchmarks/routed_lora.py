"""Time one routed module against PEFT's Arrow, one plain LoRA, and the bare base layer.

    python benchmarks/routed_lora.py                # CPU, some minutes
    python benchmarks/routed_lora.py --plot cost.png
    python benchmarks/routed_lora.py --device cuda

All in one process, in turn, the best of up to fifty rounds; on a CPU one thread's processor time,
so that other work on the machine does not count. Memory is the peak beyond what is held before.
Both routers are Arrow's, on the same adapters and with the same top k, 0 standing for all experts.
PEFT's makes a tensor of (tokens, experts, out); where that alone is over `--limit` GB it is not
run. `routed_lora_rule.py` compares the ways inside the routed module, `routed_lora_model.py` whole
models.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from measuring import best_in_turn, peak_extra_bytes
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ArrowConfig, create_arrow_model
from random_adapters import random_adapters
from torch import nn

from mergekit_moe_ext.analysis import check_new_figure, pyplot
from peft_routing import RoutedLoraConfig

PEFTS = "PEFT's Arrow"


class Base(nn.Module):
    """A model of one linear module: PEFT wants it inside another."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def competitors(
    paths: list[str], rank: int, sizes: tuple[int, int], k: int, device: str
) -> dict[str, Callable[[], Any]]:
    """A function for each competitor that makes its model."""
    base = Base(*sizes).to(device).requires_grad_(False)

    def fresh() -> Base:
        copy = Base(*sizes).to(device).requires_grad_(False)
        copy.load_state_dict(base.state_dict())
        return copy

    plain = LoraConfig(r=rank, target_modules=["linear"], init_lora_weights=False)
    return {
        "base layer": fresh,
        "one plain LoRA": lambda: get_peft_model(fresh(), plain),
        "routed": lambda: get_peft_model(
            fresh(), RoutedLoraConfig(experts=paths, router="arrow", top_k=k)
        ),
        PEFTS: lambda: create_arrow_model(fresh(), paths, ArrowConfig(top_k=k)),
    }


def forward(model: Any, x: torch.Tensor) -> None:
    with torch.no_grad():  # not inference_mode: PEFT would keep its prototypes as inference tensors
        model(x)


def forward_and_backward(model: Any, x: torch.Tensor) -> None:
    model(x).sum().backward()


WORKS = (forward, forward_and_backward)
STYLES: dict[str, dict[str, Any]] = {
    PEFTS: {"color": "tab:red", "marker": "s"},
    "routed": {"color": "tab:blue", "marker": "o"},
    "one plain LoRA": {"color": "0.3", "linestyle": "--"},
    "base layer": {"color": "0.6", "linestyle": ":"},
}


@dataclass(frozen=True)
class Row:
    """A row of the table: a size of the problem, and the seconds and memory of each competitor."""

    sizes: tuple[int, int]  # in and out
    rank: int
    experts: int
    k: int
    tokens: int
    work: Callable[..., None]
    seconds: dict[str, float]
    extra: dict[str, int]  # bytes

    def __str__(self) -> str:
        ours = self.seconds["routed"]
        lora = self.seconds["one plain LoRA"]
        work = "forward" if self.work is forward else "+backward"
        arrow_ms = "-"
        arrow_ratio = "-"
        arrow_mb = "-"
        if PEFTS in self.seconds:
            arrow = self.seconds[PEFTS]
            arrow_ms = f"{arrow * 1e3:.2f}"
            arrow_ratio = f"{arrow / ours:.1f}"
            arrow_mb = f"{self.extra[PEFTS] / 1e6:.1f}"
        return (
            f"{self.sizes[0]:>5} x {self.sizes[1]:<4} {self.rank:>3} {self.experts:>4} {self.k:>4} "
            f"{self.tokens:>6} {work:>9} {self.seconds['base layer'] * 1e3:>8.2f} "
            f"{lora * 1e3:>8.2f} {ours * 1e3:>8.2f} {arrow_ms:>9} {ours / lora:>7.2f} "
            f"{arrow_ratio:>7} {self.extra['routed'] / 1e6:>8.1f} {arrow_mb:>9}"
        )


@click.command()
@click.option(
    "--device", default="cpu", show_default=True, help="Device to compute on, as torch names it."
)
@click.option(
    "--shape",
    "shapes",
    type=(int, int),
    multiple=True,
    default=[(2048, 2048), (2048, 8192)],
    show_default=True,
    help="Inputs and outputs of the module; several may be given, as of the next four options.",
)
@click.option(
    "--experts",
    "counts",
    type=int,
    multiple=True,
    default=[4, 8, 10, 64, 256],
    show_default=True,
    help="Number of experts.",
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
    "--k",
    "ks",
    type=int,
    multiple=True,
    default=[4, 0],
    show_default=True,
    help="Number of experts that a token chooses, 0 for all.",
)
@click.option(
    "--tokens",
    type=int,
    multiple=True,
    default=[1, 16, 512],
    show_default=True,
    help="Number of tokens in a pass.",
)
@click.option(
    "--limit",
    default=3.0,
    show_default=True,
    help="Size in GB of PEFT's largest tensor above which it is not run.",
)
@click.option(
    "--seconds", default=2.0, show_default=True, help="Seconds to spend on a row of the table."
)
@click.option("--plot", type=Path, help="File for a figure of the milliseconds by experts.")
def main(
    device: str,
    shapes: Any,
    counts: Any,
    ranks: Any,
    ks: Any,
    tokens: Any,
    limit: float,
    seconds: float,
    plot: Path | None,
) -> None:
    """Print a table: milliseconds, ratios to one plain LoRA and to PEFT's Arrow, and memory."""
    if plot is not None:
        check_new_figure(plot)
    torch.set_num_threads(1)
    click.echo(f"torch {torch.__version__}, {device}, one thread, float32")
    click.echo(
        f"{'in x out':>12} {'r':>3} {'E':>4} {'k':>4} {'tokens':>6} {'work':>9} {'base ms':>8} "
        f"{'LoRA ms':>8} "
        f"{'ours ms':>8} {'Arrow ms':>9} {'/ LoRA':>7} {'Arrow/':>7} {'ours MB':>8} {'Arrow MB':>9}"
    )
    measured: list[Row] = []
    for sizes, rank, count in itertools.product(shapes, ranks, counts):
        with random_adapters(Base(*sizes), count, rank, scale=0.05) as paths:
            for k in dict.fromkeys(k or count for k in ks):
                makers = competitors(paths, rank, sizes, k, device)
                models = {name: make().train() for name, make in makers.items()}
                for many, work in itertools.product(tokens, WORKS):
                    runs = models.copy()
                    if many * count * sizes[1] * 4 > limit * 1e9:
                        del runs[PEFTS]
                    x = torch.randn(
                        1, many, sizes[0], device=device, requires_grad=work is forward_and_backward
                    )
                    works = {name: partial(work, model, x) for name, model in runs.items()}
                    extra = {name: peak_extra_bytes(run, device) for name, run in works.items()}
                    best = best_in_turn(works, device, seconds)
                    row = Row(sizes, rank, count, k, many, work, best, extra)
                    measured.append(row)
                    click.echo(str(row))
    if plot is not None:
        rows = []
        for row in measured:
            if row.k == ks[0] and row.sizes == shapes[0] and row.work is forward:
                rows.append(row)
        _draw(rows, plot)


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the milliseconds of a forward pass against the number of experts, a panel per number of
    tokens and rank.
    """
    plt = pyplot()
    panels = sorted({(row.tokens, row.rank) for row in rows})
    columns = len({rank for _, rank in panels})
    lines = len(panels) // columns
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 2.6 * lines), sharex=True, sharey="row", squeeze=False
    )
    for axis, (tokens, rank) in zip(axes.flat, panels, strict=True):
        here = [row for row in rows if (row.tokens, row.rank) == (tokens, rank)]
        for name, style in STYLES.items():
            points = [(row.experts, row.seconds[name] * 1e3) for row in here if name in row.seconds]
            axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_title(f"{tokens} token{'s' * (tokens > 1)}, rank {rank}", fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        counts = sorted({row.experts for row in rows})
        axis.set_xticks(counts, [str(count) if count != 10 else "" for count in counts])  # beside 8
        axis.set_xlabel("experts")
    for axis in axes[:, 0]:
        axis.set_ylabel("ms, forward")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="lower center",
        ncols=len(STYLES),
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
