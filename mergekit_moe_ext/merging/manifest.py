"""The manifest of a config: the name and shape of every tensor that a checkpoint must hold, as
transformers has them.

The model is built without memory (on torch's meta device) and its state dict is brought into the
layout that `save_pretrained` writes, since that is the one that other readers of a checkpoint know.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
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
from _mergekit_moe_ext_common.loading import explained
from mergekit_moe_ext.modeling import find_architecture

# Recomputed by transformers; old checkpoints hold them all the same.
NOT_PARAMETERS = ("rotary_emb.inv_freq", "embeddings.position_ids", ".masked_bias")


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that all sources have, to be merged with its namesakes."""

    weight: WeightInfo  # mergekit's description of it
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The tensors that a checkpoint must hold, and those that it may hold.

    shapes: all tensors but those that are tied to another.
    tied: names that the model has but its checkpoint need not hold, and what each is tied to.
    untied: by name, what a tensor besides the head would be tied to if the config tied embeddings.
    ignored: patterns of names that a checkpoint may hold and transformers leaves out.
    computed: names of what transformers computes itself; older checkpoints hold it all the same.
    embedding: the name of the input embedding; empty where there are no tokens.
    vocabulary: the names, in `shapes`, of the embeddings and heads.
    token_axes: the axis of the vocabulary, by name, of these and of what else has a number per
        token, such as the biases of heads.
    prefix: a text that a checkpoint may have before every name (for CLIP's towers, which are cut
        out of the whole).
    trunk: a text that a checkpoint may leave out at the beginning of every name that has it (the
        name of the trunk, in checkpoints of a trunk alone, as GPT-2's and Bloom's on the Hub).
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    untied: Mapping[str, str]
    ignored: tuple[str, ...]
    computed: frozenset[str]
    embedding: str
    vocabulary: frozenset[str]
    token_axes: Mapping[str, int]
    prefix: str
    trunk: str = ""

    def is_computed(self, name: str) -> bool:
        """Whether transformers computes such a tensor itself."""
        return name in self.computed or name.endswith(NOT_PARAMETERS)

    def is_ignored(self, name: str) -> bool:
        """Whether transformers leaves such a tensor out."""
        return _matches(name, self.ignored)

    def aliases(self, name: str) -> tuple[str, ...] | None:
        """The other names that the tensor may have in a checkpoint."""
        names = []
        if self.prefix:
            names.append(self.prefix + name)
        if self.trunk and name.startswith(self.trunk):
            names.append(name.removeprefix(self.trunk))
        return tuple(names) or None

    def shared_tensor(self, name: str) -> SharedTensor:
        """The tensor of this name, for models that all have this manifest."""
        in_vocabulary = name in self.vocabulary
        # mergekit takes the embedding for the head, or the head for the embedding, where a source
        # that ties them stores one alone. The bias of a BERT's head is tied like the head.
        tied_names = tuple(self.vocabulary) if in_vocabulary else None
        if name in self.untied:
            tied_names = (self.untied[name],)
        weight = WeightInfo(
            name=name,
            vocabulary_axis=self.token_axes.get(name),
            tied_names=tied_names,
            aliases=self.aliases(name),
        )
        return SharedTensor(weight, self.shapes[name])

    def with_vocabulary(self, size: int) -> "Manifest":
        """The manifest of a model with that many tokens."""
        rows = {}
        for name, axis in self.token_axes.items():
            shape = self.shapes[name]
            rows[name] = (*shape[:axis], size, *shape[axis + 1 :])
        return replace(self, shapes={**self.shapes, **rows})


def hub_state(config: PretrainedConfig) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of the one class in `config.architectures`, without memory, and its state dict in hub
    layout.
    """
    where = config.name_or_path or "a source"
    if not config.architectures:
        raise UserError(f"the config of {where} names no class under `architectures`")
    name = config.architectures[0]
    model_class = find_architecture(name) or getattr(transformers, name, None)
    if model_class is None:
        raise UserError(f"{name} is not an architecture of transformers")
    with explained(f"cannot build {name} by the config of {where}", where):
        with torch.device("meta"):
            model = model_class(config)
        state = revert_weight_conversion(model, model.state_dict(keep_vars=True))
    for name in model._keys_to_ignore_on_save or ():  # computed, as Marian's positions
        state.pop(name, None)
    return model, state


def hub_names(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The names in a checkpoint, by the names in the model, of all tensors that are stored as they
    are used.
    """
    # A tensor that the layout only renames is the same object in both state dicts.
    tied = _tied_names(model)
    stored_names = {}
    for name, tensor in state.items():
        if name not in tied:
            stored_names[id(tensor)] = name
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in stored_names:
            names[name] = stored_names[id(tensor)]
    return names


def manifest_of(config: PretrainedConfig) -> Manifest:
    """The manifest of the one class in `config.architectures`."""
    return manifest_from(*hub_state(config))


def manifest_from(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> Manifest:
    """The manifest of a model without memory and its state dict in hub layout."""
    tied = _tied_names(model)
    stored = {name: tensor for name, tensor in state.items() if name not in tied}
    # Embeddings and heads are found as objects, since their names are the architecture's own.
    ends = embedding_and_head(model)
    weights = [end.weight for end in ends if isinstance(end, nn.Embedding | nn.Linear)]
    weight_ids = {id(weight) for weight in weights}
    bias_ids = {id(end.bias) for end in ends if isinstance(end, nn.Linear)}
    vocabulary = [name for name, tensor in stored.items() if id(tensor) in weight_ids]
    embedding = next((name for name in vocabulary if stored[name] is weights[0]), "")
    untied = {}
    for name, other in (model._tied_weights_keys or {}).items():
        if {name, other} <= stored.keys() and name not in vocabulary:
            untied[name] = other
    token_axes = {}
    for name, tensor in stored.items():
        if id(tensor) in weight_ids | bias_ids:
            token_axes[name] = 0
        elif is_bias_of_logits(name):
            token_axes[name] = 1
    buffers = {name for name, _ in model.named_buffers()}
    not_saved = model._keys_to_ignore_on_save or ()
    return Manifest(
        shapes={name: tuple(tensor.shape) for name, tensor in stored.items()},
        tied=tied,
        untied=untied,
        ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
        computed=frozenset((*buffers - stored.keys(), *not_saved)),
        embedding=embedding,
        vocabulary=frozenset(vocabulary),
        token_axes=token_axes,
        prefix=_optional_prefix(model),
    )


def embedding_and_head(model: PreTrainedModel) -> list[Any]:
    """The embedding and the head of a model, those that there are."""
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # two towers, of which one has no tokens (CLIP)
        return []
    return [end for end in ends if end is not None]


def is_bias_of_logits(name: str) -> bool:
    """Whether a tensor is what BART, Marian and their like add to their logits: a row with a number
    per token.
    """
    return name.rpartition(".")[2] == "final_logits_bias"


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """The names in a checkpoint of the tensors that are tied to another, and those others."""
    state = model.state_dict(keep_vars=True)
    names: dict[str, str] = {}
    for name, other in model.all_tied_weights_keys.items():
        tied = revert_weight_conversion(model, {name: state[name]})
        others = revert_weight_conversion(model, {other: state[other]})
        names |= dict(zip(tied, others, strict=True))
    return names


def _optional_prefix(model: PreTrainedModel) -> str:
    """The prefix that transformers removes from the names in a checkpoint, if there is one."""
    for change in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(change, PrefixChange) and change.prefix_to_remove and not change.scope_prefix:
            return f"{change.prefix_to_remove}."
    return ""


def is_known(config: PretrainedConfig) -> bool:
    """Whether the class in `config.architectures` is one of transformers' or ours."""
    name = (config.architectures or [""])[0]
    return find_architecture(name) is not None or hasattr(transformers, name)


def holds_all(names: Collection[str], config: PretrainedConfig) -> bool:
    """Whether these are all the tensors that the class in `config.architectures` needs, by their
    names in files or by those in memory. True of a class that transformers does not have.
    """
    if not is_known(config):
        return True
    model, state = hub_state(config)
    tied = _tied_names(model)
    in_files = state.keys() - tied.keys()
    in_memory = model.state_dict().keys() - model.all_tied_weights_keys.keys() - tied.keys()
    return in_files <= set(names) or in_memory <= set(names)


def names_in_files(names: Collection[str], config: PretrainedConfig) -> set[str]:
    """The names in files of those tensors of the class in `config.architectures` that have one of
    these names in memory.
    """
    model, _ = hub_state(config)
    state = model.state_dict(keep_vars=True)
    chosen = {name: state[name] for name in state if name in names}
    return set(revert_weight_conversion(model, chosen))


def needed_names(config: PretrainedConfig) -> set[str]:
    """The names, in files and in memory, of the tensors that the class in `config.architectures`
    needs.
    """
    model, state = hub_state(config)
    tied = _tied_names(model).keys() | model.all_tied_weights_keys.keys()
    return {*state, *model.state_dict()} - tied


def unmatched(
    planned: Collection[str], config: PretrainedConfig
) -> tuple[set[str], Callable[[str], bool]]:
    """The names of the tensors that the class in `config.architectures` needs and that are not
    planned, and a function that says whether a stored tensor that is not planned is of no use.

    A tensor may be planned by its name in files or by that in memory.
    """
    model, state = hub_state(config)
    manifest = manifest_from(model, state)
    covered = {*planned, *names_in_files(planned, config)}
    lacking = set()
    for name in manifest.shapes.keys() - covered:
        if not _matches(name, model._keys_to_ignore_on_load_missing):
            lacking.add(name)

    def without_use(name: str) -> bool:
        is_copy = name in manifest.tied or name in model.all_tied_weights_keys
        is_left_out = manifest.is_computed(name) or manifest.is_ignored(name)
        return is_copy or is_left_out or name in covered

    return lacking, without_use


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def check_against(manifest: Manifest, planned: Mapping[str, tuple[int, ...]]) -> None:
    """Check that planned names and shapes are the manifest's, no more and no less.

    `ValueError` if they are not.
    """
    complaints = []
    for name in sorted(manifest.shapes.keys() - planned.keys()):
        complaints.append(f"{name} comes from nowhere")
    for name in sorted(planned.keys() - manifest.shapes.keys()):
        complaints.append(f"{name} has no place in the output")
    for name, shape in manifest.shapes.items():
        if name in planned and planned[name] != shape:
            complaints.append(f"{name} is planned as {planned[name]}, must be {shape}")
    if complaints:
        summary = "; ".join(complaints[:5])
        if complaints[5:]:
            summary += f"; and {len(complaints) - 5} more"
        raise ValueError(
            f"the planned tensors are not those of the output's architecture: {summary}"
        )
