"""Figures of expert usage. matplotlib is wanted only when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _mergekit_moe_ext_common.figures import heat_map, pyplot
from _mergekit_moe_ext_common.staging import new_file
from mergekit_moe_ext.mixtures.routers import PER_SEQUENCE, stack_of
from mergekit_moe_ext.mixtures.usage import TaskUsage, Usage, routing_probability, share_of_choices


def plot_usage(usage: Usage, path: Path) -> None:
    """MergeME's figure 5 (routing probability per expert and task) above CAEM's figure 3 (a heat
    map per task).

    Heat maps have a row per layer and a column per expert, encoder and decoder apart; their shades
    are shares of the choices of one layer. A sequence MoE has no layers that choose, and so none
    (MergeME's figures 6, 8 and 9).
    """
    plt = pyplot()
    tasks = usage.tasks
    stacks = _stacks(next(iter(tasks.values())))
    rows = 1 + len(stacks)
    heights = [2.2, *(1.2 + 0.12 * len(names) for names in stacks.values())]  # inches
    figure = plt.figure(figsize=(max(6.0, 2.6 * len(tasks) + 1), sum(heights) + 0.8 * rows))
    grid = figure.add_gridspec(
        rows, len(tasks) + 1, height_ratios=heights, width_ratios=[*([1] * len(tasks)), 0.06]
    )
    _bars(figure.add_subplot(grid[0, :-1]), tasks)
    highest = max(
        max(share_of_choices(layer)) for task in tasks.values() for layer in task.layers.values()
    )
    for row, (stack, names) in enumerate(stacks.items(), 1):
        for column, (name, task) in enumerate(tasks.items()):
            axes = figure.add_subplot(grid[row, column])
            image = heat_map(
                axes, [share_of_choices(task.layers[layer]) for layer in names], highest
            )
            axes.set_title(f"{name} ({stack})" if len(stacks) > 1 else name, fontsize=9)
            axes.set_xlabel("expert")
            if column == 0:
                axes.set_ylabel("layer")
        figure.colorbar(image, cax=figure.add_subplot(grid[row, -1]), label="share of choices")
    figure.suptitle(f"Expert usage of {Path(usage.model).name}", fontsize=11)
    figure.tight_layout()
    with new_file(path) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)


def plot_allocation(
    models: Sequence[str],
    counts: Sequence[Sequence[Sequence[int]]],
    chosen: Sequence[Sequence[Sequence[int]]],
    path: Path,
) -> None:
    """A heat map of expert usage per source, the experts that are taken marked with a cross.

    `counts` and `chosen` (indices): layer by layer, source by source.
    """
    plt = pyplot()
    height = 1.6 + 0.18 * len(counts)
    figure, panels = plt.subplots(
        1, len(models), figsize=(3 * len(models) + 0.5, height), squeeze=False
    )
    shares = [
        [[n / sum(of_source) for n in of_source] for of_source in of_layer] for of_layer in counts
    ]
    highest = max(max(of_source) for of_layer in shares for of_source in of_layer)
    for index, (axes, model) in enumerate(zip(panels[0], models, strict=True)):
        image = heat_map(axes, [of_layer[index] for of_layer in shares], highest)
        taken = [(expert, row) for row, of_layer in enumerate(chosen) for expert in of_layer[index]]
        axes.scatter(
            *zip(*taken, strict=True), marker="x", s=18, linewidths=1.2, color="tab:orange"
        )
        axes.set_title(Path(model).name, fontsize=9)
        axes.set_xlabel("expert")
    panels[0][0].set_ylabel("MoE layer")
    figure.tight_layout()
    figure.colorbar(image, ax=panels[0].tolist(), label="share of choices", fraction=0.03, pad=0.02)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _stacks(task: TaskUsage) -> dict[str, list[str]]:
    """Router names, encoder and decoder apart; a decoder-only model is one stack."""
    stacks: dict[str, list[str]] = {}
    for name in task.layers:
        if name == PER_SEQUENCE:
            continue
        stacks.setdefault(stack_of(name) or "layers", []).append(name)
    return stacks


def _bars(axes: Any, tasks: dict[str, TaskUsage]) -> None:
    width = 0.8 / len(tasks)
    for index, (name, task) in enumerate(tasks.items()):
        heights = routing_probability(task)
        positions = [
            expert + (index - (len(tasks) - 1) / 2) * width for expert in range(len(heights))
        ]
        axes.bar(positions, heights, width * 0.92, label=name)
    axes.set_xticks(range(len(heights)))
    axes.set_xlabel("expert")
    axes.set_ylabel("routing probability")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=min(len(tasks), 6),
        loc="lower right",
        bbox_to_anchor=(1, 0.97),
    )
