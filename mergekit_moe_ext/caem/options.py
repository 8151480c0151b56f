"""The options of `caem`, of the merge and of each of its models."""

from typing import Literal

from pydantic import Field

from mergekit_moe_ext.merging.method import MethodOptions, ModelOptions


class CaemOptions(MethodOptions):
    num_experts: int | None = Field(
        None,
        ge=1,
        description="experts per layer of the output: what the sources have, if not given",
    )
    allocation: Literal["entropy", "fixed"] = Field(
        "entropy", description="by the entropy of expert usage, or fixed: `experts` per model"
    )
    shared: str = Field(
        "linear", description="the tensor method that merges all but experts and routers"
    )
    router_scale: bool = Field(
        False,
        description=(
            "bring the routers of the sources to one scale: the mean norm of a row, "
            "averaged over the sources"
        ),
    )
    max_samples: int | None = Field(None, ge=1, description="calibrate on the first so many rows")
    max_length: int = Field(1024, ge=2, description="cut calibration texts to so many tokens")
    batch_size: int = Field(8, ge=1, description="calibration texts at a time")
    text_column: str = Field("text", description="of calibration data, for decoders")
    messages_column: str = Field("messages", description="of calibration data, for decoders: chats")
    input_column: str = Field("input", description="of calibration data, for encoder-decoders")
    target_column: str = Field("target", description="of calibration data, for encoder-decoders")


class CaemModelOptions(ModelOptions):
    calibration: str | None = Field(
        None, description="data to count expert usage on: a file, a directory, a Hub id"
    )
    usage: str | None = Field(None, description="a usage file, written by `mergekit-moe-ext usage`")
    experts: int | None = Field(
        None, ge=1, description="how many experts to take per layer, with `allocation: fixed`"
    )
