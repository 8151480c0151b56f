"""The numbers of all and of the trained parameters of a weight-ensembling model (WEMoE, tables 1
and 8).

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

# The names of task vectors among a model's tensors: whole ones, of weights, biases or any
# parameters, and the values of sparse ones.
_TASK_VECTORS = re.compile(r"vectors[^.]*$|\.values$")


@dataclass(frozen=True)
class ParameterCounts:
    """The parameters of a weight-ensembling model, and those of its fine-tunes.

    tasks: the number of fine-tunes.
    trainable: the parameters of the routers.
    total: those of the routers, the base, the task vectors and all heads. Of a sparse task vector
        the values count, but not their places. Tied parameters count once.
    apart: those of the fine-tunes as separate models, each with its own head.
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
        """The number of parameters by which the model is smaller than its fine-tunes together;
        negative where it is larger (table 8).
        """
        return self.apart - self.total


def count_parameters(model_path: str) -> ParameterCounts:
    """The parameters of the weight-ensembling model in a directory, counted from its configuration.

    `UserError` if the directory holds no such model.
    """
    architecture, config = read_ensemble(model_path)
    with torch.device("meta"):
        return _counts(architecture(config))


def planned_parameters(base: PretrainedConfig, tasks: int, **parameters: Any) -> ParameterCounts:
    """The parameters of the model that `wemoe` would make of that many fine-tunes of the base, all
    with one head that is merged.

    `base` names its class in `architectures`; `parameters` are those of `wemoe` (`router_layers`,
    `sparsity` …). `UserError` for parameters that do not fit, and where the base cannot be upscaled
    in that way.
    """
    if tasks < 1:
        raise UserError(f"tasks: {tasks}; there must be at least one")
    options = WemoeOptions.model_validate(parameters)
    network, _ = hub_state(base)
    if options.upscale == "auto":
        raise UserError(
            "upscale: auto reads the weights of the fine-tunes: name the part that it takes, "
            "attention or mlp"
        )
    if options.upscale == "all":
        check_all(options)
        groups = weighed_tensors(network)
    else:
        groups = ensembled_groups(network, options.upscale, options.layers)
    ensembling = Ensembling(
        experts=[str(number) for number in range(tasks)],
        groups=groups,
        per_tensor=options.upscale == "all",
        router_layers=options.router_layers,
        shared_router=options.shared_router,
    )
    if options.sparsity:
        kept = {}
        for linear in ensembling.linears:
            kept[linear] = options.kept_elements(network.get_submodule(linear).weight.numel())
        ensembling = replace(ensembling, kept=kept)
    values = base.to_dict()
    for name in ("model_type", "dtype"):
        values.pop(name, None)
    base_config: Any = type(base)
    architecture: Any = type(network)
    config = config_class(base_config)(**values, ensembling=ensembling.as_dict())
    with torch.device("meta"):
        return _counts(model_class(architecture)(config))


def _counts(model: Any) -> ParameterCounts:
    tasks = len(model.ensembling.experts)
    routers = _size(model.routers.parameters())
    heads = _size(_of_heads(model))
    parameters = _size(model.parameters())
    # Each of several heads belongs to one fine-tune. A single head for all tasks is not counted as
    # one of them but with the rest, once per fine-tune.
    without_heads = parameters - routers - heads
    return ParameterCounts(
        tasks=tasks,
        trainable=routers,
        total=parameters + _size(_task_vectors(model)),
        apart=tasks * without_heads + heads,
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
