"""The method `moe` with `into: MIXTURE`: dense models become further experts of a mixture that is
there already. And the method `remove_experts`, which takes experts out of one.

Every tensor of the mixture that does not count experts is copied. Of those that do, the entries of
the old experts are copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from pydantic import Field
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.growing.arrangement import (
    arranged_config,
    order_with_new,
    order_without,
    set_expert_names,
)
from mergekit_moe_ext.growing.gate_rows import MixtureStates, NewRows
from mergekit_moe_ext.growing.new_experts import (
    ExpertSource,
    check_dense,
    expert_sources,
    family_of,
)
from mergekit_moe_ext.growing.tasks import ArrangedExperts
from mergekit_moe_ext.merging.card import model_in_markdown
from mergekit_moe_ext.merging.manifest import Manifest, manifest_of
from mergekit_moe_ext.merging.method import (
    CopiedTensor,
    Job,
    MethodOptions,
    Plan,
    StructuralMethod,
)
from mergekit_moe_ext.merging.sources import Headers, output_dtype, read_configs, read_headers
from mergekit_moe_ext.merging.tasks import StackedExperts
from mergekit_moe_ext.mixtures.experts import (
    MoeLayer,
    experts_per_token,
    moe_layers,
    num_experts,
)
from mergekit_moe_ext.upcycling.dense import rewritten, rewritten_manifest
from mergekit_moe_ext.upcycling.gates import tokenised_prompts
from mergekit_moe_ext.upcycling.method import (
    MERGEME,
    MoeMethod,
    MoeModelOptions,
    MoeOptionsWithShared,
)
from mergekit_moe_ext.upcycling.moe_lora import check_changes_ffns
from mergekit_moe_ext.upcycling.shared_expert import with_shared_expert

GateInit = Literal["mean", "prompts", "zeros"]
# Options of a mixture that is built anew; one that is there has them already.
_OF_NEW_MIXTURES = ("shared", "gate_mode", "experts_per_token", "expert_capacity", "shared_expert")
DEFAULT_MARGIN = 5.0


class GrowingOptions(MoeOptionsWithShared):
    shared_expert: str | None = Field(
        None,
        description="the model, one of the merge, whose FFNs become the shared expert, which every "
        "token passes, in architectures that have one [default: a silent one]",
    )
    into: str | None = Field(
        None,
        description="a mixture of experts that the models are added to, as further experts; all "
        "that it has stays as it is, and `base_model` is not needed",
    )
    gate_init: GateInit | None = Field(
        None,
        description="with `into`: initial rows of the gates for the new experts: mean (of the "
        "others' rows, with logits lower by `margin`), prompts (higher by `margin` for the models' "
        "positive_prompts, lower for the negative_prompts) or zeros [default: mean]",
    )
    margin: float | None = Field(
        None,
        ge=0,
        description="with `into`: difference of a new expert's mean logit from the mean of the "
        "others'; above 0 the mixture is loaded for a forward pass, over random tokens where there "
        f"are no negative_prompts [default: {DEFAULT_MARGIN:g}]",
    )


class GrowingModelOptions(MoeModelOptions):
    name: str | None = Field(
        None, description="name of the expert, for `train --only-experts` and `remove_experts`"
    )


class GrowingMoeMethod(MoeMethod):
    """The method `moe`, which builds a mixture, or, with `into`, adds to one."""

    model_options_type: type[MoeModelOptions] = GrowingModelOptions

    def __init__(self, name: str, pretty_name: str, reference_url: str):
        super().__init__(name, pretty_name, reference_url)
        self.options_type = GrowingOptions

    def completed(self, config: MergeConfiguration, options: Any) -> MergeConfiguration:
        if options.into is None:
            for key in ("gate_init", "margin"):
                if getattr(options, key) is not None:
                    raise UserError(f"`{key}` is for `into`, which adds experts to a mixture")
            return config
        for key in _OF_NEW_MIXTURES:
            if key in options.model_fields_set:
                raise UserError(f"`{key}` does not go with `into`: the mixture keeps its own")
        if options.gate_init == "zeros" and options.margin is not None:
            raise UserError("`margin` does not go with `gate_init: zeros`")
        if options.gate_init == "prompts" and options.margin == 0:
            raise UserError("`gate_init: prompts` needs a `margin` above 0")
        _check_known(config, (*GrowingOptions.model_fields, *GrowingModelOptions.model_fields))
        return _with_mixture_as_base(config, options.into, "into")

    def plan(self, job: Job) -> Plan:
        names = [options.name for options in job.model_options]
        if job.options.into is not None:
            return _plan_added(job, names)
        plan = super().plan(job)
        if job.options.shared_expert is not None:
            plan = with_shared_expert(plan, job, job.options.shared_expert, read_configs(job))
        set_expert_names(plan.config, names)
        return plan


class RemovalOptions(MethodOptions):
    experts: list[str | int] = Field(
        min_length=1, description="experts to remove from every layer, by number or name"
    )


class RemovalMethod(StructuralMethod):
    """The method `remove_experts`, whose one model is a mixture of experts."""

    options_type = RemovalOptions

    def __init__(self) -> None:
        super().__init__(
            "remove_experts",
            "Removal of experts",
            None,
            "a mixture of experts loses some of its experts; all else stays as it is",
        )

    def shared_method_name(self, options: Any) -> str:
        return "passthrough"  # nothing is shared

    def completed(self, config: MergeConfiguration, options: Any) -> MergeConfiguration:
        if len(config.models or []) != 1:
            raise UserError("remove_experts takes one model under `models:`, the mixture")
        _check_known(config, tuple(RemovalOptions.model_fields))
        return _with_mixture_as_base(config, str(config.models[0].model), "the one model")

    def plan(self, job: Job) -> Plan:
        mixture = _Mixture.read(job)
        experts = [str(expert) for expert in job.options.experts]
        order = order_without(mixture.config, experts)
        config = arranged_config(mixture.config, order)
        removed = [str(index) for index in range(mixture.number) if index not in order]
        notes = (
            f"Experts {', '.join(removed)} of {mixture.in_markdown} were removed from every layer. "
            "All else is as it was."
        )
        return _arranged(job, mixture, config, order, {}, {}, notes)


@dataclass(frozen=True)
class _Mixture:
    """The mixture that is changed."""

    model: ModelReference
    config: PretrainedConfig
    layers: list[MoeLayer]
    manifest: Manifest
    headers: Headers
    dtype: torch.dtype  # of the output

    @property
    def number(self) -> int:
        """The number of experts of a layer."""
        return num_experts(self.config)

    @property
    def in_markdown(self) -> str:
        return model_in_markdown(self.model)

    @classmethod
    def read(cls, job: Job) -> "_Mixture":
        configs = read_configs(job)
        manifests = {model: manifest_of(config) for model, config in configs.items()}
        headers = read_headers(job, configs, manifests)
        return cls.among(job, configs, manifests, headers)

    @classmethod
    def among(
        cls,
        job: Job,
        configs: Mapping[ModelReference, PretrainedConfig],
        manifests: Mapping[ModelReference, Manifest],
        headers: Mapping[ModelReference, Headers],
    ) -> "_Mixture":
        if job.merge_options.unsafe_truncate_embeddings:
            raise UserError("the mixture keeps its vocabulary: nothing is truncated here")
        model = job.donor
        config = configs[model]
        dtype = output_dtype(job, {model: headers[model]})
        return cls(model, config, moe_layers(config), manifests[model], headers[model], dtype)


def _check_known(config: MergeConfiguration, keys: Sequence[str]) -> None:
    """`UserError` for a parameter of a tensor method, of which none runs here."""
    for entry in (config, *(config.models or [])):
        for key in entry.parameters or {}:
            if key not in keys:
                raise UserError(
                    f"`{key}` is not an option here, where no tensors are merged; known: "
                    f"{', '.join(keys)}"
                )


def _with_mixture_as_base(config: MergeConfiguration, path: str, key: str) -> MergeConfiguration:
    """The configuration with the mixture as its base, which gives config and tokenizer.

    `UserError` for another base and for keys that would change what the mixture has.
    """
    mixture = ModelReference.model_validate(path)
    if mixture.lora is not None:
        raise UserError(f"{key}: {path} is a LoRA on a mixture; merge it into the mixture first")
    if config.base_model not in (None, mixture):
        raise UserError(
            f"`base_model` is {config.base_model}, but the mixture itself ({path}) gives all but "
            "the new experts; leave `base_model` out"
        )
    for name in ("tokenizer", "tokenizer_source"):
        if getattr(config, name):
            raise UserError(f"`{name}` has no use here: the mixture keeps its vocabulary")
    return config.model_copy(update={"base_model": mixture})


def _plan_added(job: Job, names: Sequence[str | None]) -> Plan:
    configs = read_configs(job)
    if job.donor in job.experts:
        raise UserError(f"{job.donor} is the mixture itself; `models:` lists dense models")
    manifests = {model: manifest_of(config) for model, config in configs.items()}
    headers = read_headers(job, configs, manifests)
    mixture = _Mixture.among(job, configs, manifests, headers)
    order = order_with_new(mixture.config, len(job.experts))
    config = arranged_config(mixture.config, order, names)
    sources = {}
    views = {}
    for model in dict.fromkeys(job.experts):
        check_dense(mixture.config, model, configs[model], manifests[model])
        family = family_of(mixture.config, model, configs[model])
        held = manifests[model]
        if family is not None:
            layer = rewritten(family, configs[model], headers[model].shapes, mixture.dtype)
            views[model] = headers[model].seen_through(layer).view
            layer = rewritten(family, configs[model], held.shapes, mixture.dtype)
            held = rewritten_manifest(held, layer)
        sources[model] = expert_sources(
            mixture.config, mixture.layers, mixture.manifest, family, model, held
        )
        check_changes_ffns(model, [source.ffn for source in sources[model]])
    added = _added_tensors(job, mixture, sources)
    new = _new_entries(job, mixture, sources)
    gate_init = job.options.gate_init or "mean"
    positions = [str(order.index(mixture.number + index)) for index in range(len(job.experts))]
    lines = [
        f"Experts were added to {mixture.in_markdown}, which had {mixture.number} per layer. All "
        "else is as it was.",
        "",
        "| expert | name | FFNs of |",
        "|---|---|---|",
    ]
    for position, name, model in zip(positions, names, job.experts, strict=True):
        lines.append(f"| {position} | {name or ''} | {model_in_markdown(model)} |")
    lines += ["", f"Their rows of the gates start as `{gate_init}`{_margin_in_words(job)}."]
    plan = _arranged(job, mixture, config, order, added, new, "\n".join(lines))
    return replace(plan, views=views)


def _margin_in_words(job: Job) -> str:
    margin = _margin(job)
    return f" with a margin of {margin:g}" if margin else ""


def _margin(job: Job) -> float:
    if job.options.gate_init == "zeros":
        return 0.0
    return DEFAULT_MARGIN if job.options.margin is None else job.options.margin


def _added_tensors(
    job: Job, mixture: _Mixture, sources: Mapping[ModelReference, Sequence[ExpertSource]]
) -> dict[tuple[str, int], CopiedTensor]:
    """The tensors of the new experts that lie apart, by template and number among the new ones."""
    added = {}
    for index, model in enumerate(job.experts):
        for source in sources[model]:
            for template, name in source.apart.items():
                first = template.format(expert=0)
                added[template, index] = CopiedTensor(
                    model,
                    name,
                    mixture.manifest.shapes[first],
                    dtype=mixture.headers.dtypes[first],
                )
    return added


def _new_entries(
    job: Job, mixture: _Mixture, sources: Mapping[ModelReference, Sequence[ExpertSource]]
) -> dict[str, Task]:
    """By tensor of all experts, routers' included, the task that makes the new experts' part of
    it.
    """
    states = _states(job, mixture)
    start = "zeros" if job.options.gate_init == "zeros" else "mean"
    entries: dict[str, Task] = {}
    for position, layer in enumerate(mixture.layers):
        together = sources[job.experts[0]][position].together
        for name, axis in layer.rows.items():
            if name in together:
                entries[name] = _stacked(job, mixture, sources, position, name)
                continue
            is_matrix = name in layer.router_tensors and len(mixture.manifest.shapes[name]) > 1
            entries[name] = NewRows(
                name=name,
                old=job.load(mixture.model, name, job.config.dtype),
                axis=axis,
                number=len(job.experts),
                start=start,
                margin=_margin(job),
                states=states if is_matrix else None,
                gate=position,
            )
    return entries


def _stacked(
    job: Job,
    mixture: _Mixture,
    sources: Mapping[ModelReference, Sequence[ExpertSource]],
    position: int,
    name: str,
) -> StackedExperts:
    """The new experts' part of a tensor that holds all experts of the layer at this position."""
    dtype = job.config.dtype or mixture.headers.dtypes[name]
    experts = []
    for model in job.experts:
        parts = sources[model][position].together[name]
        experts.append(tuple(job.load(model, part, dtype) for part in parts))
    shape = (len(experts), *mixture.manifest.shapes[name][1:])
    return StackedExperts(experts=tuple(experts), shape=shape, dtype=dtype)


def _states(job: Job, mixture: _Mixture) -> MixtureStates | None:
    """The task of the states that the new rows differ from the mean by, if they do."""
    has_prompts = any(
        options.positive_prompts or options.negative_prompts for options in job.model_options
    )
    if job.options.gate_init == "prompts":
        prompts = tokenised_prompts(job, "gate_init: prompts")
    elif has_prompts:
        raise UserError("the models have prompts, which only `gate_init: prompts` uses")
    else:
        prompts = (((), ()),) * len(job.experts)
    if not _margin(job):
        return None
    options = job.merge_options
    return MixtureStates(
        model=mixture.model,
        prompts=prompts,
        routers=tuple(layer.router for layer in mixture.layers),
        vocab_size=mixture.config.vocab_size,
        seed=job.seed,
        device=options.device or "cpu",
        transformers_cache=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
        quiet=options.quiet,
    )


def _arranged(
    job: Job,
    mixture: _Mixture,
    config: PretrainedConfig,
    order: Sequence[int],
    added: Mapping[tuple[str, int], CopiedTensor],
    new: Mapping[str, Task],
    notes: str,
) -> Plan:
    """The plan of a mixture with the experts in `order`.

    added, new: of the new experts the tensors that lie apart, as `_added_tensors` has them, and
        the parts of tensors of all experts, as `_new_entries` has them.
    """
    config.dtype = mixture.dtype
    copies: dict[str, CopiedTensor] = {}
    computed: dict[str, ArrangedExperts] = {}
    of_experts: set[str] = set()
    for layer in mixture.layers:
        for template in layer.experts:
            for index in range(mixture.number):
                of_experts.add(template.format(expert=index))
            for target, index in enumerate(order):
                name = template.format(expert=target)
                if index < mixture.number:
                    copies[name] = _kept(mixture, template.format(expert=index))
                else:
                    copies[name] = added[template, index - mixture.number]
        for name, axis in layer.rows.items():
            of_experts.add(name)
            shape = list(mixture.manifest.shapes[name])
            shape[axis] = len(order)
            old: LoadTensor = job.load(mixture.model, name, job.config.dtype)
            computed[name] = ArrangedExperts(
                name=name,
                old=old,
                new=new.get(name),
                axis=axis,
                order=tuple(order),
                shape=tuple(shape),
            )
    for name in mixture.manifest.shapes:
        if name not in of_experts:
            copies[name] = _kept(mixture, name)
    return Plan(
        config=config,
        num_experts=len(order),
        experts_per_token=experts_per_token(config),
        shared={},
        copies=copies,
        computed=computed,
        dtype=mixture.dtype,
        notes=notes,
    )


def _kept(mixture: _Mixture, name: str) -> CopiedTensor:
    """A tensor of the mixture as its files have it, where a tied one may stand under the other's
    name.
    """
    stored = mixture.headers.shapes
    names = [name]
    if name in mixture.manifest.vocabulary:
        names += sorted(mixture.manifest.tied)
    stored_name = next(each for each in names if each in stored)
    return CopiedTensor(mixture.model, stored_name, stored[stored_name])


MOE = GrowingMoeMethod("moe", "Mixture of experts", MERGEME)
REMOVE_EXPERTS = RemovalMethod()
