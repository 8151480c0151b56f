"""Print the losses of two tasks on the plane of a base and its two fine-tunes (WEMoE's figure 7).

    python examples/loss_landscape.py --base base --model math=math --model code=code \\
        --data math=math.jsonl --data code=code.jsonl --plot landscape.png

It prints a line for the base, for each fine-tune, and for the places where the losses are lowest.
`--output` keeps the losses of the whole grid, and `--plot` draws them.

For decoders the loss is that of the next token of the texts. For classifiers of texts or images it
is that of their classes, each task with its own fine-tune's head. Weights are in float32, whatever
they are stored in, and four copies of the model are in memory.
`mergekit_moe_ext.analysis.loss_landscape` says what exactly is measured.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from task_vector_similarity import parse_models

from mergekit_moe_ext import Reading, UserError, options_of
from mergekit_moe_ext.analysis import (
    HEADS,
    Landscape,
    check_new_figure,
    check_new_file,
    load_config,
    loss_landscape,
    parse_sources,
    pyplot,
    read_batches,
    silence,
)

CONTOURS = 15


def load(path: str, architecture: Any, device: str) -> Any:
    """The model in a directory. `UserError` if anything but a classifier's head is missing, which
    transformers would draw at random.
    """
    try:
        model, report = architecture.from_pretrained(
            str(Path(path).expanduser()), dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load {path}: {str(error).splitlines()[0]}") from error
    missing = sorted(name for name in report["missing_keys"] if name.split(".")[0] not in HEADS)
    if missing:
        raise UserError(f"{path} lacks {missing[0]} of {architecture.__name__}")
    return model.to(device)


def table(landscape: Landscape) -> str:
    """A line for the base, for each fine-tune, and for the place where each loss is lowest."""
    first, second = landscape.tasks
    losses = {first: landscape.losses[0], second: landscape.losses[1], "both": landscape.joint}
    places = {"base": (0.0, 0.0), first: (1.0, 0.0), second: (0.0, 1.0)}
    for task, grid in losses.items():
        places[f"lowest {task}"] = landscape.lowest(grid)[:2]
    width = max(map(len, places))
    heading = "".join(f"{f'loss {task}':>{len(task) + 8}}" for task in losses)
    lines = [f"{'':{width}}     l_1    l_2{heading}"]
    for name, (l_1, l_2) in places.items():
        # a place that is not on the grid was not measured
        if l_1 in landscape.scales and l_2 in landscape.scales:
            point = (landscape.scales.index(l_1), landscape.scales.index(l_2))
            cells = ""
            for task, grid in losses.items():
                cells += f"{grid[point].item():>{len(task) + 8}.4f}"
            lines.append(f"{name:{width}}{l_1:>8.2f}{l_2:>7.2f}{cells}")
    return "\n".join(lines)


def as_json(landscape: Landscape, settings: dict[str, Any]) -> str:
    """The losses of the whole grid: by task, `scales` of the first by `scales` of the second."""
    losses = {task: of.tolist() for task, of in zip(landscape.tasks, landscape.losses, strict=True)}
    return json.dumps({**settings, "scales": landscape.scales, "losses": losses}, indent=1) + "\n"


def draw(landscape: Landscape, path: Path) -> None:
    """Draws the losses of both tasks and their sum. A cross marks the lowest loss; contours lie
    closer to each other there.
    """
    plt = pyplot()
    first, second = landscape.tasks
    named = {
        f"{first} + {second}": landscape.joint,
        first: landscape.losses[0],
        second: landscape.losses[1],
    }
    figure, panels = plt.subplots(
        1, 3, figsize=(11, 3.6), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (name, losses) in zip(panels, named.items(), strict=True):
        # rows are l_1, which the x axis shows
        low = losses.min().item()
        high = max(losses.max().item(), low + 1e-6)
        levels = [low + (high - low) * (step / CONTOURS) ** 2 for step in range(CONTOURS + 1)]
        norm = plt.matplotlib.colors.PowerNorm(0.5, low, high)
        contours = axes.contourf(
            landscape.scales,
            landscape.scales,
            losses.T.tolist(),
            levels=levels,
            norm=norm,
            cmap="viridis",
        )
        figure.colorbar(
            contours, ax=axes, fraction=0.046, pad=0.03, ticks=levels[::3], format="%.2f"
        )
        for (x, y), text in {(0, 0): "base", (1, 0): first, (0, 1): second}.items():
            axes.plot(
                x, y, "o", color="white", markeredgecolor="black", ms=5, clip_on=False, zorder=3
            )
            axes.annotate(
                text,
                (x, y),
                xytext=(-6, -12),
                textcoords="offset points",
                ha="right",
                color="white",
                size=8,
            )
        l_1, l_2, _ = landscape.lowest(losses)
        axes.plot(l_1, l_2, "x", color="tab:red", ms=8, mew=2, clip_on=False, zorder=4)
        axes.set_title(f"loss of {name}", fontsize=10)
        axes.set_xlabel(f"scale of the task vector of {first}")
        axes.set_aspect("equal")
    panels[0].set_ylabel(f"scale of that of {second}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--base",
    metavar="DIR",
    required=True,
    help="Directory of the model that both others were fine-tuned from.",
)
@click.option(
    "--model",
    "named_models",
    metavar="TASK=DIR",
    multiple=True,
    required=True,
    help="Fine-tune of a task; give two.",
)
@click.option(
    "--data",
    metavar="TASK=SOURCE",
    multiple=True,
    required=True,
    help="Held-out rows of a task; give both.",
)
@click.option(
    "--range",
    "limits",
    type=float,
    nargs=2,
    default=(-1.0, 1.0),
    show_default=True,
    help="Lowest and highest scale of both task vectors.",
)
@click.option(
    "--points",
    type=click.IntRange(min=2),
    default=11,
    show_default=True,
    help="Number of points along each scale.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Number of rows in a batch.",
)
@click.option(
    "--max-samples",
    type=click.IntRange(min=1),
    help="Number of rows to read of each task, from the first. [default: all]",
)
@click.option(
    "--image-column", default="image", show_default=True, help="Name of the images' column."
)
@click.option(
    "--label-column", default="label", show_default=True, help="Name of the classes' column."
)
@click.option(
    "--device", default="cpu", show_default=True, help="Device to compute on, as torch names it."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the losses of the whole grid: *.json.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the figure: *.png, *.pdf or *.svg.",
)
@options_of(Reading, "reading")
def main(
    base: str,
    named_models: Sequence[str],
    data: Sequence[str],
    limits: tuple[float, float],
    points: int,
    batch_size: int,
    max_samples: int | None,
    image_column: str,
    label_column: str,
    device: str,
    output: Path | None,
    plot: Path | None,
    reading: Reading,
) -> None:
    models = parse_models(named_models)
    sources = {source.name: source for source in parse_sources(data)}
    if len(models) != 2 or models.keys() != sources.keys():
        raise UserError("give two --model TASK=DIR, and --data TASK=SOURCE for both")
    if limits[0] >= limits[1]:
        raise UserError(f"--range {limits[0]} {limits[1]}: the first must be below the second")
    if output:
        check_new_file(output)
    if plot:
        check_new_figure(plot)
    silence(reading)
    configs = {path: load_config(path, reading) for path in (base, *models.values())}
    names = {path: (config.architectures or [""])[0] for path, config in configs.items()}
    first = next(iter(models.values()))
    architecture = getattr(transformers, names[first], None)
    for path in models.values():
        if architecture is None or names[path] != architecture.__name__:
            raise UserError(
                f"{path} is {names[path] or 'of no class'}; both must be one of transformers'"
            )
    loaded = {task: load(path, architecture, device) for task, path in models.items()}
    batches = {}
    for task, source in sources.items():
        of_task = read_batches(
            models[task],
            loaded[task],
            source,
            reading,
            batch_size=batch_size,
            max_samples=max_samples,
            with_labels=True,
            image_column=image_column,
            label_column=label_column,
        )
        batches[task] = list(of_task)
    # rounded, so that 0 and 1 are met exactly
    spaced = torch.linspace(*limits, points, dtype=torch.float64).tolist()
    scales = [round(value, 9) for value in spaced]
    try:
        landscape = loss_landscape(
            load(base, architecture, device), loaded, batches, scales, quiet=reading.quiet
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    click.echo(table(landscape))
    if output:
        output.write_text(as_json(landscape, {"base": base, "models": models, "data": data}))
    if plot:
        draw(landscape, plot)


if __name__ == "__main__":
    main()
