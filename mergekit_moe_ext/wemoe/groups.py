"""The groups of linear modules that one router weighs together, and what it reads (WEMoE 3.2 and
table 6).
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.layers import chosen_layers, linears_in, parts_of
from mergekit_moe_ext.merging.wrappers import is_mixture

Part = Literal["attention", "mlp"]
Grouping = Literal["mlp", "attention", "attention+mlp", "block"]
Upscale = Literal[Grouping, "all", "auto"]


def ensembled_groups(
    model: PreTrainedModel, upscale: Grouping, layers: Sequence[int] | None
) -> dict[str, list[str]]:
    """The names of the linear modules that each router weighs, by the name of the module whose
    input it reads.

    `layers` are the numbers of those to take of every stack of layers; None takes all. `UserError`
    where a layer lacks the attention or MLP that `upscale` names, or it cannot be told or has no
    linear modules, and for a number beyond the last layer.
    """
    groups: dict[str, list[str]] = {}
    for name, layer in chosen_layers(model, layers).items():
        for modules in _modules_by_router(model, name, layer, upscale):
            linears = []
            for module in modules:
                of_module = linears_in(layer, module)
                if not of_module:  # a mixture of experts, all in one parameter
                    raise UserError(
                        f"{name}.{module} of {type(model).__name__} has no linear layer that a "
                        f"router could weigh{_hint(model, upscale)}"
                    )
                linears += [f"{name}.{linear}" for linear in of_module]
            reader = name if upscale == "block" else f"{name}.{modules[0]}"
            groups[reader] = linears
    return groups


def _modules_by_router(
    model: PreTrainedModel, name: str, layer: nn.Module, upscale: Grouping
) -> list[list[str]]:
    """For each router of the layer of this name, the modules in the layer that it weighs together.

    `UserError` where the layer lacks the attention or MLP that `upscale` names.
    """
    parts = parts_of(layer)
    # Cross attention is left out: it reads another stack's states, which no coefficients of this
    # one are for.
    attention = parts.attention
    # A router reads the input of one MLP, so of several the first is weighed.
    ffn = parts.ffns[0] if parts.ffns else []
    # Where both are weighed, a layer without attention has its MLP alone weighed.
    needed = attention if upscale == "attention" else ffn
    if not needed:
        lacking = "attention" if upscale == "attention" else "MLP"
        raise UserError(
            f"layer {name} of {type(model).__name__} has no {lacking} that can be told by its "
            f"class{_hint(model, upscale)}"
        )
    each_attention = [[module] for module in attention]
    groupings = {
        "mlp": [ffn],
        "attention": each_attention,
        "attention+mlp": [*each_attention, ffn],
        "block": [[*attention, *ffn]],
    }
    return groupings[upscale]


def _hint(model: PreTrainedModel, upscale: Grouping) -> str:
    """The end of a sentence on what cannot be routed: what to do with mixtures of experts."""
    if upscale == "attention" or not is_mixture(model.config):
        return ""
    return (
        ": it is a mixture of experts, of which only the attention can be weighed (`upscale: "
        "attention`); `merge_method: caem` merges mixtures"
    )


def linears_by_layer(
    model: PreTrainedModel, part: Part, layers: Sequence[int] | None
) -> dict[str, list[str]]:
    """The names of the linear modules of each layer that `upscale` with this part weighs.

    `layers` are numbers, as in `ensembled_groups`.
    """
    groups = ensembled_groups(model, part, layers)
    by_layer: dict[str, list[str]] = {}
    for layer in chosen_layers(model, layers):
        by_layer[layer] = []
        for reader, linears in groups.items():
            if reader.startswith(f"{layer}."):
                by_layer[layer] += linears
    return by_layer


def weighed_tensors(model: PreTrainedModel, head: str | None = None) -> dict[str, list[str]]:
    """Groups of one parameter each, by its name, for all parameters but those of `head`
    (AdaMerging).

    Of tied parameters it is the one that is stored. `UserError` for recurrent layers, which keep
    their parameters in a second place, too.
    """
    recurrent = [name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)]
    if recurrent:
        raise UserError(
            f"{recurrent[0]} of {type(model).__name__} is recurrent, which upscale: all cannot "
            "weigh"
        )
    # Tied parameters come under all of their names here, since the first need not be the stored
    # one.
    groups = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_stored = parameter.is_floating_point() and name not in model.all_tied_weights_keys
        if is_stored and (head is None or not name.startswith(f"{head}.")):
            groups[name] = [name]
    return groups
