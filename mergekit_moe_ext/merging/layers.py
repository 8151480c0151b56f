"""What of a model is a layer, and what of a layer is attention and what is the FFN."""

import re
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from _mergekit_moe_ext_common.errors import UserError

# Not T5's layers, which are called after the attention that they hold.
ATTENTION = re.compile("^(?!.*Layer).*Attention")
_FFN = re.compile("MLP|FeedForward|FFN|DenseAct|DenseGatedAct")


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Its layers by name: what transformers can checkpoint. `UserError` if that is not one stack."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and id(module) in inside
    }
    stacks = {name.rpartition(".")[0] for name in found}
    if len(stacks) != 1:
        raise UserError(f"{type(model).__name__} has {len(stacks)} stacks of decoder layers, not one")
    return found


def attention_and_ffn(layer: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The parts of a layer by name, told by their classes, which transformers names alike for all architectures.

    `UserError` for a part that is neither, nor a norm, and for a layer that lacks one.
    """
    attention: dict[str, nn.Module] = {}
    ffn: dict[str, nn.Module] = {}
    linear: dict[str, nn.Module] = {}
    if any(True for _ in layer.parameters(recurse=False)):
        raise UserError("it has parameters of its own, which are neither attention nor FFN")
    for name, module in layer.named_children():
        kind = type(module).__name__
        if not any(True for _ in module.parameters()):
            continue
        if "Attention" in kind:
            attention[name] = module
        elif "MLP" in kind or "FeedForward" in kind:
            ffn[name] = module
        elif isinstance(module, nn.Linear):
            linear[name] = module
        elif not is_norm(module):
            raise UserError(f"{name} ({kind}) is neither attention nor FFN nor norm")
    if linear and ffn:
        raise UserError("it has linear layers that belong neither to attention nor to the FFN")
    ffn |= linear  # OPT's FFN is no module of its own
    for name, parts in {"attention": attention, "FFN": ffn}.items():
        if not parts:
            raise UserError(f"it has no {name}")
    return attention, ffn


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def chosen_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> Mapping[str, nn.Module]:
    """By name those of every stack of layers with these numbers; all if None. `UserError` where there is none."""
    marked = {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    # Swin marks its stages, too, which hold layers
    found = {
        name: module for name, module in marked.items() if not any(inner.startswith(f"{name}.") for inner in marked)
    }
    if not found:
        raise UserError(f"{type(model).__name__} has no layers that transformers knows of")
    if layers is None:
        return found
    numbers = {name: int(name.rpartition(".")[2]) for name in found}
    beyond = sorted(set(layers) - set(numbers.values()))
    if beyond:
        raise UserError(f"upscale_layers: there is no layer {beyond[0]}; the last is {max(numbers.values())}")
    return {name: module for name, module in found.items() if numbers[name] in layers}


def ffn_in(layer: nn.Module) -> list[str]:
    """Names within the layer of what makes up the MLP; the router reads what the first of them reads."""
    if found := outermost(layer, _FFN):
        return found[:1]
    children = dict(layer.named_children())
    if {"intermediate", "output"} <= children.keys():  # BERT and its relatives
        return ["intermediate", "output"]
    return [name for name, module in children.items() if isinstance(module, nn.Linear)]  # OPT


def outermost(layer: nn.Module, kind: re.Pattern[str]) -> list[str]:
    """Modules within the layer whose class is called so, and not those within one of them."""
    found: list[str] = []
    for name, module in layer.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and kind.search(type(module).__name__):
            found.append(name)
    return found


def linears_in(layer: nn.Module, part: str) -> list[str]:
    """Names within the layer of the linear modules of one of its parts."""
    module = layer.get_submodule(part)
    return [
        f"{part}.{name}".rstrip(".") for name, each in module.named_modules() if isinstance(each, nn.Linear | Conv1D)
    ]
