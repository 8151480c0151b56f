"""The tensors of a dense model that make up an expert of a mixture which exists.

For a family of ours they are those of its declaration. For any other mixture that transformers has
they are the dense model's namesakes: `mlp.up_proj` for `mlp.experts.3.up_proj`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import Manifest
from mergekit_moe_ext.merging.wrappers import language_config
from mergekit_moe_ext.mixtures.experts import MoeLayer, layer_of
from mergekit_moe_ext.modeling.configuration_upcycled_moe import routed_ffns
from mergekit_moe_ext.upcycling.families import Stack, Upcycling, families_into
from mergekit_moe_ext.upcycling.generic import check_same_ffns
from mergekit_moe_ext.upcycling.wrapped import family_of_all

_EXPERT = "experts.{expert}."
# Config keys by which an FFN is known: its sizes are compared as shapes.
_OF_FFNS = ("hidden_size", "num_hidden_layers", "num_decoder_layers", "hidden_act", "dense_act_fn")


@dataclass(frozen=True)
class ExpertSource:
    """The dense tensors that one layer's new expert is made of, by hub names.

    modules: the modules of the dense model that become the expert.
    apart: {template of an expert's tensor, with {expert}: the dense tensor}.
    together: {tensor of all experts: the dense tensors of one, joined along their first axis}.
    """

    modules: tuple[str, ...]
    apart: Mapping[str, str]
    together: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> set[str]:
        names = set(self.apart.values())
        for several in self.together.values():
            names |= set(several)
        return names


def family_of(
    mixture: PretrainedConfig, model: ModelReference, dense: PretrainedConfig
) -> Upcycling | None:
    """The family of ours by which FFNs of the dense model become experts of the mixture; None for a
    mixture that no family of ours makes.

    `UserError` for a dense model of another family.
    """
    architecture = mixture.architectures[0]
    if hasattr(mixture, "routed_ffns"):
        return None
    if dense.architectures == mixture.architectures and language_config(dense) is not dense:
        family = family_of_all({model: dense})
        output = family.output_config(dense, 2, family.experts_per_token or 2)
        is_ours = language_config(output).model_type == language_config(mixture).model_type
        return family if is_ours else None
    families = families_into(architecture)
    for family in families:
        if dense.model_type in family.dense:
            return family
    if not families:
        return None
    names = sorted({name for family in families for name in family.dense.values()})
    raise UserError(
        f"{model} is a {(dense.architectures or [dense.model_type])[0]}; the experts of "
        f"{architecture} are made of {' or '.join(names)}"
    )


def check_dense(
    into: ModelReference,
    mixture: PretrainedConfig,
    model: ModelReference,
    dense: PretrainedConfig,
    held: Manifest,
) -> None:
    """`UserError` for a model that is a mixture itself, for one of other sizes, and, where the
    mixture is a generic one, for one of another class than it is made of.

    into, mixture: the mixture, and its config.
    held: the model's manifest.
    """
    if any("experts" in name for name in held.shapes):
        raise UserError(
            f"{model} is a mixture of experts itself; `into` takes dense models, and "
            "`merge_method: caem` merges mixtures"
        )
    inner = language_config(mixture)
    for key in _OF_FFNS:
        here = getattr(language_config(dense), key, None)
        there = getattr(inner, key, None)
        if here != there:
            raise UserError(f"{model} does not fit the mixture: `{key}` is {here!r}, not {there!r}")
    if hasattr(mixture, "routed_ffns"):
        architecture = mixture.architectures[0].removeprefix("UpcycledMoe")
        if dense.architectures != [architecture]:
            raise UserError(
                f"{model} is a {(dense.architectures or [dense.model_type])[0]}; the experts of "
                f"{mixture.architectures[0]} are made of {architecture}"
            )
        check_same_ffns(model, dense, into, mixture)


def expert_sources(
    mixture: PretrainedConfig,
    layers: Sequence[MoeLayer],
    held: Manifest,
    family: Upcycling | None,
    model: ModelReference,
    dense: Manifest,
) -> list[ExpertSource]:
    """The tensors of the dense model that make up its expert, per layer of the mixture.

    held: the mixture's manifest.
    family: what `family_of` gives; `dense` is the model's manifest as that family reads it.

    `UserError` for a dense model whose FFNs cannot be the mixture's experts.
    """
    sources = []
    for layer in layers:
        if hasattr(mixture, "routed_ffns"):
            source = _by_router(mixture, layer)
        elif family is None:
            source = _by_names(mixture.architectures[0], layer, held, model, dense)
        else:
            source = _by_family(family, layer)
        _check_shapes(layer, source, held, model, dense)
        sources.append(source)
    return sources


def _by_router(mixture: PretrainedConfig, layer: MoeLayer) -> ExpertSource:
    """The linear modules that the layer's router sends tokens to, in a generic mixture: their
    tensors have the names of the dense model's.
    """
    together = {name: (name,) for name in layer.rows if name not in layer.router_tensors}
    return ExpertSource(tuple(routed_ffns(mixture)[layer.router].linears), {}, together)


def _by_family(family: Upcycling, layer: MoeLayer) -> ExpertSource:
    """What the family's declaration says of this layer."""
    stack, index = _place_of(family, layer)
    apart = {}
    for name, template in stack.experts.items():
        # Only the layer is filled in.
        filled = template.format(layer=index, expert="{expert}")
        apart[filled] = name.format(layer=index)
    together = {}
    for template, names in stack.stacked.items():
        together[template.format(layer=index)] = tuple(name.format(layer=index) for name in names)
    return ExpertSource((stack.ffn.format(layer=index),), apart, together)


def _place_of(family: Upcycling, layer: MoeLayer) -> tuple[Stack, int]:
    """The stack of the family that a layer of the mixture is in, and its number there."""
    for stack in family.stacks:
        gate = re.escape(stack.gate).replace(re.escape("{layer}"), r"(\d+)")
        for name in layer.router_tensors:
            match = re.fullmatch(gate, name)
            if match:
                return stack, int(match.group(1))
    raise UserError(f"{layer.router} of {family.moe} is not where `moe` puts a gate")


def _by_names(
    architecture: str, layer: MoeLayer, held: Manifest, model: ModelReference, dense: Manifest
) -> ExpertSource:
    """The dense model's namesakes of the tensors of an expert, where all else in its layer has the
    names and shapes that it has in the mixture.
    """
    are_named = bool(layer.experts) and all(_EXPERT in each for each in layer.experts)
    if not are_named or _of_all_experts(layer, held):
        raise UserError(
            f"no dense model is known whose FFNs could be the experts of {architecture}"
        )
    apart = {template: template.replace(_EXPERT, "") for template in layer.experts}
    block = layer.experts[0].partition(_EXPERT)[0]
    # A dense FFN can be an expert only where it reads what the experts read: the rest of the layer
    # must be built as in the mixture.
    start = layer_of(layer.experts[0])
    here = {name: shape for name, shape in dense.shapes.items() if name.startswith(start)}
    there = {name: shape for name, shape in held.shapes.items() if name.startswith(start)}
    for name in sorted(here.keys() | there.keys()):
        if not name.startswith(block) and here.get(name) != there.get(name):
            raise UserError(
                f"{model} is not of the base that {architecture} is built on: {name} is "
                f"{here.get(name, 'missing')}, in the mixture {there.get(name, 'missing')}"
            )
    return ExpertSource((block.removesuffix("."),), apart, {})


def _of_all_experts(layer: MoeLayer, held: Manifest) -> list[str]:
    """The tensors in which all experts of a layer lie together: neither of its router, nor of one
    number per expert, as a correction of the router's scores.
    """
    names = []
    for name, axis in layer.rows.items():
        shape = held.shapes[name]
        if name not in layer.router_tensors and math.prod(shape) > shape[axis]:
            names.append(name)
    return names


def _check_shapes(
    layer: MoeLayer,
    source: ExpertSource,
    held: Manifest,
    model: ModelReference,
    dense: Manifest,
) -> None:
    """Check that the source holds all of an expert, that the tensors fit, and that nothing else is
    in the dense FFN.
    """
    for template, name in source.apart.items():
        _check_shape(name, model, dense, held.shapes.get(template.format(expert=0)))
    for template, names in source.together.items():
        _, rows, *rest = held.shapes[template]
        for name in names:
            _check_shape(name, model, dense, (rows // len(names), *rest))
    left = [name for name in layer.experts if name not in source.apart]
    left += [name for name in _of_all_experts(layer, held) if name not in source.together]
    if left:
        raise UserError(f"{model} has nothing to make {left[0]} of")
    # A tensor of the FFN, or a bias beside a weight of it.
    places = {*source.modules, *(name.rpartition(".")[0] for name in source.names)}
    beginnings = tuple(f"{place}." for place in places)
    for name in dense.shapes:
        if name.startswith(beginnings) and name not in source.names:
            raise UserError(f"{name} of {model} has no place in an expert of the mixture")


def _check_shape(
    name: str, model: ModelReference, dense: Manifest, wanted: tuple[int, ...] | None
) -> None:
    if dense.shapes.get(name) != wanted or wanted is None:
        raise UserError(
            f"{name} of {model} is {dense.shapes.get(name, 'missing')}, but an expert of the "
            f"mixture wants {wanted or 'no such tensor'}"
        )
