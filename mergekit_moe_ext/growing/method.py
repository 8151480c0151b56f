"""The method `moe` with `into: MIXTURE`: dense models become further experts of a mixture that is
there already. And the method `remove_experts`, which takes experts out of one.
"""

from collections.abc import Sequence
from typing import Any, Literal

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from pydantic import Field

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.growing.adding import DEFAULT_MARGIN, plan_added
from mergekit_moe_ext.growing.arrangement import (
    arranged_config,
    order_without,
    set_expert_names,
)
from mergekit_moe_ext.growing.mixture import Mixture, arranged
from mergekit_moe_ext.merging.manifest import manifest_of
from mergekit_moe_ext.merging.method import Job, MethodOptions, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import read_configs, read_headers
from mergekit_moe_ext.upcycling.method import (
    MERGEME,
    MoeMethod,
    MoeModelOptions,
    MoeOptionsWithShared,
)
from mergekit_moe_ext.upcycling.shared_expert import with_shared_expert

GateInit = Literal["mean", "prompts", "zeros"]
# Options of a mixture that is built anew; one that is there has them already.
_OF_NEW_MIXTURES = (
    "architecture",
    "shared",
    "gate_mode",
    "experts_per_token",
    "expert_capacity",
    "shared_expert",
)


class GrowingOptions(MoeOptionsWithShared):
    shared_expert: str | None = Field(
        None,
        description="the model, one of the merge, whose FFNs become the shared expert, which every "
        "token goes through, in architectures that have one [default: a silent one]",
    )
    into: str | None = Field(
        None,
        description="a mixture of experts that the models are added to, as further experts; all "
        "that it has stays as it is, and `base_model` is not needed",
    )
    gate_init: GateInit | None = Field(
        None,
        description="with `into`: initial rows of the gates for the new experts: mean (of the "
        "others' rows, with logits lower by `margin`), prompts (higher by `margin` for the models' "
        "positive_prompts, lower for the negative_prompts) or zeros [default: mean]",
    )
    margin: float | None = Field(
        None,
        ge=0,
        description="with `into`: difference of a new expert's mean logit from the mean of the "
        "others'; above 0 the mixture is loaded for a forward pass, over random tokens where there "
        f"are no negative_prompts [default: {DEFAULT_MARGIN:g}]",
    )


class GrowingModelOptions(MoeModelOptions):
    name: str | None = Field(
        None, description="name of the expert, for `train --only-experts` and `remove_experts`"
    )


class GrowingMoeMethod(MoeMethod):
    """The method `moe`, which builds a mixture, or, with `into`, adds to one."""

    model_options_type: type[MoeModelOptions] = GrowingModelOptions

    def __init__(self, name: str, pretty_name: str, reference_url: str):
        super().__init__(name, pretty_name, reference_url)
        self.options_type = GrowingOptions

    def completed(self, config: MergeConfiguration, options: Any) -> MergeConfiguration:
        if options.into is None:
            for key in ("gate_init", "margin"):
                if getattr(options, key) is not None:
                    raise UserError(f"`{key}` is for `into`, which adds experts to a mixture")
            return config
        for key in _OF_NEW_MIXTURES:
            if key in options.model_fields_set:
                raise UserError(f"`{key}` does not go with `into`: the mixture keeps its own")
        if options.gate_init == "zeros" and options.margin is not None:
            raise UserError("`margin` does not go with `gate_init: zeros`")
        if options.gate_init == "prompts" and options.margin == 0:
            raise UserError("`gate_init: prompts` needs a `margin` above 0")
        _check_known(config, (*GrowingOptions.model_fields, *GrowingModelOptions.model_fields))
        return _with_mixture_as_base(config, options.into, "into")

    def plan(self, job: Job) -> Plan:
        names = [options.name for options in job.model_options]
        if job.options.into is not None:
            return plan_added(job, names)
        plan = super().plan(job)
        if job.options.shared_expert is not None:
            plan = with_shared_expert(plan, job, job.options.shared_expert, read_configs(job))
        set_expert_names(plan.config, names)
        return plan


class RemovalOptions(MethodOptions):
    experts: list[str | int] = Field(
        min_length=1, description="experts to remove from every layer, by number or name"
    )


class RemovalMethod(StructuralMethod):
    """The method `remove_experts`, whose one model is a mixture of experts."""

    options_type = RemovalOptions

    def __init__(self) -> None:
        super().__init__(
            "remove_experts",
            "Removal of experts",
            None,
            "a mixture of experts loses some of its experts; all else stays as it is",
        )

    def shared_method_name(self, options: Any) -> str:
        return "passthrough"  # nothing is shared

    def completed(self, config: MergeConfiguration, options: Any) -> MergeConfiguration:
        if len(config.models or []) != 1:
            raise UserError("remove_experts takes one model under `models:`, the mixture")
        _check_known(config, tuple(RemovalOptions.model_fields))
        return _with_mixture_as_base(config, str(config.models[0].model), "the one model")

    def plan(self, job: Job) -> Plan:
        configs = read_configs(job)
        manifests = {model: manifest_of(config) for model, config in configs.items()}
        headers = read_headers(job, configs, manifests)
        mixture = Mixture.among(job, configs, manifests, headers)
        experts = [str(expert) for expert in job.options.experts]
        order = order_without(mixture.config, experts)
        config = arranged_config(mixture.config, order)
        removed = [str(index) for index in range(mixture.number) if index not in order]
        notes = (
            f"Experts {', '.join(removed)} of {mixture.in_markdown} were removed from every layer. "
            "All else is as it was."
        )
        return arranged(job, mixture, config, order, {}, {}, notes)


def _check_known(config: MergeConfiguration, keys: Sequence[str]) -> None:
    """`UserError` for a parameter of a tensor method, of which none runs here."""
    for entry in (config, *(config.models or [])):
        for key in entry.parameters or {}:
            if key not in keys:
                raise UserError(
                    f"`{key}` is not an option here, where no tensors are merged; known: "
                    f"{', '.join(keys)}"
                )


def _with_mixture_as_base(config: MergeConfiguration, path: str, key: str) -> MergeConfiguration:
    """The configuration with the mixture as its base, which gives config and tokenizer.

    `UserError` for another base and for keys that would change what the mixture has.
    """
    mixture = ModelReference.model_validate(path)
    if mixture.lora is not None:
        raise UserError(f"{key}: {path} is a LoRA on a mixture; merge it into the mixture first")
    if config.base_model not in (None, mixture):
        raise UserError(
            f"`base_model` is {config.base_model}, but the mixture itself ({path}) gives all but "
            "the new experts; leave `base_model` out"
        )
    for name in ("tokenizer", "tokenizer_source"):
        if getattr(config, name):
            raise UserError(f"`{name}` has no use here: the mixture keeps its vocabulary")
    return config.model_copy(update={"base_model": mixture})


MOE = GrowingMoeMethod("moe", "Mixture of experts", MERGEME)
REMOVE_EXPERTS = RemovalMethod()
