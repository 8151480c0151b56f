"""What transformers says a checkpoint of a config must hold: every tensor's name and shape.

The model is built without memory (on torch's meta device) and its state dict is brought into the
layout that `save_pretrained` writes, which is what other readers of a checkpoint know.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from mergekit.architecture import WeightInfo
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.modeling import find_architecture


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that all sources have, to be merged with its namesakes."""

    weight: WeightInfo  # what mergekit wants to know of it
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    shapes: Mapping[str, tuple[int, ...]]  # without the names that are tied to another
    tied: frozenset[str]  # names that the model has but its checkpoint need not hold
    ignored: tuple[
        str, ...
    ]  # patterns of names that a checkpoint may hold and transformers leaves out
    embedding: str  # the name of the input embedding; empty where there are no tokens
    vocabulary: frozenset[str]  # names, in `shapes`, of tensors whose first axis is the vocabulary
    prefix: (
        str  # what a checkpoint may have before every name (CLIP's towers, cut out of the whole)
    )

    def aliases(self, name: str) -> tuple[str, ...] | None:
        """What else the tensor may be called in a checkpoint."""
        return (self.prefix + name,) if self.prefix else None

    def shared_tensor(self, name: str) -> SharedTensor:
        """The tensor of this name, for models that all have this manifest."""
        in_vocabulary = name in self.vocabulary
        weight = WeightInfo(
            name=name,
            vocabulary_axis=0 if in_vocabulary else None,
            tied_names=tuple(self.vocabulary) if in_vocabulary else None,
            aliases=self.aliases(name),
        )
        return SharedTensor(weight, self.shapes[name])

    def with_vocabulary(self, size: int) -> "Manifest":
        """The manifest of a model with that many tokens."""
        rows = {name: (size, *self.shapes[name][1:]) for name in self.vocabulary}
        return replace(self, shapes={**self.shapes, **rows})


def hub_state(config: PretrainedConfig) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of the one class in `config.architectures`, without memory, and its state dict in hub
    layout.
    """
    model_class = find_architecture(config.architectures[0]) or getattr(
        transformers, config.architectures[0], None
    )
    if model_class is None:
        raise UserError(f"{config.architectures[0]} is no architecture of transformers")
    with torch.device("meta"):
        model = model_class(config)
    return model, revert_weight_conversion(model, model.state_dict(keep_vars=True))


def hub_names(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The name in a checkpoint of every tensor that is stored as it is used, by its name in the
    model.
    """
    stored = {
        id(tensor): name
        for name, tensor in state.items()
        if name not in model.all_tied_weights_keys
    }
    used = model.state_dict(keep_vars=True).items()
    return {name: stored[id(tensor)] for name, tensor in used if id(tensor) in stored}


def manifest_of(config: PretrainedConfig) -> Manifest:
    """The manifest of the one class in `config.architectures`."""
    return manifest_from(*hub_state(config))


def manifest_from(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> Manifest:
    """The manifest of a model without memory and its state dict in hub layout."""
    tied = frozenset(model.all_tied_weights_keys)
    try:
        layers: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:  # two towers, of which one has no tokens (CLIP)
        layers = ()
    embeddings = [layer.weight for layer in layers if isinstance(layer, nn.Embedding | nn.Linear)]
    first = embeddings[0] if embeddings else None
    vocabulary = {id(weight) for weight in embeddings}
    return Manifest(
        shapes={name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied},
        tied=tied,
        ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
        embedding=next((name for name, t in state.items() if t is first and name not in tied), ""),
        vocabulary=frozenset(
            name for name, tensor in state.items() if id(tensor) in vocabulary and name not in tied
        ),
        prefix=_optional_prefix(model),
    )


def _optional_prefix(model: PreTrainedModel) -> str:
    for change in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(change, PrefixChange) and change.prefix_to_remove and not change.scope_prefix:
            return f"{change.prefix_to_remove}."
    return ""


def check_against(manifest: Manifest, planned: Mapping[str, tuple[int, ...]]) -> None:
    """Planned names and shapes must be the manifest's, no more and no less. `ValueError` if not."""
    missing = manifest.shapes.keys() - planned.keys()
    surplus = planned.keys() - manifest.shapes.keys()
    differing = [
        f"{name} is planned as {planned[name]}, must be {shape}"
        for name, shape in manifest.shapes.items()
        if name in planned and planned[name] != shape
    ]
    complaints = [
        *(f"{name} comes from nowhere" for name in sorted(missing)),
        *(f"{name} has no place in the output" for name in sorted(surplus)),
        *differing,
    ]
    if complaints:
        shown = "; ".join(complaints[:5]) + (
            f"; and {len(complaints) - 5} more" if complaints[5:] else ""
        )
        raise ValueError(f"the planned tensors are not those of the output's architecture: {shown}")
