"""The family of dense models that also see or hear: that of the language models in them.

A wrapper (LLaVA, say) that builds its language model by whatever config it is given holds a mixture
as it holds a dense model, so the output is the wrapper with another `text_config`. All names are
those of the language model alone, with a prefix.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergekit.common import ModelReference
from transformers import AutoModelForCausalLM, PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import Manifest, hub_state, manifest_of
from mergekit_moe_ext.merging.wrappers import (
    language_config,
    language_model,
    outside_language_model,
)
from mergekit_moe_ext.upcycling.families import upcycling_for
from mergekit_moe_ext.upcycling.families.declaration import Rewriting, Stack, Upcycling


def family_of_all(
    configs: Mapping[ModelReference, PretrainedConfig], *, mix_architectures: bool = False
) -> Upcycling:
    """The family of all these dense models, or of the language models in them.

    `UserError` names the model that does not fit.
    """
    first = next(iter(configs.values()))
    if language_config(first) is first or _decoder_class(first) is None:
        return upcycling_for(configs, mix_architectures=mix_architectures)
    for model, config in configs.items():
        if (
            config.architectures != first.architectures
            or language_config(config).model_type != language_config(first).model_type
        ):
            raise UserError(
                f"{model} is not the {first.architectures} around a "
                f"{language_config(first).model_type} that the first model is"
            )
    family = upcycling_for({model: _decoder_config(each) for model, each in configs.items()})
    wrapped = _within(family, first)
    _check_holds(wrapped, family, first)
    return wrapped


def _decoder_class(wrapper: PretrainedConfig) -> Any:
    """The class of the language model in a wrapper, with a head; None where there is no such."""
    entry = AutoModelForCausalLM._model_mapping.get(type(language_config(wrapper)), None)
    return entry[0] if isinstance(entry, tuple) else entry


def _decoder_config(wrapper: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model in a wrapper, as if it were alone."""
    config = _tied_as(wrapper, language_config(wrapper))
    config.architectures = [_decoder_class(wrapper).__name__]
    return config


def _within(family: Upcycling, wrapper: PretrainedConfig) -> Upcycling:
    """The family with the names that its tensors have in this wrapper."""
    kind = wrapper.architectures[0]
    decoder = _decoder_config(wrapper)
    alone = manifest_of(decoder)
    prefix = _prefix(wrapper, alone)
    rewritings = []
    for rewriting in family.rewritings.get(decoder.model_type, ()):
        if rewriting.name == alone.embedding:
            raise UserError(
                f"the embeddings of a {decoder.architectures[0]} are scaled in {family.moe}, and "
                f"the images of {kind} would not be"
            )
        becomes = tuple(prefix + name for name in rewriting.becomes)
        rewritings.append(Rewriting(prefix + rewriting.name, becomes, rewriting.make))

    def output_config(
        dense: PretrainedConfig, num_experts: int, experts_per_token: int, **options: Any
    ) -> PretrainedConfig:
        config: Any = copy.deepcopy(dense)
        inner = _decoder_config(dense)
        config.text_config = family.output_config(inner, num_experts, experts_per_token, **options)
        return config

    return replace(
        family,
        dense={wrapper.model_type: kind},
        moe=kind,
        stacks=tuple(_stack_within(stack, prefix, wrapper) for stack in family.stacks),
        output_config=output_config,
        refuse=lambda dense: family.refuse(_decoder_config(dense)),
        rewritings={wrapper.model_type: tuple(rewritings)},
    )


def _stack_within(stack: Stack, prefix: str, wrapper: PretrainedConfig) -> Stack:
    """The stack with the names that its tensors and modules have in the wrapper."""

    def renamed(names: Mapping[str, str]) -> dict[str, str]:
        return {prefix + name: prefix + other for name, other in names.items()}

    stacked = {}
    for name, parts in stack.stacked.items():
        stacked[prefix + name] = tuple(prefix + part for part in parts)
    return replace(
        stack,
        ffn=_module_within(stack.ffn, wrapper),
        gate=prefix + stack.gate,
        experts=renamed(stack.experts),
        stacked=stacked,
        merged=renamed(stack.merged),
        zeros=tuple(prefix + name for name in stack.zeros),
        constants={prefix + name: value for name, value in stack.constants.items()},
        shared_expert=renamed(stack.shared_expert),
    )


def _module_within(ffn: str, wrapper: PretrainedConfig) -> str:
    """The name in the wrapper of a module of the language model, which has another one alone."""
    network, _ = hub_state(wrapper)
    inner = language_model(network)
    place = next(name for name, module in network.named_modules() if module is inner)
    # A trunk alone is in most wrappers, whose modules have no name of the trunk before theirs.
    trunk, _, without_trunk = ffn.partition(".")
    return f"{place}.{ffn}" if hasattr(inner, trunk) else f"{place}.{without_trunk}"


def _check_holds(wrapped: Upcycling, family: Upcycling, wrapper: PretrainedConfig) -> None:
    """`UserError` for a wrapper with no place for the mixture that the family makes."""
    number = family.experts_per_token or 2
    output = wrapped.output_config(wrapper, 2, number)
    alone = manifest_of(_tied_as(output, language_config(output)))
    prefix = _prefix(output, alone)
    inside = manifest_of(output).shapes.keys() - outside_language_model(output)
    if inside != {prefix + name for name in alone.shapes}:
        raise UserError(f"{wrapped.moe} has no place for a {family.moe}")


def _tied_as(wrapper: PretrainedConfig, decoder: PretrainedConfig) -> PretrainedConfig:
    """The config of a decoder that ties its head to its embedding as the wrapper does."""
    config = copy.deepcopy(decoder)
    config.tie_word_embeddings = getattr(wrapper, "tie_word_embeddings", False)
    return config


def _prefix(wrapper: PretrainedConfig, alone: Manifest) -> str:
    """What the names of the language model in a wrapper begin with, beyond those that it has alone.

    `UserError` for a wrapper that has it under other names.
    """
    inside = manifest_of(wrapper).shapes.keys() - outside_language_model(wrapper)
    for name in inside:
        if name.endswith(alone.embedding):
            return name.removesuffix(alone.embedding)
    raise UserError(f"{wrapper.architectures[0]} names the tensors of its language model anew")
