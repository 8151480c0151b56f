"""`caem`: several mixtures of experts of one family become one (CAEM-MoE, section 3, Algorithm 1,
appendix A.2).

Per layer each source gives as many experts as the entropy of its usage asks for, its most used
ones, with their rows of the router. Everything else is averaged, weighted by how many experts a
source gave, encoder and decoder apart; what both share (the embedding) by how many it gave in all
layers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.caem.allocation import allocate, most_used, normalised_entropy
from mergekit_moe_ext.caem.checks import (
    check_one_family,
    check_options,
    check_routing,
    check_same_layers,
    check_shapes,
    check_usage_is_of,
    number_of_experts,
)
from mergekit_moe_ext.caem.options import CaemModelOptions, CaemOptions
from mergekit_moe_ext.merging.manifest import Manifest, manifest_of
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import (
    Headers,
    check_same_size,
    output_dtype,
    read_configs,
    read_headers,
)
from mergekit_moe_ext.merging.tasks import ExpertRows
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
            (
                "mixtures of experts of one family become one; experts are allotted by the entropy "
                "of their usage"
            ),
        )

    def shared_method_name(self, options: Any) -> str:
        return options.shared

    def plan(self, job: Job) -> Plan:
        check_options(job)
        configs = read_configs(job)
        check_one_family(job, configs)
        check_same_size(job, configs)
        layers = {model: moe_layers(config) for model, config in configs.items()}
        check_same_layers(job, layers)
        manifests = {model: manifest_of(config) for model, config in configs.items()}
        headers = read_headers(job, configs, manifests)
        sizes = [num_experts(configs[model]) for model in job.experts]
        number = number_of_experts(job, sizes)
        config = with_num_experts(configs[job.donor], number)
        check_routing(config, number)
        check_shapes(job, configs, layers, manifests)
        config.dtype = dtype = output_dtype(job, headers)
        allocations = _allocate(job, configs, layers, sizes, number)

        axes = {name: axis for layer in layers[job.donor] for name, axis in layer.rows.items()}
        of_donor = manifests[job.donor]
        copies: dict[str, CopiedTensor] = {}
        rows: dict[str, ExpertRows] = {}
        for allocation in allocations:
            copies |= _copied_experts(job, allocation, headers)
            rows |= _expert_rows(job, allocation, of_donor)
        weights = _weights(job, allocations)
        size = num_experts(configs[job.donor])
        of_experts = axes.keys() | {
            template.format(expert=e)
            for layer in layers[job.donor]
            for template in layer.experts
            for e in range(size)
        }
        shared = {
            name: of_donor.shared_tensor(name) for name in of_donor.shapes if name not in of_experts
        }
        return Plan(
            config=config,
            num_experts=number,
            experts_per_token=experts_per_token(config),
            shared=shared,
            copies=copies,
            computed=rows,
            dtype=dtype,
            weights={name: weights.get(stack_of(name), weights["all"]) for name in shared},
            notes=_notes(job, allocations, weights),
            draw=lambda path: _draw(job, allocations, path),
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
                raise UserError(
                    f"the usage of {model} has no expert that was ever chosen in {layer.router}"
                )
        entropies = [normalised_entropy(of_model) for of_model in counts]
        if job.options.allocation == "fixed":
            numbers = [options.experts for options in job.model_options]
        else:
            numbers = allocate(entropies, number, sizes)
        chosen = [
            most_used(of_model, taken) for of_model, taken in zip(counts, numbers, strict=True)
        ]
        allocations.append(LayerAllocation(layer, counts, entropies, chosen))
    return allocations


def _usages(
    job: Job,
    configs: Mapping[ModelReference, PretrainedConfig],
    layers: Mapping[ModelReference, Sequence[MoeLayer]],
) -> "list[Usage]":
    """Per entry of `models:`, read or counted. All files and texts are read before anything is
    counted.
    """
    # only here: `datasets` takes seconds to import, and every command of mergekit imports this file
    from mergekit_moe_ext.mixtures.usage import count_usage, read_texts, read_usage

    entries = list(zip(job.experts, job.model_options, strict=True))
    read = {}
    for index, (model, options) in enumerate(entries):
        if options.usage:
            read[index] = read_usage(Path(options.usage))
            check_usage_is_of(job, model, configs[model], read[index], options.usage, layers[model])
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
        index: read_texts(
            paths[model], [f"calibration={options.calibration}"], reading, settings.max_samples
        )
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


def _counts(usage: "Usage", router: str) -> list[int]:
    """Over all tasks of a usage file."""
    per_task = [task.layers[router].counts for task in usage.tasks.values()]
    return [sum(numbers) for numbers in zip(*per_task, strict=True)]


def _copied_experts(
    job: Job, allocation: LayerAllocation, headers: Mapping[ModelReference, Headers]
) -> dict[str, CopiedTensor]:
    """Where the family keeps every expert's tensors apart: those that are taken, by their names in
    the output.
    """
    copies = {}
    for template in allocation.layer.experts:
        for target, (model, source) in enumerate(_taken(job, allocation)):
            name = template.format(expert=source)
            copies[template.format(expert=target)] = CopiedTensor(
                model, name, headers[model].shapes[name]
            )
    return copies


def _expert_rows(
    job: Job, allocation: LayerAllocation, of_donor: Manifest
) -> dict[str, ExpertRows]:
    """The tensors in which all experts of a layer lie side by side, those of its router among
    them."""
    tasks = {}
    for name, axis in allocation.layer.rows.items():
        shape = list(of_donor.shapes[name])
        shape[axis] = sum(allocation.numbers)
        matrix = _scale(job, allocation.layer, name)
        matrices = (
            [job.load(model, matrix, job.config.dtype) for model in job.experts] if matrix else []
        )
        tasks[name] = ExpertRows(
            name=name,
            shape=tuple(shape),
            axis=axis,
            sources=tuple(
                (job.load(model, name, job.config.dtype), tuple(indices))
                for model, indices in zip(job.experts, allocation.chosen, strict=True)
            ),
            scaled_by=tuple(matrices),
        )
    return tasks


def _taken(job: Job, allocation: LayerAllocation) -> list[tuple[ModelReference, int]]:
    """Source and index of every expert of the output, in order."""
    pairs = zip(job.experts, allocation.chosen, strict=True)
    return [(model, index) for model, indices in pairs for index in indices]


def _scale(job: Job, layer: MoeLayer, name: str) -> str | None:
    """The router's matrix, if `name` is of that router and is to be brought to one scale by it."""
    matrix = next(tensor for tensor in layer.router_tensors if tensor.endswith("weight"))
    bias = (
        matrix.removesuffix("weight") + "bias"
    )  # added to the logits; other biases stand in the scores' own scale
    return matrix if job.options.router_scale and name in (matrix, bias) else None


def _weights(
    job: Job, allocations: Sequence[LayerAllocation]
) -> dict[str, dict[ModelReference, float]]:
    """Algorithm 1, line 17: per stack, and over all layers, the share of experts that each source
    gave.
    """
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
    job: Job,
    allocations: Sequence[LayerAllocation],
    weights: Mapping[str, Mapping[ModelReference, float]],
) -> str:
    """Two tables in Markdown: entropy and experts taken per layer and source, and the weights of
    the average.
    """
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
