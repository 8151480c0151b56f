"""`wemoe` and `ewemoe`: fine-tunes of one base become one model whose MLPs weigh their task vectors per input.

Everything but the upscaled modules is merged by the method that `shared:` names, task arithmetic in the papers. An
upscaled linear module keeps the base's weight and every source's task vector, whole or, in E-WEMoE, pruned to its
largest elements and stored as such (WEMoE 3.1 and 3.2).
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import click
import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_moe_ext.ensembling import Upscale, ensembled_groups, weighed_tensors
from mergekit_moe_ext.gates import RandomTensor
from mergekit_moe_ext.manifest import hub_names, hub_state, manifest_from
from mergekit_moe_ext.methods.base import Job, MethodOptions, Plan, StructuralMethod
from mergekit_moe_ext.methods.sequence import names_of
from mergekit_moe_ext.modeling.configuration_wemoe import Ensembling, config_class
from mergekit_moe_ext.modeling.modeling_wemoe import auto_class_of
from mergekit_moe_ext.sources import Headers, check_same_size, output_dtype, read_configs, read_headers
from mergekit_moe_ext.tasks import Filled, LoadFiniteTensor

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
        description="what is routed in every block; block has one router for all of it; all is AdaMerging: every "
        "parameter of the network has learned constants, with router_layers: 0",
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


class EwemoeOptions(WemoeOptions):
    sparsity: float = Field(0.9, ge=0, lt=1, description="how much of every task vector is dropped, by magnitude")
    shared_router: bool = Field(True, description="one router for all blocks, each with its own input")


class Wemoe(StructuralMethod):
    def __init__(self, *args: Any, options_type: type[WemoeOptions]) -> None:
        super().__init__(*args)
        self.options_type = options_type

    def shared_method_name(self, options: Any) -> str:
        return options.shared

    def plan(self, job: Job) -> Plan:
        options, base = job.options, job.base
        if base is None or base in job.experts:
            raise click.ClickException(
                f"{self.spec.name} needs what its sources are fine-tunes of as `base_model:`, and not among `models:`"
            )
        configs = read_configs(job)
        _check_one_architecture(base, configs)
        check_same_size(job, configs)
        built = {model: hub_state(config) for model, config in configs.items()}
        manifests = {model: manifest_from(*each) for model, each in built.items()}
        headers = read_headers(job, configs, manifests)
        network, state = built[base]
        tasks = names_of(job.experts)
        head = _head_of_tasks(network, configs)
        groups = _groups(job, network, head)
        per_tensor = options.upscale == "all"
        linears = [] if per_tensor else [linear for group in groups.values() for linear in group]
        shapes, stored = manifests[base].shapes, hub_names(network, state)
        weights = {linear: _stored(base, stored, f"{linear}.weight") for linear in linears}
        kept = {}
        if options.sparsity:
            sizes = {linear: math.prod(shapes[weight]) for linear, weight in weights.items()}
            kept = {linear: max(1, round((1 - options.sparsity) * size)) for linear, size in sizes.items()}
        ensembling = Ensembling(
            experts=tasks,
            groups=groups,
            per_tensor=per_tensor,
            router_layers=options.router_layers,
            shared_router=options.shared_router,
            init_lambda=options.init_lambda,
            init_std=options.router_init_std,
            kept=kept,
            mode=options.mode,
            routing_tokens=options.routing_tokens,
            heads={task: configs[m].num_labels for task, m in zip(tasks, job.experts, strict=True)} if head else {},
            head=head or "",
        )
        config = _output_config(configs[base], ensembling)
        config.dtype = dtype = output_dtype(job, headers)
        try:
            made = hub_state(config)
        except ValueError as error:
            raise click.ClickException(f"{base}: {error}") from error
        wanted, output = manifest_from(*made).shapes, hub_names(*made)
        load = LoadTensor if options.allow_nonfinite else LoadFiniteTensor
        copies: dict[str, tuple[ModelReference, str]] = {}
        computed: dict[str, Any] = {}

        def add(name: str, task: type[Task], **fields: Any) -> None:
            name = output[name]
            computed[name] = task(shape=wanted[name], dtype=str(dtype), **fields)

        for parameter in groups if per_tensor else ():
            hub_name = _stored(base, stored, parameter)
            _check_stored_itself(hub_name, headers)
            copies[output[parameter]] = base, hub_name
            vectors = TaskVectors(base=base, sources=tuple(job.experts), tensor=hub_name, load=load)
            add(f"{parameter}_vectors", Stacked, vectors=vectors)
        for linear in linears:
            for part in ("weight", "bias"):
                name = stored.get(f"{linear}.{part}")
                if name is None:
                    continue
                copies[output[f"{linear}.{part}"]] = base, name
                vectors = TaskVectors(base=base, sources=tuple(job.experts), tensor=name, load=load)
                if part == "bias":
                    add(f"{linear}.bias_vectors", Stacked, vectors=vectors)
                elif linear not in kept:
                    add(f"{linear}.vectors", Stacked, vectors=vectors)
                else:
                    pruned = Pruned(vectors=vectors, kept=kept[linear])
                    for piece in ("values", "columns", "row_ends"):
                        add(f"{linear}.{piece}", PartOfPruned, pruned=pruned, part=piece, width=shapes[name][1])
        for name in wanted:
            if name.startswith("routers."):
                computed[name] = _router_tensor(name, wanted[name], job, dtype)
        for part in ("weight", "bias") if head else ():
            for index, model in enumerate(job.experts):
                if f"{head}.{part}" in stored:
                    copies[output[f"{head}.{index}.{part}"]] = model, stored[f"{head}.{part}"]
        rest = [name for name in wanted if name not in copies and name not in computed]
        return Plan(
            config=config,
            num_experts=len(tasks),
            experts_per_token=len(tasks),
            routed_per="sample",
            shared={name: manifests[base].weight_info(name) for name in rest},
            copies=copies,
            computed=computed,
            shapes={
                **{name: shapes[name] for name in rest},
                **{name: headers[model].shapes[source] for name, (model, source) in copies.items()},
                **{name: task.shape for name, task in computed.items()},
            },
            integers=frozenset(name for name in computed if name.endswith((".columns", ".row_ends"))),
            dtype=dtype,
        )


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


def _groups(job: Job, network: PreTrainedModel, head: str | None) -> dict[str, list[str]]:
    options, base = job.options, job.base
    try:
        if options.upscale == "all":
            _check_all(job)
            return weighed_tensors(network, head)
        return ensembled_groups(network, options.upscale, _numbers(options.upscale_layers))
    except ValueError as error:
        raise click.ClickException(f"{base}: {error}") from error


def _check_all(job: Job) -> None:
    """What `upscale: all` cannot be put together with."""
    options = job.options
    refused = {
        f"router_layers: {options.router_layers}": options.router_layers
        and "embeddings and norms have no hidden states before them that a router could read; write router_layers: 0",
        f"sparsity: {options.sparsity}": options.sparsity and "task vectors are kept whole; write sparsity: 0",
        f"upscale_layers: {options.upscale_layers}": options.upscale_layers != "all"
        and "every parameter is weighed, in blocks or not; leave it out, or take another upscale",
        "tokenizer": (job.config.tokenizer or job.config.tokenizer_source)
        and "the embeddings' task vectors are not aligned; give the sources the base's vocabulary and leave it out",
    }
    for what, why in refused.items():
        if why:
            raise click.ClickException(f"upscale: all does not go with {what}: {why}")


def _stored(base: ModelReference, stored: Mapping[str, str], name: str) -> str:
    if name not in stored:
        raise click.ClickException(f"{name} of {base} is not stored as it is used, so that it cannot be upscaled")
    return stored[name]


def _check_stored_itself(name: str, headers: Mapping[ModelReference, Headers]) -> None:
    for model, found in headers.items():
        if name not in found.shapes:
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
    ours = ("model_type", "architectures", "auto_map", "dtype")
    values = {key: value for key, value in base.to_dict().items() if key not in ours}
    return config_type(
        **values,
        ensembling=ensembling.as_dict(),
        architectures=[f"WEMoE{architecture}"],
        auto_map={
            "AutoConfig": f"configuration_wemoe.{config_type.__name__}",
            auto_class_of(architecture): f"modeling_wemoe.WEMoE{architecture}",
        },
    )


def _router_tensor(name: str, shape: tuple[int, ...], job: Job, dtype: torch.dtype) -> Any:
    if name.endswith("hidden.bias"):
        return Filled(name=name, shape=shape, value=0.0, dtype=str(dtype))
    if name.endswith(".bias"):
        return Filled(name=name, shape=shape, value=job.options.init_lambda, dtype=str(dtype))
    std = job.options.router_init_std
    return RandomTensor(name=name, shape=shape, mode="random", std=std, seed=job.seed, dtype=str(dtype))


class TaskVectors(Task[Tensor]):
    """Source minus base, of every source: (sources, *shape), in float32 or wider."""

    base: ModelReference
    sources: tuple[ModelReference, ...]
    tensor: str
    load: type[LoadTensor]

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str:
        return self.tensor

    def execute(self, **_kwargs: object) -> Tensor:
        start = self.load(model=self.base, tensor=self.tensor).execute()
        assert start is not None
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        vectors = start.new_empty(len(self.sources), *start.shape)
        for vector, model in zip(vectors, self.sources, strict=True):
            end = self.load(model=model, tensor=self.tensor).execute()
            assert end is not None
            torch.sub(end.to(start), start, out=vector)
        return vectors


class Stacked(Task[Tensor]):
    """Task vectors as they are written."""

    vectors: TaskVectors
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {"vectors": self.vectors}

    def execute(self, vectors: Tensor) -> Tensor:
        return vectors.to(dtype_from_name(self.dtype))


class Pruned(Task[tuple[Tensor, Tensor]]):
    """The largest elements of each task vector by magnitude, and where they lie in it: (sources, kept) each."""

    vectors: TaskVectors
    kept: int

    def arguments(self) -> dict[str, Task]:
        return {"vectors": self.vectors}

    def execute(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        flat = vectors.flatten(1)
        places = flat.abs().topk(self.kept, dim=1, sorted=False).indices.sort(dim=1).values
        return flat.gather(1, places), places


class PartOfPruned(Task[Tensor]):
    """`values`, the `columns` they lie in, or where each row ends among them."""

    pruned: Pruned
    part: Literal["values", "columns", "row_ends"]
    shape: tuple[int, ...]
    width: int
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {"pruned": self.pruned}

    def execute(self, pruned: tuple[Tensor, Tensor]) -> Tensor:
        values, places = pruned
        if self.part == "values":
            return values.to(dtype_from_name(self.dtype))
        if self.part == "columns":
            return (places % self.width).to(torch.uint16 if self.width <= 2**16 else torch.int32)
        rows = torch.arange(1, self.shape[1] + 1, device=places.device) * self.width
        return torch.searchsorted(places, rows.expand(len(places), -1).contiguous()).int()


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
