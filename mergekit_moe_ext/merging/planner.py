"""mergekit's planner, extended to run a structural method's `Plan`.

Shared parameters go through mergekit's own `plan_tensor` with the shared method, so that filters,
gradients, tokenizer handling and devices behave as mergekit documents them. For a stock method the
planner is the stock planner.
"""

import contextvars
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pydantic
import torch
from mergekit.architecture import ModelArchitecture, ModuleDefinition, WeightInfo
from mergekit.architecture.auto import infer_architecture_info
from mergekit.architecture.json_definitions import (
    JsonLayerTemplates,
    JsonModuleArchDef,
    JsonModuleArchitecture,
)
from mergekit.common import ModelReference
from mergekit.config import (
    ConfigReader,
    InputSliceDefinition,
    MergeConfiguration,
    OutputSliceDefinition,
)
from mergekit.graph import Task
from mergekit.io.tasks import (
    FinalizeModel,
    GatherTensors,
    LoaderCache,
    LoadTensor,
    SaveTensor,
    TensorWriterTask,
)
from mergekit.merge_methods.base import BasePolicy
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner as StockMergePlanner

from _mergekit_moe_ext_common.checkpoints import wrapper_of
from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.layouts import renaming_layer
from mergekit_moe_ext.merging.loras import merged_or_base
from mergekit_moe_ext.merging.manifest import (
    check_against,
    holds_all,
    is_bias_of_logits,
    is_known,
    manifest_of,
    names_in_files,
    needed_names,
    unmatched,
)
from mergekit_moe_ext.merging.method import Job, Plan, StructuralMethod, TensorMethod
from mergekit_moe_ext.merging.sources import DTYPES, Headers, stored_headers
from mergekit_moe_ext.merging.tasks import CopyTensors, GatherFiniteTensors, RefuseNonfinite
from mergekit_moe_ext.merging.views import install_views
from mergekit_moe_ext.merging.wrappers import vocabulary_key
from mergekit_moe_ext.merging.writer import BehindWriterTask, header_room

LOG = logging.getLogger(__name__)
NEUTRAL_PARAMETERS = {"weight": 1.0}
_LAYER = re.compile(r"\.(\d+)\.")
_COUNTER = ".num_batches_tracked"  # of a batch norm: on how many batches it was trained


class PlannedArchitecture(ModelArchitecture):
    """Carries a plan through mergekit's `run_merge`, in the place of a model's architecture."""

    job: Any
    plan: Any


# The architecture that our run_merge has prepared. None where mergekit's run_merge was bound to a
# name before this package was imported, so that ours does not run.
PREPARED: contextvars.ContextVar[PlannedArchitecture | None] = contextvars.ContextVar(
    "PREPARED", default=None
)


def prepare(job: Job) -> PlannedArchitecture:
    """Plan the job, and check the plan against the manifest of the output."""
    plan = job.method.plan(job)
    check_against(manifest_of(plan.config), plan.shapes)
    return PlannedArchitecture(
        modules={},
        architectures=[],
        model_type="",
        vocab_size_config_key=vocabulary_key(plan.config),
        job=job,
        plan=plan,
    )


def dense_architecture(
    described: Callable[[MergeConfiguration, MergeOptions], ModelArchitecture],
    config: MergeConfiguration,
    options: MergeOptions,
) -> ModelArchitecture:
    """The architecture of a dense merge, as mergekit describes it (`described`), with the key of
    its config for the number of tokens.

    Where mergekit's list reads another layout of the config, the architecture is inferred. Where
    mergekit cannot infer it, it lists nothing, and all is planned by what transformers saves.
    """
    assert config.base_model  # these methods require one
    of_donor = config.base_model.config(options.trust_remote_code)
    try:
        architecture = described(config, options)
    except NotImplementedError:  # it asks for the embedding, which CLIP and ResNet do not have
        architecture = _listing_nothing()
    try:
        for module in architecture.modules.values():
            module.architecture.num_layers(of_donor)
    except RuntimeError:  # Qwen2-VL's config has the number inside since transformers 5
        models = tuple(sorted(config.referenced_models(), key=str))
        architecture = infer_architecture_info(models, config.base_model, options)
    return architecture.model_copy(update={"vocab_size_config_key": vocabulary_key(of_donor)})


def _listing_nothing() -> ModelArchitecture:
    """An architecture of one module that has no tensors."""
    definition = JsonModuleArchDef(
        model_type="",
        architectures=[],
        pre_weights=[],
        layer_templates=JsonLayerTemplates(weights=[]),
        post_weights=[],
        override_num_layers=0,
    )
    module = ModuleDefinition(architecture=JsonModuleArchitecture(definition=definition))
    return ModelArchitecture(modules={"default": module}, architectures=[], model_type="")


class SharedConfigReader(ConfigReader):
    """A reader of the shared method's parameters, in which one that is not set has the structural
    method's default, and one that is required has its neutral value.
    """

    merged_base: ModelReference | None
    weights: Mapping[ModelReference, float]  # those that the structural method sets
    defaults: Mapping[str, Any]

    @property
    def base_model(self) -> ModelReference | None:
        return self.merged_base

    def parameter_sources(self, model: ModelReference | None = None) -> Iterable[Any]:
        yield from super().parameter_sources(model)
        unstated = {**NEUTRAL_PARAMETERS, **self.defaults}
        if model in self.weights:
            unstated["weight"] = self.weights[model]
        yield unstated


def merged_models(job: Job) -> tuple[list[ModelReference], ModelReference | None]:
    """The models that the shared method merges, each once, and the base that it gets.

    A base that is not in `models:` takes part only where the method uses a base; else it gives
    config and tokenizer and nothing more.
    """
    listed = list(dict.fromkeys(job.experts))
    uses_base = job.shared_method.spec.contract.base in (BasePolicy.OPTIONAL, BasePolicy.REQUIRED)
    if job.base is None or (job.base not in listed and not uses_base):
        return listed, None
    return job.sources, job.base


class MergePlanner(StockMergePlanner):
    def __init__(
        self, config: Any, arch_info: ModelArchitecture, options: Any, out_model_config: Any
    ):
        super().__init__(config, arch_info, options, out_model_config)
        if not isinstance(arch_info, PlannedArchitecture):
            return
        self._job: Job = arch_info.job
        self._plan_of_job: Plan = arch_info.plan
        self._method = self._job.shared_method
        if PREPARED.get() is None:
            LOG.warning(
                "run_merge was imported before mergekit_moe_ext, so the output is written in "
                "place, without staging; import mergekit_moe_ext first, or leave torch's autoload "
                "on"
            )
        install_views(self._plan_of_job.views)
        # Where the YAML names no dtype, mergekit writes a tensor in the dtype of its first source.
        # Sources of different dtypes have float32 or wider in common (`output_dtype`), and reading
        # all tensors so loses nothing. Sources of one narrower dtype are read as they are: what
        # they hold in float32 all the same (a router's correction, say) they hold for a reason.
        if self._job.dtype is None and self._plan_of_job.dtype.itemsize >= torch.float32.itemsize:
            self.config = config.model_copy(update={"dtype": str(self._plan_of_job.dtype)})
        # mergekit saves the object that it made before planning, so that object has to become ours.
        out_model_config.__class__ = type(self._plan_of_job.config)
        out_model_config.__dict__ = self._plan_of_job.config.__dict__
        tokenizer_task: Any = self._tokenizer_task
        if tokenizer_task:  # in the order of the YAML, which referenced_models() does not keep
            self._tokenizer_task: Any = tokenizer_task.model_copy(
                update={
                    "base_model": self._job.donor,
                    "referenced_models": tuple(self._job.sources),
                }
            )

    @property
    def _is_ours(self) -> bool:
        """Whether the merge is by a method of ours, structural or not."""
        is_structural = isinstance(self.arch_info, PlannedArchitecture)
        return is_structural or isinstance(self._method, TensorMethod)

    def _plan(self) -> None:
        if isinstance(self.arch_info, PlannedArchitecture):
            self._plan_job()
        elif isinstance(self._method, TensorMethod):
            self._plan_dense()
        else:
            super()._plan()

    def _plan_job(self) -> None:
        """Plans what a structural method has planned."""
        num_layers = layers_of(self._plan_of_job)
        for name, tensor in self._plan_of_job.shared.items():
            self._plan_shared(name, tensor.weight, num_layers)
        for name, task in self._plan_of_job.computed.items():
            if not self._job.options.allow_nonfinite and name not in self._plan_of_job.integers:
                task = RefuseNonfinite(tensor_task=task, name=name, out_dtype=self.config.out_dtype)
            self._tensors.append((WeightInfo(name=name), task))

    def _plan_dense(self) -> None:
        """Plans a merge by a tensor method of ours: what mergekit lists, and what it forgets."""
        are_whole = bool(self.config.models)
        headers = self._read_headers() if is_known(self.out_model_config) else {}
        super()._plan()
        self._drop_repeated()
        if headers:
            self._drop_unneeded(headers)
            self._check_held(headers)
            self._plan_unlisted(headers, are_whole)
            if are_whole:
                self._check_complete(headers)
        if not (self.config.parameters or {}).get("allow_nonfinite"):
            for index, (weight, task) in enumerate(self._tensors):
                out_dtype = weight.force_dtype or self.config.out_dtype
                task = _refusing_nonfinite(task, weight.name, out_dtype)
                self._tensors[index] = (weight, task)
        self._copy_counters()

    def _read_headers(self) -> dict[ModelReference, Headers]:
        """The headers of all sources by the names of today, by which mergekit reads them from now
        on, too.
        """
        known_names = needed_names(self.out_model_config)
        headers = {}
        for model in sorted(self.config.referenced_models(), key=str):
            in_files = stored_headers(merged_or_base(model, self.options), self.options)
            layer = renaming_layer(self.out_model_config, in_files.shapes.keys(), known_names)
            headers[model] = in_files.seen_through(layer)
        install_views({model: of_model.view for model, of_model in headers.items()})
        return headers

    def _check_complete(self, headers: Mapping[ModelReference, Headers]) -> None:
        """`UserError` where the output would lack what sources may hold under another name; a
        warning for what they lack themselves.
        """
        planned: set[str] = set()
        for weight, _ in self._tensors:
            planned |= _names_of(weight)
        lacking, without_use = unmatched(planned, self.out_model_config)
        if not lacking:
            return
        for model, of_model in headers.items():
            for name in sorted(of_model.shapes.keys() - planned):
                if not without_use(name):
                    raise UserError(
                        f"{self._method.spec.name} cannot merge {min(lacking)}, which no source "
                        f"holds. It may be what {model} has as {name}: load the model with its "
                        "class of transformers and save it again"
                    )
        LOG.warning(
            "no source holds %s (%d tensors in all): the output lacks it, too, and transformers "
            "starts it anew",
            min(lacking),
            len(lacking),
        )

    def _drop_repeated(self) -> None:
        """Drops a tensor that mergekit's list has a second time, as Qwen2.5-VL's has four."""
        seen: set[str] = set()
        entries: list[tuple[WeightInfo, Any]] = []
        for entry in self._tensors:
            if entry[0].name not in seen:
                entries.append(entry)
            seen.add(entry[0].name)
        self._tensors[:] = entries

    def _check_held(self, headers: Mapping[ModelReference, Headers]) -> None:
        """`UserError` for a tensor that some sources hold and others do not, where mergekit's list
        calls it optional: it would be merged without these.
        """
        for weight, _ in self._tensors:
            names = _names_of(weight)
            holders = [
                model for model, of_model in headers.items() if names & of_model.shapes.keys()
            ]
            if not weight.optional or not holders or len(holders) == len(headers):
                continue
            # mergekit stacks what is stored apart, experts in most cases, and renames nothing.
            parts = names_in_files(names, self.out_model_config)
            for model, of_model in headers.items():
                if model in holders or (len(parts) > 1 and parts & of_model.shapes.keys()):
                    continue
                wrapper = wrapper_of(of_model.shapes, names & headers[holders[0]].shapes.keys())
                hint = ". If it is there under another name, load the model with its class of "
                hint += "transformers and save it again"
                raise UserError(
                    f"{self._method.spec.name} cannot merge {weight.name}: {model} does not hold "
                    f"it, and {holders[0]} does{f': {wrapper}' if wrapper else hint}"
                )

    def _drop_unneeded(self, headers: Mapping[ModelReference, Headers]) -> None:
        """Drops the tensors of mergekit's list that the output does not need and no source holds:
        those of another variant of the architecture, such as GPT-NeoX's masks or the second norms
        of some Falcons. mergekit's own methods fail at them.
        """
        needed = needed_names(self.out_model_config)
        stored: set[str] = set()
        for of_model in headers.values():
            stored |= of_model.shapes.keys()
        kept = needed | stored
        entries: list[tuple[WeightInfo, Any]] = []
        for entry in self._tensors:
            if not kept.isdisjoint(_names_of(entry[0])):
                entries.append(entry)
        self._tensors[:] = entries

    def _plan_unlisted(self, headers: Mapping[ModelReference, Headers], are_whole: bool) -> None:
        """Plans the tensors that the output needs and mergekit's list of the architecture lacks,
        such as the biases of a Llama's attention, which mergekit's own methods leave out.

        are_whole: whether whole models are merged, and not slices of them. Slices may give a layer
            another number, and what is not listed cannot follow: `UserError`.
        """
        listed: set[str] = set()
        for weight, _ in self._tensors:
            listed |= _names_of(weight)
        # A list may have names in memory, for which mergekit reads those in files.
        listed |= names_in_files(listed, self.out_model_config)
        if holds_all(listed, self.out_model_config):
            return
        needed = needed_names(self.out_model_config)
        lost: set[str] = set()
        for of_model in headers.values():
            lost |= (of_model.shapes.keys() & needed) - listed
        if not lost:
            return
        of_list = (
            f"{self._method.spec.name} goes by mergekit's list of the tensors of a "
            f"{self.out_model_config.architectures[0]}, which lacks {len(lost)} of them, such as "
            f"{min(lost)}"
        )
        if not are_whole:
            raise UserError(f"{of_list}: merge whole models, under `models:`, not slices")
        manifest = manifest_of(self.out_model_config)
        for name in manifest.shapes:
            weight = manifest.shared_tensor(name).weight
            names = {name, *(weight.aliases or ())}
            if lost.isdisjoint(names):
                continue
            lost -= names
            _check_held_by_all(name, names, headers, of_list)
            self._plan_whole(weight, manifest.shapes)
        if lost:  # a layout of an earlier transformers, say
            raise UserError(f"{of_list}: save_pretrained writes no tensor {min(lost)}")

    def _copy_counters(self) -> None:
        """Takes the counters of batch norms from the base, as they are: there is nothing to merge
        in them, and mergekit refuses those that differ.
        """
        assert self.config.base_model
        for index, (weight, _) in enumerate(self._tensors):
            if weight.name.endswith(_COUNTER):
                load = LoadTensor(
                    model=self.config.base_model, tensor=weight.name, aliases=weight.aliases
                )
                uncast = weight.model_copy(update={"force_dtype": "int64"})
                self._tensors[index] = (uncast, load)

    def _plan_whole(self, weight: WeightInfo, all_names: Iterable[str]) -> None:
        """Plans a tensor of whole models, as mergekit plans those that it lists."""
        modules = self.config.modules
        assert modules  # mergekit has written `models:` as modules of one slice
        definition = next(iter(modules.values())).slices[0]
        # Gradients go over the layers of the tensor's own stack: a model may have two towers.
        position = _gradient_position(weight.name, _depth_of_stack(weight.name, all_names))
        reader = ConfigReader(config=self.config, slice_out=definition, t=position)
        models = [source.model for source in definition.sources]
        self.plan_tensor(weight, [weight] * len(models), models, reader)

    def _plan_shared(self, name: str, weight: WeightInfo, num_layers: int) -> None:
        models, base = merged_models(self._job)
        parameters = {entry.model: entry.parameters for entry in reversed(self._job.config.models)}
        sources = []
        for model in models:
            sources.append(
                InputSliceDefinition(
                    model=model, layer_range=(0, num_layers), parameters=parameters.get(model)
                )
            )
        reader = SharedConfigReader(
            config=self.config,
            slice_out=OutputSliceDefinition(sources=sources),
            t=_gradient_position(weight.name, num_layers),
            merged_base=base,
            weights=self._plan_of_job.weights.get(name, {}),
            defaults=self._plan_of_job.shared_defaults,
        )
        self.plan_tensor(weight, [weight] * len(models), models, reader)
        weight, task = self._tensors.pop()
        if not self._job.options.allow_nonfinite:
            task = _refusing_nonfinite(task, name, self.config.out_dtype)
        self._tensors.append((weight.model_copy(update={"name": name}), task))

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        if not self._is_ours:
            super().plan_tensor(weight, weights_in, models, cfg_reader)
            return
        if weight.optional and not any(map(_is_held, models, weights_in)):
            return
        # mergekit's own look for an optional tensor fails at one with aliases, as BertModel's are.
        wanted = weight.model_copy(update={"optional": False})
        if is_bias_of_logits(weight.name):
            wanted = wanted.model_copy(update={"vocabulary_axis": 1})
        try:
            super().plan_tensor(wanted, weights_in, models, cfg_reader)
            _, task = self._tensors.pop()
            self._tensors.append((weight, task))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"{self._method.spec.name} cannot merge {weight.name}: {first['input']!r}: "
                f"{first['msg']}"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{self._method.spec.name} cannot merge {weight.name}: {error}"
            ) from error

    def plan_to_disk(self, out_path: str) -> list[Task]:
        tasks = super().plan_to_disk(out_path)
        if not self._is_ours:
            return tasks
        finalize = next(task for task in tasks if isinstance(task, FinalizeModel))
        writer = self._writer_task(finalize)
        saves = []
        for task in finalize.tensor_save_tasks:
            saves.append(task.model_copy(update={"writer_task": writer}))
        copies: list[CopyTensors] = []
        if isinstance(self.arch_info, PlannedArchitecture):
            copies = self._copy_tasks(writer)
            saves = list(map(self._keeping_integers, saves))
        # Stock tasks that save or finalise are replaced by ours; all others (the tokenizer's) stay.
        others = []
        for task in tasks:
            if task is not finalize and task not in finalize.tensor_save_tasks:
                others.append(task)
        finalize_all = FinalizeModel(tensor_save_tasks=(*saves, *copies), writer_task=writer)
        return [*copies, *saves, finalize_all, *others]

    def _writer_task(self, finalize: FinalizeModel) -> TensorWriterTask:
        """What makes the writer of the output: one that writes behind the merge, if it is to write
        safetensors.
        """
        stock = finalize.writer_task
        if not stock.safe_serialization:
            return stock
        names = [task.tensor_name for task in finalize.tensor_save_tasks]
        if isinstance(self.arch_info, PlannedArchitecture):
            names += self._plan_of_job.copies
        return BehindWriterTask(**dict(stock), header_room=header_room(names))

    def _keeping_integers(self, task: Any) -> Any:
        """The task, or, for a tensor of integers, one that does not cast it."""
        is_integer = isinstance(task, SaveTensor) and task.tensor_name in self._plan_of_job.integers
        return task.model_copy(update={"dtype": None}) if is_integer else task

    def plan_in_memory(self) -> list[Any]:
        if isinstance(self.arch_info, PlannedArchitecture):
            raise UserError(f"{self._job.method.spec.name} writes to disk only")
        return super().plan_in_memory()

    def _copy_tasks(self, writer: TensorWriterTask) -> list[CopyTensors]:
        """One task per layer, with its experts in order."""
        by_layer: dict[str, list[tuple[str, LoadTensor]]] = defaultdict(list)
        for name, copy in self._plan_of_job.copies.items():
            layer = _LAYER.search(name)
            load = self._job.load(copy.model, copy.name, self.config.dtype or copy.dtype)
            by_layer[layer.group(1) if layer else ""].append((name, load))
        tasks = []
        for copies in by_layer.values():
            tasks.append(
                CopyTensors(
                    copies=tuple(copies),
                    writer_task=writer,
                    out_dtype=self.config.out_dtype,
                    clone=self.options.clone_tensors,
                )
            )
        return tasks


def _check_held_by_all(
    name: str, names: set[str], headers: Mapping[ModelReference, Headers], complaint: str
) -> None:
    """`UserError`, which begins with the complaint, where a source does not hold a tensor under one
    of its `names`, or holds it in a dtype that is not merged.
    """
    for model, of_model in headers.items():
        stored = names & of_model.shapes.keys()
        if not stored:
            raise UserError(f"{complaint}: {model} does not hold {name}")
        dtype = of_model.dtypes[stored.pop()]
        if dtype not in DTYPES.values() and not name.endswith(_COUNTER):
            raise UserError(f"{complaint}: {name} is {dtype} in {model}, not of floats")


def _is_held(model: ModelReference, weight: WeightInfo) -> bool:
    """Whether the files of a model hold a tensor under one of its own names."""
    stored = LoaderCache().get(model).index.tensor_paths
    return any(name in stored for name in (weight.name, *(weight.aliases or ())))


def _names_of(weight: WeightInfo) -> set[str]:
    """The names under which mergekit looks for a tensor."""
    return {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}


def layers_of(plan: Plan) -> int:
    """The number of layers that the config states; where it states none, as for two towers (CLIP),
    that of the deeper one. A tower that is copied as it is does not count.
    """
    stated = getattr(plan.config, "num_hidden_layers", None)
    if stated:
        return stated
    numbers = [1]
    for name in (*plan.shared, *plan.computed):
        layer = _LAYER.search(name)
        if layer:
            numbers.append(int(layer.group(1)) + 1)
    return max(numbers)


def _depth_of_stack(tensor_name: str, all_names: Iterable[str]) -> int:
    """The number of layers in the stack that a tensor is in; 1 outside layers."""
    layer = _LAYER.search(tensor_name)
    if not layer:
        return 1
    stack = tensor_name[: layer.start()]
    numbers = set()
    for name in all_names:
        other = _LAYER.search(name)
        if other and name[: other.start()] == stack:
            numbers.add(int(other.group(1)))
    return max(numbers) + 1


def _gradient_position(tensor_name: str, num_layers: int) -> float:
    """The position of a tensor in mergekit's gradients: 0 to 1 over the layers, 0 outside them."""
    layer = _LAYER.search(tensor_name)
    if not layer:
        return 0.0
    return int(layer.group(1)) / (num_layers - 1) if num_layers > 1 else 1.0


def _loading_finite(task: Any) -> Any:
    """A task of mergekit's that merges a tensor, with NaN and Inf refused in its inputs."""
    # What gathers the inputs lies in the method's own task, and one deeper where vocabularies are
    # aligned.
    if type(task) is GatherTensors:
        return GatherFiniteTensors(**dict(task))
    return task.model_copy(update={"gather_tensors": _loading_finite(task.gather_tensors)})


def _refusing_nonfinite(task: Any, name: str, out_dtype: str | None) -> RefuseNonfinite:
    """The task that merges a tensor, with NaN and Inf refused in its inputs and its result."""
    return RefuseNonfinite(tensor_task=_loading_finite(task), name=name, out_dtype=out_dtype)


def structural_method(name: str) -> StructuralMethod | None:
    """The structural method of this name; None if there is none."""
    from mergekit.merge_methods import registered_methods

    for method in registered_methods():
        if method.spec.name == name and isinstance(method, StructuralMethod):
            return method
    return None
