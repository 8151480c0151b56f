"""WEMoE's figure 7: the losses of two tasks on the plane that a base and its two fine-tunes span.

    python examples/loss_landscape.py --base base --model math=math --model code=code \\
        --data math=math.jsonl --data code=code.jsonl --plot landscape.png

For decoders the loss is that of the next token of given texts, for classifiers of texts or images
that of their classes, each with its own fine-tune's head. Weights are in float32, whatever they are
stored in, and four copies of the model are in memory. `mergekit_moe_ext.analysis.landscape` says
what exactly is measured.
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
    """`UserError` if anything but a classifier's head is missing, which transformers would draw at
    random.
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
    """The losses at the base, the sources and where each is lowest."""
    first, second = landscape.tasks
    losses = {first: landscape.losses[0], second: landscape.losses[1], "both": landscape.joint}
    places = {"base": (0.0, 0.0), first: (1.0, 0.0), second: (0.0, 1.0)}
    places |= {f"lowest {name}": landscape.lowest(of)[:2] for name, of in losses.items()}
    width = max(map(len, places))
    lines = [
        f"{'':{width}}     l_1    l_2"
        + "".join(f"{f'loss {name}':>{len(name) + 8}}" for name in losses)
    ]
    for name, (l_1, l_2) in places.items():
        if l_1 in landscape.scales and l_2 in landscape.scales:
            at = landscape.scales.index(l_1), landscape.scales.index(l_2)
            shown = "".join(f"{of[at].item():>{len(each) + 8}.4f}" for each, of in losses.items())
            lines.append(f"{name:{width}}{l_1:>8.2f}{l_2:>7.2f}{shown}")
    return "\n".join(lines)


def as_json(landscape: Landscape, settings: dict[str, Any]) -> str:
    losses = {task: of.tolist() for task, of in zip(landscape.tasks, landscape.losses, strict=True)}
    return json.dumps({**settings, "scales": landscape.scales, "losses": losses}, indent=1) + "\n"


def draw(landscape: Landscape, path: Path) -> None:
    """Both tasks and their sum; a cross is where the loss is lowest, and contours are closer
    there."""
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
        low, high = losses.min().item(), max(losses.max().item(), losses.min().item() + 1e-6)
        levels = [low + (high - low) * (step / CONTOURS) ** 2 for step in range(CONTOURS + 1)]
        norm = plt.matplotlib.colors.PowerNorm(0.5, low, high)
        image = axes.contourf(
            landscape.scales,
            landscape.scales,
            losses.T.tolist(),
            levels=levels,
            norm=norm,
            cmap="viridis",
        )
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, ticks=levels[::3], format="%.2f")
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
@click.option("--base", metavar="DIR", required=True, help="What both models were fine-tuned from.")
@click.option(
    "--model", "given", metavar="TASK=DIR", multiple=True, required=True, help="Two, one each."
)
@click.option(
    "--data",
    metavar="TASK=SOURCE",
    multiple=True,
    required=True,
    help="Held-out rows of both tasks.",
)
@click.option(
    "--range",
    "limits",
    type=float,
    nargs=2,
    default=(-1.0, 1.0),
    show_default=True,
    help="Of both scales.",
)
@click.option(
    "--points", type=click.IntRange(min=2), default=11, show_default=True, help="Along each scale."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--max-samples",
    type=click.IntRange(min=1),
    help="The first so many rows of each task. [default: all]",
)
@click.option("--image-column", default="image", show_default=True)
@click.option("--label-column", default="label", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="As torch names it.")
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
@options_of(Reading, "reading")
def main(
    base: str,
    given: Sequence[str],
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
    models, sources = parse_models(given), {source.name: source for source in parse_sources(data)}
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
    architecture = getattr(transformers, names[models[next(iter(models))]], None)
    for path in models.values():
        if architecture is None or names[path] != architecture.__name__:
            raise UserError(
                f"{path} is {names[path] or 'of no class'}; both must be one of transformers'"
            )
    loaded = {task: load(path, architecture, device) for task, path in models.items()}
    batches = {
        task: list(
            read_batches(
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
        )
        for task, source in sources.items()
    }
    # rounded, so that 0 and 1 are met exactly
    scales = [
        round(value, 9) for value in torch.linspace(*limits, points, dtype=torch.float64).tolist()
    ]
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
