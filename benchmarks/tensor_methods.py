"""Time our tensor methods against mergekit's, on one matrix, side by side in one process.

    python benchmarks/tensor_methods.py                 # 4096 x 11008; some minutes
    python benchmarks/tensor_methods.py --device cuda
    python benchmarks/tensor_methods.py --write docs    # writes kernels.md and kernels.png there

Seconds are the best of up to five runs after a warm-up. Extra memory is the peak beyond what is
held before, in units of one input tensor, the result included. `copy` reads and writes all inputs
once, the least that any merge does.

(Not called kernels.py: transformers imports a module of that name, and would find this one.)
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from measuring import best_seconds, peak_extra_bytes
from mergekit.merge_methods import merge_tensors
from mergekit.sparsify import magnitude

from mergekit_moe_ext.analysis import pyplot
from mergekit_moe_ext.tensor.kernels.trim import trim

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METHODS = ("ties", "fast_ties", "dare_linear", "dare")
DENSITY = 0.8


class Row(NamedTuple):
    """A row of the table; extra memory is in units of one input tensor."""

    method: str
    dtype: str
    sources: int
    seconds: float
    extra: float


def measure(shape: tuple[int, int], device: str) -> list[Row]:
    """The rows of the table, which are printed as they are measured."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        inputs = [torch.randn(shape, device=device).to(dtype) for _ in range(9)]
        size = inputs[0].numel() * inputs[0].element_size()
        jobs: list[tuple[str, int, Callable[[], object]]] = [
            ("mergekit's trim (a sort)", 1, partial(magnitude, inputs[0], DENSITY)),
            ("trim", 1, partial(trim, inputs[0], DENSITY)),
        ]
        for count in (1, 3, 8):
            used = inputs[: count + 1]
            jobs.append(("copy", count, partial(_copy, used, torch.empty_like(used[0]))))
            jobs += [(name, count, partial(_merge, used, name)) for name in METHODS]
        for name, count, job in jobs:
            extra = peak_extra_bytes(job, device) / size  # and a warm-up
            seconds = best_seconds(job, device)
            rows.append(Row(name, dtype_name, count, seconds, extra))
            click.echo(f"{name:26}{dtype_name:10}{count:3}{seconds:10.3f} s{extra:8.2f} tensors")
    return rows


def _copy(tensors: list[torch.Tensor], target: torch.Tensor) -> None:
    for tensor in tensors:
        target.copy_(tensor)


def _merge(tensors: list[torch.Tensor], method: str) -> torch.Tensor:
    return merge_tensors(
        tensors, method, base_index=0, parameters={"weight": 1.0, "density": DENSITY}
    )


def write(rows: list[Row], title: str, folder: Path) -> None:
    """Writes the table and a figure of it."""
    lines = [f"# Kernels\n\n{title}. Made by `python benchmarks/tensor_methods.py --write docs`.\n"]
    lines.append("![Seconds of each method](kernels.png)\n")
    lines.append(
        "| | dtype | sources | seconds | extra memory (tensors) |\n|---|---|---:|---:|---:|"
    )
    for row in rows:
        lines.append(
            f"| {row.method} | {row.dtype} | {row.sources} | {row.seconds:.3f} | {row.extra:.2f} |"
        )
    (folder / "kernels.md").write_text("\n".join(lines) + "\n")

    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, DTYPES, strict=True):
        for index, name in enumerate(("copy", *METHODS)):
            seconds = [row.seconds for row in rows if (row.method, row.dtype) == (name, dtype)]
            axis.bar(
                [group + (index - 2) * 0.17 for group in range(3)], seconds, width=0.16, label=name
            )
        axis.set(
            title=dtype,
            yscale="log",
            xlabel="sources",
            xticks=range(3),
            xticklabels=["1", "3", "8"],
        )
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("seconds (log scale)")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title)
    figure.savefig(folder / "kernels.png", dpi=110)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--rows", default=4096, show_default=True, help="Number of rows of the matrix.")
@click.option("--columns", default=11008, show_default=True, help="Number of its columns.")
@click.option(
    "--device", default="cpu", show_default=True, help="Device to compute on, as torch names it."
)
@click.option(
    "--write",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory to write kernels.md and kernels.png to.",
)
def main(rows: int, columns: int, device: str, folder: Path | None) -> None:
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} threads of {os.uname()[4]}"
    )
    title = f"{rows} x {columns}, density {DENSITY}, torch {torch.__version__}, {where}"
    click.echo(title)
    measured = measure((rows, columns), device)
    if folder:
        write(measured, title, folder)


if __name__ == "__main__":
    main()
