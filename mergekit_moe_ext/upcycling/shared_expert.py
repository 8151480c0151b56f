"""A shared expert, which every token goes through, with the FFNs of one of the models.

Without one, the shared expert of a family that always has it stays silent (its `down_proj` is
zero).
"""

from collections.abc import Mapping
from dataclasses import replace

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import manifest_of
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan
from mergekit_moe_ext.merging.wrappers import language_config
from mergekit_moe_ext.upcycling.wrapped import family_of_all


def with_shared_expert(
    plan: Plan, job: Job, path: str, configs: Mapping[ModelReference, PretrainedConfig]
) -> Plan:
    """The plan with the FFNs of the model of this path in the place of the silent shared expert.

    `UserError` for a model that is none of the merge, and for a family that has no shared expert.
    """
    model = ModelReference.model_validate(path)
    if model not in job.sources:
        raise UserError(
            f"shared_expert: {path} is none of the models; name it as `base_model` or under "
            "`models:`, too"
        )
    if hasattr(plan.config, "routed_ffns"):
        raise UserError(
            f"{plan.config.architectures[0]} is a generic mixture, which has no shared expert, so "
            "`shared_expert` has no place in it"
        )
    family = family_of_all(configs, mix_architectures=job.merge_options.allow_crimes)
    if not any(stack.shared_expert for stack in family.stacks):
        raise UserError(f"{family.moe} has no shared expert, so `shared_expert` has no place in it")
    for key, value in family.with_shared_expert.items():
        setattr(language_config(plan.config), key, value)
    copies = dict(plan.copies)
    shared = dict(plan.shared)
    computed = dict(plan.computed)
    shapes = manifest_of(plan.config).shapes
    for stack in family.stacks:
        for layer in range(getattr(language_config(plan.config), stack.layers)):
            for output, dense in stack.shared_expert.items():
                name = output.format(layer=layer)
                shared.pop(name, None)
                computed.pop(name, None)
                copies[name] = CopiedTensor(model, dense.format(layer=layer), shapes[name])
    return replace(plan, copies=copies, shared=shared, computed=computed)
