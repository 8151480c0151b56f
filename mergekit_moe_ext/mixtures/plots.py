"""Figures of expert usage, and a page of it with texts. matplotlib is needed only for figures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _mergekit_moe_ext_common.figures import heat_map, pyplot
from _mergekit_moe_ext_common.staging import new_file
from _mergekit_moe_ext_common.token_page import ShownTexts, write_page
from mergekit_moe_ext.mixtures.routers import PER_SEQUENCE, stack_of
from mergekit_moe_ext.mixtures.usage import TaskUsage, Usage, routing_probability, share_of_choices


def write_usage_page(usage: Usage, shown: ShownTexts, path: Path) -> None:
    """Write a page with the texts that were shown, and heat maps of the usage. `UserError` where it
    cannot be written.
    """
    shares = {}
    for name, task in usage.tasks.items():
        shares[name] = {
            layer: share_of_choices(of_layer) for layer, of_layer in task.layers.items()
        }
    first = next(iter(usage.tasks.values())).layers
    number = max(len(layer.counts) for layer in first.values())
    write_page(
        path,
        f"Experts of {Path(usage.model).name}",
        [f"expert {index}" for index in range(number)],
        shown,
        shares,
        "Share of the choices of each layer",
    )


def plot_usage(usage: Usage, path: Path) -> None:
    """Draw MergeME's figure 5 (routing probability per expert and task) above CAEM's figure 3 (a
    heat map per task).

    Heat maps have a row per layer and a column per expert, encoder and decoder apart; their shades
    are shares of the choices of one layer. A sequence MoE has no layers that choose, and so none
    (MergeME's figures 6, 8 and 9).
    """
    plt = pyplot()
    tasks = usage.tasks
    stacks = _stacks(next(iter(tasks.values())).layers)
    rows = 1 + len(stacks)
    heights = [2.2, *(1.2 + 0.12 * len(names) for names in stacks.values())]  # inches
    figure = plt.figure(figsize=(max(6.0, 2.6 * len(tasks) + 1), sum(heights) + 0.8 * rows))
    grid = figure.add_gridspec(
        rows, len(tasks) + 1, height_ratios=heights, width_ratios=[*([1] * len(tasks)), 0.06]
    )
    _bars(figure.add_subplot(grid[0, :-1]), tasks)
    # One scale of shades for all heat maps, so that they can be compared.
    highest = 0.0
    for task in tasks.values():
        for layer in task.layers.values():
            highest = max(highest, *share_of_choices(layer))
    for row, (stack, names) in enumerate(stacks.items(), 1):
        for column, (name, task) in enumerate(tasks.items()):
            axes = figure.add_subplot(grid[row, column])
            shares = [share_of_choices(task.layers[layer]) for layer in names]
            image = heat_map(axes, shares, highest)
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
    routers: Sequence[str],
    counts: Sequence[Sequence[Sequence[int]]],
    chosen: Sequence[Sequence[Sequence[int]]],
    path: Path,
) -> None:
    """Draw a heat map of expert usage per source, encoder and decoder apart, with a cross on the
    experts that are taken.

    `counts` and `chosen`, the indices of these experts, are lists of layers, as are their
    `routers`' names, and the layers are lists of sources.
    """
    plt = pyplot()
    stacks = _stacks(routers)
    heights = [1.2 + 0.18 * len(names) for names in stacks.values()]  # inches
    figure, panels = plt.subplots(
        len(stacks),
        len(models),
        figsize=(3 * len(models) + 0.5, sum(heights) + 0.4),
        height_ratios=heights,
        squeeze=False,
    )
    # By layer, a list of shares per source.
    shares: list[list[list[float]]] = []
    # One scale of shades for all heat maps, so that they can be compared.
    highest = 0.0
    for layer_counts in counts:
        of_layer = []
        for source_counts in layer_counts:
            total = sum(source_counts)
            of_source = [count / total for count in source_counts]
            of_layer.append(of_source)
            highest = max(highest, *of_source)
        shares.append(of_layer)
    for stack_panels, (stack, names) in zip(panels, stacks.items(), strict=True):
        layers = [routers.index(name) for name in names]
        for index, (axes, model) in enumerate(zip(stack_panels, models, strict=True)):
            image = heat_map(axes, [shares[layer][index] for layer in layers], highest)
            columns = []
            rows = []
            for row, layer in enumerate(layers):
                for expert in chosen[layer][index]:
                    columns.append(expert)
                    rows.append(row)
            axes.scatter(columns, rows, marker="x", s=18, linewidths=1.2, color="tab:orange")
            name = Path(model).name
            axes.set_title(f"{name} ({stack})" if len(stacks) > 1 else name, fontsize=9)
        stack_panels[0].set_ylabel("MoE layer")
    for axes in panels[-1]:
        axes.set_xlabel("expert")
    figure.tight_layout()
    figure.colorbar(
        image, ax=panels.ravel().tolist(), label="share of choices", fraction=0.03, pad=0.02
    )
    with new_file(path) as partial:
        figure.savefig(partial, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _stacks(routers: Iterable[str]) -> dict[str, list[str]]:
    """The names of the routers by stack, encoder and decoder; a decoder-only model is one stack."""
    stacks: dict[str, list[str]] = {}
    for name in routers:
        if name == PER_SEQUENCE:
            continue
        stacks.setdefault(stack_of(name) or "layers", []).append(name)
    return stacks


def _bars(axes: Any, tasks: dict[str, TaskUsage]) -> None:
    """Draw a group of bars per expert, with one bar per task, around the expert's position."""
    width = 0.8 / len(tasks)
    for index, (name, task) in enumerate(tasks.items()):
        heights = routing_probability(task)
        offset = (index - (len(tasks) - 1) / 2) * width
        positions = [expert + offset for expert in range(len(heights))]
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
