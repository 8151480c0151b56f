"""The options of `wemoe` and `ewemoe`, of the merge and of each of its models."""

import re
from typing import Literal

from pydantic import Field, field_validator

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.method import MethodOptions, ModelOptions
from mergekit_moe_ext.wemoe.groups import Upscale


class WemoeOptions(MethodOptions):
    shared: str = Field(
        "task_arithmetic", description="tensor method that merges the rest of the network"
    )
    init_lambda: float = Field(0.3, description="initial value of every coefficient")
    router_layers: int = Field(
        2,
        ge=0,
        le=2,
        description="number of layers of every router: 0 (a learned constant, equation 4), 1 or 2",
    )
    router_init_std: float = Field(
        0.01,
        ge=0,
        description="standard deviation of a router's initial weights, as in the papers' code; 0.1 "
        "is the text's variance of 0.01, with which coefficients start far from init_lambda",
    )
    upscale: Upscale = Field(
        "mlp",
        description="part of every block that is routed; block has one router for all of it; auto "
        "is mlp or attention, whichever fine-tuning changed more; all is AdaMerging: every "
        "parameter of the network has learned constants, with router_layers: 0",
    )
    upscale_layers: int | str = Field(
        "all",
        description="blocks that are upscaled, of every stack: all, or numbers such as 6-11 or "
        "0,3,6",
    )
    sparsity: float = Field(
        0.0, ge=0, lt=1, description="share of every task vector that is dropped, by magnitude"
    )
    prune_biases: bool = Field(
        False,
        description="drop that share of every bias's task vector, too, as E-WEMoE's public code "
        "does",
    )
    shared_router: bool = Field(
        False, description="use one router for all blocks, which reads each block's own input"
    )
    mode: Literal["frozen", "running"] = Field(
        "frozen",
        description="rule for models that generate: frozen, the prefix chooses for the whole "
        "sequence; running, at every position the tokens up to it choose",
    )
    routing_tokens: int = Field(
        32,
        ge=1,
        description="number of tokens of the prefix in a plain forward pass; generate takes the "
        "prompt",
    )

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
        """The number of elements that are kept of a task vector of that size."""
        return max(1, round((1 - self.sparsity) * size))


class WemoeModelOptions(ModelOptions):
    head: str | None = Field(
        None,
        description="file with the embeddings of the classes' names, for a CLIP vision tower; see "
        "docs/wemoe.md",
    )


class EwemoeOptions(WemoeOptions):
    sparsity: float = Field(
        0.9, ge=0, lt=1, description="share of every task vector that is dropped, by magnitude"
    )
    shared_router: bool = Field(
        True, description="use one router for all blocks, which reads each block's own input"
    )


def check_all(options: WemoeOptions) -> None:
    """Raise a `UserError` for options that do not go with `upscale: all`."""
    prefix = "upscale: all does not go with"
    if options.router_layers:
        raise UserError(
            f"{prefix} router_layers: {options.router_layers}: embeddings and norms have no hidden "
            "states before them that a router could read; write router_layers: 0"
        )
    if options.sparsity:
        raise UserError(
            f"{prefix} sparsity: {options.sparsity}: task vectors are kept whole; write sparsity: 0"
        )
    if options.upscale_layers != "all":
        raise UserError(
            f"{prefix} upscale_layers: {options.upscale_layers}: every parameter is weighed, in "
            "blocks or not; leave it out, or take another upscale"
        )


def check_pruning(options: WemoeOptions) -> None:
    """Raise a `UserError` where biases would be pruned and nothing is dropped."""
    if options.prune_biases and not options.sparsity:
        raise UserError(
            "prune_biases: true drops nothing with sparsity: 0; write a sparsity above 0, or leave "
            "prune_biases out"
        )


def _numbers(layers: int | str) -> list[int] | None:
    """The numbers in a text such as "0,3,6-11"; None for "all"."""
    if layers == "all":
        return None
    numbers: list[int] = []
    for part in str(layers).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        interval = range(0)
        if match:
            first = int(match[1])
            last = int(match[2] or first)
            interval = range(first, last + 1)
        if not interval:
            raise UserError("write all, or numbers and ranges that go up, such as 6-11 or 0,3,6")
        numbers += interval
    return numbers
