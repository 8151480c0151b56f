"""WEMoE's tables 1 and 8: how many parameters weight-ensembling models have, and how many of them
are trained.

    python examples/wemoe_parameters.py out out-adapted
    python examples/wemoe_parameters.py --base base --tasks 2-8 --router-layers 2

The first form counts models that `wemoe` and `ewemoe` wrote, the second what they would write. Only
configurations are read. `mergekit_moe_ext.analysis.parameter_counts` says what exactly is counted.
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
    """A line per model, in millions; `reduced` is by how much it is smaller than its fine-tunes
    together.
    """
    width = max(len("model"), *map(len, counts))
    lines = [f"{'model':{width}}  tasks  trainable      total   ratio    reduced"]
    for name, each in counts.items():
        lines.append(
            f"{name:{width}}{each.tasks:>7}{_short(each.trainable):>11}{_short(each.total):>11}{each.ratio:>8.2%}"
            f"{_short(each.reduced):>11}"
        )
    return "\n".join(lines)


def _short(number: int) -> str:
    return str(number) if abs(number) < 1000 else f"{number / 1e6:.3f}M"


def planned(base: str, tasks: str, parameters: dict[str, Any]) -> dict[str, ParameterCounts]:
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
        wrong = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
    except ValueError as error:
        raise UserError(f"{base}: {error}") from error


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.argument("models", nargs=-1)
@click.option("--base", metavar="DIR", help="Plan for this base in place of MODELS.")
@click.option(
    "--tasks",
    default="2-8",
    show_default=True,
    help="With --base: how many fine-tunes, as 8 or 2-8.",
)
@click.option(
    "--upscale",
    default="mlp",
    show_default=True,
    help="With --base, as the rest: the merge's own options.",
)
@click.option("--upscale-layers", default="all", show_default=True)
@click.option("--router-layers", type=int, default=2, show_default=True)
@click.option("--sparsity", type=float, default=0.0, show_default=True)
@click.option("--shared-router", is_flag=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the numbers: *.json.",
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
        written = {name: {**asdict(each), "reduced": each.reduced} for name, each in counts.items()}
        output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
