"""The plan of a mixture of experts with dense models as further experts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit.common import ModelReference
from mergekit.graph import Task
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.growing.arrangement import arranged_config, order_with_new
from mergekit_moe_ext.growing.gate_rows import MixtureStates, NewRows
from mergekit_moe_ext.growing.mixture import Mixture, arranged
from mergekit_moe_ext.growing.new_experts import (
    ExpertSource,
    check_dense,
    expert_sources,
    family_of,
)
from mergekit_moe_ext.merging.card import model_in_markdown
from mergekit_moe_ext.merging.manifest import Manifest, manifest_of
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan
from mergekit_moe_ext.merging.sources import Headers, read_configs, read_headers
from mergekit_moe_ext.merging.tasks import StackedExperts
from mergekit_moe_ext.merging.views import View
from mergekit_moe_ext.merging.wrappers import language_config
from mergekit_moe_ext.upcycling.dense import rewritten, rewritten_manifest
from mergekit_moe_ext.upcycling.gates import tokenised_prompts
from mergekit_moe_ext.upcycling.moe_lora import check_changes_ffns

DEFAULT_MARGIN = 5.0
Sources = Mapping[ModelReference, Sequence[ExpertSource]]  # per layer of the mixture


def plan_added(job: Job, names: Sequence[str | None]) -> Plan:
    """The plan of the mixture that is the job's donor with an expert for each entry of `models:`.

    names: those of the new experts. `UserError` for models that do not fit the mixture.
    """
    if job.donor in job.experts:
        raise UserError(f"{job.donor} is the mixture itself; `models:` lists dense models")
    configs = read_configs(job)
    manifests = {model: manifest_of(config) for model, config in configs.items()}
    headers = read_headers(job, configs, manifests)
    mixture = Mixture.among(job, configs, manifests, headers)
    order = order_with_new(mixture.config, len(job.experts))
    config = arranged_config(mixture.config, order, names)
    sources = {}
    views = {}
    for model in dict.fromkeys(job.experts):
        sources[model], views[model] = _sources_and_view(
            mixture, model, configs[model], manifests[model], headers[model]
        )
    added = _added_tensors(job, mixture, sources)
    new = _new_entries(job, mixture, sources)
    notes = _notes(job, mixture, order, names)
    plan = arranged(job, mixture, config, order, added, new, notes)
    return replace(plan, views={**plan.views, **views})


def _sources_and_view(
    mixture: Mixture,
    model: ModelReference,
    config: PretrainedConfig,
    held: Manifest,
    headers: Headers,
) -> tuple[list[ExpertSource], View]:
    """What a dense model gives to each layer of the mixture, and how the model is read for that.

    config, held, headers: the dense model's config, manifest and headers.
    """
    check_dense(mixture.model, mixture.config, model, config, held)
    family = family_of(mixture.config, model, config)
    view = headers.view
    if family is not None:
        shown = rewritten(family, config, headers.shapes, mixture.dtype)
        view = headers.seen_through(shown).view
        held = rewritten_manifest(held, rewritten(family, config, held.shapes, mixture.dtype))
    sources = expert_sources(mixture.config, mixture.layers, mixture.manifest, family, model, held)
    ffns: list[str] = []
    for source in sources:
        ffns += source.modules
    check_changes_ffns(model, ffns)
    return sources, view


def _notes(job: Job, mixture: Mixture, order: Sequence[int], names: Sequence[str | None]) -> str:
    """What was added where, in Markdown."""
    lines = [
        f"Experts were added to {mixture.in_markdown}, which had {mixture.number} per layer. All "
        "else is as it was.",
        "",
        "| expert | name | FFNs of |",
        "|---|---|---|",
    ]
    for index, (name, model) in enumerate(zip(names, job.experts, strict=True)):
        position = order.index(mixture.number + index)
        lines.append(f"| {position} | {name or ''} | {model_in_markdown(model)} |")
    gate_init = job.options.gate_init or "mean"
    margin = f" with a margin of {_margin(job):g}" if _margin(job) else ""
    lines += ["", f"Their rows of the gates start as `{gate_init}`{margin}."]
    return "\n".join(lines)


def _margin(job: Job) -> float:
    if job.options.gate_init == "zeros":
        return 0.0
    return DEFAULT_MARGIN if job.options.margin is None else job.options.margin


def _added_tensors(
    job: Job, mixture: Mixture, sources: Sources
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


def _new_entries(job: Job, mixture: Mixture, sources: Sources) -> dict[str, Task]:
    """By tensor of all experts, routers' included, the task that makes the new experts' part of
    it.
    """
    states = _states(job, mixture)
    inner = language_config(mixture.config)
    start = "zeros" if job.options.gate_init == "zeros" else "mean"
    entries: dict[str, Task] = {}
    for position, layer in enumerate(mixture.layers):
        together = sources[job.experts[0]][position].together
        for name, axis in layer.rows.items():
            if name in together:
                entries[name] = _stacked(job, mixture, sources, position, name)
                continue
            # Of the router's tensors one reads the states: it has a row of their size per expert.
            entry = math.prod(mixture.manifest.shapes[name]) // mixture.number
            reads_states = name in layer.router_tensors and entry == inner.hidden_size
            entries[name] = NewRows(
                name=name,
                old=job.load(mixture.model, name, job.config.dtype),
                axis=axis,
                number=len(job.experts),
                start=start,
                margin=_margin(job),
                states=states if reads_states else None,
                gate=position,
            )
    return entries


def _stacked(
    job: Job,
    mixture: Mixture,
    sources: Sources,
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


def _states(job: Job, mixture: Mixture) -> MixtureStates | None:
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
    if not mixture.manifest.embedding:
        raise UserError(
            f"a margin is measured on texts, and {mixture.config.architectures[0]} reads none: use "
            "`margin: 0` or `gate_init: zeros`"
        )
    options = job.merge_options
    return MixtureStates(
        model=mixture.model,
        prompts=prompts,
        routers=tuple(layer.router for layer in mixture.layers),
        vocab_size=language_config(mixture.config).vocab_size,
        seed=job.seed,
        device=options.device or "cpu",
        transformers_cache=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
        quiet=options.quiet,
    )
