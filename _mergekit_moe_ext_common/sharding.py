"""Models that are split between processes: FSDP2 as accelerate and the Trainer set it up.

accelerate reads its settings from the environment, where `accelerate launch` puts them.

A checkpoint of a split model is one file of weights and one of optimizer states per process, each
with that process's part of what is trained. (accelerate's own would hold what is frozen as well,
and an index that is a pickle.)
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    disable_fsdp_ram_efficient_loading,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from _mergekit_moe_ext_common.errors import UserError

LOG = logging.getLogger(__name__)
_REPLACEMENT = (
    "use FSDP2: `accelerate launch --use_fsdp --fsdp_version 2`, or `fsdp_version: 2` under "
    "fsdp_config in the configuration of accelerate"
)
# What MPI and torchrun call the number of processes, as accelerate reads it.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_split_wanted() -> bool:
    """Whether accelerate was told to split the model between processes."""
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"  # as accelerate reads it


def check_launch(*, splits: bool) -> None:
    """`UserError` where accelerate was told to do what this training cannot.

    `splits` says whether the training can split its model between processes. Where it can, what
    accelerate leaves open is settled here.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        instead = _REPLACEMENT if splits else "use `accelerate launch --multi_gpu`"
        raise UserError(f"DeepSpeed is not supported; {instead}")
    # Processes that torchrun starts on CPUs find each other only where accelerate is told so.
    is_one_of_several = os.environ.get("WORLD_SIZE", "1") != "1"
    if is_one_of_several and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if not is_split_wanted():
        return
    if not splits:
        raise UserError(
            "FSDP is not supported here: every process holds the whole model; use "
            "`accelerate launch --multi_gpu`"
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(f"FSDP of version 1 is not supported; {_REPLACEMENT}")
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "fsdp_activation_checkpointing renames the layers; set it to false, and give "
            "--gradient-checkpointing"
        )
    # Without a policy the model would be one unit, which every process gathers whole.
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    # The checks before a training run the model and read all its values, in every process.
    disable_fsdp_ram_efficient_loading()


def warn_of_missing_processes(processes: int) -> None:
    """Warns where the environment asks for more processes than there are."""
    for variable in _WORLD_SIZES:
        number = os.environ.get(variable, "")
        if number.isdecimal() and int(number) > processes:
            LOG.warning(
                "%s asks for %s processes, and there is %d: start all of them with torchrun",
                variable,
                number,
                processes,
            )
            return
    # `accelerate launch --cpu` starts one process whatever --num_processes says. It hands on no
    # number, but sets an address to meet at where more than one was asked for.
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if processes == 1 and is_launched and "LOCAL_RANK" not in os.environ:
        LOG.warning(
            "accelerate was asked for several processes and has started one, as it does on a CPU; "
            "`torchrun --nproc-per-node N -m ...` starts N"
        )


def split_on_cpu(accelerator: Any) -> None:
    """Has the model split on CPUs too, where accelerate would leave FSDP aside in silence."""
    state = accelerator.state
    if is_split_wanted() and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()


def keep_dtypes(accelerator: Any) -> None:
    """Has autocast alone choose precisions, as it does on one process.

    FSDP's own policy would cast whole layers, routers in float32 among them.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = None


def reduce_unused(model: nn.Module) -> None:
    """Counts an expert that no token of a process chose as one without gradient there.

    Only experts that are modules of their own need it: of a fused tensor of experts, some part is
    always used. (Older versions of torch lack it.)
    """
    if isinstance(model, FSDPModule) and hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)


def reshard(model: nn.Module) -> None:
    """Lets go of the whole parameters that a forward pass has left in some modules."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def part_of(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of one that is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_optimizer(optimizer: Any, path: Path) -> None:
    """Writes this process's part of an optimizer's state."""
    state = optimizer.state_dict()
    parts = {number: _parts_of(tensors) for number, tensors in state["state"].items()}
    torch.save({**state, "state": parts}, path)


def _parts_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    parts = {}
    for name, value in tensors.items():
        # A part is a view of what is whole, and would be stored with it.
        parts[name] = part_of(value).clone() if isinstance(value, Tensor) else value
    return parts


def load_optimizer(optimizer: Any, path: Path) -> None:
    """Reads what `save_optimizer` wrote, in a process of the same number among as many."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    for number, tensors in state["state"].items():
        for name, value in tensors.items():
            # A step is a number.
            if isinstance(value, Tensor) and value.dim():
                tensors[name] = _split_like(parameters[number], value)
    optimizer.load_state_dict(state)


def _split_like(parameter: Tensor, part: Tensor) -> Tensor:
    """The split tensor of a parameter's shape of which this process has `part`."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part.to(parameter.to_local().device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def make_whole(model: nn.Module, *, keeps: bool) -> None:
    """Puts a split model together in the processes that keep it, for saving.

    All processes must call this. Parameters are gathered one at a time, into main memory.
    """
    reshard(model)
    whole: dict[int, nn.Parameter] = {}  # one that two modules share is gathered once
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in whole:
                tensor = parameter.full_tensor().detach()
                if keeps:
                    whole[id(parameter)] = nn.Parameter(tensor.cpu(), parameter.requires_grad)
                else:
                    whole[id(parameter)] = parameter
            setattr(module, name, whole[id(parameter)])
    if not keeps:
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # `fully_shard` has made its class of FSDPModule and the class that it had.
            module.__class__ = type(module).__bases__[1]
