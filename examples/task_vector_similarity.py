"""MergeME's figure 4: the cosine similarity of fine-tunes' task vectors in attention and in the
FFNs, layer by layer.

    python examples/task_vector_similarity.py --base base/ --model math=math/ --model code=code/
    --plot figure4.png

Works on any fine-tunes of one base that transformers stores as safetensors, whatever their size:
one tensor of each model is in memory at a time. `mergekit_moe_ext.analysis.similarity` says what
exactly is measured.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import click

from mergekit_moe_ext import UserError
from mergekit_moe_ext.analysis import (
    PairSimilarity,
    check_new_figure,
    check_new_file,
    pyplot,
    task_vector_similarity,
)

Way = Literal["concatenated", "mean"]


def table(pairs: Sequence[PairSimilarity]) -> str:
    """A line per layer and a column per pair and part, and the mean over the layers that have a
    cosine.
    """
    columns = [column for pair in pairs for column in (pair.attention, pair.ffn)]
    width = max(len(f"{pair.first}, {pair.second}") for pair in pairs) + 2
    half = max(11, -(-width // 2))
    lines = [" " * 5 + "".join(f"{f'{pair.first}, {pair.second}':>{2 * half}}" for pair in pairs)]
    lines.append("layer" + f"{'attention':>{half}}{'FFN':>{half}}" * len(pairs))
    rows: dict[str, Sequence[float]] = {
        str(layer): row for layer, row in enumerate(zip(*columns, strict=True))
    }
    rows["mean"] = [mean(column) for column in columns]
    lines += [
        f"{name:5}" + "".join(f"{value:{half}.3f}" for value in row) for name, row in rows.items()
    ]
    return "\n".join(lines)


def mean(cosines: Sequence[float]) -> float:
    """Of those that are numbers."""
    return statistics.mean([value for value in cosines if not math.isnan(value)] or [math.nan])


def as_json(
    base: str, models: dict[str, str], reading: str, pairs: Sequence[PairSimilarity]
) -> str:
    """JSON has no NaN: null."""

    def plain(value: Any) -> Any:
        return (
            [None if math.isnan(each) else each for each in value]
            if isinstance(value, tuple)
            else value
        )

    listed = [{key: plain(value) for key, value in asdict(pair).items()} for pair in pairs]
    return (
        json.dumps({"base": base, "models": models, "reading": reading, "pairs": listed}, indent=1)
        + "\n"
    )


def draw(pairs: Sequence[PairSimilarity], path: Path) -> None:
    """A panel per pair, at most three in a row."""
    plt = pyplot()
    across = min(3, len(pairs))
    down = -(-len(pairs) // across)
    size = (3.4 * across + 0.6, 2.8 * down + 0.4)
    figure, panels = plt.subplots(
        down, across, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for axes, pair in zip(panels.flat, pairs, strict=False):
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        axes.plot(pair.attention, marker="o", ms=3, label="attention")
        axes.plot(pair.ffn, marker="s", ms=3, label="FFN")
        axes.set_title(f"{pair.first}, {pair.second}", fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(pairs) :]:
        axes.set_visible(False)
    for row in panels:
        row[0].set_ylabel("cosine similarity")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.28 / size[1], 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_models(texts: Sequence[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for text in texts:
        named = re.fullmatch(r"([^=]+)=(.+)", text)
        if not named:
            raise UserError(f"--model {text}: write NAME=DIR")
        name, path = named.groups()
        if name in models:
            raise UserError(f"two models are called {name!r}")
        models[name] = path
    return models


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--base", metavar="DIR", required=True, help="What the models were fine-tuned from.")
@click.option(
    "--model",
    "given",
    metavar="NAME=DIR",
    multiple=True,
    required=True,
    help="Two or more, one each.",
)
@click.option(
    "--reading",
    type=click.Choice(get_args(Way)),
    default="concatenated",
    show_default=True,
    help=(
        "Of all tensors of a part as one vector (the paper's text), or the mean of each one's "
        "(its caption)."
    ),
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the numbers: *.json.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw them: *.png, *.pdf or *.svg.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def main(
    base: str,
    given: Sequence[str],
    reading: Way,
    output: Path | None,
    plot: Path | None,
    quiet: bool,
) -> None:
    models = parse_models(given)
    if output:
        check_new_file(output)
    if plot:
        check_new_figure(plot)
    try:
        pairs = task_vector_similarity(base, models, reading, quiet=quiet)
    except ValueError as error:
        raise UserError(str(error)) from error
    click.echo(table(pairs))
    if output:
        output.write_text(as_json(base, models, reading, pairs))
    if plot:
        draw(pairs, plot)


if __name__ == "__main__":
    main()
