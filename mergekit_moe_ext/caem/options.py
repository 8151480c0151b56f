"""The options of `caem`, of the merge and of each of its models."""

from typing import Literal

from pydantic import Field

from mergekit_moe_ext.merging.method import MethodOptions, ModelOptions
from mergekit_moe_ext.recipes import Counted

# Of the merge, for all models, and of each model, for its own data.
COLUMN_OPTIONS = ("text_column", "messages_column", "input_column", "target_column")


class CaemOptions(MethodOptions):
    num_experts: int | None = Field(
        None,
        ge=1,
        description="number of experts per layer of the output [default: that of the sources]",
    )
    allocation: Literal["entropy", "fixed"] = Field(
        "entropy",
        description="rule that shares the experts among the sources: entropy of their usage, or "
        "fixed, the `experts` of each model",
    )
    shared: str = Field(
        "linear", description="tensor method that merges all but experts and routers"
    )
    router_scale: bool = Field(
        False,
        description=(
            "bring the routers of the sources to one scale: the mean norm of a row, "
            "averaged over the sources"
        ),
    )
    count: Counted = Field(
        "chosen",
        description="what is counted of routers with an expert capacity (Switch Transformers): "
        "chosen, all that they chose, or dispatched, what went to an expert that had room",
    )
    max_samples: int | None = Field(
        None,
        ge=1,
        description="number of rows of the calibration data that are read, from the first on "
        "[default: all]",
    )
    max_length: int = Field(
        1024, ge=2, description="number of tokens of a calibration text; longer texts are cut"
    )
    batch_size: int = Field(8, ge=1, description="number of calibration texts at a time")
    text_column: str = Field(
        "text", description="column of texts in calibration data, for decoders"
    )
    messages_column: str = Field(
        "messages", description="column of chats in calibration data, for decoders"
    )
    input_column: str = Field(
        "input", description="column of inputs in calibration data, for encoder-decoders"
    )
    target_column: str = Field(
        "target", description="column of targets in calibration data, for encoder-decoders"
    )


class CaemModelOptions(ModelOptions):
    calibration: str | None = Field(
        None,
        description="data to count expert usage on, a file, a directory or a Hub id; this or "
        "`usage` is required",
    )
    usage: str | None = Field(
        None, description="usage file, as `mergekit-moe-ext usage` writes it, in place of data"
    )
    text_column: str | None = Field(
        None, description="column of texts in this model's calibration data [default: the merge's]"
    )
    messages_column: str | None = Field(
        None, description="column of chats in this model's calibration data [default: the merge's]"
    )
    input_column: str | None = Field(
        None, description="column of inputs in this model's calibration data [default: the merge's]"
    )
    target_column: str | None = Field(
        None,
        description="column of targets in this model's calibration data [default: the merge's]",
    )
    experts: int | None = Field(
        None,
        ge=1,
        description="number of experts to take per layer; required with `allocation: fixed`, and "
        "for it alone",
    )
