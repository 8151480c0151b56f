"""The method `caem`: several mixtures of experts of one family become one (CAEM-MoE, section 3,
Algorithm 1, appendix A.2).

In each layer a source gives as many experts as the entropy of its usage asks for: its most used
ones, with their rows of the router. All other parameters are averaged, each source weighted by the
number of experts that it gave: in the encoder or the decoder for a parameter of one of them, in all
layers for one of both (the embedding).
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Columns, Reading
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
from mergekit_moe_ext.caem.options import COLUMN_OPTIONS, CaemModelOptions, CaemOptions
from mergekit_moe_ext.merging.card import model_in_markdown
from mergekit_moe_ext.merging.manifest import Manifest, manifest_of
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import (
    Headers,
    check_same_size,
    output_dtype,
    read_configs,
    read_headers,
    stored_model,
    untied_if_any_is,
    views_of,
    warn_of_other_behaviour,
)
from mergekit_moe_ext.merging.tasks import ExpertRows
from mergekit_moe_ext.merging.wrappers import copied_outside
from mergekit_moe_ext.mixtures.experts import (
    MoeLayer,
    experts_per_token,
    moe_layers,
    num_experts,
    with_num_experts,
)
from mergekit_moe_ext.mixtures.routers import stack_of

if TYPE_CHECKING:
    from mergekit_moe_ext.mixtures.usage import Texts, Usage

LOG = logging.getLogger(__name__)
_PROVISIONAL = (
    "The allocation is made in the merge, once each LoRA is merged into its mixture: usage is "
    "counted on the result."
)


@dataclass(frozen=True)
class LayerAllocation:
    """The experts that one layer takes from each entry of `models:`."""

    layer: MoeLayer
    counts: list[list[int]]  # per entry, how often each expert was used
    entropies: list[float]
    dropped: list[float | None]  # per entry, the share of choices that the expert capacity dropped
    chosen: list[list[int]]  # per entry, indices in the source, ascending

    @property
    def numbers(self) -> list[int]:
        """The number of experts taken, per entry."""
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
                "mixtures of experts of one family become one, which takes experts by the entropy "
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
        warn_of_other_behaviour(job, configs)
        layers = {model: moe_layers(config) for model, config in configs.items()}
        check_same_layers(job, layers)
        manifests = {model: manifest_of(config) for model, config in configs.items()}
        headers = read_headers(job, configs, manifests)
        sizes = [num_experts(configs[model]) for model in job.experts]
        number = number_of_experts(job, sizes)
        donor = untied_if_any_is(job, configs)
        config = with_num_experts(donor, number)
        check_routing(config, number)
        check_shapes(job, configs, layers, _tied_alike(manifests, configs, donor))
        dtype = output_dtype(job, headers)
        config.dtype = dtype
        # The usage of a LoRA source is that of the merged model, which is not there before the
        # merge has begun. Until then the plan has the right shapes and an even allocation.
        is_provisional = any(model.lora and model not in job.merged_loras for model in job.sources)
        # All files and texts are read before anything is counted, so that bad input is found first.
        usages = _given_usages(job, configs, layers, is_provisional=is_provisional)
        texts = _calibration_texts(job)
        if is_provisional:
            allocations = _even_allocation(layers[job.donor], sizes, number)
        else:
            usages |= _counted_usages(job, texts)
            in_order = [usages[index] for index in range(len(job.experts))]
            allocations = _allocate(job, layers[job.donor], in_order, sizes, number)

        donor_manifest = manifest_of(donor)
        copies: dict[str, CopiedTensor] = {}
        rows: dict[str, ExpertRows] = {}
        for allocation in allocations:
            copies |= _copied_experts(job, allocation, headers)
            rows |= _expert_rows(job, allocation, donor_manifest)
        expert_tensors = _expert_tensors(layers[job.donor], num_experts(configs[job.donor]))
        outside = copied_outside(job, donor, headers[job.donor].shapes)
        copies |= outside
        shared = {}
        for name in donor_manifest.shapes:
            if name not in expert_tensors and name not in outside:
                shared[name] = donor_manifest.shared_tensor(name)
        weights = _weights(job, allocations)
        return Plan(
            config=config,
            num_experts=number,
            experts_per_token=experts_per_token(config),
            shared=shared,
            copies=copies,
            computed=rows,
            dtype=dtype,
            views=views_of(headers),
            weights={name: weights.get(stack_of(name), weights["all"]) for name in shared},
            notes=_PROVISIONAL if is_provisional else _notes(job, allocations, weights),
            draw=None if is_provisional else lambda path: _draw(job, allocations, path),
        )


def _tied_alike(
    manifests: Mapping[ModelReference, Manifest],
    configs: Mapping[ModelReference, PretrainedConfig],
    donor: PretrainedConfig,
) -> dict[ModelReference, Manifest]:
    """The manifests of the sources, with a head of its own for a source that ties it where the
    output does not: such a source gives its embedding for the head.

    Not of encoder-decoders, which scale the logits of a head that is tied.
    """
    alike = dict(manifests)
    if donor.is_encoder_decoder:
        return alike
    for model, config in configs.items():
        is_tied = getattr(config, "tie_word_embeddings", False)
        if is_tied and not getattr(donor, "tie_word_embeddings", False):
            untied = copy.deepcopy(config)
            untied.tie_word_embeddings = False
            alike[model] = manifest_of(untied)
    return alike


def _expert_tensors(layers: Sequence[MoeLayer], number: int) -> set[str]:
    """The hub names of all tensors of experts and routers of a model."""
    names: set[str] = set()
    for layer in layers:
        names |= layer.rows.keys()
        for template in layer.experts:
            names |= {template.format(expert=index) for index in range(number)}
    return names


def _even_allocation(
    layers: Sequence[MoeLayer], sizes: Sequence[int], number: int
) -> list[LayerAllocation]:
    """The allocation by which every source gives as many of its first experts, if it has them."""
    numbers = allocate([0.0] * len(sizes), number, sizes)
    chosen = [list(range(each)) for each in numbers]
    return [LayerAllocation(layer, [], [], [], chosen) for layer in layers]


def _allocate(
    job: Job,
    layers: Sequence[MoeLayer],
    usages: "Sequence[Usage]",
    sizes: Sequence[int],
    number: int,
) -> list[LayerAllocation]:
    """The experts that each layer takes, from the usage of every entry of `models:`.

    `sizes` are the numbers of experts that these have; `number` is that of the output.
    """
    allocations = []
    for layer in layers:
        counts = [_counts(usage, layer.router) for usage in usages]
        for model, model_counts in zip(job.experts, counts, strict=True):
            if not any(model_counts):
                raise UserError(
                    f"the usage of {model} has no expert that was ever chosen in {layer.router}"
                )
        entropies = [normalised_entropy(model_counts) for model_counts in counts]
        if job.options.allocation == "fixed":
            numbers = [options.experts for options in job.model_options]
        else:
            numbers = allocate(entropies, number, sizes)
        chosen = []
        for model_counts, taken in zip(counts, numbers, strict=True):
            chosen.append(most_used(model_counts, taken))
        dropped = [_share_dropped(usage, layer.router) for usage in usages]
        allocations.append(LayerAllocation(layer, counts, entropies, dropped, chosen))
    return allocations


def _given_usages(
    job: Job,
    configs: Mapping[ModelReference, PretrainedConfig],
    layers: Mapping[ModelReference, Sequence[MoeLayer]],
    *,
    is_provisional: bool,
) -> "dict[int, Usage]":
    """The usage files that entries of `models:` name, by the number of the entry.

    That of a LoRA source is left out where `is_provisional`: it is of the merged model, with which
    it cannot be compared yet.
    """
    # Only here: `datasets` takes seconds to import, and every command of mergekit imports this
    # file.
    from mergekit_moe_ext.mixtures.usage import read_usage

    usages = {}
    for index, (model, options) in enumerate(zip(job.experts, job.model_options, strict=True)):
        if not options.usage:
            continue
        usage = read_usage(Path(options.usage))
        if is_provisional and model.lora:
            continue
        check_usage_is_of(job, model, configs[model], usage, options.usage, layers[model])
        usages[index] = usage
    return usages


def _calibration_texts(job: Job) -> "dict[int, Texts]":
    """The texts on which usage is to be counted, by the number of the entry of `models:`."""
    from mergekit_moe_ext.mixtures.usage import read_texts  # as in `_given_usages`

    texts = {}
    for index, (model, options) in enumerate(zip(job.experts, job.model_options, strict=True)):
        if not options.calibration:
            continue
        # A model into which a LoRA was merged has no tokenizer of its own.
        of_tokenizer = ModelReference(model=model.model)
        texts[index] = read_texts(
            _local_path(job, model),
            [f"calibration={options.calibration}"],
            _reading(job),
            job.options.max_samples,
            columns=_columns(job.options, options),
            tokenizer_path=of_tokenizer.local_path(job.merge_options.transformers_cache),
        )
    return texts


def _counted_usages(job: Job, texts: "Mapping[int, Texts]") -> "dict[int, Usage]":
    """The usage of entries of `models:` on their texts, both by the number of the entry."""
    from mergekit_moe_ext.mixtures.usage import count_usage  # as in `_given_usages`

    device = job.merge_options.device or "cpu"
    usages = {}
    for index, calibration_texts in texts.items():
        counted = count_usage(
            _local_path(job, job.experts[index]),
            calibration_texts,
            _reading(job),
            count=job.options.count,
            batch_size=job.options.batch_size,
            device="auto" if device == "cuda" else device,
        )
        assert counted is not None  # a merge is one process
        usages[index] = counted
    return usages


def _local_path(job: Job, model: ModelReference) -> str:
    """The directory of a source; of a LoRA, that of the merged model."""
    stored = ModelReference(model=stored_model(job, model).model)
    return stored.local_path(job.merge_options.transformers_cache)


def _reading(job: Job) -> Reading:
    """The way in which calibration data is read."""
    return Reading(
        max_length=job.options.max_length,
        trust_remote_code=job.merge_options.trust_remote_code,
        quiet=job.merge_options.quiet,
    )


def _columns(settings: CaemOptions, options: CaemModelOptions) -> Columns:
    """The columns of a model's calibration data: its own, else those of the merge."""
    names = {}
    for option in COLUMN_OPTIONS:
        column = option.removesuffix("_column")
        names[column] = getattr(options, option) or getattr(settings, option)
    advice = "`text_column`, `input_column` and `target_column` under `parameters:` name others"
    return Columns(**names, advice=advice)


def _counts(usage: "Usage", router: str) -> list[int]:
    """The number of times that each expert of this router was used, over all tasks of a usage
    file.
    """
    per_task = [task.layers[router].counts for task in usage.tasks.values()]
    return [sum(numbers) for numbers in zip(*per_task, strict=True)]


def _share_dropped(usage: "Usage", router: str) -> float | None:
    """The share of this router's choices whose expert was full, over all tasks of a usage file."""
    from mergekit_moe_ext.mixtures.usage import share_dropped

    return share_dropped([task.layers[router] for task in usage.tasks.values()], usage.count)


def _copied_experts(
    job: Job, allocation: LayerAllocation, headers: Mapping[ModelReference, Headers]
) -> dict[str, CopiedTensor]:
    """The tensors of single experts that a layer takes, by their names in the output; none where
    the family keeps a layer's experts in one tensor.
    """
    copies = {}
    for template in allocation.layer.experts:
        for target, (model, source) in enumerate(_taken_experts(job, allocation)):
            name = template.format(expert=source)
            copy = CopiedTensor(model, name, headers[model].shapes[name])
            copies[template.format(expert=target)] = copy
    return copies


def _expert_rows(
    job: Job, allocation: LayerAllocation, donor_manifest: Manifest
) -> dict[str, ExpertRows]:
    """The tensors in which all experts of a layer lie side by side, those of its router among
    them."""
    tasks = {}
    for name, axis in allocation.layer.rows.items():
        shape = list(donor_manifest.shapes[name])
        shape[axis] = sum(allocation.numbers)
        sources = []
        for model, indices in zip(job.experts, allocation.chosen, strict=True):
            sources.append((job.load(model, name, job.config.dtype), tuple(indices)))
        matrices = []
        if job.options.router_scale and _has_router_scale(allocation.layer, name):
            matrix = _router_matrix(allocation.layer)
            matrices = [job.load(model, matrix, job.config.dtype) for model in job.experts]
        tasks[name] = ExpertRows(
            name=name,
            shape=tuple(shape),
            axis=axis,
            sources=tuple(sources),
            scaled_by=tuple(matrices),
        )
    return tasks


def _taken_experts(job: Job, allocation: LayerAllocation) -> list[tuple[ModelReference, int]]:
    """Source and index of every expert of the output, in order."""
    pairs = []
    for model, indices in zip(job.experts, allocation.chosen, strict=True):
        pairs += [(model, index) for index in indices]
    return pairs


def _router_matrix(layer: MoeLayer) -> str:
    return next(tensor for tensor in layer.router_tensors if tensor.endswith("weight"))


def _has_router_scale(layer: MoeLayer, name: str) -> bool:
    """Whether a tensor is the router's matrix or the bias that is added to its logits. Other biases
    are added to scores, whose scale no router changes.
    """
    matrix = _router_matrix(layer)
    return name in (matrix, matrix.removesuffix("weight") + "bias")


def _weights(
    job: Job, allocations: Sequence[LayerAllocation]
) -> dict[str, dict[ModelReference, float]]:
    """The share of experts that each source gave, per stack, and over all layers under "all"
    (Algorithm 1, line 17).
    """
    totals: dict[str, dict[ModelReference, int]] = {}
    for allocation in allocations:
        # A layer of the encoder or the decoder counts there, and in both together.
        stacks = ["all"]
        if allocation.layer.stack:
            stacks.append(allocation.layer.stack)
        for stack in stacks:
            numbers = totals.setdefault(stack, dict.fromkeys(job.experts, 0))
            for model, number in zip(job.experts, allocation.numbers, strict=True):
                numbers[model] += number
    weights = {}
    for stack, numbers in totals.items():
        total = sum(numbers.values())
        weights[stack] = {model: number / total for model, number in numbers.items()}
    return weights


def _notes(
    job: Job,
    allocations: Sequence[LayerAllocation],
    weights: Mapping[str, Mapping[ModelReference, float]],
) -> str:
    """Two tables in Markdown: the entropy and the experts taken per layer and source, and the
    weights of the average.
    """
    models = list(map(model_in_markdown, job.experts))
    title = "Normalised entropy of expert usage, and the experts taken:"
    if any(share is not None for each in allocations for share in each.dropped):
        title = (
            f"Normalised entropy of expert usage (counted: {job.options.count}), the experts "
            "taken, and the share of choices that the expert capacity dropped:"
        )
    lines = [
        title,
        "",
        f"| router | {' | '.join(models)} |",
        "|---|" + "---|" * len(models),
    ]
    for allocation in allocations:
        cells = []
        per_model = zip(allocation.entropies, allocation.chosen, allocation.dropped, strict=True)
        for entropy, indices, share in per_model:
            cell = f"{entropy:.3f}: {len(indices)} ({', '.join(map(str, indices))})"
            cells.append(cell if share is None else f"{cell}, {share:.1%} dropped")
        lines.append(f"| {allocation.layer.router} | {' | '.join(cells)} |")
    columns = list(dict.fromkeys(job.experts))
    names = " | ".join(map(model_in_markdown, columns))
    lines += ["", "Weights of the shared parameters:", "", f"| | {names} |"]
    lines.append("|---|" + "---:|" * len(columns))
    for stack, stack_weights in sorted(weights.items()):
        cells = [f"{stack_weights[model]:.4f}" for model in columns]
        lines.append(f"| {stack} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(job: Job, allocations: Sequence[LayerAllocation], path: Path) -> None:
    from mergekit_moe_ext.mixtures.plots import plot_allocation

    plot_allocation(
        [str(model) for model in job.experts],
        [allocation.layer.router for allocation in allocations],
        [allocation.counts for allocation in allocations],
        [allocation.chosen for allocation in allocations],
        path,
    )


CAEM = CaemMethod()
