"""`wemoe` and `ewemoe`: fine-tunes of one base become one model whose MLPs weigh their task vectors per input.

Everything but the upscaled modules is merged by the method that `shared:` names, task arithmetic in the papers. An
upscaled linear module keeps the base's weight and every source's task vector, whole or, in E-WEMoE, pruned to its
largest elements and stored as such (WEMoE 3.1 and 3.2).
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_moe_ext.merging.manifest import Manifest, hub_names, hub_state, manifest_from
from mergekit_moe_ext.merging.method import Job, MethodOptions, ModelOptions, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import (
    Headers,
    check_same_size,
    names_of,
    output_dtype,
    read_configs,
    read_headers,
)
from mergekit_moe_ext.merging.tasks import Filled, LoadFiniteTensor, RandomTensor
from mergekit_moe_ext.modeling import find_architecture
from mergekit_moe_ext.modeling.configuration_wemoe import Ensembling, class_names, config_class, vectors_of
from mergekit_moe_ext.modeling.modeling_wemoe import auto_class_of
from mergekit_moe_ext.wemoe.clip_heads import (
    PROJECTION,
    ClipHead,
    FromHeadFile,
    as_tower,
    classifier_config,
    has_projection,
    read_heads,
    with_projection,
)
from mergekit_moe_ext.wemoe.groups import Grouping, Part, Upscale, ensembled_groups, weighed_tensors
from mergekit_moe_ext.wemoe.task_vectors import PartOfPruned, Pruned, Stacked, TaskVectors
from mergekit_moe_ext.wemoe.variation import Variation, decide, measure, names_by_layer

_WEMOE = "https://arxiv.org/abs/2402.00433"
_EWEMOE = "https://arxiv.org/abs/2410.21804"
_HEADS = ("classifier", "score", "classification_head.out_proj", "classifier.out_proj")


class WemoeOptions(MethodOptions):
    shared: str = Field("task_arithmetic", description="the tensor method that merges the rest of the network")
    init_lambda: float = Field(0.3, description="where the routers' coefficients start")
    router_layers: int = Field(2, ge=0, le=2, description="of every router: 0 is a learned constant (equation 4)")
    router_init_std: float = Field(
        0.01,
        ge=0,
        description="standard deviation of a router's initial weights, as in the papers' code; 0.1 is the text's "
        "variance of 0.01, with which coefficients start far from init_lambda",
    )
    upscale: Upscale = Field(
        "mlp",
        description="what is routed in every block; block has one router for all of it; auto is mlp or attention, "
        "whichever fine-tuning changed more; all is AdaMerging: every parameter of the network has learned constants, "
        "with router_layers: 0",
    )
    upscale_layers: int | str = Field(
        "all", description="which blocks are upscaled: all, or numbers, as 6-11 or 0,3,6; of every stack of blocks"
    )
    sparsity: float = Field(0.0, ge=0, lt=1, description="how much of every task vector is dropped, by magnitude")
    shared_router: bool = Field(False, description="one router for all blocks, each with its own input")
    mode: Literal["frozen", "running"] = Field(
        "frozen",
        description="for models that generate: the prefix chooses (frozen), or at every position what precedes it",
    )
    routing_tokens: int = Field(32, ge=1, description="the prefix of a plain forward pass; generate takes the prompt")

    @field_validator("upscale_layers")
    @classmethod
    def _are_numbers(cls, value: int | str) -> int | str:
        _numbers(value)
        return value

    @property
    def layers(self) -> list[int] | None:
        """The numbers of the upscaled blocks; None for all."""
        return _numbers(self.upscale_layers)

    def kept_elements(self, size: int) -> int:
        """Of a task vector of that size."""
        return max(1, round((1 - self.sparsity) * size))


class WemoeModelOptions(ModelOptions):
    head: str | None = Field(
        None, description="of a CLIP vision tower: a file with the embeddings of its classes' names; see docs/wemoe.md"
    )


class EwemoeOptions(WemoeOptions):
    sparsity: float = Field(0.9, ge=0, lt=1, description="how much of every task vector is dropped, by magnitude")
    shared_router: bool = Field(True, description="one router for all blocks, each with its own input")


class Wemoe(StructuralMethod):
    model_options_type = WemoeModelOptions

    def __init__(self, *args: Any, options_type: type[WemoeOptions]) -> None:
        super().__init__(*args)
        self.options_type = options_type

    def shared_method_name(self, options: Any) -> str:
        return options.shared

    def plan(self, job: Job) -> Plan:
        sources = _read_sources(job, self.spec.name)
        ensembling, notes = _ensembling(job, sources)
        like = classifier_config(sources.config, sources.clip_heads) if sources.clip_heads else sources.config
        config = _output_config(like, ensembling)
        config.dtype = dtype = output_dtype(job, sources.headers)
        output = _Output(job, sources, config)
        for linear in ensembling.linears:
            output.ensemble(f"{linear}.weight", f"{linear}.vectors", ensembling.kept.get(linear))
            if f"{linear}.bias" in sources.stored:
                output.ensemble(f"{linear}.bias", f"{linear}.bias_vectors")
        for parameter in ensembling.groups if ensembling.per_tensor else ():
            _check_stored_itself(parameter, sources)
            output.ensemble(parameter, vectors_of(parameter))
        output.add_routers()
        if sources.clip_heads:
            output.add_clip_heads(ensembling.head)
        elif ensembling.head:
            output.copy_heads(ensembling.head)
        rest = [name for name in output.wanted if name not in output.copies and name not in output.computed]
        return Plan(
            config=config,
            num_experts=len(ensembling.experts),
            experts_per_token=len(ensembling.experts),
            routed_per="sample",
            shared={name: sources.manifest.weight_info(name) for name in rest},
            copies=output.copies,
            computed=output.computed,
            shapes={**{name: sources.manifest.shapes[name] for name in rest}, **output.shapes},
            integers=frozenset(name for name in output.computed if name.endswith((".columns", ".row_ends"))),
            dtype=dtype,
            notes=notes,
        )


@dataclass(frozen=True)
class _Sources:
    """What is known of base and sources before any tensor is read."""

    base: ModelReference
    configs: Mapping[ModelReference, PretrainedConfig]
    headers: Mapping[ModelReference, Headers]
    network: PreTrainedModel  # the base's, without memory
    manifest: Manifest  # the base's
    stored: Mapping[str, str]  # its names in a checkpoint
    clip_heads: Sequence[ClipHead]
    projecting: Sequence[ModelReference]  # CLIP's towers with a projection of their own

    @property
    def config(self) -> PretrainedConfig:
        return self.configs[self.base]

    def stored_name(self, name: str) -> str:
        if name not in self.stored:
            raise click.ClickException(
                f"{name} of {self.base} is not stored as it is used, so that it cannot be upscaled"
            )
        return self.stored[name]


def _read_sources(job: Job, method: str) -> _Sources:
    base = job.base
    if base is None or base in job.experts:
        raise click.ClickException(
            f"{method} needs what its sources are fine-tunes of as `base_model:`, and not among `models:`"
        )
    configs = read_configs(job)
    clip_heads = read_heads([of_model.head for of_model in job.model_options], job.experts, configs)
    projecting = [model for model, config in configs.items() if clip_heads and has_projection(config)]
    configs |= {model: as_tower(configs[model]) for model in projecting}
    _check_one_architecture(base, configs)
    check_same_size(job, configs)
    built = {model: hub_state(config) for model, config in configs.items()}
    manifests = {model: manifest_from(*each) for model, each in built.items()}
    manifests |= {model: with_projection(manifests[model], configs[model]) for model in projecting}
    headers = read_headers(job, configs, manifests)
    network, state = built[base]
    stored = hub_names(network, state)
    return _Sources(base, configs, headers, network, manifests[base], stored, clip_heads, projecting)


def _ensembling(job: Job, sources: _Sources) -> tuple[Ensembling, str]:
    """And what of it the card says."""
    options, tasks, notes = job.options, names_of(job.experts), ""
    head = "classifier" if sources.clip_heads else _head_of_tasks(sources.network, sources.configs)
    upscale = options.upscale
    if upscale == "all":
        _check_all_of(job)
    if upscale == "auto":
        upscale, notes = _choose_part(job, sources)
    classes = [list(of_clip.classes) for of_clip in sources.clip_heads]
    classes = classes or [class_names(sources.configs[model]) for model in job.experts]
    ensembling = Ensembling(
        experts=tasks,
        groups=_groups(job, sources.network, head, upscale),
        per_tensor=upscale == "all",
        router_layers=options.router_layers,
        shared_router=options.shared_router,
        init_lambda=options.init_lambda,
        init_std=options.router_init_std,
        mode=options.mode,
        routing_tokens=options.routing_tokens,
        heads=dict(zip(tasks, classes, strict=True)) if head else {},
        head=head or "",
    )
    if options.sparsity:
        shapes = {name: sources.manifest.shapes[sources.stored_name(f"{name}.weight")] for name in ensembling.linears}
        kept = {name: options.kept_elements(math.prod(shape)) for name, shape in shapes.items()}
        ensembling = replace(ensembling, kept=kept)
    return ensembling, notes


class _Output:
    """Where the tensors of the output come from, by their names in it; see `Plan`."""

    def __init__(self, job: Job, sources: _Sources, config: PretrainedConfig) -> None:
        try:
            made = hub_state(config)
        except ValueError as error:
            raise click.ClickException(f"{sources.base}: {error}") from error
        self._job, self._sources, self._dtype = job, sources, config.dtype
        self._names = hub_names(*made)
        self.wanted = manifest_from(*made).shapes
        self.copies: dict[str, tuple[ModelReference, str]] = {}
        self.computed: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _copy(self, name: str, model: ModelReference, stored: str) -> None:
        headers, name = self._sources.headers[model], self._names[name]
        # what a tower is cut out of has its projection beside it
        self.copies[name] = model, stored if stored == PROJECTION else headers.prefix + stored
        self.shapes[name] = headers.shapes[stored]

    def _compute(self, name: str, task: type[Task], /, **fields: Any) -> None:
        name = self._names[name]
        self.computed[name] = task(shape=self.wanted[name], dtype=str(self._dtype), **fields)
        self.shapes[name] = self.wanted[name]

    def ensemble(self, parameter: str, vectors_name: str, kept: int | None = None) -> None:
        """The base's parameter, and the task vectors of all sources."""
        sources, stored = self._sources, self._sources.stored_name(parameter)
        self._copy(parameter, sources.base, stored)
        vectors = TaskVectors(
            base=sources.base,
            sources=tuple(self._job.experts),
            tensor=stored,
            aliases=sources.manifest.aliases(stored),
            load=LoadTensor if self._job.options.allow_nonfinite else LoadFiniteTensor,
        )
        if kept is None:
            self._compute(vectors_name, Stacked, vectors=vectors)
            return
        pruned, width = Pruned(vectors=vectors, kept=kept), sources.manifest.shapes[stored][1]
        for part in ("values", "columns", "row_ends"):
            self._compute(
                f"{parameter.rpartition('.')[0]}.{part}", PartOfPruned, pruned=pruned, part=part, width=width
            )

    def add_routers(self) -> None:
        options = self._job.options
        for name in self._names:
            if not name.startswith("routers."):
                continue
            if name.endswith("bias"):
                value = 0.0 if name.endswith("hidden.bias") else options.init_lambda
                self._compute(name, Filled, name=self._names[name], value=value)
            else:
                random: dict[str, Any] = {"mode": "random", "std": options.router_init_std, "seed": self._job.seed}
                self._compute(name, RandomTensor, name=self._names[name], **random)

    def copy_heads(self, head: str) -> None:
        for part in ("weight", "bias"):
            for index, model in enumerate(self._job.experts):
                if f"{head}.{part}" in self._sources.stored:
                    self._copy(f"{head}.{index}.{part}", model, self._sources.stored[f"{head}.{part}"])

    def add_clip_heads(self, head: str) -> None:
        sources = self._sources
        for index, (model, of_clip) in enumerate(zip(self._job.experts, sources.clip_heads, strict=True)):
            self._compute(f"{head}.{index}.classes.weight", FromHeadFile, path=of_clip.path, part="classes")
            if model in sources.projecting:
                self._copy(f"{head}.{index}.projection.weight", model, PROJECTION)
            else:
                self._compute(f"{head}.{index}.projection.weight", FromHeadFile, path=of_clip.path, part="projection")


def _check_one_architecture(base: ModelReference, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    wanted = configs[base].architectures
    for model, config in configs.items():
        if config.architectures != wanted or not wanted:
            raise click.ClickException(
                f"{model} is a {config.architectures} and {base} a {wanted}: they must be one class"
            )
    try:
        auto_class_of(wanted[0])
    except ValueError as error:
        raise click.ClickException(f"{base}: {error}") from error


def _groups(
    job: Job, network: PreTrainedModel, head: str | None, upscale: Grouping | Literal["all"]
) -> dict[str, list[str]]:
    try:
        if upscale == "all":
            return weighed_tensors(network, head)
        return ensembled_groups(network, upscale, job.options.layers)
    except ValueError as error:
        raise click.ClickException(f"{job.base}: {error}") from error


def _choose_part(job: Job, sources: _Sources) -> tuple[Part, str]:
    """What `upscale: auto` takes, and what of that the card says. Reads the weights of all sources."""
    if any(model.lora for model in job.sources):
        raise click.ClickException(
            "upscale: auto reads the weights of all sources before the merge: merge each LoRA into its base first, or "
            "choose upscale: mlp or attention"
        )

    def reader(model: ModelReference) -> Callable[[str], Tensor]:
        options = job.merge_options
        loader = model.lazy_loader(cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle)
        return lambda name: loader.get_tensor(sources.headers[model].prefix + name)

    try:
        names = names_by_layer(sources.network, sources.stored, job.options.layers)
        readers = dict(zip(names_of(job.experts), map(reader, job.experts), strict=True))
        variation = measure(names, reader(sources.base), readers, quiet=job.merge_options.quiet)
        return (part := decide(variation)), _notes(part, variation)
    except ValueError as error:
        raise click.ClickException(f"upscale: auto: {error}") from error


def _notes(chosen: Part, variation: Mapping[Part, Variation]) -> str:
    what = {"mlp": "MLP", "attention": "attention"}
    rows = [
        f"| {what[part]} | {found.mean_change:.4g} | {found.mean_change_per_parameter:.4g} |"
        for part, found in variation.items()
    ]
    return "\n".join(
        [
            f"`upscale: auto` chose `{chosen}`: fine-tuning changed it more (E-WEMoE, figure 3a). What counts is the "
            "squared L2 norm of a module's task vector, in the mean over sources and blocks. It is a total, so that "
            "a module of more parameters counts for more.",
            "",
            "| module | squared L2 change | per parameter |",
            "|---|---:|---:|",
            *rows,
        ]
    )


def _check_all_of(job: Job) -> None:
    try:
        check_all(job.options)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if job.config.tokenizer or job.config.tokenizer_source:
        raise click.ClickException(
            "upscale: all does not go with tokenizer: the embeddings' task vectors are not aligned; give the sources "
            "the base's vocabulary and leave it out"
        )


def check_all(options: WemoeOptions) -> None:
    """`ValueError` for what `upscale: all` cannot be put together with."""
    refused = {
        f"router_layers: {options.router_layers}": options.router_layers
        and "embeddings and norms have no hidden states before them that a router could read; write router_layers: 0",
        f"sparsity: {options.sparsity}": options.sparsity and "task vectors are kept whole; write sparsity: 0",
        f"upscale_layers: {options.upscale_layers}": options.upscale_layers != "all"
        and "every parameter is weighed, in blocks or not; leave it out, or take another upscale",
    }
    for what, why in refused.items():
        if why:
            raise ValueError(f"upscale: all does not go with {what}: {why}")


def _check_stored_itself(parameter: str, sources: _Sources) -> None:
    name = sources.stored_name(parameter)
    for model, headers in sources.headers.items():
        if name not in headers.shapes:
            raise click.ClickException(
                f"{model} has {name} only under the name of a tensor that is tied to it: save it again"
            )


def _numbers(given: int | str) -> list[int] | None:
    """`all`, or numbers and ranges, as in 0,3,6-11."""
    if given == "all":
        return None
    numbers: list[int] = []
    for part in str(given).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            raise ValueError("write all, or numbers and ranges that go up, as 6-11 or 0,3,6")
        numbers += found
    return numbers


def _head_of_tasks(network: PreTrainedModel, configs: Mapping[ModelReference, PretrainedConfig]) -> str | None:
    """The classification head, where not all models have the same classes, by their names.

    Where nobody named them (`LABEL_0`, `LABEL_1` …), as many classes of two models are not taken for the same.
    """
    head = next(
        (name for name, module in network.named_modules() if name in _HEADS and hasattr(module, "weight")), None
    )
    classes = [config.id2label for config in configs.values()]
    are_named = any(not str(label).startswith("LABEL_") for label in classes[0].values())
    return head if head and not (are_named and all(each == classes[0] for each in classes)) else None


def _output_config(base: PretrainedConfig, ensembling: Ensembling) -> PretrainedConfig:
    architecture = base.architectures[0]
    config_type: Any = config_class(type(base))  # type: ignore[arg-type]
    output: Any = find_architecture(f"WEMoE{architecture}")
    ours = ("model_type", "architectures", "auto_map", "dtype")
    values = {key: value for key, value in base.to_dict().items() if key not in ours}
    if len(ensembling.heads) == 1:
        (names,) = ensembling.heads.values()
        values |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return config_type(
        **values,
        ensembling=ensembling.as_dict(),
        architectures=[f"WEMoE{architecture}"],
        auto_map={
            "AutoConfig": f"configuration_wemoe.{config_type.__name__}",
            output._auto_class: f"{Path(inspect.getfile(output)).stem}.{output.__name__}",
        },
    )


WEMOE_METHODS = (
    Wemoe(
        "wemoe",
        "WEMoE (weight-ensembling mixture of experts)",
        _WEMOE,
        "fine-tunes of one base become one model whose MLPs weigh their task vectors per input",
        options_type=WemoeOptions,
    ),
    Wemoe(
        "ewemoe",
        "E-WEMoE (weight-ensembling mixture of sparse experts)",
        _EWEMOE,
        "wemoe with pruned task vectors, stored sparse, and one router for all blocks",
        options_type=EwemoeOptions,
    ),
)
