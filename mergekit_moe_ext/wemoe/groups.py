"""Which linear modules of a model are ensembled together, and what their router reads (WEMoE 3.2 and table 6)."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

Part = Literal["attention", "mlp"]
Grouping = Literal["mlp", "attention", "attention+mlp", "block"]
Upscale = Literal[Grouping, "all", "auto"]
# Not T5's layers, which are called after the attention that they hold.
_ATTENTION = re.compile("^(?!.*Layer).*Attention")
_FFN = re.compile("MLP|FeedForward|FFN|DenseAct|DenseGatedAct")
# Reads another stack's states, which no coefficients of this one are for.
_CROSS_ATTENTION = re.compile("encdec|encoder_attn|cross", re.IGNORECASE)


def ensembled_groups(model: PreTrainedModel, upscale: Grouping, layers: Sequence[int] | None) -> dict[str, list[str]]:
    """Per router the module whose input it reads, and the linear modules that it weighs, by their names.

    `layers`: of every stack of layers those with these numbers; all if None. `ValueError` where a layer lacks what is
    asked for, or it cannot be told, and for a number beyond the last layer.
    """
    groups: dict[str, list[str]] = {}
    for name, layer in _chosen_layers(model, layers).items():
        ffn = _ffn(layer)
        attention = [part for part in _outermost(layer, _ATTENTION) if not _CROSS_ATTENTION.search(part)]
        what, found = ("attention", attention) if upscale == "attention" else ("MLP", ffn)
        if not found:
            raise ValueError(f"layer {name} of {type(model).__name__} has no {what} that can be told by its class")
        each_attention = [[part] for part in attention]
        parts = {
            "mlp": [ffn],
            "attention": each_attention,
            "attention+mlp": [*each_attention, ffn],
            "block": [[*attention, *ffn]],
        }
        for modules in parts[upscale]:
            linears = [linear for part in modules for linear in _linears(layer, part)]
            reader = name if upscale == "block" else f"{name}.{modules[0]}"
            groups[reader] = [f"{name}.{linear}" for linear in linears]
    return groups


def linears_by_layer(model: PreTrainedModel, part: Part, layers: Sequence[int] | None) -> dict[str, list[str]]:
    """Per layer the linear modules that `upscale` with this part weighs, by their names; `layers` as there."""
    groups = ensembled_groups(model, part, layers)
    return {
        layer: [linear for reader, own in groups.items() if reader.startswith(f"{layer}.") for linear in own]
        for layer in _chosen_layers(model, layers)
    }


def weighed_tensors(model: PreTrainedModel, head: str | None = None) -> dict[str, list[str]]:
    """Every parameter by its name as a group of its own, but for those of a head that is kept (AdaMerging).

    Of parameters that are tied the one that is stored. `ValueError` for recurrent layers, which keep their parameters
    elsewhere, too.
    """
    recurrent = [name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)]
    if recurrent:
        raise ValueError(f"{recurrent[0]} of {type(model).__name__} is recurrent, which upscale: all cannot weigh")
    # with all names of what is tied, since the first one need not be the one that is stored
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if parameter.is_floating_point()]
    kept = [name for name in names if name not in model.all_tied_weights_keys]
    return {name: [name] for name in kept if head is None or not name.startswith(f"{head}.")}


def _chosen_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> Mapping[str, nn.Module]:
    marked = {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    # Swin marks its stages, too, which hold layers
    found = {
        name: module for name, module in marked.items() if not any(inner.startswith(f"{name}.") for inner in marked)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers that transformers knows of")
    if layers is None:
        return found
    numbers = {name: int(name.rpartition(".")[2]) for name in found}
    beyond = sorted(set(layers) - set(numbers.values()))
    if beyond:
        raise ValueError(f"upscale_layers: there is no layer {beyond[0]}; the last is {max(numbers.values())}")
    return {name: module for name, module in found.items() if numbers[name] in layers}


def _ffn(layer: nn.Module) -> list[str]:
    """Names within the layer of what makes up the MLP; the router reads what the first of them reads."""
    if found := _outermost(layer, _FFN):
        return found[:1]
    children = dict(layer.named_children())
    if {"intermediate", "output"} <= children.keys():  # BERT and its relatives
        return ["intermediate", "output"]
    return [name for name, module in children.items() if isinstance(module, nn.Linear)]  # OPT


def _outermost(layer: nn.Module, kind: re.Pattern[str]) -> list[str]:
    """Modules within the layer whose class is called so, and not those within one of them."""
    found: list[str] = []
    for name, module in layer.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and kind.search(type(module).__name__):
            found.append(name)
    return found


def _linears(layer: nn.Module, part: str) -> list[str]:
    module = layer.get_submodule(part)
    return [
        f"{part}.{name}".rstrip(".") for name, each in module.named_modules() if isinstance(each, nn.Linear | Conv1D)
    ]
