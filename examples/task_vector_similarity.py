"""Print the similarity of fine-tunes' task vectors in attention and FFNs (MergeME's figure 4).

    python examples/task_vector_similarity.py --base base/ --model math=math/ --model code=code/ \\
        --plot figure4.png

The table has the cosine of each pair of fine-tunes layer by layer, and the mean over layers.
`--output` keeps the numbers, and `--plot` draws them.

Any fine-tunes of one base will do that transformers stores as safetensors, whatever their size: one
tensor of each model is in memory at a time. `mergekit_moe_ext.analysis.task_vector_similarity` says
what exactly is measured.
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
    columns: list[Sequence[float]] = []
    for pair in pairs:
        columns += [pair.attention, pair.ffn]
    titles = [f"{pair.first}, {pair.second}" for pair in pairs]
    width = max(map(len, titles)) + 2
    half = max(11, -(-width // 2))
    lines = [" " * 5 + "".join(f"{title:>{2 * half}}" for title in titles)]
    lines.append("layer" + f"{'attention':>{half}}{'FFN':>{half}}" * len(pairs))
    rows: dict[str, Sequence[float]] = {}
    for layer, cosines in enumerate(zip(*columns, strict=True)):
        rows[str(layer)] = cosines
    rows["mean"] = [mean(column) for column in columns]
    for name, row in rows.items():
        lines.append(f"{name:5}" + "".join(f"{value:{half}.3f}" for value in row))
    return "\n".join(lines)


def mean(cosines: Sequence[float]) -> float:
    """The mean of those that are numbers; NaN where none is."""
    return statistics.mean([value for value in cosines if not math.isnan(value)] or [math.nan])


def as_json(
    base: str, models: dict[str, str], reading: str, pairs: Sequence[PairSimilarity]
) -> str:
    """The cosines and what they were measured on. JSON has no NaN; null stands in its place."""

    def plain(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return [None if math.isnan(cosine) else cosine for cosine in value]

    listed_pairs = []
    for pair in pairs:
        listed_pairs.append({key: plain(value) for key, value in asdict(pair).items()})
    content = {"base": base, "models": models, "reading": reading, "pairs": listed_pairs}
    return json.dumps(content, indent=1) + "\n"


def draw(pairs: Sequence[PairSimilarity], path: Path) -> None:
    """Draws a panel per pair, at most three in a row."""
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
    """Directories by name, of texts such as `math=math/`."""
    models: dict[str, str] = {}
    for text in texts:
        match = re.fullmatch(r"([^=]+)=(.+)", text)
        if not match:
            raise UserError(f"--model {text}: write NAME=DIR")
        name, path = match.groups()
        if name in models:
            raise UserError(f"two models are called {name!r}")
        models[name] = path
    return models


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--base",
    metavar="DIR",
    required=True,
    help="Directory of the model that the others were fine-tuned from.",
)
@click.option(
    "--model",
    "named_models",
    metavar="NAME=DIR",
    multiple=True,
    required=True,
    help="Fine-tune and its name; give two or more.",
)
@click.option(
    "--reading",
    type=click.Choice(get_args(Way)),
    default="concatenated",
    show_default=True,
    help=(
        "Cosine of all tensors of a part as one vector (the paper's text), or the mean of the "
        "cosines of each tensor (its caption)."
    ),
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the cosines: *.json.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the figure: *.png, *.pdf or *.svg.",
)
@click.option("--quiet", is_flag=True, help="Show no progress bar.")
def main(
    base: str,
    named_models: Sequence[str],
    reading: Way,
    output: Path | None,
    plot: Path | None,
    quiet: bool,
) -> None:
    models = parse_models(named_models)
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
