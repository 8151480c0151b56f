"""Checks of `caem`'s options, its sources and their usage. Each raises a `UserError` that says what
is wrong.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit.common import ModelReference
from mergekit.merge_methods.base import BasePolicy
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.caem.options import COLUMN_OPTIONS
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.merging.manifest import Manifest
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import stored_model
from mergekit_moe_ext.merging.wrappers import language_config, routing_config
from mergekit_moe_ext.mixtures.experts import MoeLayer, experts_per_token, num_experts

if TYPE_CHECKING:
    from mergekit_moe_ext.mixtures.usage import Usage

LOG = logging.getLogger(__name__)


def check_options(job: Job) -> None:
    """Check what can be seen without looking at any model."""
    for entry in (job.config, *job.config.models):
        if "weight" in (entry.parameters or {}):
            raise UserError(
                "`weight` is not an option: caem weighs each source by how many experts it gives"
            )
    if job.merge_options.unsafe_truncate_embeddings:
        raise UserError("caem does not truncate embeddings; align vocabularies with `tokenizer:`")
    if "weight" not in [parameter.name for parameter in job.shared_method.spec.parameters]:
        LOG.warning(
            "%s has no `weight`, so all sources count alike in the shared parameters",
            job.shared_method.spec.name,
        )
    uses_base = job.shared_method.spec.contract.base in (BasePolicy.OPTIONAL, BasePolicy.REQUIRED)
    if job.base in job.experts and uses_base:
        raise UserError(
            f"{job.base} is the base and a source: {job.shared_method.spec.name} would merge it as "
            "a task vector of zeros; name the ancestor of all sources as `base_model:`"
        )
    is_fixed = job.options.allocation == "fixed"
    for index, options in enumerate(job.model_options):
        where = f"models[{index}].parameters ({job.experts[index]})"
        if options.calibration and options.usage:
            raise UserError(f"{where}: give `calibration` or `usage`, not both")
        if not (options.calibration or options.usage):
            raise UserError(
                f"{where}: `calibration` (data) or `usage` (a file) is needed, to count experts"
            )
        for key in COLUMN_OPTIONS:
            if options.usage and getattr(options, key) is not None:
                raise UserError(
                    f"{where}: `{key}` is for `calibration`; `usage` is counted already"
                )
        if is_fixed and options.experts is None:
            raise UserError(
                f"{where}: `allocation: fixed` needs `experts`, how many to take per layer"
            )
        if not is_fixed and options.experts is not None:
            raise UserError(f"{where}: `experts` is for `allocation: fixed`")


def check_one_family(job: Job, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """Check that all sources have the model type of the donor."""
    family = configs[job.donor].model_type
    for model, config in configs.items():
        if not config.architectures:
            raise UserError(f"the config of {model} names no architecture")
        if config.model_type != family:
            raise UserError(
                f"{model} is of another family than {job.donor}: model_type is "
                f"{config.model_type!r}, not {family!r}"
            )


def check_same_layers(job: Job, layers: Mapping[ModelReference, Sequence[MoeLayer]]) -> None:
    """Check that all sources have their experts in the same layers."""
    donor_routers = [layer.router for layer in layers[job.donor]]
    for model, model_layers in layers.items():
        if [layer.router for layer in model_layers] != donor_routers:
            raise UserError(f"{model} has its experts in other layers than {job.donor}")


def number_of_experts(job: Job, sizes: Sequence[int]) -> int:
    """The number of experts per layer of the output, from the options and the number that each
    entry of `models:` has. `UserError` where the sources cannot give that many.
    """
    stated = job.options.num_experts
    if job.options.allocation == "fixed":
        total = sum(options.experts for options in job.model_options)
        if stated not in (None, total):
            raise UserError(f"num_experts is {stated}, but the models' `experts` add up to {total}")
        for model, options, size in zip(job.experts, job.model_options, sizes, strict=True):
            if options.experts > size:
                raise UserError(
                    f"`experts: {options.experts}` for {model} is more than the {size} that it has"
                )
        return total
    if stated is None and len(set(sizes)) > 1:
        pairs = zip(job.experts, sizes, strict=True)
        numbers = ", ".join(f"{model}: {size}" for model, size in pairs)
        raise UserError(f"num_experts is needed, since the sources differ in it ({numbers})")
    number = stated or sizes[0]
    if number < len(sizes):
        raise UserError(
            f"num_experts is {number}, but there are {len(sizes)} sources, and each gives at "
            "least one expert"
        )
    if number > sum(sizes):
        raise UserError(f"num_experts is {number}, but the sources have {sum(sizes)} together")
    return number


def check_routing(config: PretrainedConfig, number: int) -> None:
    """Check that the routers of this config can choose among that many experts."""
    config = routing_config(config)
    per_token = experts_per_token(config)
    groups = getattr(config, "n_group", None) or 1
    if per_token > number:
        raise UserError(
            f"the sources choose {per_token} experts per token; num_experts is only {number}"
        )
    if number % groups:
        raise UserError(
            f"num_experts is {number}, but the sources choose among {groups} groups of experts; "
            f"it must be a multiple of {groups}"
        )
    # A group's score is the sum of its best two experts' (DeepSeek-V2: of the best one).
    needs_two = groups > 1 and config.model_type != "deepseek_v2"
    if needs_two and number // groups < 2:
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
    """Check that the tensors that are merged or put side by side have one shape in all sources."""
    shapes = {}
    for model, manifest in manifests.items():
        shapes[model] = _comparable_shapes(manifest, layers[model], num_experts(configs[model]))
    donor_shapes = shapes[job.donor]
    for model, model_shapes in shapes.items():
        for name in model_shapes.keys() | donor_shapes.keys():
            if model_shapes.get(name) != donor_shapes.get(name):
                here = manifests[model].shapes.get(name, "missing")
                there = manifests[job.donor].shapes.get(name, "missing")
                raise UserError(f"{name} of {model} is {here}, of {job.donor} {there}")


def _comparable_shapes(
    manifest: Manifest, layers: Sequence[MoeLayer], number: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors, by name: of one expert per layer, and without the axes that
    count experts or words, in which sources may differ.
    """
    counting_axes = dict(manifest.token_axes)
    further_experts = set()
    for layer in layers:
        counting_axes |= layer.rows
        for template in layer.experts:
            further_experts |= {template.format(expert=index) for index in range(1, number)}
    shapes = {}
    for name, shape in manifest.shapes.items():
        if name not in further_experts:
            axis = counting_axes.get(name)
            shapes[name] = tuple(size for index, size in enumerate(shape) if index != axis)
    return shapes


def check_usage_is_of(
    job: Job,
    model: ModelReference,
    config: PretrainedConfig,
    usage: "Usage",
    path: str,
    layers: Sequence[MoeLayer],
) -> None:
    """Check that a usage file was counted on this model, on all of its experts, and in the way that
    this merge counts.
    """
    stored = stored_model(job, model)
    if usage.checkpoint != checkpoint_fingerprint(stored, job.merge_options):
        raise UserError(
            f"{path} is the usage of another model ({usage.model}), not of {model}, or of an "
            "earlier version: count it again with `mergekit-moe-ext usage`"
        )
    sizes_of_model = {layer.router: num_experts(config) for layer in layers}
    for task, task_usage in usage.tasks.items():
        sizes = {router: len(layer.counts) for router, layer in task_usage.layers.items()}
        if sizes != sizes_of_model:
            raise UserError(
                f"{path} names other routers or experts for the task {task!r} than {model} has"
            )
    chosen = experts_per_token(config)
    if usage.experts_per_token != chosen:
        raise UserError(
            f"{path} was counted with {usage.experts_per_token} experts per token, and {model} "
            f"chooses {chosen} by its config: count it again with `mergekit-moe-ext usage`"
        )
    # Without an expert capacity all that is chosen is dispatched.
    count = job.options.count
    if hasattr(language_config(config), "expert_capacity") and usage.count != count:
        # Files of earlier versions do not say it.
        default = ", as where it says nothing" if usage.count == "dispatched" else ""
        raise UserError(
            f"{path} was counted with `count: {usage.count}`{default}, and this merge has `count: "
            f"{count}`: count {model} again with `mergekit-moe-ext usage … --count {count}`, or "
            f"set `count: {usage.count}` under the merge's `parameters:`"
        )
