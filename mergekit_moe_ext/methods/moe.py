"""`moe`: dense models of one architecture become one mixture of experts (MergeME 3.1.1 and 3.1.2).

Each model in `models:` gives the FFN of one expert per layer, unchanged. Everything else (embedding,
attention, norms, head) is merged by the tensor method that `shared:` names. A gate per layer starts as
`gate_mode` says; MergeME, like BTX before it, trains it afterwards.
"""

import functools
from typing import Any, Literal

import click
import torch
from mergekit.architecture import WeightInfo
from pydantic import Field

from mergekit_moe_ext.families import upcycling_for
from mergekit_moe_ext.gates import InitialGate
from mergekit_moe_ext.manifest import manifest_of
from mergekit_moe_ext.methods.base import Job, MethodOptions, Plan, StructuralMethod
from mergekit_moe_ext.sources import check_same_size, read_configs, read_headers

_MERGEME = "https://arxiv.org/abs/2502.00997"
_BTX = "https://arxiv.org/abs/2403.07816"


class MoeOptions(MethodOptions):
    experts_per_token: int = Field(
        2, ge=1, description="how many experts the gate chooses per token; with 1 a Mixtral gate gets no gradient"
    )
    gate_mode: Literal["random", "uniform_random", "zeros"] = Field(
        "random",
        description="how gates start: random (normal) and uniform_random have the architecture's "
        "initializer_range as standard deviation; zeros chooses arbitrarily and weighs equally",
    )


class MoeOptionsWithShared(MoeOptions):
    shared: str = Field("linear", description="the tensor method that merges everything but the FFNs")


class MoeMethod(StructuralMethod):
    """With `shared` given, a spelling of `moe` that fixes it."""

    def __init__(self, name: str, pretty_name: str, reference_url: str, shared: str | None = None):
        merged_by = f"the {shared} method" if shared else "the method that `shared` names"
        super().__init__(
            name,
            pretty_name,
            reference_url,
            f"dense models become the experts of one MoE; all but their FFNs is merged by {merged_by}",
        )
        self.options_type = MoeOptions if shared else MoeOptionsWithShared
        self._shared = shared

    def shared_method_name(self, options: Any) -> str:
        return self._shared or options.shared

    def plan(self, job: Job) -> Plan:
        options, experts = job.options, job.experts
        if options.experts_per_token > len(experts):
            raise click.ClickException(
                f"experts_per_token is {options.experts_per_token}, but `models:` lists {len(experts)} "
                f"expert(s); it can be at most {len(experts)}"
            )
        configs = read_configs(job)
        family = upcycling_for(configs, mix_architectures=job.merge_options.allow_crimes)
        check_same_size(job, configs)
        config = family.output_config(configs[job.donor], len(experts), options.experts_per_token)
        dense = manifest_of(configs[job.donor])
        headers = read_headers(job, configs, dense)
        config.dtype = dtype = job.dtype or functools.reduce(
            torch.promote_types, [getattr(torch, source.dtype) for source in headers.values()]
        )
        if job.merge_options.unsafe_truncate_embeddings:
            config.vocab_size = min(
                shape[0]
                for source in headers.values()
                for name, shape in source.shapes.items()
                if name in dense.vocabulary
            )

        layers = range(config.num_hidden_layers)
        ffn_names = {
            source.format(layer=layer): (output, layer) for source, output in family.ffn.items() for layer in layers
        }
        copies = {
            output.format(layer=layer, expert=index): (model, name)
            for name, (output, layer) in ffn_names.items()
            for index, model in enumerate(experts)
        }
        shared = [
            WeightInfo(
                name=name,
                vocabulary_axis=0 if name in dense.vocabulary else None,
                tied_names=tuple(dense.vocabulary) if name in dense.vocabulary else None,
            )
            for name in dense.shapes
            if name not in ffn_names
        ]
        gates = {
            (name := family.gate.format(layer=layer)): InitialGate(
                name=name,
                shape=(len(experts), config.hidden_size),
                mode=options.gate_mode,
                std=config.initializer_range,
                seed=job.seed,
                dtype=str(dtype),
            )
            for layer in layers
        }
        return Plan(
            config=config,
            shared=shared,
            copies=copies,
            computed=gates,
            shapes={
                **{
                    name: (config.vocab_size, *shape[1:]) if name in dense.vocabulary else shape
                    for name, shape in dense.shapes.items()
                    if name not in ffn_names
                },
                **{name: headers[model].shapes[source] for name, (model, source) in copies.items()},
                **{name: gate.shape for name, gate in gates.items()},
            },
            dtype=dtype,
        )


MOE_METHODS = (
    MoeMethod("moe", "Mixture of experts", _MERGEME),
    MoeMethod("moe_linear", "BTX (mixture of experts, averaged shared parameters)", _BTX, "linear"),
    MoeMethod("moe_ties", "MergeME (mixture of experts, TIES shared parameters)", _MERGEME, "fast_ties"),
    MoeMethod("moe_dare", "MergeME (mixture of experts, DARE shared parameters)", _MERGEME, "dare"),
)
