"""The methods `wemoe` and `ewemoe`: fine-tunes of one base become one model whose MLPs weigh their
task vectors per input.

All parameters outside the upscaled modules are merged by the method that `shared:` names, task
arithmetic in the papers. An upscaled linear module keeps the base's weight and every source's task
vector, whole or, in E-WEMoE, pruned to its largest elements and stored sparse (WEMoE 3.1 and 3.2).
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
    loader_of,
    names_of,
    output_dtype,
    views_of,
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
from mergekit_moe_ext.wemoe.options import (
    EwemoeOptions,
    WemoeModelOptions,
    WemoeOptions,
    check_all,
    check_pruning,
)
from mergekit_moe_ext.wemoe.sources import Sources, head_of_tasks, read_sources
from mergekit_moe_ext.wemoe.task_vectors import (
    PartOfPruned,
    Pruned,
    Stacked,
    TaskVectors,
    WithZeros,
)
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
        base_config = sources.config
        if sources.clip_heads:
            base_config = classifier_config(base_config, sources.clip_heads)
        config = _output_config(base_config, ensembling)
        dtype = output_dtype(job, sources.headers)
        config.dtype = dtype
        output = _Output(job, sources, config)
        for linear in ensembling.linears:
            output.ensemble(f"{linear}.weight", f"{linear}.vectors", ensembling.kept.get(linear))
            if f"{linear}.bias" in sources.stored:
                bias = f"{linear}.bias"
                if job.options.prune_biases:
                    output.ensemble_with_zeros(bias, f"{linear}.bias_vectors")
                else:
                    output.ensemble(bias, f"{linear}.bias_vectors")
        for parameter in ensembling.groups if ensembling.per_tensor else ():
            _check_stored_itself(parameter, sources)
            output.ensemble(parameter, vectors_of(parameter))
        output.check_joined()
        output.add_routers()
        if sources.clip_heads:
            output.add_clip_heads(ensembling.head)
        elif ensembling.head:
            output.copy_heads(ensembling.head)
        # Every other tensor of the output is one that all sources have, too.
        shared = {}
        for name in output.shapes:
            if name not in output.copies and name not in output.computed:
                shared[name] = sources.manifest.shared_tensor(name)
        indices = [name for name in output.computed if name.endswith((".columns", ".row_ends"))]
        return Plan(
            config=config,
            num_experts=len(ensembling.experts),
            experts_per_token=len(ensembling.experts),
            routed_per="sample",
            shared=shared,
            copies=output.copies,
            computed=output.computed,
            integers=frozenset(indices),
            dtype=dtype,
            views=views_of(sources.headers),
            notes=notes,
        )


def _ensembling(job: Job, sources: Sources) -> tuple[Ensembling, str]:
    """The ensembling that the options ask for, and the notes on it for the card."""
    options = job.options
    tasks = names_of(job.experts)
    notes = ""
    head = "classifier" if sources.clip_heads else head_of_tasks(sources.network, sources.configs)
    upscale = options.upscale
    check_pruning(options)
    if upscale == "all":
        _check_all_of(job)
    if upscale == "auto":
        upscale, notes = _choose_part(job, sources)
    if sources.clip_heads:
        classes = [list(clip_head.classes) for clip_head in sources.clip_heads]
    else:
        classes = [class_names(sources.configs[model]) for model in job.experts]
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
        kept = {}
        for name in ensembling.linears:
            shape = sources.manifest.shapes[sources.stored_name(f"{name}.weight")]
            kept[name] = options.kept_elements(math.prod(shape))
        ensembling = replace(ensembling, kept=kept)
    return ensembling, notes


class _Output:
    """The origins of the output's tensors, by their names in it; see `Plan`.

    `shapes` are those of all tensors of the output. Methods take names as the network has them, and
    `_names` holds those in the output's files.
    """

    def __init__(self, job: Job, sources: Sources, config: PretrainedConfig) -> None:
        try:
            network, state = hub_state(config)
        except ValueError as error:
            raise UserError(f"{sources.base}: {error}") from error
        self._job = job
        self._sources = sources
        self._dtype = config.dtype
        self._names = hub_names(network, state)
        self._joined_in: dict[str, str] = {}
        self._copied_parts: set[str] = set()
        for joined, parts in sources.joined.items():
            self._joined_in |= dict.fromkeys(parts, joined)
        self.shapes = manifest_from(network, state).shapes
        self.copies: dict[str, CopiedTensor] = {}
        self.computed: dict[str, Any] = {}

    def _copy(self, name: str, model: ModelReference, stored: str) -> None:
        headers = self._sources.headers[model]
        if name in self._joined_in:
            joined = self._joined_in[name]
            self.copies[joined] = CopiedTensor(model, joined, headers.shapes[joined])
            self._copied_parts.add(name)
            return
        # In the files of a whole CLIP the tower's tensors have a prefix, but the projection, which
        # lies beside the tower, has none.
        name_in_files = stored if stored == PROJECTION else headers.prefix + stored
        self.copies[self._names[name]] = CopiedTensor(model, name_in_files, headers.shapes[stored])

    def _compute(
        self, name: str, task: type[Task], shape: tuple[int, ...], /, **fields: Any
    ) -> None:
        self.computed[self._names[name]] = task(shape=shape, dtype=str(self._dtype), **fields)

    def ensemble(self, parameter: str, vectors_name: str, kept: int | None = None) -> None:
        """Add the base's parameter and the task vectors of all sources, whole or with `kept`
        elements each.
        """
        vectors, shape = self._with_vectors(parameter)
        count = len(vectors.sources)
        if kept is None:
            self._compute(vectors_name, Stacked, (count, *shape), vectors=vectors)
            return
        pruned = Pruned(vectors=vectors, kept=kept)
        rows, width = shape
        module = parameter.rpartition(".")[0]
        for part, length in {"values": kept, "columns": kept, "row_ends": rows}.items():
            size = (count, length)
            self._compute(
                f"{module}.{part}", PartOfPruned, size, pruned=pruned, part=part, width=width
            )

    def ensemble_with_zeros(self, parameter: str, vectors_name: str) -> None:
        """Add the base's parameter and the task vectors of all sources, pruned but not stored
        sparse.
        """
        vectors, shape = self._with_vectors(parameter)
        kept = self._job.options.kept_elements(math.prod(shape))
        pruned = Pruned(vectors=vectors, kept=kept)
        self._compute(vectors_name, WithZeros, (len(vectors.sources), *shape), pruned=pruned)

    def _with_vectors(self, parameter: str) -> tuple[TaskVectors, tuple[int, ...]]:
        """The task vectors of a parameter of the base, which is added, and the shape of each."""
        sources = self._sources
        stored = sources.stored_name(parameter)
        aliases = sources.manifest.aliases(stored)
        self._copy(parameter, sources.base, stored)
        loads = [self._job.load(model, stored, aliases=aliases) for model in self._job.experts]
        base = self._job.load(sources.base, stored, aliases=aliases)
        return TaskVectors(base=base, sources=tuple(loads)), sources.manifest.shapes[stored]

    def check_joined(self) -> None:
        """`UserError` where only some parts of a tensor that is stored joined are the base's."""
        for joined, parts in self._sources.joined.items():
            others = set(parts) - self._copied_parts
            if joined in self.copies and others:
                raise UserError(
                    f"{joined} of {self._sources.base} holds {', '.join(parts)}, of which "
                    f"{', '.join(sorted(others))} would not be upscaled: choose another `upscale`"
                )

    def add_routers(self) -> None:
        """Add all routers: random matrices, and last biases at which coefficients start."""
        options = self._job.options
        for name, stored in self._names.items():
            if not name.startswith("routers."):
                continue
            shape = self.shapes[stored]
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
        """Add the head of every source."""
        for part in ("weight", "bias"):
            stored = self._sources.stored.get(f"{head}.{part}")
            if stored is None:
                continue
            for index, model in enumerate(self._job.experts):
                self._copy(f"{head}.{index}.{part}", model, stored)

    def add_clip_heads(self, head: str) -> None:
        """Add a text head for every source, from its head file and its own projection, if any."""
        sources = self._sources
        pairs = zip(self._job.experts, sources.clip_heads, strict=True)
        for index, (model, clip_head) in enumerate(pairs):
            path = clip_head.path
            name = f"{head}.{index}.classes.weight"
            shape = clip_head.shapes["text_embeds"]
            self._compute(name, FromHeadFile, shape, path=path, part="classes")
            name = f"{head}.{index}.projection.weight"
            if model in sources.projecting:
                self._copy(name, model, PROJECTION)
            else:
                shape = clip_head.shapes[PROJECTION]
                self._compute(name, FromHeadFile, shape, path=path, part="projection")


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
    """The part that `upscale: auto` takes, and the notes on it for the card.

    The weights of all sources are read here.
    """
    if any(model.lora for model in job.sources):
        raise UserError(
            "upscale: auto reads the weights of all sources before the merge: merge each LoRA into "
            "its base first, or choose upscale: mlp or attention"
        )

    def reader(model: ModelReference) -> Callable[[str], Tensor]:
        loader = loader_of(job, model, sources.headers[model].view)
        return lambda name: loader.get_tensor(sources.headers[model].prefix + name)

    try:
        names = names_by_layer(sources.network, sources.stored, job.options.layers)
        readers = dict(zip(names_of(job.experts), map(reader, job.experts), strict=True))
        variation = measure(names, reader(sources.base), readers, quiet=job.merge_options.quiet)
        part = decide(variation)
    except ValueError as error:
        raise UserError(f"upscale: auto: {error}") from error
    return part, _notes(part, variation)


def _notes(part: Part, variation: Mapping[Part, Variation]) -> str:
    """Two sentences and a table in Markdown: the part that was chosen, and why."""
    lines = [
        f"`upscale: auto` chose `{part}`: fine-tuning changed it more (E-WEMoE, figure 3a). "
        "What counts is the squared L2 norm of a module's task vector, in the mean over "
        "sources and blocks. It is a total, so that a module of more parameters counts for "
        "more.",
        "",
        "| module | squared L2 change | per parameter |",
        "|---|---:|---:|",
    ]
    titles = {"mlp": "MLP", "attention": "attention"}
    for name, measured in variation.items():
        change = f"{measured.mean_change:.4g}"
        per_parameter = f"{measured.mean_change_per_parameter:.4g}"
        lines.append(f"| {titles[name]} | {change} | {per_parameter} |")
    return "\n".join(lines)


def _check_all_of(job: Job) -> None:
    check_all(job.options)
    if job.config.tokenizer or job.config.tokenizer_source:
        raise UserError(
            "upscale: all does not go with `tokenizer`: the embeddings' task vectors are not "
            "aligned; give the sources the base's vocabulary and leave `tokenizer` out"
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
    """The configuration of the output: the base's values, the ensembling, and the classes of a
    single head.
    """
    architecture = base.architectures[0]
    config_type: Any = config_class(type(base))  # type: ignore[arg-type]
    output: Any = find_architecture(f"WEMoE{architecture}")
    replaced = ("model_type", "architectures", "auto_map", "dtype")
    values = {key: value for key, value in base.to_dict().items() if key not in replaced}
    if len(ensembling.heads) == 1:
        (names,) = ensembling.heads.values()
        values["id2label"] = dict(enumerate(names))
        values["label2id"] = {name: number for number, name in enumerate(names)}
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
