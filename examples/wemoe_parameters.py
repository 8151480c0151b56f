"""Print the numbers of parameters of weight-ensembling models (WEMoE's tables 1 and 8).

    python examples/wemoe_parameters.py out out-adapted
    python examples/wemoe_parameters.py --base base --tasks 2-8 --router-layers 2

The first form counts models that `wemoe` and `ewemoe` wrote, the second what they would write. The
table has a line per model: its parameters, how many of them are trained, and how many fewer they
are than those of the fine-tunes together. Only configurations are read.
`mergekit_moe_ext.analysis.count_parameters` says what exactly is counted.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pydantic

from mergekit_moe_ext import Reading, UserError
from mergekit_moe_ext.analysis import (
    ParameterCounts,
    check_new_file,
    count_parameters,
    load_config,
    planned_parameters,
)


def table(counts: Mapping[str, ParameterCounts]) -> str:
    """A line per model, in millions; `reduced` is how much smaller it is than its fine-tunes
    together.
    """
    width = max(len("model"), *map(len, counts))
    lines = [f"{'model':{width}}  tasks  trainable      total   ratio    reduced"]
    for name, count in counts.items():
        trainable = _short(count.trainable)
        total = _short(count.total)
        reduced = _short(count.reduced)
        lines.append(
            f"{name:{width}}{count.tasks:>7}{trainable:>11}{total:>11}{count.ratio:>8.2%}"
            f"{reduced:>11}"
        )
    return "\n".join(lines)


def _short(number: int) -> str:
    """A number from a thousand on in millions."""
    return str(number) if abs(number) < 1000 else f"{number / 1e6:.3f}M"


def planned(base: str, tasks: str, parameters: dict[str, Any]) -> dict[str, ParameterCounts]:
    """The counts of what would be made of a base and a number of fine-tunes, or each of two such as
    2-8.
    """
    config = load_config(base, Reading())
    if not config.architectures:
        raise UserError(f"the config of {base} names no architecture")
    first, _, last = tasks.partition("-")
    try:
        numbers = range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise UserError(f"--tasks {tasks}: write a number, or two as 2-8") from error
    try:
        return {
            f"{number} tasks": planned_parameters(config, number, **parameters)
            for number in numbers
        }
    except pydantic.ValidationError as error:
        first_error = error.errors()[0]
        option = ".".join(map(str, first_error["loc"]))
        raise UserError(f"{option}: {first_error['msg']}") from error
    except ValueError as error:
        raise UserError(f"{base}: {error}") from error


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.argument("models", nargs=-1)
@click.option("--base", metavar="DIR", help="Directory of a base to plan for in place of MODELS.")
@click.option(
    "--tasks",
    default="2-8",
    show_default=True,
    help="Number of fine-tunes to plan for, as 8 or 2-8; with --base.",
)
@click.option(
    "--upscale",
    default="mlp",
    show_default=True,
    help="Parts that get task vectors, as in the merge's option; with --base.",
)
@click.option(
    "--upscale-layers",
    default="all",
    show_default=True,
    help="Layers that get task vectors, as in the merge's option; with --base.",
)
@click.option(
    "--router-layers",
    type=int,
    default=2,
    show_default=True,
    help="Number of router layers: 0, 1 or 2; with --base.",
)
@click.option(
    "--sparsity",
    type=float,
    default=0.0,
    show_default=True,
    help="Share of each task vector that is dropped; with --base.",
)
@click.option("--shared-router", is_flag=True, help="Plan one router for all layers; with --base.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the numbers: *.json.",
)
def main(
    models: tuple[str, ...], base: str | None, tasks: str, output: Path | None, **parameters: Any
) -> None:
    if bool(models) == bool(base):
        raise UserError("name MODELS to count, or with --base what to plan for")
    if output:
        check_new_file(output)
    counts = (
        planned(base, tasks, parameters)
        if base
        else {model: count_parameters(model) for model in models}
    )
    click.echo(table(counts))
    if output:
        content = {}
        for name, count in counts.items():
            content[name] = {**asdict(count), "reduced": count.reduced}
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
