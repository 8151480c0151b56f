"""Which linear modules of a model are ensembled together, and what their router reads (WEMoE 3.2
and table 6).
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.layers import chosen_layers, linears_in, parts_of

Part = Literal["attention", "mlp"]
Grouping = Literal["mlp", "attention", "attention+mlp", "block"]
Upscale = Literal[Grouping, "all", "auto"]


def ensembled_groups(
    model: PreTrainedModel, upscale: Grouping, layers: Sequence[int] | None
) -> dict[str, list[str]]:
    """Per router the module whose input it reads, and the linear modules that it weighs, by their
    names.

    `layers`: of every stack of layers those with these numbers; all if None. `UserError` where a
    layer lacks what is asked for, or it cannot be told, and for a number beyond the last layer.
    """
    groups: dict[str, list[str]] = {}
    for name, layer in chosen_layers(model, layers).items():
        layer_parts = parts_of(layer)
        # Cross attention is left out: it reads another stack's states, which no coefficients of
        # this one are for.
        attention = layer_parts.attention
        # A router reads the input of one MLP, so that of several the first is weighed.
        ffn = layer_parts.ffns[0] if layer_parts.ffns else []
        lacking = not attention if upscale == "attention" else not ffn
        if lacking:
            what = "attention" if upscale == "attention" else "MLP"
            raise UserError(
                f"layer {name} of {type(model).__name__} has no {what} that can be told by its "
                "class"
            )
        each_attention = [[part] for part in attention]
        parts = {
            "mlp": [ffn],
            "attention": each_attention,
            "attention+mlp": [*each_attention, ffn],
            "block": [[*attention, *ffn]],
        }
        for modules in parts[upscale]:
            linears = [linear for part in modules for linear in linears_in(layer, part)]
            reader = name if upscale == "block" else f"{name}.{modules[0]}"
            groups[reader] = [f"{name}.{linear}" for linear in linears]
    return groups


def linears_by_layer(
    model: PreTrainedModel, part: Part, layers: Sequence[int] | None
) -> dict[str, list[str]]:
    """Per layer the linear modules that `upscale` with this part weighs, by their names; `layers`
    as there.
    """
    groups = ensembled_groups(model, part, layers)
    return {
        layer: [
            linear
            for reader, own in groups.items()
            if reader.startswith(f"{layer}.")
            for linear in own
        ]
        for layer in chosen_layers(model, layers)
    }


def weighed_tensors(model: PreTrainedModel, head: str | None = None) -> dict[str, list[str]]:
    """Every parameter by its name as a group of its own, but for those of a head that is kept
    (AdaMerging).

    Of parameters that are tied the one that is stored. `UserError` for recurrent layers, which keep
    their parameters elsewhere, too.
    """
    recurrent = [name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)]
    if recurrent:
        raise UserError(
            f"{recurrent[0]} of {type(model).__name__} is recurrent, which upscale: all cannot "
            "weigh"
        )
    # with all names of what is tied, since the first one need not be the one that is stored
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if parameter.is_floating_point()]
    kept = [name for name in names if name not in model.all_tied_weights_keys]
    return {name: [name] for name in kept if head is None or not name.startswith(f"{head}.")}
