"""Pairs of a dense architecture and the mixture-of-experts architecture that its FFNs can become the experts of.

A pair is one declaration of where the FFNs go, and of what the output's config is. Everything that it does not
name keeps its name; `merging/manifest.py` checks that this adds up. All but Switch are exact: where every source
equals the base, the output computes the base's logits.
"""

from collections.abc import Mapping

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.upcycling.families.declaration import Upcycling


def upcycling_for(configs: Mapping[ModelReference, PretrainedConfig], *, mix_architectures: bool = False) -> Upcycling:
    """The pair that holds all these dense models. `UserError` names the model that does not fit."""
    from mergekit_moe_ext.upcycling.families.cohere import COHERE2_MOE
    from mergekit_moe_ext.upcycling.families.ernie import ERNIE_MOE
    from mergekit_moe_ext.upcycling.families.flex_olmo import FLEX_OLMO
    from mergekit_moe_ext.upcycling.families.granite import GRANITE_MOE
    from mergekit_moe_ext.upcycling.families.hunyuan import HUNYUAN_MOE
    from mergekit_moe_ext.upcycling.families.mixtral import MIXTRAL
    from mergekit_moe_ext.upcycling.families.qwen import QWEN2_MOE, QWEN3_MOE
    from mergekit_moe_ext.upcycling.families.switch import SWITCH

    families = (
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        FLEX_OLMO,
        GRANITE_MOE,
        COHERE2_MOE,
        ERNIE_MOE,
        HUNYUAN_MOE,
        SWITCH,
    )
    by_type = {model_type: family for family in families for model_type in family.dense}
    for model, config in configs.items():
        family = by_type.get(config.model_type)
        architecture = (config.architectures or [None])[0]
        if family is None or architecture not in (None, family.dense[config.model_type]):
            supported = ", ".join(f"{name} (to {family.moe})" for family in families for name in family.dense.values())
            raise UserError(
                f"{model} is a {architecture or config.model_type}, which has no mixture-of-experts "
                f"architecture here; supported: {supported}"
            )
        config.architectures = [family.dense[config.model_type]]  # some configs name none
        if complaint := family.refuse(config):
            raise UserError(f"{model}: {complaint}")
    first, *others = configs
    for model in others:
        if configs[model].model_type != configs[first].model_type and not mix_architectures:
            raise UserError(
                f"{model} is another architecture than {first}: model_type is "
                f"{configs[model].model_type!r}, not {configs[first].model_type!r} "
                "(--allow-crimes merges them all the same)"
            )
    return by_type[configs[first].model_type]
