"""What a structural merge method is: a method whose output has other tensors than its inputs.

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
from mergekit.merge_methods.base import MergeMethod, MergeMethodSpec
from mergekit.options import MergeOptions
from pydantic import BaseModel, ConfigDict, Field
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import SharedTensor
from mergekit_moe_ext.merging.tasks import LoadFiniteTensor

Fraction = Annotated[float, Field(ge=0, le=1)]


class MethodOptions(BaseModel):
    """Options that every structural method has; they stand under `parameters:` of the merge."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    allow_nonfinite: bool = Field(False, description="let NaN and Inf in a source through")


class ModelOptions(BaseModel):
    """Options of one entry of `models:`; they stand under its `parameters:`. A structural method
    may have some.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Job:
    """One merge as the user asked for it, after its keys and options were found to be good."""

    config: MergeConfiguration
    merge_options: MergeOptions
    method: "StructuralMethod"
    options: Any  # the method's own MethodOptions subclass
    model_options: Sequence[Any]  # the method's own ModelOptions subclass, per entry of `models:`
    shared: MergeMethod  # the tensor method that merges the shared parameters
    # Of sources that are a LoRA on a base the directories of the merged models, once there are any.
    merged_loras: Mapping[ModelReference, Path] = field(default_factory=dict)

    @property
    def experts(self) -> list[ModelReference]:
        """`models:` in order; one that is listed twice is here twice."""
        return [entry.model for entry in self.config.models or []]

    @property
    def base(self) -> ModelReference | None:
        return self.config.base_model

    @property
    def donor(self) -> ModelReference:
        """Where config and tokenizer come from."""
        return self.base or self.experts[0]

    @property
    def sources(self) -> list[ModelReference]:
        """Every model once: `models:` in order, then the base if it is not among them."""
        return list(dict.fromkeys([*self.experts, *([self.base] if self.base else [])]))

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the output, if the configuration says."""
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
    """A tensor of a source that the output takes as it is."""

    model: ModelReference
    name: str  # in the source's files
    shape: tuple[int, ...]  # as the source's header has it


@dataclass(frozen=True)
class Plan:
    """Where every tensor of the output comes from, by its name in the output."""

    config: PretrainedConfig  # of the output; its class is what transformers will load
    num_experts: int
    experts_per_token: int
    shared: Mapping[
        str, SharedTensor
    ]  # merged by the shared method from its namesakes in all sources
    copies: Mapping[str, CopiedTensor]
    computed: Mapping[str, Any]  # made by a mergekit Task that has a `shape`, that of what it makes
    dtype: torch.dtype  # of what is computed and in general of all
    # Where the method decides how much each model counts in a shared parameter: its `weight`, by
    # name. Else 1.
    weights: Mapping[str, Mapping[ModelReference, float]] = field(default_factory=dict)
    integers: frozenset[str] = frozenset()  # of `computed`, what no dtype of the output is for
    routed_per: Literal["token", "sequence", "sample"] = "token"
    notes: str = ""  # Markdown, for the card and for `mergekit-moe-ext plan`
    draw: Callable[[Path], None] | None = None  # a figure, for `mergekit-moe-ext plan --plot`

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the output, by its name, as what it comes from has it."""
        origins: dict[str, Any] = {**self.shared, **self.copies, **self.computed}
        return {name: origin.shape for name, origin in origins.items()}

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * sum(math.prod(shape) for shape in self.shapes.values())


class StructuralMethod(MergeMethod):
    """A merge method that mergekit's own planner cannot run, and ours can."""

    options_type: type[MethodOptions]
    model_options_type: type[ModelOptions] = ModelOptions

    def __init__(self, name: str, pretty_name: str, reference_url: str | None, description: str):
        self.spec = MergeMethodSpec(name=name, pretty_name=pretty_name, reference_url=reference_url)
        self.description = description

    @abstractmethod
    def shared_method_name(self, options: Any) -> str:
        """The tensor method that merges the shared parameters."""

    @abstractmethod
    def plan(self, job: Job) -> Plan:
        """Check the sources and say where every tensor comes from. Reads tensors only where they
        decide it.
        """

    def _execute(self, *_args: Any, **_kwargs: Any) -> Any:
        raise UserError(
            f"{self.spec.name} builds a new architecture, so it cannot merge single tensors; "
            "run it with mergekit-yaml or mergekit.merge.run_merge"
        )
