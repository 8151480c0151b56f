"""Dense models as a family reads them: with the tensors that it rewrites rewritten."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from mergekit.common import ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import Manifest
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import Headers, loader_of
from mergekit_moe_ext.merging.views import Derivation, Layer, derived_shapes
from mergekit_moe_ext.merging.wrappers import language_config
from mergekit_moe_ext.upcycling.families.declaration import Upcycling


def rewritten(
    family: Upcycling,
    config: PretrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> Layer:
    """The layer of a view that makes the tensors that the family takes of a dense model.

    config: the dense model's.
    shapes: those of its tensors, by name.
    dtype: the output's. A narrower tensor is widened before it is rewritten, not after.
    """
    rewritings = list(_in_model(family, config, shapes))
    origins = {name for name, _, _ in rewritings}
    derivations = []
    for name, becomes, make in rewritings:
        # A tensor that the model has itself stays its own: the head of a Gemma that is not tied.
        is_made = [each not in shapes or each in origins for each in becomes]
        names = tuple(itertools.compress(becomes, is_made))
        derivations.append(Derivation(name, names, _widening(make, config, dtype, is_made)))
    return tuple(derivations)


def _in_model(
    family: Upcycling, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, list[str], Callable]]:
    """For every tensor of the model that is rewritten its name, the names of what it becomes, and
    the function that makes these.
    """
    number = language_config(config).num_hidden_layers
    for rewriting in family.rewritings.get(config.model_type, ()):
        is_in_layers = "{layer}" in rewriting.name
        for layer in range(number if is_in_layers else 1):
            name = rewriting.name.format(layer=layer)
            if name in shapes:
                becomes = [template.format(layer=layer) for template in rewriting.becomes]
                yield name, becomes, rewriting.make


def _widening(
    make: Callable, config: PretrainedConfig, dtype: torch.dtype, is_made: Sequence[bool]
) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """The function of the stored tensor alone that gives those tensors that are made of it."""

    def widened(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        wide = tensor.to(torch.promote_types(tensor.dtype, dtype))
        return tuple(itertools.compress(make(wide, language_config(config)), is_made))

    return widened


def rewritten_manifest(manifest: Manifest, layer: Layer) -> Manifest:
    """The manifest of a dense model that is read through such a layer."""
    vocabulary = set(manifest.vocabulary)
    token_axes = dict(manifest.token_axes)
    for derivation in layer:
        if derivation.origin in manifest.vocabulary:
            vocabulary |= set(derivation.names)
            token_axes |= dict.fromkeys(derivation.names, 0)
    shapes = derived_shapes(manifest.shapes, layer)
    return replace(
        manifest,
        shapes=shapes,
        tied={name: other for name, other in manifest.tied.items() if name not in shapes},
        vocabulary=frozenset(vocabulary & shapes.keys()),
        token_axes={name: axis for name, axis in token_axes.items() if name in shapes},
    )


def check_dropped(
    job: Job,
    model: ModelReference,
    headers: Headers,
    family: Upcycling,
    config: PretrainedConfig,
) -> None:
    """`UserError` where a tensor without a place in the output is not zero everywhere."""
    dropped = []
    for name, becomes, _ in _in_model(family, config, headers.shapes):
        if not becomes:
            dropped.append(name)
    if not dropped:
        return
    loader = loader_of(job, model, headers.view)
    for name in dropped:
        tensor = loader.get_tensor(headers.prefix + name)
        if tensor.any():
            raise UserError(
                f"{name} of {model} has no place in {family.moe}, and is not zero: only models "
                f"whose tensors of this kind are zero can be merged with models without them"
            )
