"""Families: a dense architecture, and the mixture of experts that its FFNs can become.

A family is one declaration of where the FFNs go and what the output's config is. Every tensor that
it does not name keeps its name; `merging/manifest.py` checks that this adds up. All families but
Switch are exact: where every source equals the base, the output computes the base's logits.

A dense architecture may have several families, of which the first that has a place for all that the
sources hold is taken. A family of your own is an `Upcycling` that is handed to `register_family`
before the merge runs.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from mergekit.common import ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.upcycling.families.declaration import (
    Rewriting,
    Stack,
    Upcycling,
    moe_config,
)

__all__ = [
    "Rewriting",
    "Stack",
    "Upcycling",
    "families_into",
    "moe_config",
    "register_family",
    "upcycling_for",
]

# Config keys that mixtures of experts have.
_NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# By the model type of the dense model, in the order in which they are tried.
_FAMILIES: dict[str, list[Upcycling]] = {}
# Keys of an output's config in which sources of several model types may differ all the same: they
# do not change what a model computes, or are compared elsewhere (`check_same_size`).
_MAY_DIFFER = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "pad_token_id",
        "tie_word_embeddings",
        "transformers_version",
        "use_cache",
        "vocab_size",
    }
)


def register_family(family: Upcycling) -> None:
    """Make `moe` turn the dense models that the family names into its mixture of experts.

    Of several families for one model type the last one is tried first, so that one of your own may
    take the place of one of ours.
    """
    _register_ours()
    _register(family)


def upcycling_for(
    configs: Mapping[ModelReference, PretrainedConfig], *, mix_architectures: bool = False
) -> Upcycling:
    """The family of all these dense models. `UserError` names the model that does not fit.

    Models of several architectures must be equal but for how their tensors are stored, unless
    `mix_architectures` is set.
    """
    _register_ours()
    for model, config in configs.items():
        _check_known(model, config)
    candidates = _candidates(configs, mix_architectures=mix_architectures)
    complaints = []
    for family in candidates:
        complaint = _complaint(family, configs)
        if complaint is None:
            if not mix_architectures:
                _check_equal(family, configs)
            return family
        if complaint not in complaints:
            complaints.append(complaint)
    raise UserError("; nor: ".join(complaints))


def _check_known(model: ModelReference, config: PretrainedConfig) -> None:
    """`UserError` where no family takes the architecture. One that the config does not name is
    added to it.
    """
    architecture = (config.architectures or [None])[0]
    for family in _FAMILIES.get(config.model_type, []):
        if architecture in (None, family.dense[config.model_type]):
            config.architectures = [family.dense[config.model_type]]
            return
    if any(getattr(config, key, None) for key in _NUMBERS_OF_EXPERTS):
        raise UserError(
            f"{model} is a mixture of experts already ({architecture or config.model_type}): "
            "`merge_method: caem` merges mixtures, and `into:` under `parameters:` of `moe` adds "
            "dense models to one"
        )
    raise UserError(
        f"{model} is a {architecture or config.model_type}, which has no mixture-of-experts "
        "architecture in transformers that fits"
    )


def _candidates(
    configs: Mapping[ModelReference, PretrainedConfig], *, mix_architectures: bool
) -> list[Upcycling]:
    """The families to try, in order: those of the first model that take the others' model types."""
    first, *others = configs
    candidates = list(_FAMILIES[configs[first].model_type])
    if mix_architectures:
        return candidates
    for model in others:
        model_type = configs[model].model_type
        candidates = [family for family in candidates if model_type in family.dense]
        if not candidates:
            raise UserError(
                f"{model} is another architecture than {first}: model_type is "
                f"{model_type!r}, not {configs[first].model_type!r} "
                "(--allow-crimes merges them all the same)"
            )
    return candidates


def _complaint(family: Upcycling, configs: Mapping[ModelReference, PretrainedConfig]) -> str | None:
    """What in one of the models has no place in the family's MoE; None if all fit."""
    for model, config in configs.items():
        # Under --allow-crimes a model may be of a type that this family does not know.
        is_known = config.model_type in family.dense
        judge = family if is_known else _FAMILIES[config.model_type][0]
        complaint = judge.refuse(config)
        if complaint:
            return f"{model}: {complaint}"
    return None


def _check_equal(family: Upcycling, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """`UserError` where models of several types would make mixtures that compute differently."""
    first, *others = configs
    if all(configs[model].model_type == configs[first].model_type for model in others):
        return
    expected = _compared(family, configs[first])
    for model in others:
        values = _compared(family, configs[model])
        for key in sorted(expected.keys() | values.keys()):
            here = values.get(key)
            there = expected.get(key)
            if here != there:
                raise UserError(
                    f"{model} ({configs[model].model_type}) and {first} "
                    f"({configs[first].model_type}) go into one {family.moe} only if they compute "
                    f"alike: `{key}` is {here!r}, not {there!r} (--allow-crimes merges them all "
                    "the same)"
                )


def _compared(family: Upcycling, config: PretrainedConfig) -> dict[str, Any]:
    """What the output's config would say of how such a model computes."""
    output = family.output_config(config, 2, family.experts_per_token or 2).to_dict()
    compared = {key: value for key, value in output.items() if key not in _MAY_DIFFER}
    # A window that no text reaches is none.
    window = compared.get("sliding_window")
    if window and window >= config.max_position_embeddings:
        compared["sliding_window"] = None
    return compared


def families_into(architecture: str) -> list[Upcycling]:
    """The families whose mixture of experts is of this architecture."""
    _register_ours()
    families: list[Upcycling] = []
    for of_model_type in _FAMILIES.values():
        for family in of_model_type:
            if family.moe == architecture and family not in families:
                families.append(family)
    return families


def _register(family: Upcycling) -> None:
    for model_type in family.dense:
        _FAMILIES.setdefault(model_type, []).insert(0, family)


@functools.cache
def _register_ours() -> None:
    """Register our families, on first use: transformers takes a while to import their configs."""
    for family in _ours():
        if hasattr(transformers, family.moe):  # some came with a later version
            _register(family)


def _ours() -> Sequence[Upcycling]:
    """Our families; of several for one model type a later one is tried first."""
    from mergekit_moe_ext.upcycling.families.cohere import COHERE2_MOE
    from mergekit_moe_ext.upcycling.families.ernie import ERNIE_MOE
    from mergekit_moe_ext.upcycling.families.flex_olmo import FLEX_OLMO
    from mergekit_moe_ext.upcycling.families.glm import GLM4_MOE
    from mergekit_moe_ext.upcycling.families.granite import GRANITE_MOE, GRANITE_MOE_SWA
    from mergekit_moe_ext.upcycling.families.hunyuan import HUNYUAN_MOE
    from mergekit_moe_ext.upcycling.families.mixtral import MIXTRAL
    from mergekit_moe_ext.upcycling.families.qwen import MELLUM, QWEN2_MOE, QWEN3_MOE
    from mergekit_moe_ext.upcycling.families.switch import SWITCH

    return (
        GRANITE_MOE,
        GLM4_MOE,
        MIXTRAL,
        GRANITE_MOE_SWA,
        QWEN2_MOE,
        MELLUM,
        QWEN3_MOE,
        FLEX_OLMO,
        COHERE2_MOE,
        ERNIE_MOE,
        HUNYUAN_MOE,
        SWITCH,
    )


def supported() -> str:
    """All dense architectures that have a family, and where each leads."""
    _register_ours()
    names = []
    for model_type, families in _FAMILIES.items():
        outputs = " or ".join(family.moe for family in families)
        names.append(f"{families[0].dense[model_type]} (to {outputs})")
    return ", ".join(names)
