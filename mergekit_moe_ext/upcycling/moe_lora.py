"""The method `moe_lora`: LoRA adapters on one base model become the experts of a mixture.

Each expert's FFNs are the base's with one adapter's updates in them. What an adapter changes beside
the FFNs (attention, mostly) goes into the merge of the shared parameters. So the result is that of
`moe` with sources `base+adapter`.

A mixture that stays an adapter on its base is not a merge: `peft-route compose` makes it.
"""

from collections.abc import Sequence
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import InputModelDefinition, MergeConfiguration
from peft.utils.save_and_load import load_peft_weights
from pydantic import Field
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.method import Job, Plan
from mergekit_moe_ext.merging.sources import read_configs
from mergekit_moe_ext.merging.wrappers import language_config
from mergekit_moe_ext.modeling.configuration_upcycled_moe import routed_ffns
from mergekit_moe_ext.upcycling.method import MoeMethod, MoeOptionsWithShared
from mergekit_moe_ext.upcycling.wrapped import family_of_all


class MoeLoraOptions(MoeOptionsWithShared):
    merge_experts: bool = Field(
        False,
        description="write experts with all their weights, the adapters merged into them; required "
        "to be true, since an adapter with experts is what `peft-route compose` writes",
    )


class MoeLoraMethod(MoeMethod):
    def __init__(self) -> None:
        super().__init__("moe_lora", "Mixture of LoRA experts", None)
        self.description = (
            "LoRA adapters on one base become the experts of one MoE; all parameters but the FFNs "
            "are merged by the method that `shared` names"
        )
        self.options_type = MoeLoraOptions

    def completed(self, config: MergeConfiguration, options: Any) -> MergeConfiguration:
        base = config.base_model
        if base is None:
            raise UserError("moe_lora needs `base_model`, the model that the adapters are on")
        if base.lora is not None:
            raise UserError(f"`base_model` is {base}; merge that LoRA first")
        if not options.merge_experts:
            raise UserError(
                "moe_lora writes a mixture with all its weights: say so by `merge_experts: true`. "
                "A small adapter that holds the experts and a router is made by: "
                f"peft-route compose {base} {_experts_of_compose(base, config)} --router arrow "
                "-o DIR"
            )
        models = []
        for entry in config.models or []:
            models.append(entry.model_copy(update={"model": _on_base(base, entry)}))
        return config.model_copy(update={"models": models})

    def plan(self, job: Job) -> Plan:
        plan = super().plan(job)
        ffns = _ffns_of(job, plan.config)
        for model in job.sources:
            check_changes_ffns(model, ffns)
        return plan


def _ffns_of(job: Job, output: PretrainedConfig) -> list[str]:
    """The modules of the base whose weights become experts of the mixture with this config."""
    modules = []
    if hasattr(output, "routed_ffns"):  # a generic mixture
        for ffn in routed_ffns(output).values():
            modules += ffn.linears
        return modules
    for stack in family_of_all(read_configs(job)).stacks:
        for layer in range(getattr(language_config(output), stack.layers)):
            modules.append(stack.ffn.format(layer=layer))
    return modules


def _experts_of_compose(base: ModelReference, config: MergeConfiguration) -> str:
    """The adapters as options of `peft-route compose`."""
    adapters = [entry.model for entry in config.models or [] if entry.model != base]
    return " ".join(f"--expert {adapter.lora or adapter.model}" for adapter in adapters)


def _on_base(base: ModelReference, entry: InputModelDefinition) -> ModelReference:
    """The base with the adapter that an entry of `models:` names; the base itself stays."""
    model = entry.model
    if model == base:
        return base
    if model.lora is None:
        return ModelReference(model=base.model, lora=model.model)
    if model.model != base.model:
        raise UserError(f"{model} is a LoRA on another model than `base_model`, which is {base}")
    return model


def check_changes_ffns(model: ModelReference, ffns: Sequence[str]) -> None:
    """`UserError` for a LoRA that leaves all of the FFNs as they are in its base.

    An expert is made of FFNs alone, so that it would be the base's.
    """
    if model.lora is None:
        return
    names = load_peft_weights(model.lora.path, device="cpu", revision=model.lora.revision)
    if not any(f".{ffn}." in name for name in names for ffn in ffns):
        raise UserError(
            f"the LoRA {model.lora} changes no FFN ({ffns[0]}, for one), and an expert is made of "
            "FFNs alone: it would be that of the base"
        )


MOE_LORA = MoeLoraMethod()
