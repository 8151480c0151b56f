"""The change of attention and of the MLPs by fine-tuning, layer by layer (E-WEMoE, figure 3).

`upscale: auto` chooses by it, and `analysis/variation.py` measures models on disk with it.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.wemoe.groups import Part, linears_by_layer

_CHUNK = 2**20  # elements of each model that are in float64 at a time
Names = Mapping[str, Sequence[str]]  # by layer, the names of its tensors


@dataclass(frozen=True)
class Variation:
    """The differences between the base and its fine-tunes in one type of module.

    layers: the names of the layers; all values per layer are in their order.
    parameters: the number of parameters of each layer.
    change: by fine-tune, the squared L2 norm of the task vector of each layer.
    cosine: by fine-tune, the cosine of its parameters and the base's, of each layer.
    below: by fine-tune, the number of the task vector's elements below each threshold.
    """

    layers: tuple[str, ...]
    parameters: tuple[int, ...]
    change: Mapping[str, tuple[float, ...]]
    cosine: Mapping[str, tuple[float, ...]]
    below: Mapping[str, tuple[int, ...]]

    @property
    def mean_change(self) -> float:
        """The mean of the squared norms, over fine-tunes and layers."""
        return statistics.mean(itertools.chain.from_iterable(self.change.values()))

    @property
    def mean_change_per_parameter(self) -> float:
        """The mean square of the task vectors' elements, over fine-tunes and layers."""
        return self.mean_change * len(self.layers) / sum(self.parameters)

    def share_below(self, model: str) -> tuple[float, ...]:
        """The share of a fine-tune's task vector, over all layers, that is below each threshold."""
        return tuple(count / sum(self.parameters) for count in self.below[model])


def names_by_layer(
    network: PreTrainedModel, hub_names: Mapping[str, str], layers: Sequence[int] | None
) -> dict[Part, Names]:
    """The names, in a checkpoint, of the tensors of attention and of the MLP of every layer.

    `UserError` where attention and MLP cannot be told.
    """
    by_part: dict[Part, Names] = {}
    for part in get_args(Part):
        by_layer = {}
        for layer, linears in linears_by_layer(network, part, layers).items():
            names = []
            for linear in linears:
                names += [_stored(hub_names, name) for name in _parameters(network, linear)]
            by_layer[layer] = names
        by_part[part] = by_layer
    return by_part


def _parameters(network: PreTrainedModel, linear: str) -> list[str]:
    return [f"{linear}.{name}" for name, _ in network.get_submodule(linear).named_parameters()]


def _stored(hub_names: Mapping[str, str], name: str) -> str:
    if name not in hub_names:
        raise UserError(f"{name} is stored in another form than it is used")
    return hub_names[name]


def measure(
    names: Mapping[Part, Names],
    base: Callable[[str], Tensor],
    models: Mapping[str, Callable[[str], Tensor]],
    *,
    thresholds: Sequence[float] = (),
    quiet: bool = True,
) -> dict[Part, Variation]:
    """The variation of these tensors, which `base` and `models` read by their names.

    `analysis.parameter_variation` says what is measured.
    """
    if list(thresholds) != sorted(thresholds):
        raise UserError(f"thresholds must go up, and {list(thresholds)} do not")
    edges = torch.tensor(thresholds, dtype=torch.float64)
    variation = {}
    for part, part_names in names.items():
        variation[part] = _variation(part, part_names, base, models, edges, quiet)
    return variation


def _variation(
    part: Part,
    names: Names,
    base: Callable[[str], Tensor],
    models: Mapping[str, Callable[[str], Tensor]],
    edges: Tensor,
    quiet: bool,
) -> Variation:
    # The inner products of base and fine-tune with themselves and each other, of which the cosine
    # is made. The change is summed up by itself: as a difference of these it would lose its digits.
    products = torch.zeros(len(models), len(names), 2, 2, dtype=torch.float64)
    changes = torch.zeros(len(models), len(names), dtype=torch.float64)
    below = torch.zeros(len(models), len(edges), dtype=torch.int64)
    parameters = [0] * len(names)
    bar = tqdm(names.values(), desc=f"change of the {part}", disable=quiet)
    for layer, layer_names in enumerate(bar):
        for name in layer_names:
            start = base(name).flatten()
            parameters[layer] += start.numel()
            for index, read in enumerate(models.values()):
                end = read(name).flatten()
                # In chunks, since both models' elements are in float64 at a time.
                for before, after in zip(start.split(_CHUNK), end.split(_CHUNK), strict=True):
                    both = torch.stack([before.double(), after.double()])
                    change = both[1] - both[0]
                    products[index, layer] += both @ both.T
                    changes[index, layer] += change @ change
                    below[index] += _below(change.abs(), edges)
    norms = products.diagonal(dim1=-2, dim2=-1).prod(-1).sqrt()
    # Rounding may lead beyond 1. NaN where all parameters are zero.
    cosines = (products[..., 0, 1] / norms).clamp(-1, 1)
    return Variation(
        layers=tuple(names),
        parameters=tuple(parameters),
        change={model: tuple(row.tolist()) for model, row in zip(models, changes, strict=True)},
        cosine={model: tuple(row.tolist()) for model, row in zip(models, cosines, strict=True)},
        below={model: tuple(row.tolist()) for model, row in zip(models, below, strict=True)},
    )


def _below(magnitudes: Tensor, edges: Tensor) -> Tensor:
    """The number of magnitudes that are smaller than each of the edges, which go up."""
    # One pass for all edges: each magnitude is counted between two of them.
    buckets = torch.bucketize(magnitudes, edges, right=True)
    counts = torch.bincount(buckets, minlength=len(edges) + 1)
    return counts[: len(edges)].cumsum(0)


def decide(variation: Mapping[Part, Variation]) -> Part:
    """The type of module that fine-tuning changes more: by the total per module, in the mean over
    fine-tunes and layers.

    `UserError` where a change is not finite.
    """
    for part, measured in variation.items():
        if not math.isfinite(measured.mean_change):
            raise UserError(
                f"the change of the {part} is not finite, so that nothing can be chosen by it"
            )
    if variation["attention"].mean_change > variation["mlp"].mean_change:
        return "attention"
    return "mlp"
