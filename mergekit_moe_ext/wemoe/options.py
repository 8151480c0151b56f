"""The options of `wemoe` and `ewemoe`, of the merge and of each of its models."""

import re
from typing import Literal

from pydantic import Field, field_validator

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.method import MethodOptions, ModelOptions
from mergekit_moe_ext.wemoe.groups import Upscale


class WemoeOptions(MethodOptions):
    shared: str = Field(
        "task_arithmetic", description="the tensor method that merges the rest of the network"
    )
    init_lambda: float = Field(0.3, description="where the routers' coefficients start")
    router_layers: int = Field(
        2, ge=0, le=2, description="of every router: 0 is a learned constant (equation 4)"
    )
    router_init_std: float = Field(
        0.01,
        ge=0,
        description="standard deviation of a router's initial weights, as in the papers' code; 0.1 "
        "is the text's variance of 0.01, with which coefficients start far from init_lambda",
    )
    upscale: Upscale = Field(
        "mlp",
        description="what is routed in every block; block has one router for all of it; auto is "
        "mlp or attention, whichever fine-tuning changed more; all is AdaMerging: every parameter "
        "of the network has learned constants, with router_layers: 0",
    )
    upscale_layers: int | str = Field(
        "all",
        description="which blocks are upscaled: all, or numbers, as 6-11 or 0,3,6; of every stack "
        "of blocks",
    )
    sparsity: float = Field(
        0.0, ge=0, lt=1, description="how much of every task vector is dropped, by magnitude"
    )
    shared_router: bool = Field(
        False, description="one router for all blocks, each with its own input"
    )
    mode: Literal["frozen", "running"] = Field(
        "frozen",
        description="for models that generate: the prefix chooses (frozen), or at every position "
        "what precedes it",
    )
    routing_tokens: int = Field(
        32, ge=1, description="the prefix of a plain forward pass; generate takes the prompt"
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
        """Of a task vector of that size."""
        return max(1, round((1 - self.sparsity) * size))


class WemoeModelOptions(ModelOptions):
    head: str | None = Field(
        None,
        description="of a CLIP vision tower: a file with the embeddings of its classes' names; "
        "see docs/wemoe.md",
    )


class EwemoeOptions(WemoeOptions):
    sparsity: float = Field(
        0.9, ge=0, lt=1, description="how much of every task vector is dropped, by magnitude"
    )
    shared_router: bool = Field(
        True, description="one router for all blocks, each with its own input"
    )


def check_all(options: WemoeOptions) -> None:
    """`UserError` for what `upscale: all` cannot be put together with."""
    refused = {
        f"router_layers: {options.router_layers}": options.router_layers
        and "embeddings and norms have no hidden states before them that a router could read; "
        "write router_layers: 0",
        f"sparsity: {options.sparsity}": options.sparsity
        and "task vectors are kept whole; write sparsity: 0",
        f"upscale_layers: {options.upscale_layers}": options.upscale_layers != "all"
        and "every parameter is weighed, in blocks or not; leave it out, or take another upscale",
    }
    for what, why in refused.items():
        if why:
            raise UserError(f"upscale: all does not go with {what}: {why}")


def _numbers(given: int | str) -> list[int] | None:
    """`all`, or numbers and ranges, as in 0,3,6-11."""
    if given == "all":
        return None
    numbers: list[int] = []
    for part in str(given).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not found:
            raise UserError("write all, or numbers and ranges that go up, as 6-11 or 0,3,6")
        numbers += found
    return numbers
