"""What `caem` asks of its options, its sources and their usage, and what it says where that is not
so.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit.common import ModelReference
from mergekit.merge_methods.base import BasePolicy
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.merging.manifest import Manifest
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.mixtures.experts import MoeLayer, experts_per_token, num_experts

if TYPE_CHECKING:
    from mergekit_moe_ext.mixtures.usage import Usage

LOG = logging.getLogger(__name__)


def check_options(job: Job) -> None:
    """What can be seen without looking at any model."""
    if any(model.lora for model in job.sources):
        raise UserError("caem takes no LoRA sources; merge each into its mixture of experts first")
    if "weight" in (job.config.parameters or {}) or any(
        "weight" in (e.parameters or {}) for e in job.config.models
    ):
        raise UserError("`weight` is set by caem itself: by how many experts a source gives")
    if job.merge_options.unsafe_truncate_embeddings:
        raise UserError("caem does not truncate embeddings; align vocabularies with `tokenizer:`")
    if "weight" not in [parameter.name for parameter in job.shared.spec.parameters]:
        LOG.warning(
            "%s knows no weights, so all sources count alike in the shared parameters",
            job.shared.spec.name,
        )
    uses_base = job.shared.spec.contract.base in (BasePolicy.OPTIONAL, BasePolicy.REQUIRED)
    if job.base in job.experts and uses_base:
        raise UserError(
            f"{job.base} is the base and a source: {job.shared.spec.name} would merge it as a task "
            "vector of zeros; name the ancestor of all sources as `base_model:`"
        )
    fixed = job.options.allocation == "fixed"
    for index, options in enumerate(job.model_options):
        where = f"models[{index}].parameters ({job.experts[index]})"
        if options.calibration and options.usage:
            raise UserError(f"{where}: give `calibration` or `usage`, not both")
        if not (options.calibration or options.usage):
            raise UserError(
                f"{where}: `calibration` (data) or `usage` (a file) is needed, to count experts"
            )
        if fixed != (options.experts is not None):
            raise UserError(
                f"{where}: `allocation: fixed` needs `experts`, how many to take per layer"
                if fixed
                else f"{where}: `experts` is for `allocation: fixed`"
            )


def check_one_family(job: Job, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    wanted = configs[job.donor].model_type
    for model, config in configs.items():
        if not config.architectures:
            raise UserError(f"the config of {model} names no architecture")
        if config.model_type != wanted:
            raise UserError(
                f"{model} is another family than {job.donor}: model_type is "
                f"{config.model_type!r}, not {wanted!r}"
            )


def check_same_layers(job: Job, layers: Mapping[ModelReference, Sequence[MoeLayer]]) -> None:
    wanted = [layer.router for layer in layers[job.donor]]
    for model, of_model in layers.items():
        if [layer.router for layer in of_model] != wanted:
            raise UserError(f"{model} has its experts in other layers than {job.donor}")


def number_of_experts(job: Job, sizes: Sequence[int]) -> int:
    given = job.options.num_experts
    if job.options.allocation == "fixed":
        total = sum(options.experts for options in job.model_options)
        if given not in (None, total):
            raise UserError(f"num_experts is {given}, but the models' `experts` add up to {total}")
        for model, options, size in zip(job.experts, job.model_options, sizes, strict=True):
            if options.experts > size:
                raise UserError(
                    f"{options.experts} experts are to be taken of {model}, which has {size}"
                )
        return total
    if given is None and len(set(sizes)) > 1:
        has = ", ".join(f"{model}: {size}" for model, size in zip(job.experts, sizes, strict=True))
        raise UserError(f"num_experts is needed, since the sources differ in it ({has})")
    number = given or sizes[0]
    if number < len(sizes):
        raise UserError(
            f"num_experts is {number}, but there are {len(sizes)} sources, and each gives at "
            "least one expert"
        )
    if number > sum(sizes):
        raise UserError(f"num_experts is {number}, but the sources have {sum(sizes)} together")
    return number


def check_routing(config: PretrainedConfig, number: int) -> None:
    per_token, groups = experts_per_token(config), getattr(config, "n_group", None) or 1
    if per_token > number:
        raise UserError(
            f"the sources choose {per_token} experts per token; num_experts is only {number}"
        )
    if number % groups:
        raise UserError(
            f"num_experts is {number}, but the sources choose among {groups} groups of experts; "
            "it must be a multiple"
        )
    if (
        groups > 1 and number // groups < 2 and config.model_type != "deepseek_v2"
    ):  # they add up the best two of each
        raise UserError(
            f"num_experts is {number}, but the sources choose by the best two experts of each of "
            f"{groups} groups; it must be at least {2 * groups}"
        )
    reachable = number // groups * (getattr(config, "topk_group", None) or groups)
    if per_token > reachable:
        raise UserError(
            f"the sources choose {per_token} experts per token from some of {groups} groups, "
            f"which hold only {reachable} with num_experts {number}"
        )


def check_shapes(
    job: Job,
    configs: Mapping[ModelReference, PretrainedConfig],
    layers: Mapping[ModelReference, Sequence[MoeLayer]],
    manifests: Mapping[ModelReference, Manifest],
) -> None:
    """What is merged or put side by side must be of one shape in all sources."""

    def shapes(model: ModelReference) -> dict[str, tuple[int, ...]]:
        """Of one expert per layer, and without the axes that count experts or words."""
        axes = {name: axis for layer in layers[model] for name, axis in layer.rows.items()}
        axes |= dict.fromkeys(manifests[model].vocabulary, 0)
        number = num_experts(configs[model])
        more = {
            t.format(expert=e)
            for layer in layers[model]
            for t in layer.experts
            for e in range(1, number)
        }
        return {
            name: tuple(size for axis, size in enumerate(shape) if axis != axes.get(name))
            for name, shape in manifests[model].shapes.items()
            if name not in more
        }

    wanted = shapes(job.donor)
    for model in manifests:
        found = shapes(model)
        for name in found.keys() | wanted.keys():
            if found.get(name) != wanted.get(name):
                raise UserError(
                    f"{name} of {model} is {found.get(name, 'missing')}, of {job.donor} "
                    f"{wanted.get(name, 'missing')}"
                )


def check_usage_is_of(
    job: Job,
    model: ModelReference,
    config: PretrainedConfig,
    usage: "Usage",
    path: str,
    layers: Sequence[MoeLayer],
) -> None:
    if usage.checkpoint != checkpoint_fingerprint(model, job.merge_options):
        raise UserError(f"{path} is the usage of another model ({usage.model}), not of {model}")
    number = num_experts(config)
    for task, of_task in usage.tasks.items():
        shapes = {router: len(layer.counts) for router, layer in of_task.layers.items()}
        if shapes != {layer.router: number for layer in layers}:
            raise UserError(
                f"{path} names other routers or experts for the task {task!r} than {model} has"
            )
