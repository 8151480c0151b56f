"""A model that no single device can hold, trained in part by one process: accelerate spreads it
over all GPUs and, where they are too small, main memory.

A module in main memory is copied to a GPU for each of its forward passes. That is for frozen ones:
no gradient comes back to such a copy, so what is trained always lies on a GPU.
"""

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_module, remove_hook_from_submodules
from accelerate.utils import (
    find_tied_parameters,
    get_balanced_memory,
    get_max_memory,
    retie_parameters,
)
from torch import nn
from transformers import TrainingArguments

from _mergekit_moe_ext_common.checkpoints import Stored
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.sharding import is_split_wanted

LOG = logging.getLogger(__name__)


def check_device_map(device_map: str | None, processes: int) -> None:
    """`UserError` for a device map other than `auto`, and for one beside FSDP or beside other
    processes.
    """
    if device_map is None:
        return
    if device_map != "auto":
        raise UserError(f"--device-map {device_map}: the only one is auto")
    if is_split_wanted():
        raise UserError(
            "--device-map spreads a model from one process, and FSDP splits it between processes: "
            "leave one of them out"
        )
    if processes > 1:
        raise UserError(
            f"--device-map spreads a model from one process, and there are {processes}: start one, "
            "or split the model with FSDP2"
        )


def check_can_be_spread(model: str, config: Any, tensors: Collection[Stored]) -> None:
    """`UserError` for a quantised model, and for one of which modules would lie on disk.

    `tensors` are those of the model, all of which go through main memory.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"--device-map is not for {model}, which is quantised and is loaded onto one device"
        )
    size = sum(math.prod(each.shape) * each.dtype.itemsize for each in tensors)
    room = get_max_memory()["cpu"]
    if size > room:
        raise UserError(
            f"--device-map: {model} has {size / 1e9:.1f} GB of weights, and main memory has room "
            f"for {room / 1e9:.1f} GB, so that modules would lie on disk, where nothing is trained"
        )


def spread(model: nn.Module, arguments: TrainingArguments) -> Sequence[Sequence[str]]:
    """Spreads a model whose trained part is settled, unless the Trainer is to use a CPU.

    Returns the names of the parameters that are one under several names.
    """
    tied = find_tied_parameters(model)
    skipped = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, device_map=_device_map(model, arguments.device), skip_keys=skipped)
    has_copies = False
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if not getattr(hook, "offload", False):
            continue
        parameters = list(module.parameters(recurse=False))
        if any(parameter.requires_grad for parameter in parameters):
            # Without the hook its tensors are in main memory. From there they go, for good, to
            # where the modules around it compute.
            remove_hook_from_module(module)
            module.to(hook.execution_device)
        elif parameters:
            has_copies = True
    if has_copies and not arguments.gradient_checkpointing:
        LOG.warning(
            "some modules lie in main memory, and a GPU keeps its copies of them until the "
            "backward pass is over: if its memory runs out, give --gradient-checkpointing"
        )
    return tied


def _device_map(model: Any, device: torch.device) -> dict[str, Any]:
    """The device of each module, as accelerate chooses it for the memory that is free."""
    if device.type == "cpu":
        return {"": "cpu"}
    whole = list(getattr(model, "_no_split_modules", None) or [])
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    memory["cpu"] = math.inf  # what does not fit elsewhere is there already
    return infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)


def gather(model: Any, tied: Sequence[Sequence[str]]) -> None:
    """Puts a model that was spread together in main memory; `tied` is what `spread` returned."""
    remove_hook_from_submodules(model)
    model.to("cpu")
    # Each of several names got a copy of its own.
    retie_parameters(model, tied)
    del model.hf_device_map
    # accelerate's autocast went with the hooks: the next Trainer is to wrap the model anew.
    model._is_accelerate_prepared = False
