"""Print which task vectors the routers favour for each task's inputs (WEMoE's figures 11 and 12).

    python examples/wemoe_routing.py out-adapted --data sun=images/sun --data cars=images/cars \\
        --plot routing.png

The tables have the mean coefficient of each expert per task and group of layers, and how often a
task's own expert has the highest one. `--output` keeps the numbers. `--plot` draws two figures:
`routing.png` (figure 12) and `routing-coefficients.png` (figure 11).

Data is read as in `mergekit-moe-ext adapt`, but classes are not needed. Figure 12 compares a task
with the expert of its name, so give the data the names of the sources' directories.
`mergekit_moe_ext.analysis.ensemble_routing` says what exactly is measured.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from mergekit_moe_ext import Reading, UserError, options_of
from mergekit_moe_ext.analysis import (
    EnsembleRouting,
    check_new_figure,
    check_new_file,
    ensemble_routing,
    heat_map,
    load_ensemble,
    parse_sources,
    pyplot,
    read_batches,
    read_ensemble,
    silence,
)

PANELS_DOWN = 5  # groups in figure 11, as in the paper, from the first to the last


def tables(routing: EnsembleRouting) -> str:
    """The mean coefficient of each expert per task, group by group; then figure 12 in percent."""
    width = max(len("group"), *map(len, routing.groups))
    column = max(8, *(len(name) + 2 for name in (*routing.experts, *routing.tasks)))
    lines = []
    for task, samples, means in zip(
        routing.tasks, routing.samples, routing.mean.tolist(), strict=True
    ):
        lines.append(f"mean coefficients of {samples} inputs of {task}")
        lines.append(
            f"{'group':{width}}" + "".join(f"{name:>{column}}" for name in routing.experts)
        )
        for group, row in zip(routing.groups, means, strict=True):
            lines.append(f"{group:{width}}" + "".join(f"{value:>{column}.3f}" for value in row))
        lines.append("")
    lines.append(
        "first choice: the percentage of a task's inputs that give its own expert the highest "
        "coefficient"
    )
    lines.append(f"{'group':{width}}" + "".join(f"{name:>{column}}" for name in routing.tasks))
    for group, row in zip(routing.groups, routing.own_expert().T.tolist(), strict=True):
        cells = ["-" if math.isnan(value) else f"{100 * value:.1f}" for value in row]
        lines.append(f"{group:{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
    return "\n".join(lines)


def as_json(model: str, data: Sequence[str], routing: EnsembleRouting) -> str:
    """The routing and what it was measured on."""
    content: dict[str, Any] = {"model": model, "data": data}
    for name in ("tasks", "groups", "experts", "samples"):
        content[name] = getattr(routing, name)
    for name in ("mean", "spread", "first_choice"):
        content[name] = getattr(routing, name).tolist()
    return json.dumps(content, indent=1) + "\n"


def draw_first_choice(routing: EnsembleRouting, path: Path) -> None:
    """Draws figure 12: a row per task, a column per group."""
    plt = pyplot()
    own = (100 * routing.own_expert()).tolist()
    tasks = len(routing.tasks)
    groups = len(routing.groups)
    figure, axes = plt.subplots(figsize=(2.4 + 0.45 * max(groups, 6), 1.2 + 0.4 * tasks))
    colours = heat_map(axes, own, 100)
    axes.set_yticks(range(tasks), routing.tasks)
    axes.set_xlabel("group (from first layer to last)")
    if groups <= 16:
        for row, values in enumerate(own):
            for column, value in enumerate(values):
                text = "-" if math.isnan(value) else f"{value:.0f}"
                axes.text(
                    column, row, text, ha="center", va="center", fontsize=7, color=_readable(value)
                )
    figure.colorbar(colours, label="% of inputs", fraction=0.05, pad=0.02)
    axes.set_title("first choice is the task's own expert", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _readable(percentage: float) -> str:
    """The colour of text that can be read on the colour of this percentage."""
    return "white" if percentage > 60 else "black"


def draw_coefficients(routing: EnsembleRouting, path: Path) -> None:
    """Draws figure 11: a panel per group and task, a bar per expert, with the standard deviation
    over the inputs.
    """
    plt = pyplot()
    tasks = routing.tasks
    experts = routing.experts
    groups = _spread_out(len(routing.groups), PANELS_DOWN)
    across = max(4.5, 1.0 + len(tasks) * max(1.2, 0.28 * len(experts)))
    figure, panels = plt.subplots(
        len(groups),
        len(tasks),
        figsize=(across, 0.9 + 1.5 * len(groups)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    palette = plt.get_cmap("tab10" if len(experts) <= 10 else "tab20")
    colours = [palette(index) for index in range(len(experts))]
    for row, group in zip(panels, groups, strict=True):
        for task, axes in enumerate(row):
            means = routing.mean[task, group].tolist()
            spread = routing.spread[task, group].tolist()
            axes.bar(
                range(len(experts)), means, yerr=spread, color=colours, error_kw={"linewidth": 0.8}
            )
            axes.axhline(0, color="#bbbbbb", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xticks([])
            axes.tick_params(labelsize=7)
        row[0].set_ylabel(f"group {group}", fontsize=8)
    for axes, task_name in zip(panels[0], tasks, strict=True):
        axes.set_title(f"inputs of {task_name}", fontsize=9)
    bars = panels[0][0].containers[-1].patches
    figure.legend(
        bars,
        experts,
        loc="outside lower center",
        ncols=min(8, len(experts)),
        frameon=False,
        fontsize=8,
    )
    figure.align_ylabels()
    figure.supylabel("coefficient", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _spread_out(number: int, at_most: int) -> list[int]:
    """The indices of up to `at_most` of so many, the first and the last among them."""
    if number <= at_most:
        return list(range(number))
    return [round(index * (number - 1) / (at_most - 1)) for index in range(at_most)]


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.argument("model_path", metavar="MODEL")
@click.option(
    "--data", multiple=True, required=True, metavar="TASK=SOURCE", help="Inputs of each task."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Number of inputs in a batch.",
)
@click.option(
    "--max-samples",
    type=click.IntRange(min=1),
    help="Number of inputs to read of each task, from the first. [default: all]",
)
@click.option(
    "--image-column", default="image", show_default=True, help="Name of the images' column."
)
@click.option(
    "--device", default="cpu", show_default=True, help="Device to compute on, as torch names it."
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
    help="File for figure 12: *.png, *.pdf or *.svg; figure 11 is drawn beside it.",
)
@options_of(Reading, "reading")
def main(
    model_path: str,
    data: tuple[str, ...],
    batch_size: int,
    max_samples: int | None,
    image_column: str,
    device: str,
    output: Path | None,
    plot: Path | None,
    reading: Reading,
) -> None:
    second_plot = plot.with_stem(f"{plot.stem}-coefficients") if plot else None
    if output:
        check_new_file(output)
    for path in (plot, second_plot):
        if path:
            check_new_figure(path)
    silence(reading)
    architecture, config = read_ensemble(model_path)
    model = load_ensemble(model_path, architecture, config).to(device)
    if model.can_generate() and model.ensembling.mode == "frozen":
        # tokens after the prefix have no part in the choice
        max_length = min(reading.max_length, model.ensembling.routing_tokens)
        reading = replace(reading, max_length=max_length)
    batches = {
        source.name: read_batches(
            model_path,
            model,
            source,
            reading,
            batch_size=batch_size,
            max_samples=max_samples,
            image_column=image_column,
        )
        for source in parse_sources(data)
    }
    with_bars = {
        task: tqdm(of_task, desc=task, unit="batch", disable=reading.quiet)
        for task, of_task in batches.items()
    }
    try:
        routing = ensemble_routing(model, with_bars)
    except ValueError as error:
        raise UserError(f"{model_path}: {error}") from error
    click.echo(tables(routing))
    if output:
        output.write_text(as_json(model_path, data, routing))
    if plot and second_plot:
        draw_first_choice(routing, plot)
        draw_coefficients(routing, second_plot)


if __name__ == "__main__":
    main()
