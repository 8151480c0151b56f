"""`wemoe` and `ewemoe`: fine-tunes of one base become one model whose MLPs weigh their task vectors
per input.

Everything but the upscaled modules is merged by the method that `shared:` names, task arithmetic in
the papers. An upscaled linear module keeps the base's weight and every source's task vector, whole
or, in E-WEMoE, pruned to its largest elements and stored as such (WEMoE 3.1 and 3.2).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mergekit.common import ModelReference
from mergekit.graph import Task
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import hub_names, hub_state, manifest_from
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import (
    names_of,
    output_dtype,
)
from mergekit_moe_ext.merging.tasks import Filled, RandomTensor
from mergekit_moe_ext.modeling import find_architecture
from mergekit_moe_ext.modeling.configuration_wemoe import (
    Ensembling,
    class_names,
    config_class,
    vectors_of,
)
from mergekit_moe_ext.wemoe.clip_heads import (
    PROJECTION,
    FromHeadFile,
    classifier_config,
)
from mergekit_moe_ext.wemoe.groups import Grouping, Part, ensembled_groups, weighed_tensors
from mergekit_moe_ext.wemoe.options import EwemoeOptions, WemoeModelOptions, WemoeOptions, check_all
from mergekit_moe_ext.wemoe.sources import Sources, head_of_tasks, read_sources
from mergekit_moe_ext.wemoe.task_vectors import PartOfPruned, Pruned, Stacked, TaskVectors
from mergekit_moe_ext.wemoe.variation import Variation, decide, measure, names_by_layer

_WEMOE = "https://arxiv.org/abs/2402.00433"
_EWEMOE = "https://arxiv.org/abs/2410.21804"


class Wemoe(StructuralMethod):
    model_options_type = WemoeModelOptions

    def __init__(self, *args: Any, options_type: type[WemoeOptions]) -> None:
        super().__init__(*args)
        self.options_type = options_type

    def shared_method_name(self, options: Any) -> str:
        return options.shared

    def plan(self, job: Job) -> Plan:
        sources = read_sources(job, self.spec.name)
        ensembling, notes = _ensembling(job, sources)
        like = (
            classifier_config(sources.config, sources.clip_heads)
            if sources.clip_heads
            else sources.config
        )
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
        rest = [
            name
            for name in output.wanted
            if name not in output.copies and name not in output.computed
        ]
        return Plan(
            config=config,
            num_experts=len(ensembling.experts),
            experts_per_token=len(ensembling.experts),
            routed_per="sample",
            shared={name: sources.manifest.shared_tensor(name) for name in rest},
            copies=output.copies,
            computed=output.computed,
            integers=frozenset(
                name for name in output.computed if name.endswith((".columns", ".row_ends"))
            ),
            dtype=dtype,
            notes=notes,
        )


def _ensembling(job: Job, sources: Sources) -> tuple[Ensembling, str]:
    """And what of it the card says."""
    options, tasks, notes = job.options, names_of(job.experts), ""
    head = "classifier" if sources.clip_heads else head_of_tasks(sources.network, sources.configs)
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
        router_init_std=options.router_init_std,
        mode=options.mode,
        routing_tokens=options.routing_tokens,
        heads=dict(zip(tasks, classes, strict=True)) if head else {},
        head=head or "",
    )
    if options.sparsity:
        shapes = {
            name: sources.manifest.shapes[sources.stored_name(f"{name}.weight")]
            for name in ensembling.linears
        }
        kept = {name: options.kept_elements(math.prod(shape)) for name, shape in shapes.items()}
        ensembling = replace(ensembling, kept=kept)
    return ensembling, notes


class _Output:
    """Where the tensors of the output come from, by their names in it; see `Plan`."""

    def __init__(self, job: Job, sources: Sources, config: PretrainedConfig) -> None:
        try:
            made = hub_state(config)
        except ValueError as error:
            raise UserError(f"{sources.base}: {error}") from error
        self._job, self._sources, self._dtype = job, sources, config.dtype
        self._names = hub_names(*made)
        self.wanted = manifest_from(*made).shapes
        self.copies: dict[str, CopiedTensor] = {}
        self.computed: dict[str, Any] = {}

    def _copy(self, name: str, model: ModelReference, stored: str) -> None:
        headers = self._sources.headers[model]
        # what a tower is cut out of has its projection beside it
        in_files = stored if stored == PROJECTION else headers.prefix + stored
        self.copies[self._names[name]] = CopiedTensor(model, in_files, headers.shapes[stored])

    def _compute(
        self, name: str, task: type[Task], shape: tuple[int, ...], /, **fields: Any
    ) -> None:
        self.computed[self._names[name]] = task(shape=shape, dtype=str(self._dtype), **fields)

    def ensemble(self, parameter: str, vectors_name: str, kept: int | None = None) -> None:
        """The base's parameter, and the task vectors of all sources."""
        sources, experts = self._sources, self._job.experts
        stored = sources.stored_name(parameter)
        shape = sources.manifest.shapes[stored]
        aliases = sources.manifest.aliases(stored)
        self._copy(parameter, sources.base, stored)
        vectors = TaskVectors(
            base=self._job.load(sources.base, stored, aliases=aliases),
            sources=tuple(self._job.load(model, stored, aliases=aliases) for model in experts),
        )
        if kept is None:
            self._compute(vectors_name, Stacked, (len(experts), *shape), vectors=vectors)
            return
        pruned = Pruned(vectors=vectors, kept=kept)
        rows, width = shape
        module = parameter.rpartition(".")[0]
        for part, length in {"values": kept, "columns": kept, "row_ends": rows}.items():
            size = (len(experts), length)
            self._compute(
                f"{module}.{part}", PartOfPruned, size, pruned=pruned, part=part, width=width
            )

    def add_routers(self) -> None:
        options = self._job.options
        for name in self._names:
            if not name.startswith("routers."):
                continue
            stored = self._names[name]
            shape = self.wanted[stored]
            if name.endswith("bias"):
                value = 0.0 if name.endswith("hidden.bias") else options.init_lambda
                self._compute(name, Filled, shape, name=stored, value=value)
            else:
                random: dict[str, Any] = {
                    "mode": "random",
                    "std": options.router_init_std,
                    "seed": self._job.seed,
                }
                self._compute(name, RandomTensor, shape, name=stored, **random)

    def copy_heads(self, head: str) -> None:
        for part in ("weight", "bias"):
            for index, model in enumerate(self._job.experts):
                if f"{head}.{part}" in self._sources.stored:
                    self._copy(
                        f"{head}.{index}.{part}", model, self._sources.stored[f"{head}.{part}"]
                    )

    def add_clip_heads(self, head: str) -> None:
        sources = self._sources
        for index, (model, of_clip) in enumerate(
            zip(self._job.experts, sources.clip_heads, strict=True)
        ):
            classes, projection = (
                f"{head}.{index}.classes.weight",
                f"{head}.{index}.projection.weight",
            )
            shape = of_clip.shapes["text_embeds"]
            self._compute(classes, FromHeadFile, shape, path=of_clip.path, part="classes")
            if model in sources.projecting:
                self._copy(projection, model, PROJECTION)
            else:
                shape = of_clip.shapes[PROJECTION]
                self._compute(projection, FromHeadFile, shape, path=of_clip.path, part="projection")


def _groups(
    job: Job, network: PreTrainedModel, head: str | None, upscale: Grouping | Literal["all"]
) -> dict[str, list[str]]:
    try:
        if upscale == "all":
            return weighed_tensors(network, head)
        return ensembled_groups(network, upscale, job.options.layers)
    except ValueError as error:
        raise UserError(f"{job.base}: {error}") from error


def _choose_part(job: Job, sources: Sources) -> tuple[Part, str]:
    """What `upscale: auto` takes, and what of that the card says. Reads the weights of all
    sources."""
    if any(model.lora for model in job.sources):
        raise UserError(
            "upscale: auto reads the weights of all sources before the merge: merge each LoRA into "
            "its base first, or choose upscale: mlp or attention"
        )

    def reader(model: ModelReference) -> Callable[[str], Tensor]:
        options = job.merge_options
        loader = model.lazy_loader(
            cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle
        )
        return lambda name: loader.get_tensor(sources.headers[model].prefix + name)

    try:
        names = names_by_layer(sources.network, sources.stored, job.options.layers)
        readers = dict(zip(names_of(job.experts), map(reader, job.experts), strict=True))
        variation = measure(names, reader(sources.base), readers, quiet=job.merge_options.quiet)
        return (part := decide(variation)), _notes(part, variation)
    except ValueError as error:
        raise UserError(f"upscale: auto: {error}") from error


def _notes(chosen: Part, variation: Mapping[Part, Variation]) -> str:
    what = {"mlp": "MLP", "attention": "attention"}
    rows = [
        f"| {what[part]} | {found.mean_change:.4g} | {found.mean_change_per_parameter:.4g} |"
        for part, found in variation.items()
    ]
    return "\n".join(
        [
            f"`upscale: auto` chose `{chosen}`: fine-tuning changed it more (E-WEMoE, figure 3a). "
            "What counts is the squared L2 norm of a module's task vector, in the mean over "
            "sources and blocks. It is a total, so that a module of more parameters counts for "
            "more.",
            "",
            "| module | squared L2 change | per parameter |",
            "|---|---:|---:|",
            *rows,
        ]
    )


def _check_all_of(job: Job) -> None:
    check_all(job.options)
    if job.config.tokenizer or job.config.tokenizer_source:
        raise UserError(
            "upscale: all does not go with tokenizer: the embeddings' task vectors are not "
            "aligned; give the sources the base's vocabulary and leave it out"
        )


def _check_stored_itself(parameter: str, sources: Sources) -> None:
    name = sources.stored_name(parameter)
    for model, headers in sources.headers.items():
        if name not in headers.shapes:
            raise UserError(
                f"{model} has {name} only under the name of a tensor that is tied to it: save it "
                "again"
            )


def _output_config(base: PretrainedConfig, ensembling: Ensembling) -> PretrainedConfig:
    architecture = base.architectures[0]
    config_type: Any = config_class(type(base))  # type: ignore[arg-type]
    output: Any = find_architecture(f"WEMoE{architecture}")
    ours = ("model_type", "architectures", "auto_map", "dtype")
    values = {key: value for key, value in base.to_dict().items() if key not in ours}
    if len(ensembling.heads) == 1:
        (names,) = ensembling.heads.values()
        values |= {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }
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
