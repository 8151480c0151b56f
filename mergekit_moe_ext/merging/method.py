"""Structural merge methods, whose outputs have other tensors than their inputs.

Stock mergekit methods are tensor methods: they make one tensor out of its namesakes. A structural
method says for every tensor of the output where it comes from (`Plan`); the planner does the rest.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoadTensor
from mergekit.merge_methods.base import (
    FunctionalGroupMergeMethod,
    MergeMethod,
    MergeMethodSpec,
)
from mergekit.options import MergeOptions
from pydantic import BaseModel, ConfigDict, Field
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import SharedTensor
from mergekit_moe_ext.merging.tasks import LoadFiniteTensor
from mergekit_moe_ext.merging.views import View

Fraction = Annotated[float, Field(ge=0, le=1)]


class MethodOptions(BaseModel):
    """The options of every structural method; they stand under `parameters:` of the merge."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    allow_nonfinite: bool = Field(False, description="let NaN and Inf in the sources through")


class ModelOptions(BaseModel):
    """The options that a structural method has for one entry of `models:`; they stand under its
    `parameters:`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Job:
    """One merge as the user asked for it, after its keys and options have been checked."""

    config: MergeConfiguration
    merge_options: MergeOptions
    method: "StructuralMethod"
    options: Any  # of the method's own subclass of MethodOptions
    model_options: Sequence[Any]  # per entry of `models:`, of the method's subclass of ModelOptions
    shared_method: MergeMethod  # the tensor method that merges the shared parameters
    # Of sources that are a LoRA on a base the directories of the merged models, once there are any.
    merged_loras: Mapping[ModelReference, Path] = field(default_factory=dict)

    @property
    def experts(self) -> list[ModelReference]:
        """The models under `models:`, in order; one that is listed twice is here twice."""
        return [entry.model for entry in self.config.models or []]

    @property
    def base(self) -> ModelReference | None:
        return self.config.base_model

    @property
    def donor(self) -> ModelReference:
        """The model that config and tokenizer come from."""
        return self.base or self.experts[0]

    @property
    def sources(self) -> list[ModelReference]:
        """Every model once: those of `models:` in order, then the base if it is not among them."""
        models = self.experts
        if self.base:
            models.append(self.base)
        return list(dict.fromkeys(models))

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the output, if the configuration names one."""
        return dtype_from_name(self.config.out_dtype or self.config.dtype)

    @property
    def seed(self) -> int:
        return self.merge_options.random_seed or 0

    def load(
        self,
        model: ModelReference,
        name: str,
        dtype: str | None = None,
        aliases: tuple[str, ...] | None = None,
    ) -> LoadTensor:
        """The task that loads a tensor of a source, in `dtype` if one is named.

        It refuses NaN and Inf unless the user lets them through.
        """
        kind = LoadTensor if self.options.allow_nonfinite else LoadFiniteTensor
        return kind(model=model, tensor=name, dtype=dtype, aliases=aliases)


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor of a source that the output takes as it is, or cast to `dtype`."""

    model: ModelReference
    name: str  # in the source's files
    shape: tuple[int, ...]  # as the source's header has it
    dtype: str | None = None  # where the configuration names none


@dataclass(frozen=True)
class Plan:
    """The origin of every tensor of the output, by its name in the output.

    config: the output's; its class is the one that transformers will load.
    num_experts: the number of experts of a layer, for the card.
    experts_per_token: the number of them that a token, sequence or sample passes (`routed_per`).
    shared: tensors that the shared method merges from their namesakes in all sources.
    copies: tensors of single sources.
    computed: tensors that a mergekit Task makes, which has their shape as its `shape`.
    dtype: that of the computed tensors, and in general of all.
    weights: by shared tensor, the `weight` of each model, where the method sets it; 1 elsewhere.
    shared_defaults: the shared method's parameters where the configuration states none, in place of
        that method's own defaults.
    integers: the computed tensors that keep their own dtype.
    views: how sources are read whose files hold tensors in another form than the merge takes.
    untrained: what of the output cannot be used before it is trained, as `mergekit-moe-ext train`
        calls it, and how it starts: {"gates": "random"}.
    notes: Markdown for the card and for `mergekit-moe-ext plan`.
    draw: writes a figure, for `mergekit-moe-ext plan --plot`.
    """

    config: PretrainedConfig
    num_experts: int
    experts_per_token: int
    shared: Mapping[str, SharedTensor]
    copies: Mapping[str, CopiedTensor]
    computed: Mapping[str, Any]
    dtype: torch.dtype
    weights: Mapping[str, Mapping[ModelReference, float]] = field(default_factory=dict)
    shared_defaults: Mapping[str, Any] = field(default_factory=dict)
    integers: frozenset[str] = frozenset()
    views: Mapping[ModelReference, View] = field(default_factory=dict)
    routed_per: Literal["token", "sequence", "sample"] = "token"
    untrained: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    draw: Callable[[Path], None] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the output, by its name, as its origin states it."""
        origins: dict[str, Any] = {**self.shared, **self.copies, **self.computed}
        return {name: origin.shape for name, origin in origins.items()}

    @property
    def bytes(self) -> int:
        """The size of the output's weights."""
        return self.dtype.itemsize * sum(math.prod(shape) for shape in self.shapes.values())


class TensorMethod(FunctionalGroupMergeMethod):
    """A tensor method of this package.

    mergekit's own planner runs it; its configuration and its sources are checked before that, and
    its output appears whole or not at all, like a structural method's.
    """


class StructuralMethod(MergeMethod):
    """A merge method that mergekit's own planner cannot run, and ours can."""

    options_type: type[MethodOptions]
    model_options_type: type[ModelOptions] = ModelOptions

    def __init__(self, name: str, pretty_name: str, reference_url: str | None, description: str):
        self.spec = MergeMethodSpec(name=name, pretty_name=pretty_name, reference_url=reference_url)
        self.description = description

    @abstractmethod
    def shared_method_name(self, options: Any) -> str:
        """The name of the tensor method that merges the shared parameters."""

    def completed(self, config: MergeConfiguration, options: Any) -> MergeConfiguration:
        """The configuration with what the method's own options say of it. `UserError` for an
        option that does not go with it.
        """
        return config

    @abstractmethod
    def plan(self, job: Job) -> Plan:
        """The plan of a merge, after its sources have been checked.

        It reads tensors only where the plan depends on them.
        """

    def _execute(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UserError(
            f"{self.spec.name} builds a new architecture, so it cannot merge single tensors; "
            "run it with mergekit-yaml or mergekit.merge.run_merge"
        )
