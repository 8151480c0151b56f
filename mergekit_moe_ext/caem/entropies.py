"""The entropies of expert usage per layer, and their means over stacks (CAEM-MoE, table 3)."""

import math
from collections.abc import Mapping

from mergekit_moe_ext.caem.allocation import normalised_entropy
from mergekit_moe_ext.mixtures.routers import stack_of
from mergekit_moe_ext.mixtures.usage import LayerUsage, Usage


def layer_entropies(layers: Mapping[str, LayerUsage]) -> dict[str, float]:
    """The normalised entropy of the choices of each layer (equation 1); NaN without any choice."""
    entropies = {}
    for name, layer in layers.items():
        is_used = any(layer.counts)
        entropies[name] = normalised_entropy(layer.counts) if is_used else math.nan
    return entropies


def mean_entropies(entropies: Mapping[str, float]) -> dict[str, float]:
    """The means of the entropies of layers: of the encoder's and the decoder's, where there are
    two stacks, and of all.
    """
    by_stack: dict[str, list[float]] = {}
    for name, entropy in entropies.items():
        by_stack.setdefault(stack_of(name), []).append(entropy)
    means = {}
    if len(by_stack) > 1:
        for stack, values in by_stack.items():
            means[stack] = sum(values) / len(values)
    means["all"] = sum(entropies.values()) / len(entropies)
    return means


def entropy_table(usage: Usage) -> str:
    """A line per layer and per mean, and a column per task."""
    columns: dict[str, dict[str, float]] = {}
    for task, of_task in usage.tasks.items():
        entropies = layer_entropies(of_task.layers)
        column = dict(entropies)
        for stack, mean in mean_entropies(entropies).items():
            column[f"mean, {stack}"] = mean
        columns[task] = column
    names = list(next(iter(columns.values())))
    title = "normalised entropy"
    first_width = max(map(len, [title, *names]))
    widths = {task: max(7, len(task) + 2) for task in columns}
    lines = [title.ljust(first_width) + "".join(task.rjust(widths[task]) for task in columns)]
    for name in names:
        cells = [f"{column[name]:.3f}".rjust(widths[task]) for task, column in columns.items()]
        lines.append(name.ljust(first_width) + "".join(cells))
    return "\n".join(lines)
