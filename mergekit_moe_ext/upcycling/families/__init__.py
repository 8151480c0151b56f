"""Families: a dense architecture, and the mixture of experts that its FFNs can become.

A family is one declaration of where the FFNs go and what the output's config is. Every tensor that
it does not name keeps its name; `merging/manifest.py` checks that this adds up. All families but
Switch are exact: where every source equals the base, the output computes the base's logits.

A family of your own is an `Upcycling` that is handed to `register_family` before the merge runs.
"""

import functools
from collections.abc import Mapping

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling, moe_config

__all__ = ["Stack", "Upcycling", "moe_config", "register_family", "upcycling_for"]

_FAMILIES: dict[str, Upcycling] = {}  # by the model type of the dense model


def register_family(family: Upcycling) -> None:
    """Make `moe` turn the dense models that the family names into its mixture of experts.

    Of several families for one model type the last one counts, so that one of your own may take the
    place of one of ours.
    """
    _register_ours()
    _register(family)


def upcycling_for(
    configs: Mapping[ModelReference, PretrainedConfig], *, mix_architectures: bool = False
) -> Upcycling:
    """The family of all these dense models. `UserError` names the model that does not fit."""
    _register_ours()
    for model, config in configs.items():
        family = _FAMILIES.get(config.model_type)
        architecture = (config.architectures or [None])[0]
        if family is None or architecture not in (None, family.dense[config.model_type]):
            raise UserError(
                f"{model} is a {architecture or config.model_type}, which has no "
                f"mixture-of-experts architecture here; supported: {_supported()}"
            )
        config.architectures = [family.dense[config.model_type]]  # some configs name none
        complaint = family.refuse(config)
        if complaint:
            raise UserError(f"{model}: {complaint}")
    first, *others = configs
    for model in others:
        if configs[model].model_type != configs[first].model_type and not mix_architectures:
            raise UserError(
                f"{model} is another architecture than {first}: model_type is "
                f"{configs[model].model_type!r}, not {configs[first].model_type!r} "
                "(--allow-crimes merges them all the same)"
            )
    return _FAMILIES[configs[first].model_type]


def _register(family: Upcycling) -> None:
    _FAMILIES.update(dict.fromkeys(family.dense, family))


@functools.cache
def _register_ours() -> None:
    """Register our families, on first use: transformers takes a while to import their configs."""
    from mergekit_moe_ext.upcycling.families.cohere import COHERE2_MOE
    from mergekit_moe_ext.upcycling.families.ernie import ERNIE_MOE
    from mergekit_moe_ext.upcycling.families.flex_olmo import FLEX_OLMO
    from mergekit_moe_ext.upcycling.families.granite import GRANITE_MOE
    from mergekit_moe_ext.upcycling.families.hunyuan import HUNYUAN_MOE
    from mergekit_moe_ext.upcycling.families.mixtral import MIXTRAL
    from mergekit_moe_ext.upcycling.families.qwen import QWEN2_MOE, QWEN3_MOE
    from mergekit_moe_ext.upcycling.families.switch import SWITCH

    for family in (
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        FLEX_OLMO,
        GRANITE_MOE,
        COHERE2_MOE,
        ERNIE_MOE,
        HUNYUAN_MOE,
        SWITCH,
    ):
        _register(family)


def _supported() -> str:
    names = [
        f"{family.dense[model_type]} (to {family.moe})" for model_type, family in _FAMILIES.items()
    ]
    return ", ".join(names)
