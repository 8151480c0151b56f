"""`moe`: dense models of one architecture become one mixture of experts (MergeME 3.1.1 and 3.1.2).

Each model in `models:` gives the FFN of one expert per layer, unchanged. Everything else
(embedding, attention, norms, head) is merged by the tensor method that `shared:` names. A gate per
layer starts as `gate_mode` says; MergeME, like BTX before it, trains it afterwards.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from pydantic import Field

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import Manifest, manifest_of
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
)
from mergekit_moe_ext.merging.tasks import Filled, StackedExperts
from mergekit_moe_ext.upcycling.families import upcycling_for
from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling
from mergekit_moe_ext.upcycling.gates import GateMode, initial_gates

_MERGEME = "https://arxiv.org/abs/2502.00997"
_BTX = "https://arxiv.org/abs/2403.07816"


class MoeOptions(MethodOptions):
    experts_per_token: int | None = Field(
        None,
        ge=1,
        description="how many experts the gate chooses per token: 2 if not given, 1 in Switch "
        "Transformers, which has "
        "no other; with 1 the gate of any other architecture gets no gradient",
    )
    gate_mode: GateMode = Field(
        "random",
        description="how gates start: random (normal) and uniform_random have the architecture's "
        "initializer_range as standard deviation; zeros chooses arbitrarily and weighs equally; "
        "hidden (or hidden_last), hidden_avg and cheap_embed are made of the models' "
        "positive_prompts and negative_prompts",
    )
    expert_capacity: int | None = Field(
        None,
        ge=1,
        description="Switch Transformers only: how many tokens of a sequence an expert takes; 64 "
        "if not given",
    )


class MoeOptionsWithShared(MoeOptions):
    shared: str = Field(
        "linear", description="the tensor method that merges everything but the FFNs"
    )


class MoeModelOptions(ModelOptions):
    positive_prompts: list[str] | str | None = Field(
        None, description="texts that this expert is for: a list, or a text file with one per line"
    )
    negative_prompts: list[str] | str | None = Field(
        None,
        description="texts that this expert is not for: a list, or a text file with one per line",
    )


class MoeMethod(StructuralMethod):
    """With `shared` given, a spelling of `moe` that fixes it."""

    model_options_type = MoeModelOptions

    def __init__(self, name: str, pretty_name: str, reference_url: str, shared: str | None = None):
        merged_by = f"the {shared} method" if shared else "the method that `shared` names"
        super().__init__(
            name,
            pretty_name,
            reference_url,
            "dense models become the experts of one MoE; all but their FFNs is merged by "
            f"{merged_by}",
        )
        self.options_type = MoeOptions if shared else MoeOptionsWithShared
        self._shared = shared

    def shared_method_name(self, options: Any) -> str:
        return self._shared or options.shared

    def plan(self, job: Job) -> Plan:
        experts = job.experts
        configs = read_configs(job)
        family = upcycling_for(configs, mix_architectures=job.merge_options.allow_crimes)
        check_same_size(job, configs)
        experts_per_token = _experts_per_token(job, family)
        donor = untied_if_any_is(job, configs)
        config = family.output_config(
            donor, len(experts), experts_per_token, **_options_of_family(job, family)
        )
        dense = manifest_of(donor)
        headers = read_headers(job, configs, dict.fromkeys(configs, dense))
        config.dtype = dtype = output_dtype(job, headers)
        if job.merge_options.unsafe_truncate_embeddings:
            config.vocab_size = _smallest_vocabulary(headers.values(), dense)
            dense = dense.with_vocabulary(config.vocab_size)

        layers = [
            (stack, layer)
            for stack in family.stacks
            for layer in range(getattr(config, stack.layers))
        ]
        copies = _copied_experts(job, layers, headers)
        stacks = _stacked_experts(job, layers, dense, dtype)
        of_experts = _names_of_experts(layers)
        shared = {
            name: dense.shared_tensor(name) for name in dense.shapes if name not in of_experts
        }
        for stack, layer in layers:
            for output, name in stack.merged.items():
                shared[output.format(layer=layer)] = dense.shared_tensor(name.format(layer=layer))
        computed: dict[str, Any] = stacks | initial_gates(
            job, config, layers, dense.embedding, dtype
        )
        zeros = [
            template.format(layer=layer) for stack, layer in layers for template in stack.zeros
        ]
        if zeros:
            shapes = manifest_of(config).shapes
            computed |= {
                name: Filled(name=name, shape=shapes[name], dtype=str(dtype)) for name in zeros
            }
        return Plan(
            config=config,
            num_experts=len(experts),
            experts_per_token=experts_per_token,
            shared=shared,
            copies=copies,
            computed=computed,
            dtype=dtype,
        )


def _experts_per_token(job: Job, family: Upcycling) -> int:
    given, number = job.options.experts_per_token, len(job.experts)
    if family.experts_per_token is not None:
        if given not in (None, family.experts_per_token):
            raise UserError(
                f"experts_per_token is {given}, but {family.moe} has always "
                f"{family.experts_per_token}"
            )
        return family.experts_per_token
    wanted = 2 if given is None else given
    if wanted > number:
        raise UserError(
            f"experts_per_token is {wanted}, but `models:` lists {number} expert(s); it can be at "
            f"most {number}"
        )
    return wanted


def _options_of_family(job: Job, family: Upcycling) -> dict[str, Any]:
    """The options that only some architectures have, which must be this one."""
    given = {
        key: getattr(job.options, key)
        for key in ("expert_capacity",)
        if getattr(job.options, key) is not None
    }
    for key in given:
        if key not in family.options:
            raise UserError(f"{family.moe} has no `{key}`")
    return given


def _smallest_vocabulary(headers: Iterable[Headers], dense: Manifest) -> int:
    """How many tokens every source has."""
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


def _copied_experts(
    job: Job, layers: Sequence[tuple[Stack, int]], headers: Mapping[ModelReference, Headers]
) -> dict[str, CopiedTensor]:
    """Where a family keeps every expert's tensors apart: these, by their names in the output."""
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
    """Where a family keeps all experts of a layer in one tensor: that tensor, by its name in the
    output.
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
    MoeMethod("moe", "Mixture of experts", _MERGEME),
    MoeMethod("moe_linear", "BTX (mixture of experts, averaged shared parameters)", _BTX, "linear"),
    MoeMethod(
        "moe_ties", "MergeME (mixture of experts, TIES shared parameters)", _MERGEME, "fast_ties"
    ),
    MoeMethod("moe_dare", "MergeME (mixture of experts, DARE shared parameters)", _MERGEME, "dare"),
)
