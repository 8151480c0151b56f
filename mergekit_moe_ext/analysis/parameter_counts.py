"""How many parameters a weight-ensembling model has, and how many of them are trained (WEMoE,
tables 1 and 8).

Nothing here reads weights: models are built without memory. `examples/wemoe_parameters.py` prints
the tables.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import hub_state
from mergekit_moe_ext.modeling.configuration_wemoe import Ensembling, config_class
from mergekit_moe_ext.modeling.modeling_wemoe import TaskHeads, model_class
from mergekit_moe_ext.wemoe.groups import ensembled_groups, weighed_tensors
from mergekit_moe_ext.wemoe.loading import read_ensemble
from mergekit_moe_ext.wemoe.options import WemoeOptions, check_all

_TASK_VECTORS = re.compile(r"vectors[^.]*$|\.values$")  # what modules hold besides parameters


@dataclass(frozen=True)
class ParameterCounts:
    """Of a weight-ensembling model of `tasks` fine-tunes, and of these kept apart, each with its
    own head.

    trainable: the routers. total: them, the base, the task vectors and all heads. Of a sparse task
    vector the values count, and where they lie does not. Tied parameters count once.
    """

    tasks: int
    trainable: int
    total: int
    apart: int

    @property
    def ratio(self) -> float:
        """Trainable to total (table 1)."""
        return self.trainable / self.total

    @property
    def reduced(self) -> int:
        """By how much the model is smaller than its fine-tunes together; negative where it is
        larger (table 8).
        """
        return self.apart - self.total


def count_parameters(model_path: str) -> ParameterCounts:
    """Of a weight-ensembling model, by its configuration. `UserError` if the directory holds no
    such model.
    """
    architecture, config = read_ensemble(model_path)
    with torch.device("meta"):
        return _counts(architecture(config))


def planned_parameters(base: PretrainedConfig, tasks: int, **parameters: Any) -> ParameterCounts:
    """Of what `wemoe` would make of that many fine-tunes of the base, all with one head that is
    merged.

    `base` names its class in `architectures`; `parameters` are those of `wemoe` (`router_layers`,
    `sparsity` …). `UserError` for wrong ones, and where the base cannot be upscaled in that way.
    """
    if tasks < 1:
        raise UserError(f"tasks: {tasks}; there must be at least one")
    options = WemoeOptions.model_validate(parameters)
    network, _ = hub_state(base)
    if options.upscale == "auto":
        raise UserError(
            "upscale: auto reads the weights of the fine-tunes: say what it takes, attention or mlp"
        )
    if options.upscale == "all":
        check_all(options)
    ensembling = Ensembling(
        experts=[str(number) for number in range(tasks)],
        groups=weighed_tensors(network)
        if options.upscale == "all"
        else ensembled_groups(network, options.upscale, options.layers),
        per_tensor=options.upscale == "all",
        router_layers=options.router_layers,
        shared_router=options.shared_router,
    )
    if options.sparsity:
        sizes = {
            linear: network.get_submodule(linear).weight.numel() for linear in ensembling.linears
        }
        ensembling = replace(
            ensembling, kept={name: options.kept_elements(size) for name, size in sizes.items()}
        )
    values = {
        name: value for name, value in base.to_dict().items() if name not in ("model_type", "dtype")
    }
    base_config: Any = type(base)
    architecture: Any = type(network)
    config = config_class(base_config)(**values, ensembling=ensembling.as_dict())
    with torch.device("meta"):
        return _counts(model_class(architecture)(config))


def _counts(model: Any) -> ParameterCounts:
    tasks = len(model.ensembling.experts)
    routers, heads = _size(model.routers.parameters()), _size(_of_heads(model))
    everything = _size(model.parameters())
    without_heads = everything - routers - heads
    # each head is that of one fine-tune; a single one, that of all, is not apart from the rest
    return ParameterCounts(
        tasks, routers, everything + _size(_task_vectors(model)), tasks * without_heads + heads
    )


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _of_heads(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, TaskHeads):
            yield from module.parameters()


def _task_vectors(model: nn.Module) -> Iterator[Tensor]:
    for name, tensor in model.state_dict().items():
        if _TASK_VECTORS.search(name) and tensor.is_floating_point():
            yield tensor
