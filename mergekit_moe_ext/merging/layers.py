"""The layers of a model, and the attention and the FFN of a layer."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from _mergekit_moe_ext_common.errors import UserError

# T5's layers, which are named after the attention that they hold, are not attention themselves.
_ATTENTION = re.compile("^(?!.*Layer).*Attention")
_FFN = re.compile("MLP|FeedForward|FFN|DenseAct|DenseGatedAct")
# Cross attention is told by its name in the layer, since its class is that of any attention.
_CROSS_ATTENTION = re.compile("encdec|encoder_attn|cross", re.IGNORECASE)


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers of a model's decoder, by name. `UserError` if they are not one stack.

    A layer is a module whose activations transformers can checkpoint.
    """
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    layers = {}
    for name, module in checkpointed_layers(model).items():
        if id(module) in inside:
            layers[name] = module
    stacks = {name.rpartition(".")[0] for name in layers}
    if len(stacks) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(stacks)} stacks of decoder layers, not one"
        )
    return layers


def checkpointed_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers of all stacks of a model, by name, in order."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            layers[name] = module
    return layers


@dataclass(frozen=True)
class LayerParts:
    """The attention and the FFNs of a layer, as names of modules within it.

    They are told by their classes, which transformers names alike for all architectures.

    cross_attention: attention to the states of another stack.
    ffns: each FFN as the modules that make it up, first the one that reads its input.
    """

    attention: list[str]
    cross_attention: list[str]
    ffns: list[list[str]]


def parts_of(layer: nn.Module) -> LayerParts:
    """The attention and the FFNs of a layer, by the one rule for all of this package. Lists are
    empty where a layer has none.
    """
    every_attention = _outermost(layer, _ATTENTION)
    across = [name for name in every_attention if _CROSS_ATTENTION.search(name)]
    own = [name for name in every_attention if name not in across]
    ffns = [[name] for name in _outermost(layer, _FFN) if not _lies_in(name, every_attention)]
    if not ffns:
        modules = _ffn_without_a_class(layer)
        ffns = [modules] if modules else []
    return LayerParts(own, across, ffns)


def attention_and_ffn(layer: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules of the attention and those of the FFN of a layer, by their names in it.

    `UserError` for a part that is neither, nor a norm, and for a layer without attention or FFN.
    """
    parts = parts_of(layer)
    ffn_names = list(itertools.chain.from_iterable(parts.ffns))
    attention: dict[str, nn.Module] = {}
    ffn: dict[str, nn.Module] = {}
    # Callers treat attention and FFN differently, so every parameter has to belong to one of them.
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
    """The modules of an FFN that is not a module of its own."""
    children = dict(layer.named_children())
    if {"intermediate", "output"} <= children.keys():  # BERT and its relatives
        return ["intermediate", "output"]
    return [name for name, module in children.items() if isinstance(module, nn.Linear)]  # OPT


def _outermost(layer: nn.Module, kind: re.Pattern[str]) -> list[str]:
    """The modules of a layer whose class has a name of this kind, but not those inside of one."""
    names: list[str] = []
    for name, module in layer.named_modules():
        if name and not _lies_in(name, names) and kind.search(type(module).__name__):
            names.append(name)
    return names


def _lies_in(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def chosen_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> Mapping[str, nn.Module]:
    """The layers with these numbers of every stack, by name; all layers if None.

    `UserError` for a model without layers and for a number that none of them has.
    """
    checkpointed = checkpointed_layers(model)
    # Swin marks its stages, too, which hold layers.
    innermost = {}
    for name, module in checkpointed.items():
        if not any(inner.startswith(f"{name}.") for inner in checkpointed):
            innermost[name] = module
    if not innermost:
        raise UserError(f"{type(model).__name__} has no layers that transformers knows of")
    if layers is None:
        return innermost
    numbers = {name: int(name.rpartition(".")[2]) for name in innermost}
    beyond = sorted(set(layers) - set(numbers.values()))
    if beyond:
        raise UserError(
            f"upscale_layers: there is no layer {beyond[0]}; the last is {max(numbers.values())}"
        )
    return {name: module for name, module in innermost.items() if numbers[name] in layers}


def linears_in(layer: nn.Module, part: str) -> list[str]:
    """The names, within the layer, of the linear modules of one of its parts."""
    names = []
    for name, module in layer.get_submodule(part).named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            names.append(f"{part}.{name}".rstrip("."))
    return names
