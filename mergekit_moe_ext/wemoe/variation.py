"""How far fine-tuning moved attention and the MLPs, layer by layer, which `upscale: auto` goes by
(E-WEMoE, figure 3).

`analysis/variation.py` measures models on disk by it.
"""

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
Names = Mapping[str, Sequence[str]]  # of tensors, by layer


@dataclass(frozen=True)
class Variation:
    """How one type of module differs between the base and its fine-tunes. Layers are in the order
    of `layers`.
    """

    layers: tuple[str, ...]
    parameters: tuple[int, ...]  # how many there are, per layer
    change: Mapping[
        str, tuple[float, ...]
    ]  # by fine-tune: the squared L2 norm of the task vector, per layer
    cosine: Mapping[
        str, tuple[float, ...]
    ]  # by fine-tune: of its parameters and the base's, per layer
    below: Mapping[
        str, tuple[int, ...]
    ]  # by fine-tune: how many elements of the task vector are below each threshold

    @property
    def mean_change(self) -> float:
        """Over fine-tunes and layers."""
        return statistics.mean(value for of_model in self.change.values() for value in of_model)

    @property
    def mean_change_per_parameter(self) -> float:
        """The mean square of the task vectors' elements, over fine-tunes and layers."""
        return self.mean_change * len(self.layers) / sum(self.parameters)

    def share_below(self, model: str) -> tuple[float, ...]:
        """Of the elements of a fine-tune's task vector, over all layers."""
        return tuple(count / sum(self.parameters) for count in self.below[model])


def names_by_layer(
    network: PreTrainedModel, hub_names: Mapping[str, str], layers: Sequence[int] | None
) -> dict[Part, Names]:
    """The tensors of attention and of the MLP of every layer. `UserError` where these cannot be
    told.
    """
    found: dict[Part, Names] = {}
    for part in get_args(Part):
        found[part] = {
            layer: [
                _stored(hub_names, name)
                for linear in linears
                for name in _parameters(network, linear)
            ]
            for layer, linears in linears_by_layer(network, part, layers).items()
        }
    return found


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
    """What `parameter_variation` measures, of these tensors, which `base` and `models` read by
    their names.
    """
    if list(thresholds) != sorted(thresholds):
        raise UserError(f"thresholds go up, and {list(thresholds)} do not")
    edges = torch.tensor(thresholds, dtype=torch.float64)
    return {
        part: _variation(part, of_part, base, models, edges, quiet)
        for part, of_part in names.items()
    }


def _variation(
    part: Part,
    names: Names,
    base: Callable[[str], Tensor],
    models: Mapping[str, Callable[[str], Tensor]],
    edges: Tensor,
    quiet: bool,
) -> Variation:
    products = torch.zeros(
        len(models), len(names), 2, 2, dtype=torch.float64
    )  # of base and fine-tune
    changes = torch.zeros(len(models), len(names), dtype=torch.float64)
    below = torch.zeros(len(models), len(edges), dtype=torch.int64)
    parameters = [0] * len(names)
    for layer, own in enumerate(tqdm(names.values(), desc=f"change of the {part}", disable=quiet)):
        for name in own:
            start = base(name).flatten()
            parameters[layer] += start.numel()
            for index, read in enumerate(models.values()):
                for before, after in zip(
                    start.split(_CHUNK), read(name).flatten().split(_CHUNK), strict=True
                ):
                    both = torch.stack([before.double(), after.double()])
                    change = both[1] - both[0]
                    products[index, layer] += both @ both.T
                    changes[index, layer] += change @ change
                    below[index] += _below(change.abs(), edges)
    norms = products.diagonal(dim1=-2, dim2=-1).prod(-1).sqrt()
    cosines = (products[..., 0, 1] / norms).clamp(
        -1, 1
    )  # rounding may lead beyond; NaN where all are zero
    return Variation(
        layers=tuple(names),
        parameters=tuple(parameters),
        change={model: tuple(row.tolist()) for model, row in zip(models, changes, strict=True)},
        cosine={model: tuple(row.tolist()) for model, row in zip(models, cosines, strict=True)},
        below={model: tuple(row.tolist()) for model, row in zip(models, below, strict=True)},
    )


def _below(magnitudes: Tensor, edges: Tensor) -> Tensor:
    """How many are smaller than each of the edges, which go up."""
    counts = torch.bincount(
        torch.bucketize(magnitudes, edges, right=True), minlength=len(edges) + 1
    )
    return counts[: len(edges)].cumsum(0)


def decide(variation: Mapping[Part, Variation]) -> Part:
    """The type of module that changes more, in the mean over fine-tunes and layers of the total per
    module.

    `UserError` where a change is not finite.
    """
    for part, found in variation.items():
        if not math.isfinite(found.mean_change):
            raise UserError(
                f"the change of the {part} is not finite, so that nothing can be chosen by it"
            )
    return (
        "attention" if variation["attention"].mean_change > variation["mlp"].mean_change else "mlp"
    )
