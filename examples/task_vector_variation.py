"""E-WEMoE's figure 3: how far fine-tunes are from their base in attention and in the MLPs, layer by
layer.

    python examples/task_vector_variation.py --base base/ --model sun=sun/ --model cars=cars/ --plot
    variation.png

Beside it how large the elements of the task vectors are. Works on any fine-tunes of one base, text
or vision, that transformers stores as safetensors, whatever their size: one tensor of two models is
in memory at a time. `mergekit_moe_ext.analysis.variation` says what exactly is measured;
`upscale: auto` of `wemoe` goes by it.
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
SMALL = 0.0005  # the paper finds over 75% of the elements below


def means(by_model: Mapping[str, Sequence[float]]) -> list[float]:
    """Over the models, per layer."""
    return [statistics.mean(values) for values in zip(*by_model.values(), strict=True)]


def from_one(cosines: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """One minus the cosine: most are so near 1 that they would all look the same."""
    return {model: [1 - cosine for cosine in values] for model, values in cosines.items()}


def row(name: str, values: Sequence[str], width: int = 8) -> str:
    return f"{name:{width}}" + "".join(f"{value:>25}" for value in values)


def table(variation: Mapping[Part, Variation]) -> str:
    """A line per layer, each the mean over the models; then a line per model, over all layers."""
    parts = [(LABELS[part], found) for part, found in variation.items()]
    columns = [means(found.change) for _, found in parts] + [
        means(from_one(found.cosine)) for _, found in parts
    ]
    lines = [
        row(
            "layer", [f"{what}, {label}" for what in ("change", "1 - cosine") for label, _ in parts]
        )
    ]
    for layer, values in enumerate(zip(*columns, strict=True)):
        lines.append(row(str(layer), [f"{value:.4g}" for value in values]))
    lines += [row("mean", [f"{statistics.mean(column):.4g}" for column in columns]), ""]
    models = list(parts[0][1].change)
    width = max(8, *(len(model) + 1 for model in models))
    heads = [f"change, {label}" for label, _ in parts] + [
        f"below {SMALL}, {label}" for label, _ in parts
    ]
    lines.append(row("model", heads, width))
    for model in models:
        changes = [f"{statistics.mean(found.change[model]):.4g}" for _, found in parts]
        shares = [f"{found.share_below(model)[THRESHOLDS.index(SMALL)]:.1%}" for _, found in parts]
        lines.append(row(model, changes + shares, width))
    per_parameter = ", ".join(
        f"{label} {found.mean_change_per_parameter:.4g}" for label, found in parts
    )
    lines += [
        "",
        f"change per parameter: {per_parameter}",
        f"upscale: auto takes {decide(variation)}",
    ]
    return "\n".join(lines)


def as_json(base: str, models: dict[str, str], variation: Mapping[Part, Variation]) -> str:
    """JSON has no NaN: null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    parts = {part: plain(asdict(found)) for part, found in variation.items()}
    return (
        json.dumps(
            {"base": base, "models": models, "thresholds": THRESHOLDS, "parts": parts}, indent=1
        )
        + "\n"
    )


def draw(variation: Mapping[Part, Variation], path: Path) -> None:
    """Change and cosine per layer, each model thin, their mean thick, and a histogram of the
    elements of the MLPs.
    """
    plt = pyplot()
    figure, (change, cosine, sizes) = plt.subplots(1, 3, figsize=(11, 3.4))
    for part, found in variation.items():
        style = STYLES[part]
        for axes, by_model in ((change, found.change), (cosine, from_one(found.cosine))):
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
@click.option("--base", metavar="DIR", required=True, help="What the models were fine-tuned from.")
@click.option(
    "--model",
    "given",
    metavar="NAME=DIR",
    multiple=True,
    required=True,
    help="One or more, one each.",
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
    base: str, given: Sequence[str], output: Path | None, plot: Path | None, quiet: bool
) -> None:
    models = parse_models(given)
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
