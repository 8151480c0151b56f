"""Pairs of a dense architecture and the mixture-of-experts architecture that holds it exactly.

A pair is one declaration of where the FFNs of the dense model go, and what the output's config is.
Everything that it does not name keeps its name; `manifest.py` checks that this adds up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import click
from mergekit.common import ModelReference
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Upcycling:
    """A dense architecture and the stock MoE architecture that its FFNs can become the experts of."""

    dense: Mapping[str, str]  # model type -> architecture
    moe: str  # architecture
    ffn: Mapping[str, str]  # dense name with {layer} -> hub name with {layer} and {expert}
    gate: str  # hub name with {layer}
    output_config: Callable[[PretrainedConfig, int, int], PretrainedConfig]
    refuse: Callable[[PretrainedConfig], str | None]  # what in this dense config has no place in the MoE


def upcycling_for(configs: Mapping[ModelReference, PretrainedConfig], *, mix_architectures: bool = False) -> Upcycling:
    """The pair that holds all these dense models. `ClickException` names the model that does not fit."""
    from mergekit_moe_ext.families.mixtral import MIXTRAL

    families = (MIXTRAL,)
    by_type = {model_type: family for family in families for model_type in family.dense}
    for model, config in configs.items():
        family = by_type.get(config.model_type)
        architecture = (config.architectures or [None])[0]
        if family is None or architecture not in (None, family.dense[config.model_type]):
            supported = ", ".join(f"{name} (to {family.moe})" for family in families for name in family.dense.values())
            raise click.ClickException(
                f"{model} is a {architecture or config.model_type}, which has no mixture-of-experts "
                f"architecture here; supported: {supported}"
            )
        config.architectures = [family.dense[config.model_type]]  # some configs name none
        if complaint := family.refuse(config):
            raise click.ClickException(f"{model}: {complaint}")
    first, *others = configs
    for model in others:
        if configs[model].model_type != configs[first].model_type and not mix_architectures:
            raise click.ClickException(
                f"{model} is another architecture than {first}: model_type is "
                f"{configs[model].model_type!r}, not {configs[first].model_type!r} "
                "(--allow-crimes merges them all the same)"
            )
    return by_type[configs[first].model_type]
