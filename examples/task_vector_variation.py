"""Print how far fine-tunes are from their base in attention and in the MLPs (E-WEMoE's figure 3).

    python examples/task_vector_variation.py --base base/ --model sun=sun/ --model cars=cars/ \\
        --plot variation.png

The table has the mean change of each layer over the models, then the change of each model and how
small the elements of its task vector are, and last what `upscale: auto` of `wemoe` would take.
`--output` keeps the numbers, and `--plot` draws them.

Any fine-tunes of one base will do, text or vision, that transformers stores as safetensors,
whatever their size: one tensor of two models is in memory at a time.
`mergekit_moe_ext.analysis.parameter_variation` says what exactly is measured.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from task_vector_similarity import parse_models

from mergekit_moe_ext import UserError
from mergekit_moe_ext.analysis import (
    THRESHOLDS,
    Part,
    Variation,
    check_new_figure,
    check_new_file,
    decide,
    parameter_variation,
    pyplot,
)

LABELS: dict[Part, str] = {"attention": "attention", "mlp": "MLP"}
STYLES: dict[Part, dict[str, Any]] = {
    "attention": {"color": "C0", "marker": "o"},
    "mlp": {"color": "C1", "marker": "s"},
}
SMALL = 0.0005  # the paper finds more than 75% of the elements below it


def means(by_model: Mapping[str, Sequence[float]]) -> list[float]:
    """The mean over the models, per layer."""
    return [statistics.mean(values) for values in zip(*by_model.values(), strict=True)]


def from_one(cosines: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """One minus each cosine: most are so near 1 that they would all look the same."""
    differences = {}
    for model, values in cosines.items():
        differences[model] = [1 - cosine for cosine in values]
    return differences


def row(name: str, values: Sequence[str], width: int = 8) -> str:
    """A line of the table."""
    return f"{name:{width}}" + "".join(f"{value:>25}" for value in values)


def table(variation: Mapping[Part, Variation]) -> str:
    """A line per layer, each the mean over the models; then a line per model, over all layers."""
    parts = {LABELS[part]: of_part for part, of_part in variation.items()}
    columns = {}
    for label, part in parts.items():
        columns[f"change, {label}"] = means(part.change)
    for label, part in parts.items():
        columns[f"1 - cosine, {label}"] = means(from_one(part.cosine))
    lines = [row("layer", list(columns))]
    for layer, values in enumerate(zip(*columns.values(), strict=True)):
        lines.append(row(str(layer), [f"{value:.4g}" for value in values]))
    over_layers = [f"{statistics.mean(column):.4g}" for column in columns.values()]
    lines += [row("mean", over_layers), ""]

    models = list(next(iter(variation.values())).change)
    width = max(8, *(len(model) + 1 for model in models))
    titles = [f"change, {label}" for label in parts] + [
        f"below {SMALL}, {label}" for label in parts
    ]
    lines.append(row("model", titles, width))
    small = THRESHOLDS.index(SMALL)
    for model in models:
        changes = [f"{statistics.mean(part.change[model]):.4g}" for part in parts.values()]
        shares = [f"{part.share_below(model)[small]:.1%}" for part in parts.values()]
        lines.append(row(model, changes + shares, width))
    per_parameter = ", ".join(
        f"{label} {part.mean_change_per_parameter:.4g}" for label, part in parts.items()
    )
    lines += [
        "",
        f"change per parameter: {per_parameter}",
        f"upscale: auto takes {decide(variation)}",
    ]
    return "\n".join(lines)


def as_json(base: str, models: dict[str, str], variation: Mapping[Part, Variation]) -> str:
    """The variation and what it was measured on. JSON has no NaN; null stands in its place."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    parts = {part: plain(asdict(of_part)) for part, of_part in variation.items()}
    content = {"base": base, "models": models, "thresholds": THRESHOLDS, "parts": parts}
    return json.dumps(content, indent=1) + "\n"


def draw(variation: Mapping[Part, Variation], path: Path) -> None:
    """Draws change and cosine per layer, each model thin and their mean thick, and a histogram of
    the elements of the MLPs' task vectors.
    """
    plt = pyplot()
    figure, (change, cosine, sizes) = plt.subplots(1, 3, figsize=(11, 3.4))
    for part, of_part in variation.items():
        style = STYLES[part]
        for axes, by_model in ((change, of_part.change), (cosine, from_one(of_part.cosine))):
            for values in by_model.values():
                axes.plot(values, color=style["color"], linewidth=0.6, alpha=0.5)
            axes.plot(means(by_model), label=LABELS[part], markersize=3, **style)
    for axes, what in ((change, "squared L2 change"), (cosine, "1 - cosine with the base")):
        axes.set_ylabel(what)
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    mlp = variation["mlp"]
    shares = means({model: mlp.share_below(model) for model in mlp.below})
    sizes.stairs(
        [after - before for before, after in pairwise(shares)],
        THRESHOLDS,
        fill=True,
        color="C1",
        alpha=0.6,
    )
    sizes.axvline(SMALL, color="#888888", linewidth=0.8)
    sizes.set_title(f"{shares[THRESHOLDS.index(SMALL)]:.0%} are below {SMALL}", fontsize=9)
    sizes.set_xscale("log")
    sizes.set_ylabel("share of elements")
    sizes.set_xlabel("magnitude in the MLPs' task vectors")
    for axes in (change, cosine, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *change.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
    help="Fine-tune and its name; give one or more.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the numbers: *.json.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the figure: *.png, *.pdf or *.svg.",
)
@click.option("--quiet", is_flag=True, help="Show no progress bar.")
def main(
    base: str, named_models: Sequence[str], output: Path | None, plot: Path | None, quiet: bool
) -> None:
    models = parse_models(named_models)
    if output:
        check_new_file(output)
    if plot:
        check_new_figure(plot)
    try:
        variation = parameter_variation(base, models, quiet=quiet)
        click.echo(table(variation))
    except ValueError as error:
        raise UserError(str(error)) from error
    if output:
        output.write_text(as_json(base, models, variation))
    if plot:
        draw(variation, plot)


if __name__ == "__main__":
    main()
