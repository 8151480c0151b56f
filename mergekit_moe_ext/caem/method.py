"""`caem`: several mixtures of experts of one family become one (CAEM-MoE, section 3, Algorithm 1, appendix A.2).

Per layer each source gives as many experts as the entropy of its usage asks for, its most used ones, with their rows
of the router. Everything else is averaged, weighted by how many experts a source gave, encoder and decoder apart;
what both share (the embedding) by how many it gave in all layers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from mergekit.common import ModelReference
from mergekit.io.tasks import LoadTensor
from mergekit.merge_methods.base import BasePolicy
from pydantic import Field
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.caem.allocation import allocate, most_used, normalised_entropy
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.merging.manifest import Manifest, manifest_of
from mergekit_moe_ext.merging.method import Job, MethodOptions, ModelOptions, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import check_same_size, output_dtype, read_configs, read_headers
from mergekit_moe_ext.merging.tasks import ExpertRows, LoadFiniteTensor
from mergekit_moe_ext.mixtures.experts import (
    MoeLayer,
    experts_per_token,
    moe_layers,
    num_experts,
    with_num_experts,
)
from mergekit_moe_ext.mixtures.routers import stack_of

if TYPE_CHECKING:
    from mergekit_moe_ext.mixtures.usage import Usage

LOG = logging.getLogger(__name__)


class CaemOptions(MethodOptions):
    num_experts: int | None = Field(
        None, ge=1, description="experts per layer of the output: what the sources have, if not given"
    )
    allocation: Literal["entropy", "fixed"] = Field(
        "entropy", description="by the entropy of expert usage, or fixed: `experts` per model"
    )
    shared: str = Field("linear", description="the tensor method that merges all but experts and routers")
    router_scale: bool = Field(
        False,
        description="bring the routers of the sources to one scale: the mean norm of a row, averaged over the sources",
    )
    max_samples: int | None = Field(None, ge=1, description="calibrate on the first so many rows")
    max_length: int = Field(1024, ge=2, description="cut calibration texts to so many tokens")
    batch_size: int = Field(8, ge=1, description="calibration texts at a time")
    text_column: str = Field("text", description="of calibration data, for decoders")
    messages_column: str = Field("messages", description="of calibration data, for decoders: chats")
    input_column: str = Field("input", description="of calibration data, for encoder-decoders")
    target_column: str = Field("target", description="of calibration data, for encoder-decoders")


class CaemModelOptions(ModelOptions):
    calibration: str | None = Field(None, description="data to count expert usage on: a file, a directory, a Hub id")
    usage: str | None = Field(None, description="a usage file, written by `mergekit-moe-ext usage`")
    experts: int | None = Field(None, ge=1, description="how many experts to take per layer, with `allocation: fixed`")


@dataclass(frozen=True)
class LayerAllocation:
    """What one layer takes of each entry of `models:`."""

    layer: MoeLayer
    counts: list[list[int]]  # expert usage, per entry
    entropies: list[float]
    chosen: list[list[int]]  # indices in the source, ascending

    @property
    def numbers(self) -> list[int]:
        return [len(indices) for indices in self.chosen]


class CaemMethod(StructuralMethod):
    options_type = CaemOptions
    model_options_type = CaemModelOptions

    def __init__(self) -> None:
        super().__init__(
            "caem",
            "CAEM-MoE (complexity-aware expert merging)",
            None,
            "mixtures of experts of one family become one; experts are allotted by the entropy of their usage",
        )

    def shared_method_name(self, options: Any) -> str:
        return options.shared

    def plan(self, job: Job) -> Plan:
        _check_options(job)
        configs = read_configs(job)
        _check_one_family(job, configs)
        check_same_size(job, configs)
        layers = {model: moe_layers(config) for model, config in configs.items()}
        _check_same_layers(job, layers)
        manifests = {model: manifest_of(config) for model, config in configs.items()}
        headers = read_headers(job, configs, manifests)
        sizes = [num_experts(configs[model]) for model in job.experts]
        number = _number_of_experts(job, sizes)
        config = with_num_experts(configs[job.donor], number)
        _check_routing(config, number)
        _check_shapes(job, configs, layers, manifests)
        config.dtype = dtype = output_dtype(job, headers)
        allocations = _allocate(job, configs, layers, sizes, number)

        axes = {name: axis for layer in layers[job.donor] for name, axis in layer.rows.items()}
        of_donor = manifests[job.donor]
        copies = {
            template.format(expert=target): (model, template.format(expert=source))
            for allocation in allocations
            for template in allocation.layer.experts
            for target, (model, source) in enumerate(_taken(job, allocation))
        }
        rows = {
            name: ExpertRows(
                name=name,
                shape=tuple(number if at == axis else size for at, size in enumerate(of_donor.shapes[name])),
                axis=axis,
                sources=tuple(
                    (model, tuple(indices)) for model, indices in zip(job.experts, allocation.chosen, strict=True)
                ),
                scaled_by=_scale(job, allocation.layer, name),
                load=LoadTensor if job.options.allow_nonfinite else LoadFiniteTensor,
                dtype=job.config.dtype,
            )
            for allocation in allocations
            for name, axis in allocation.layer.rows.items()
        }
        weights = _weights(job, allocations)
        size = num_experts(configs[job.donor])
        of_experts = axes.keys() | {
            template.format(expert=e) for layer in layers[job.donor] for template in layer.experts for e in range(size)
        }
        shared = {name: of_donor.weight_info(name) for name in of_donor.shapes if name not in of_experts}
        return Plan(
            config=config,
            num_experts=number,
            experts_per_token=experts_per_token(config),
            shared=shared,
            copies=copies,
            computed=rows,
            shapes={
                **{name: of_donor.shapes[name] for name in shared},
                **{name: headers[model].shapes[source] for name, (model, source) in copies.items()},
                **{name: task.shape for name, task in rows.items()},
            },
            dtype=dtype,
            weights={name: weights.get(stack_of(name), weights["all"]) for name in shared},
            notes=_notes(job, allocations, weights),
            draw=lambda path: _draw(job, allocations, path),
        )


def _check_options(job: Job) -> None:
    """What can be seen without looking at any model."""
    if any(model.lora for model in job.sources):
        raise click.ClickException("caem takes no LoRA sources; merge each into its mixture of experts first")
    if "weight" in (job.config.parameters or {}) or any("weight" in (e.parameters or {}) for e in job.config.models):
        raise click.ClickException("`weight` is set by caem itself: by how many experts a source gives")
    if job.merge_options.unsafe_truncate_embeddings:
        raise click.ClickException("caem does not truncate embeddings; align vocabularies with `tokenizer:`")
    if "weight" not in [parameter.name for parameter in job.shared.spec.parameters]:
        LOG.warning("%s knows no weights, so all sources count alike in the shared parameters", job.shared.spec.name)
    uses_base = job.shared.spec.contract.base in (BasePolicy.OPTIONAL, BasePolicy.REQUIRED)
    if job.base in job.experts and uses_base:
        raise click.ClickException(
            f"{job.base} is the base and a source: {job.shared.spec.name} would merge it as a task vector of zeros; "
            "name the ancestor of all sources as `base_model:`"
        )
    fixed = job.options.allocation == "fixed"
    for index, options in enumerate(job.model_options):
        where = f"models[{index}].parameters ({job.experts[index]})"
        if options.calibration and options.usage:
            raise click.ClickException(f"{where}: give `calibration` or `usage`, not both")
        if not (options.calibration or options.usage):
            raise click.ClickException(
                f"{where}: `calibration` (data) or `usage` (a file) is needed, to count experts"
            )
        if fixed != (options.experts is not None):
            raise click.ClickException(
                f"{where}: `allocation: fixed` needs `experts`, how many to take per layer"
                if fixed
                else f"{where}: `experts` is for `allocation: fixed`"
            )


def _check_one_family(job: Job, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    wanted = configs[job.donor].model_type
    for model, config in configs.items():
        if not config.architectures:
            raise click.ClickException(f"the config of {model} names no architecture")
        if config.model_type != wanted:
            raise click.ClickException(
                f"{model} is another family than {job.donor}: model_type is {config.model_type!r}, not {wanted!r}"
            )


def _check_same_layers(job: Job, layers: Mapping[ModelReference, Sequence[MoeLayer]]) -> None:
    wanted = [layer.router for layer in layers[job.donor]]
    for model, of_model in layers.items():
        if [layer.router for layer in of_model] != wanted:
            raise click.ClickException(f"{model} has its experts in other layers than {job.donor}")


def _number_of_experts(job: Job, sizes: Sequence[int]) -> int:
    given = job.options.num_experts
    if job.options.allocation == "fixed":
        total = sum(options.experts for options in job.model_options)
        if given not in (None, total):
            raise click.ClickException(f"num_experts is {given}, but the models' `experts` add up to {total}")
        for model, options, size in zip(job.experts, job.model_options, sizes, strict=True):
            if options.experts > size:
                raise click.ClickException(f"{options.experts} experts are to be taken of {model}, which has {size}")
        return total
    if given is None and len(set(sizes)) > 1:
        has = ", ".join(f"{model}: {size}" for model, size in zip(job.experts, sizes, strict=True))
        raise click.ClickException(f"num_experts is needed, since the sources differ in it ({has})")
    number = given or sizes[0]
    if number < len(sizes):
        raise click.ClickException(
            f"num_experts is {number}, but there are {len(sizes)} sources, and each gives at least one expert"
        )
    if number > sum(sizes):
        raise click.ClickException(f"num_experts is {number}, but the sources have {sum(sizes)} together")
    return number


def _check_routing(config: PretrainedConfig, number: int) -> None:
    per_token, groups = experts_per_token(config), getattr(config, "n_group", None) or 1
    if per_token > number:
        raise click.ClickException(f"the sources choose {per_token} experts per token; num_experts is only {number}")
    if number % groups:
        raise click.ClickException(
            f"num_experts is {number}, but the sources choose among {groups} groups of experts; it must be a multiple"
        )
    if groups > 1 and number // groups < 2 and config.model_type != "deepseek_v2":  # they add up the best two of each
        raise click.ClickException(
            f"num_experts is {number}, but the sources choose by the best two experts of each of {groups} groups; "
            f"it must be at least {2 * groups}"
        )
    reachable = number // groups * (getattr(config, "topk_group", None) or groups)
    if per_token > reachable:
        raise click.ClickException(
            f"the sources choose {per_token} experts per token from some of {groups} groups, "
            f"which hold only {reachable} with num_experts {number}"
        )


def _check_shapes(
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
        more = {t.format(expert=e) for layer in layers[model] for t in layer.experts for e in range(1, number)}
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
                raise click.ClickException(
                    f"{name} of {model} is {found.get(name, 'missing')}, of {job.donor} {wanted.get(name, 'missing')}"
                )


def _allocate(
    job: Job,
    configs: Mapping[ModelReference, PretrainedConfig],
    layers: Mapping[ModelReference, Sequence[MoeLayer]],
    sizes: Sequence[int],
    number: int,
) -> list[LayerAllocation]:
    usages = _usages(job, configs, layers)
    allocations = []
    for layer in layers[job.donor]:
        counts = [_counts(usage, layer.router) for usage in usages]
        for model, of_model in zip(job.experts, counts, strict=True):
            if not any(of_model):
                raise click.ClickException(
                    f"the usage of {model} has no expert that was ever chosen in {layer.router}"
                )
        entropies = [normalised_entropy(of_model) for of_model in counts]
        if job.options.allocation == "fixed":
            numbers = [options.experts for options in job.model_options]
        else:
            numbers = allocate(entropies, number, sizes)
        chosen = [most_used(of_model, taken) for of_model, taken in zip(counts, numbers, strict=True)]
        allocations.append(LayerAllocation(layer, counts, entropies, chosen))
    return allocations


def _usages(
    job: Job,
    configs: Mapping[ModelReference, PretrainedConfig],
    layers: Mapping[ModelReference, Sequence[MoeLayer]],
) -> "list[Usage]":
    """Per entry of `models:`, read or counted. All files and texts are read before anything is counted."""
    # only here: `datasets` takes seconds to import, and every command of mergekit imports this file
    from mergekit_moe_ext.mixtures.usage import count_usage, read_texts, read_usage

    entries = list(zip(job.experts, job.model_options, strict=True))
    read = {}
    for index, (model, options) in enumerate(entries):
        if options.usage:
            read[index] = read_usage(Path(options.usage))
            _check_usage_is_of(job, model, configs[model], read[index], options.usage, layers[model])
    settings, merge_options = job.options, job.merge_options
    reading = Reading(
        max_length=settings.max_length,
        text_column=settings.text_column,
        messages_column=settings.messages_column,
        input_column=settings.input_column,
        target_column=settings.target_column,
        trust_remote_code=merge_options.trust_remote_code,
        quiet=merge_options.quiet,
    )
    paths = {model: model.local_path(merge_options.transformers_cache) for model in job.experts}
    texts = {
        index: read_texts(paths[model], [f"calibration={options.calibration}"], reading, settings.max_samples)
        for index, (model, options) in enumerate(entries)
        if options.calibration
    }
    for index, of_entry in texts.items():
        counted = count_usage(
            paths[job.experts[index]],
            of_entry,
            reading,
            batch_size=settings.batch_size,
            device="auto" if merge_options.device == "cuda" else merge_options.device or "cpu",
        )
        assert counted is not None  # a merge is one process
        read[index] = counted
    return [read[index] for index in range(len(entries))]


def _check_usage_is_of(
    job: Job, model: ModelReference, config: PretrainedConfig, usage: "Usage", path: str, layers: Sequence[MoeLayer]
) -> None:
    if usage.checkpoint != checkpoint_fingerprint(model, job.merge_options):
        raise click.ClickException(f"{path} is the usage of another model ({usage.model}), not of {model}")
    number = num_experts(config)
    for task, of_task in usage.tasks.items():
        shapes = {router: len(layer.counts) for router, layer in of_task.layers.items()}
        if shapes != {layer.router: number for layer in layers}:
            raise click.ClickException(f"{path} names other routers or experts for the task {task!r} than {model} has")


def _counts(usage: "Usage", router: str) -> list[int]:
    """Over all tasks of a usage file."""
    per_task = [task.layers[router].counts for task in usage.tasks.values()]
    return [sum(numbers) for numbers in zip(*per_task, strict=True)]


def _taken(job: Job, allocation: LayerAllocation) -> list[tuple[ModelReference, int]]:
    """Source and index of every expert of the output, in order."""
    pairs = zip(job.experts, allocation.chosen, strict=True)
    return [(model, index) for model, indices in pairs for index in indices]


def _scale(job: Job, layer: MoeLayer, name: str) -> str | None:
    """The router's matrix, if `name` is of that router and is to be brought to one scale by it."""
    matrix = next(tensor for tensor in layer.router_tensors if tensor.endswith("weight"))
    bias = matrix.removesuffix("weight") + "bias"  # added to the logits; other biases stand in the scores' own scale
    return matrix if job.options.router_scale and name in (matrix, bias) else None


def _weights(job: Job, allocations: Sequence[LayerAllocation]) -> dict[str, dict[ModelReference, float]]:
    """Algorithm 1, line 17: per stack, and over all layers, the share of experts that each source gave."""
    totals: dict[str, dict[ModelReference, int]] = {}
    for allocation in allocations:
        for stack in {allocation.layer.stack or "all", "all"}:
            of_stack = totals.setdefault(stack, dict.fromkeys(job.experts, 0))
            for model, number in zip(job.experts, allocation.numbers, strict=True):
                of_stack[model] += number
    return {
        stack: {model: number / sum(of_stack.values()) for model, number in of_stack.items()}
        for stack, of_stack in totals.items()
    }


def _notes(
    job: Job, allocations: Sequence[LayerAllocation], weights: Mapping[str, Mapping[ModelReference, float]]
) -> str:
    """Two tables in Markdown: entropy and experts taken per layer and source, and the weights of the average."""
    models = [str(model) for model in job.experts]
    lines = [
        "Normalised entropy of expert usage, and the experts taken:",
        "",
        f"| router | {' | '.join(models)} |",
        "|---|" + "---|" * len(models),
    ]
    for allocation in allocations:
        cells = [
            f"{entropy:.3f}: {len(indices)} ({', '.join(map(str, indices))})"
            for entropy, indices in zip(allocation.entropies, allocation.chosen, strict=True)
        ]
        lines.append(f"| {allocation.layer.router} | {' | '.join(cells)} |")
    once = list(dict.fromkeys(job.experts))
    lines += ["", "Weights of the shared parameters:", "", f"| | {' | '.join(map(str, once))} |"]
    lines.append("|---|" + "---:|" * len(once))
    lines += [
        f"| {stack} | {' | '.join(f'{of_stack[model]:.4f}' for model in once)} |"
        for stack, of_stack in sorted(weights.items())
    ]
    return "\n".join(lines)


def _draw(job: Job, allocations: Sequence[LayerAllocation], path: Path) -> None:
    from mergekit_moe_ext.mixtures.plots import plot_allocation

    plot_allocation(
        [str(model) for model in job.experts],
        [allocation.counts for allocation in allocations],
        [allocation.chosen for allocation in allocations],
        path,
    )


CAEM = CaemMethod()
