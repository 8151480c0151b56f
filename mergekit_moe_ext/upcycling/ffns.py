"""The FFNs of a dense model of any class: which linear modules of one read its input, and which
writes its output.

Nothing is written down per architecture. An FFN that is a module of its own is run, without memory,
and its linear modules are watched; then it is run once more with experts in their places.
"""

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from _mergekit_moe_ext_common.checkpoints import first_line
from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.layers import chosen_layers, is_norm, linears_in, parts_of
from mergekit_moe_ext.merging.wrappers import is_mixture
from mergekit_moe_ext.mixtures.routers import routers_of
from mergekit_moe_ext.modeling.configuration_upcycled_moe import RoutedFFN
from mergekit_moe_ext.modeling.modeling_upcycled_moe import put_experts

_ROUTER_NAMES = ("router", "token_router")
# A run without memory takes so many texts of so many tokens: no two axes that could be taken for
# each other, or be broadcast, whatever experts per token there are.
_TRIAL = (3, 5)


def find_ffns(model: PreTrainedModel) -> dict[str, RoutedFFN]:
    """The FFNs of all layers of a model without memory, by the names that their routers get.

    `UserError` for a model that is a mixture of experts already, one without FFNs, and one whose
    FFNs do more than to map every token by itself.
    """
    kind = type(model).__name__
    if _is_mixture(model):
        raise UserError(
            f"{kind} is a mixture of experts already; `merge_method: caem` merges mixtures"
        )
    ffns = {}
    known: dict[Any, RoutedFFN] = {}  # those that were run, by what makes them alike
    for layer_name, layer in layers_with_experts(model).items():
        for modules in parts_of(layer).ffns:
            first = f"{layer_name}.{modules[0]}"
            is_module = len(modules) == 1 and not _is_linear(layer.get_submodule(modules[0]))
            try:
                if is_module:
                    ffn = _by_running_once(layer, modules[0], known)
                else:
                    ffn = _by_place(layer, modules)
            except UserError as error:
                raise UserError(f"{first} of {kind}: {error.message}") from error
            owner = first if is_module else layer_name
            ffns[f"{owner}.{_free_name(model.get_submodule(owner))}"] = _within(layer_name, ffn)
    if not ffns:
        raise UserError(f"{kind} has no FFN that can be told by its class")
    return ffns


def layers_with_experts(model: PreTrainedModel) -> Mapping[str, nn.Module]:
    """The layers whose FFNs become mixtures: all of them, but of a model that also sees or hears
    those of its language model.
    """
    layers = chosen_layers(model, None)
    config = model.config
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is config:
        return layers
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    of_text = {name: layer for name, layer in layers.items() if id(layer) in inside}
    return of_text or layers


def _is_mixture(model: PreTrainedModel) -> bool:
    """Whether the model has experts: a module that transformers knows as a router, or, where the
    config says how many there are, modules that are named after them.
    """
    # The layers may be dense whatever the config says, as those of Doge are by default.
    if is_mixture(model.config) and any("expert" in name for name, _ in model.named_modules()):
        return True
    try:
        routers_of(model)
    except UserError:
        return False
    return True


def _likeness(layer: nn.Module, name: str) -> Any:
    """What two FFNs have in common whose linear modules have the same roles, by the same names."""
    ffn = layer.get_submodule(name)
    shapes = [(part, tuple(tensor.shape)) for part, tensor in ffn.named_parameters()]
    return name, type(ffn), tuple(shapes)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _free_name(owner: nn.Module) -> str:
    return next(name for name in _ROUTER_NAMES if not hasattr(owner, name))


def _within(layer: str, ffn: RoutedFFN) -> RoutedFFN:
    """The FFN by the names that its modules have in the model."""

    def full(names: Sequence[str]) -> list[str]:
        return [f"{layer}.{name}" for name in names]

    return RoutedFFN(full(ffn.readers), f"{layer}.{ffn.writer}", full(ffn.inner))


def _by_place(layer: nn.Module, modules: Sequence[str]) -> RoutedFFN:
    """The roles in an FFN that is not a module of its own: its first linear module reads, its last
    one writes.
    """
    linears = list(itertools.chain.from_iterable(linears_in(layer, part) for part in modules))
    if len(linears) != 2:
        raise UserError(f"it has {len(linears)} linear modules outside of any FFN, not two")
    reader, writer = linears
    if _sizes(layer.get_submodule(reader)) != _sizes(layer.get_submodule(writer))[::-1]:
        raise UserError(f"{writer} does not lead from where {reader} leads to")
    return RoutedFFN([reader], writer)


def _by_running_once(layer: nn.Module, name: str, known: dict[Any, RoutedFFN]) -> RoutedFFN:
    """The roles in an FFN that is a module of its own, which is run unless one like it is `known`
    already, and is known from then on.
    """
    alike = _likeness(layer, name)
    if alike not in known:
        known[alike] = _by_running(layer, name)
    return known[alike]


def _by_running(layer: nn.Module, name: str) -> RoutedFFN:
    """The roles of the linear modules of an FFN, by a run without memory."""
    ffn = layer.get_submodule(name)
    linears = {each: layer.get_submodule(each) for each in linears_in(layer, name)}
    if len(linears) < 2:
        raise UserError(f"it has {len(linears)} linear modules; an FFN has two or more")
    _check_other_parameters(ffn)
    calls, width = _calls_of(ffn, linears)
    order = [each for each, _ in calls]
    if sorted(order) != sorted(linears):
        raise UserError(f"it does not call each of {', '.join(linears)} once")
    # What the first call is given is the FFN's input: whichever modules are given the same tensor
    # read it, too. The last of the others writes.
    read = calls[0][1]
    readers = [each for each, argument in calls if argument is read]
    others = [each for each in order if each not in readers]
    if order[-1] in readers:
        raise UserError(f"{order[-1]}, which it calls last, reads its input")
    routed = RoutedFFN(readers, others[-1], others[:-1])
    _check_routed(ffn, routed, name, width)
    return routed


def _calls_of(
    ffn: nn.Module, linears: Mapping[str, nn.Module]
) -> tuple[list[tuple[str, Tensor]], int]:
    """The calls of an FFN's linear modules in a run without memory, by name and input, and the
    width of the states that it reads. `UserError` where it cannot be run.
    """
    first_error: Exception | None = None
    # Nothing says which width an FFN reads: each that one of its linear modules reads is tried.
    for width in dict.fromkeys(_sizes(module)[0] for module in linears.values()):
        calls: list[tuple[str, Tensor]] = []
        hooks = []
        for name, module in linears.items():
            hooks.append(module.register_forward_pre_hook(_recorder(calls, name)))
        try:
            _run(ffn, width)
            return calls, width
        except Exception as error:  # of any kind: it is code of any architecture
            first_error = first_error or error
        finally:
            for hook in hooks:
                hook.remove()
    assert first_error is not None
    raise UserError(f"it cannot be run by itself ({first_line(first_error)})")


def _recorder(calls: list[tuple[str, Tensor]], name: str) -> Any:
    def record(_module: Any, inputs: Any) -> None:
        calls.append((name, inputs[0]))

    return record


def _check_other_parameters(ffn: nn.Module) -> None:
    """Check that what is not linear treats every token alike and by itself: norms, and vectors."""
    for name, module in ffn.named_modules():
        if _is_linear(module):
            continue
        by_batch = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
        for parameter in module.parameters(recurse=False):
            if by_batch or (parameter.ndim != 1 and not is_norm(module)):
                where = name or "the FFN itself"
                raise UserError(
                    f"{where} ({type(module).__name__}) has parameters and is not linear"
                )


def _run(ffn: nn.Module, width: int) -> Tensor:
    """The FFN's output for random states; whatever else it requires (a residual) is like them."""
    like = next(ffn.parameters())
    states = torch.empty(*_TRIAL, width, dtype=like.dtype, device="meta")
    required = []
    for parameter in inspect.signature(ffn.forward).parameters.values():
        is_positional = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if is_positional and parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
    others = [torch.empty_like(states) for _ in required[1:]]
    output = ffn(states, *others)
    output = output[0] if isinstance(output, tuple) else output
    if output.shape != states.shape:
        raise ValueError(f"its output is {tuple(output.shape)} for {tuple(states.shape)}")
    return output


def _check_routed(ffn: nn.Module, found: RoutedFFN, name: str, width: int) -> None:
    """Check that the FFN still runs when its linear modules hold experts and get sorted tokens."""
    holder = nn.Module()
    holder.ffn = copy.deepcopy(ffn)

    def inside(linear: str) -> str:
        return "ffn" + linear.removeprefix(name)

    names = RoutedFFN(
        [inside(each) for each in found.readers],
        inside(found.writer),
        [inside(each) for each in found.inner],
    )
    put_experts(holder, "router", names, experts=4, chosen=2)
    try:
        _run(holder.ffn, width)
    except Exception as error:  # of any kind: it is code of any architecture
        raise UserError(
            f"it does more than to map every token by itself ({first_line(error)})"
        ) from error


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """The width that a linear module reads, and the one that it writes."""
    weight: Any = linear.weight
    first, second = weight.shape
    return (first, second) if isinstance(linear, Conv1D) else (second, first)
