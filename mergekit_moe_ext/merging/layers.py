"""What of a model is a layer, and what of a layer is attention and what is the FFN."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from _mergekit_moe_ext_common.errors import UserError

# Not T5's layers, which are called after the attention that they hold.
_ATTENTION = re.compile("^(?!.*Layer).*Attention")
_FFN = re.compile("MLP|FeedForward|FFN|DenseAct|DenseGatedAct")
# By what the module is called in its layer, since its class is that of any attention.
_CROSS_ATTENTION = re.compile("encdec|encoder_attn|cross", re.IGNORECASE)


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Its layers by name: what transformers can checkpoint. `UserError` if that is not one
    stack."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and id(module) in inside
    }
    stacks = {name.rpartition(".")[0] for name in found}
    if len(stacks) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(stacks)} stacks of decoder layers, not one"
        )
    return found


@dataclass(frozen=True)
class LayerParts:
    """The attention and the FFNs of a layer, as names of modules within it.

    They are told by their classes, which transformers names alike for all architectures.
    """

    attention: list[str]
    cross_attention: list[str]  # attention to the states of another stack
    ffns: list[list[str]]  # each as the modules that make it up, the one that reads its input first


def parts_of(layer: nn.Module) -> LayerParts:
    """The one rule of what is attention and what is an FFN. Lists are empty where a layer has
    none."""
    every_attention = _outermost(layer, _ATTENTION)
    across = [name for name in every_attention if _CROSS_ATTENTION.search(name)]
    own = [name for name in every_attention if name not in across]
    ffns = [[name] for name in _outermost(layer, _FFN) if not _lies_in(name, every_attention)]
    if not ffns:
        modules = _ffn_without_a_class(layer)
        ffns = [modules] if modules else []
    return LayerParts(own, across, ffns)


def attention_and_ffn(layer: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The attention and the FFN of a layer, by their names in it.

    `UserError` for a part that is neither, nor a norm, and for a layer that lacks one.
    """
    parts = parts_of(layer)
    ffn_names = list(itertools.chain.from_iterable(parts.ffns))
    attention: dict[str, nn.Module] = {}
    ffn: dict[str, nn.Module] = {}
    # Whoever keeps one of them apart must know of every parameter to which of them it belongs.
    if any(True for _ in layer.parameters(recurse=False)):
        raise UserError("it has parameters of its own, which are neither attention nor FFN")
    for name, module in layer.named_children():
        if not any(True for _ in module.parameters()):
            continue
        if name in parts.attention or name in parts.cross_attention:
            attention[name] = module
        elif name in ffn_names:
            ffn[name] = module
        elif not is_norm(module):
            raise UserError(
                f"{name} ({type(module).__name__}) is neither attention nor FFN nor norm"
            )
    if not attention:
        raise UserError("it has no attention")
    if not ffn:
        raise UserError("it has no FFN")
    return attention, ffn


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _ffn_without_a_class(layer: nn.Module) -> list[str]:
    """The modules of an FFN that is no module of its own."""
    children = dict(layer.named_children())
    if {"intermediate", "output"} <= children.keys():  # BERT and its relatives
        return ["intermediate", "output"]
    return [name for name, module in children.items() if isinstance(module, nn.Linear)]  # OPT


def _outermost(layer: nn.Module, kind: re.Pattern[str]) -> list[str]:
    """Modules within the layer whose class is called so, and not those within one of them."""
    names: list[str] = []
    for name, module in layer.named_modules():
        if name and not _lies_in(name, names) and kind.search(type(module).__name__):
            names.append(name)
    return names


def _lies_in(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def chosen_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> Mapping[str, nn.Module]:
    """By name those of every stack of layers with these numbers; all if None. `UserError` where
    there is none.
    """
    marked = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }
    # Swin marks its stages, too, which hold layers
    found = {
        name: module
        for name, module in marked.items()
        if not any(inner.startswith(f"{name}.") for inner in marked)
    }
    if not found:
        raise UserError(f"{type(model).__name__} has no layers that transformers knows of")
    if layers is None:
        return found
    numbers = {name: int(name.rpartition(".")[2]) for name in found}
    beyond = sorted(set(layers) - set(numbers.values()))
    if beyond:
        raise UserError(
            f"upscale_layers: there is no layer {beyond[0]}; the last is {max(numbers.values())}"
        )
    return {name: module for name, module in found.items() if numbers[name] in layers}


def linears_in(layer: nn.Module, part: str) -> list[str]:
    """Names within the layer of the linear modules of one of its parts."""
    module = layer.get_submodule(part)
    return [
        f"{part}.{name}".rstrip(".")
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear | Conv1D)
    ]
