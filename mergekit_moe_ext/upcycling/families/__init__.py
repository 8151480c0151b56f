"""Pairs of a dense architecture and the mixture-of-experts architecture that its FFNs can become the experts of.

A pair is one declaration of where the FFNs go, and of what the output's config is. Everything that it does not
name keeps its name; `manifest.py` checks that this adds up. All but Switch are exact: where every source equals
the base, the output computes the base's logits.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import click
from mergekit.common import ModelReference
from transformers import PretrainedConfig

# Of the dense model only. `model_type` in particular: passed on it stays the dense one in memory, and
# transformers then silently skips the weight conversion.
_DENSE_ONLY = {"_name_or_path", "architectures", "auto_map", "model_type", "pretraining_tp", "transformers_version"}


@dataclass(frozen=True)
class Stack:
    """One stack of layers. Names are templates with {layer}; those of experts with {expert} as well."""

    ffn: str  # the dense FFN, a module; the gate reads what it reads
    gate: str  # hub name
    experts: Mapping[str, str] = field(default_factory=dict)  # dense tensor -> the expert's, by its hub name
    # hub name -> dense tensors that are joined along their first axis; those of all experts lie on one another in it
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layers: str = "num_hidden_layers"  # the config key that counts them
    merged: Mapping[str, str] = field(default_factory=dict)  # hub name -> the dense tensors that are merged into it
    zeros: tuple[str, ...] = ()  # hub names


@dataclass(frozen=True)
class Upcycling:
    """A dense architecture and the stock MoE architecture that holds it."""

    dense: Mapping[str, str]  # model type -> architecture
    moe: str  # architecture
    stacks: tuple[Stack, ...]
    output_config: Callable[..., PretrainedConfig]  # (dense, number of experts, experts per token, **options)
    refuse: Callable[[PretrainedConfig], str | None]  # what in this dense config has no place in the MoE
    experts_per_token: int | None = None  # if the architecture leaves no choice
    options: frozenset[str] = frozenset()  # of the merge, that only this architecture has


def moe_config(
    config_class: type[PretrainedConfig], dense: PretrainedConfig, drop: Iterable[str] = (), **changes: object
) -> PretrainedConfig:
    """The dense config's values in a config of another class, without those that are the dense model's alone."""
    left_out = {*_DENSE_ONLY, *drop, *changes}
    kept = {key: value for key, value in dense.to_dict().items() if key not in left_out}
    return config_class(**kept, **changes)


def upcycling_for(configs: Mapping[ModelReference, PretrainedConfig], *, mix_architectures: bool = False) -> Upcycling:
    """The pair that holds all these dense models. `ClickException` names the model that does not fit."""
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
