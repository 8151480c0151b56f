"""The method `moe`: dense models of one architecture become one mixture of experts (MergeME 3.1.1
and 3.1.2).

Each model in `models:` gives its FFNs, unchanged, as one expert per layer. All other parameters
(embedding, attention, norms, head) are merged by the tensor method that `shared:` names. Each
layer gets a gate, which starts as `gate_mode` says; MergeME, like BTX before it, trains it
afterwards.
"""

import copy
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from mergekit.common import ModelReference
from pydantic import Field
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import Manifest, SharedTensor, manifest_of
from mergekit_moe_ext.merging.method import (
    CopiedTensor,
    Job,
    MethodOptions,
    ModelOptions,
    Plan,
    StructuralMethod,
)
from mergekit_moe_ext.merging.sources import (
    Headers,
    check_same_size,
    output_dtype,
    read_configs,
    read_headers,
    untied_if_any_is,
    views_of,
    warn_of_other_behaviour,
)
from mergekit_moe_ext.merging.tasks import Filled, StackedExperts
from mergekit_moe_ext.merging.wrappers import copied_outside, language_config
from mergekit_moe_ext.upcycling.alternatives import what_would_work
from mergekit_moe_ext.upcycling.dense import check_dropped, rewritten, rewritten_manifest
from mergekit_moe_ext.upcycling.families import supported
from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling
from mergekit_moe_ext.upcycling.gates import GateMode, initial_gates, untrained_gates
from mergekit_moe_ext.upcycling.generic import dense_of_all, plan_upcycled
from mergekit_moe_ext.upcycling.wrapped import family_of_all

MERGEME = "https://arxiv.org/abs/2502.00997"
_BTX = "https://arxiv.org/abs/2403.07816"
# By tensor method: its parameters in MergeME's experiments (appendix A).
_PARAMETERS_OF_MERGEME: dict[str, dict[str, Any]] = {
    "fast_ties": {"density": 0.8, "normalize": False},
    "dare": {"density": 0.8},
}


class MoeOptions(MethodOptions):
    experts_per_token: int | None = Field(
        None,
        ge=1,
        description="number of experts that the gate chooses per token; with 1 it gets no "
        "gradient, except in Switch Transformers, which always has 1 [default: 2; 1 in Switch "
        "Transformers]",
    )
    gate_mode: GateMode = Field(
        "random",
        description="initial values of the gates: random (normal) and uniform_random have the "
        "architecture's initializer_range as standard deviation; zeros chooses arbitrarily and "
        "weighs equally; hidden (or hidden_last), hidden_avg and cheap_embed are made of the "
        "models' positive_prompts and negative_prompts",
    )
    architecture: Literal["auto", "stock", "upcycled"] = Field(
        "auto",
        description="class of the output: stock is a mixture of transformers' own; upcycled is the "
        "sources' own class with routed FFNs, whose code lies beside the weights; auto is stock "
        "where there is one that fits, else upcycled",
    )
    expert_capacity: int | None = Field(
        None,
        ge=1,
        description="number of tokens of a sequence that an expert takes, in Switch Transformers "
        "only [default: 64]",
    )


class MoeOptionsWithShared(MoeOptions):
    shared: str = Field("linear", description="tensor method that merges all but the FFNs")


class MoeModelOptions(ModelOptions):
    positive_prompts: list[str] | str | None = Field(
        None, description="texts that this expert is for: a list, or a text file with one per line"
    )
    negative_prompts: list[str] | str | None = Field(
        None,
        description="texts that this expert is not for: a list, or a text file with one per line",
    )


class MoeMethod(StructuralMethod):
    """The method `moe`, or, with a fixed `shared` method, one of its other spellings."""

    model_options_type: type[MoeModelOptions] = MoeModelOptions

    def __init__(
        self, name: str, pretty_name: str, reference_url: str | None, shared: str | None = None
    ):
        merged_by = f"the {shared} method" if shared else "the method that `shared` names"
        if shared in _PARAMETERS_OF_MERGEME:
            merged_by += " as in MergeME (density 0.8, lambda 1/fine-tunes, no normalisation)"
        super().__init__(
            name,
            pretty_name,
            reference_url,
            "dense models become the experts of one MoE; all parameters but their FFNs are merged "
            f"by {merged_by}",
        )
        self.options_type = MoeOptions if shared else MoeOptionsWithShared
        self._shared = shared

    def shared_method_name(self, options: Any) -> str:
        return self._shared or options.shared

    def plan(self, job: Job) -> Plan:
        experts = job.experts
        configs = read_configs(job)
        family, reason = _family_or_reason(job, configs)
        donor = untied_if_any_is(job, configs)
        if family is None:
            defaults = _mergeme_defaults(job, self._shared)
            return _generic_plan(job, configs, donor, defaults, reason)
        check_same_size(job, configs)
        warn_of_other_behaviour(job, configs)
        experts_per_token = _experts_per_token(job, family)
        config = family.output_config(
            donor, len(experts), experts_per_token, **_options_of_family(job, family)
        )
        manifests = _manifests(donor, configs)
        stored = read_headers(job, configs, manifests)
        dtype = output_dtype(job, stored)
        config.dtype = dtype
        headers = {}
        for model, source in stored.items():
            check_dropped(job, model, source, family, configs[model])
            layer = rewritten(family, configs[model], source.shapes, dtype)
            headers[model] = source.seen_through(layer)
        dense = manifests[job.donor]
        dense = rewritten_manifest(dense, rewritten(family, donor, dense.shapes, dtype))
        if job.merge_options.unsafe_truncate_embeddings:
            vocab_size = _smallest_vocabulary(headers.values(), dense)
            language_config(config).vocab_size = vocab_size
            dense = dense.with_vocabulary(vocab_size)

        layers: list[tuple[Stack, int]] = []
        for stack in family.stacks:
            number = getattr(language_config(config), stack.layers)
            layers += [(stack, layer) for layer in range(number)]
        outside = copied_outside(job, donor, stored[job.donor].shapes)
        computed: dict[str, Any] = {
            **_stacked_experts(job, layers, dense, dtype),
            **initial_gates(job, config, layers, dense.embedding, dtype),
            **_filled(layers, config, dtype),
        }
        return Plan(
            config=config,
            num_experts=len(experts),
            experts_per_token=experts_per_token,
            shared=_shared_tensors(layers, dense, outside),
            copies={**_copied_experts(job, layers, headers), **outside},
            computed=computed,
            dtype=dtype,
            shared_defaults=_mergeme_defaults(job, self._shared),
            views=views_of(headers),
            untrained=untrained_gates(job),
            notes=_notes(family, configs),
        )


def _family_or_reason(
    job: Job, configs: Mapping[ModelReference, PretrainedConfig]
) -> tuple[Upcycling | None, str]:
    """The family that the output is of, or None and the reason why it is a generic mixture."""
    if job.options.architecture == "upcycled":
        return None, "`architecture: upcycled` asks for it"
    try:
        family = family_of_all(configs, mix_architectures=job.merge_options.allow_crimes)
    except UserError as error:
        if job.options.architecture == "stock":
            raise UserError(
                f"{error.message}; `architecture: auto` makes a generic mixture. Those that have "
                f"one: {supported()}. {what_would_work(configs)}"
            ) from error
        return None, error.message
    return family, ""


def _generic_plan(
    job: Job,
    configs: Mapping[ModelReference, PretrainedConfig],
    donor: PretrainedConfig,
    shared_defaults: Mapping[str, Any],
    reason: str,
) -> Plan:
    """The plan of a generic mixture. Where there can be none the `UserError` says what would work
    instead.
    """
    try:
        dense = dense_of_all(job, configs, donor)
    except UserError as error:
        complaint = f"{reason}. Nor can it be a generic mixture: {error.message}"
        if job.options.architecture == "upcycled":
            complaint = f"no generic mixture (`architecture: upcycled`): {error.message}"
        raise UserError(f"{complaint}. {what_would_work(configs)}") from error
    number = _number_per_token(job)
    return plan_upcycled(job, configs, donor, dense, number, shared_defaults, reason)


def _manifests(
    donor: PretrainedConfig, configs: Mapping[ModelReference, PretrainedConfig]
) -> dict[ModelReference, Manifest]:
    """The manifest of every source; those of one model type have one and the same.

    Head and embedding are tied as in `donor`, so that a head of its own has a place everywhere if
    it has one in the output.
    """
    by_type = {donor.model_type: manifest_of(donor)}
    manifests = {}
    for model, config in configs.items():
        if config.model_type not in by_type:
            tied_alike = copy.deepcopy(config)
            tied_alike.tie_word_embeddings = donor.tie_word_embeddings
            by_type[config.model_type] = manifest_of(tied_alike)
        manifests[model] = by_type[config.model_type]
    return manifests


def _notes(family: Upcycling, configs: Mapping[ModelReference, PretrainedConfig]) -> str:
    """A sentence for the card and the plan where the sources are of several architectures."""
    architectures = list(dict.fromkeys(family.dense.get(c.model_type) for c in configs.values()))
    if len(architectures) < 2 or None in architectures:  # the latter under --allow-crimes
        return ""
    return (
        f"The sources are of several architectures ({', '.join(map(str, architectures))}), which "
        f"compute alike once their tensors have the names and forms of {family.moe}."
    )


def _mergeme_defaults(job: Job, spelling: str | None) -> dict[str, Any]:
    """The parameters by which MergeME merges shared parameters with a tensor method, for the
    spellings of `moe` that stand for it; empty for the others.

    `lambda` is 1/3 for the paper's three fine-tunes: the sum of task vectors becomes their mean.
    """
    if spelling not in _PARAMETERS_OF_MERGEME:
        return {}
    number = sum(model != job.base for model in job.sources)
    return {**_PARAMETERS_OF_MERGEME[spelling], "lambda": 1 / max(1, number)}


def _experts_per_token(job: Job, family: Upcycling) -> int:
    stated = job.options.experts_per_token
    if family.experts_per_token is not None:
        if stated not in (None, family.experts_per_token):
            raise UserError(
                f"experts_per_token is {stated}, but {family.moe} always has "
                f"{family.experts_per_token}"
            )
        return family.experts_per_token
    return _number_per_token(job)


def _number_per_token(job: Job) -> int:
    stated = job.options.experts_per_token
    number = 2 if stated is None else stated
    experts = len(job.experts)
    if number > experts:
        raise UserError(
            f"experts_per_token is {number}, but `models:` lists {experts} expert(s); it can be at "
            f"most {experts}"
        )
    return number


def _options_of_family(job: Job, family: Upcycling) -> dict[str, Any]:
    """The options that only some architectures have. `UserError` where this one has not."""
    capacity = job.options.expert_capacity
    if capacity is None:
        return {}
    if "expert_capacity" not in family.options:
        raise UserError(f"{family.moe} has no `expert_capacity`")
    return {"expert_capacity": capacity}


def _smallest_vocabulary(headers: Iterable[Headers], dense: Manifest) -> int:
    """The number of tokens that every source has."""
    sizes = []
    for source in headers:
        sizes += [shape[0] for name, shape in source.shapes.items() if name in dense.vocabulary]
    return min(sizes)


def _names_of_experts(layers: Sequence[tuple[Stack, int]]) -> set[str]:
    """The dense tensors that the experts are made of."""
    names: set[str] = set()
    for stack, layer in layers:
        templates = [*stack.experts, *itertools.chain.from_iterable(stack.stacked.values())]
        names |= {template.format(layer=layer) for template in templates}
    return names


def _shared_tensors(
    layers: Sequence[tuple[Stack, int]], dense: Manifest, outside: Collection[str]
) -> dict[str, SharedTensor]:
    """The tensors that are merged, by their names in the output: all that are not of an FFN, nor
    `outside` the language model, and those that the family merges of the FFNs for a part that every
    token goes through.
    """
    left_out = _names_of_experts(layers) | set(outside)
    shared = {}
    for name in dense.shapes:
        if name not in left_out:
            shared[name] = dense.shared_tensor(name)
    for stack, layer in layers:
        for output, name in stack.merged.items():
            shared[output.format(layer=layer)] = dense.shared_tensor(name.format(layer=layer))
    return shared


def _filled(
    layers: Sequence[tuple[Stack, int]], config: PretrainedConfig, dtype: torch.dtype
) -> dict[str, Filled]:
    """The tensors that have one value everywhere, by their names in the output."""
    values: dict[str, float] = {}
    for stack, layer in layers:
        constants = {**dict.fromkeys(stack.zeros, 0.0), **stack.constants}
        for template, value in constants.items():
            values[template.format(layer=layer)] = value
    if not values:  # building a manifest takes a while
        return {}
    shapes = manifest_of(config).shapes
    tensors = {}
    for name, value in values.items():
        tensors[name] = Filled(name=name, shape=shapes[name], dtype=str(dtype), value=value)
    return tensors


def _copied_experts(
    job: Job, layers: Sequence[tuple[Stack, int]], headers: Mapping[ModelReference, Headers]
) -> dict[str, CopiedTensor]:
    """The experts' tensors by their names in the output; none where a family keeps all experts of
    a layer in one tensor.
    """
    copies = {}
    for stack, layer in layers:
        for template, output in stack.experts.items():
            name = template.format(layer=layer)
            for index, model in enumerate(job.experts):
                copy = CopiedTensor(model, name, headers[model].shapes[name])
                copies[output.format(layer=layer, expert=index)] = copy
    return copies


def _stacked_experts(
    job: Job, layers: Sequence[tuple[Stack, int]], dense: Manifest, dtype: torch.dtype
) -> dict[str, StackedExperts]:
    """The tensors that hold all experts of a layer, by their names in the output; none where a
    family keeps every expert's tensors apart.
    """
    tasks = {}
    for stack, layer in layers:
        for output, templates in stack.stacked.items():
            names = [template.format(layer=layer) for template in templates]
            rows, *rest = dense.shapes[names[0]]
            experts = []
            for model in job.experts:
                experts.append(tuple(job.load(model, name, str(dtype)) for name in names))
            tasks[output.format(layer=layer)] = StackedExperts(
                experts=tuple(experts),
                shape=(len(job.experts), rows * len(names), *rest),
                dtype=str(dtype),
            )
    return tasks


MOE_METHODS = (
    MoeMethod("moe_linear", "BTX (mixture of experts, averaged shared parameters)", _BTX, "linear"),
    MoeMethod(
        "moe_ties", "MergeME (mixture of experts, TIES shared parameters)", MERGEME, "fast_ties"
    ),
    MoeMethod("moe_dare", "MergeME (mixture of experts, DARE shared parameters)", MERGEME, "dare"),
)
