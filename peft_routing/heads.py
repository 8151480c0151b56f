"""Heads: the modules outside the trunk that PEFT trains and saves whole (`modules_to_save`).

PEFT adds them to every LoRA for sequence classification, token classification and question
answering. Such a module is not an update that could be mixed, so `head=` says what the routed
adapter gets: an expert's, the mean, or a new one, which are PEFT's own `modules_to_save` of the
routed adapter, or a frozen one per expert (`own`), of which `task=` chooses in a forward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.config import RoutedLoraConfig
from peft_routing.expert import HEADS_OF_TASKS, Expert
from peft_routing.own_heads import OwnHeads, active_in


def completed(
    config: RoutedLoraConfig, experts: Sequence[Expert], model: Any, task_type: Any
) -> dict[str, Any]:
    """What the experts' heads decide of a configuration: its `modules_to_save`, and its `head`.

    `UserError` where there is a choice that `head` does not make, or one that cannot be made.
    """
    for expert in experts:
        _check_outside(expert, model)
    routed = [expert for expert in experts if expert.name in config.experts]
    having = [expert for expert in routed if expert.head]
    if config.head is None and having:
        raise UserError(_choices(having[0], [expert.name for expert in having]))
    taken = _taken_from(config, routed, having)
    of_experts: list[str] = []
    for expert in taken:
        of_experts += expert.config["modules_to_save"]
    of_experts += HEADS_OF_TASKS.get(task_type, ())
    patterns = [*(config.modules_to_save or ()), *of_experts]
    heads = base_heads(model, patterns)
    _check_routed(heads, experts)
    if config.head == "new" and not heads:
        raise UserError(f"head='new': a {type(model).__name__} has no head that PEFT would train")
    generates = hasattr(model, "can_generate") and model.can_generate()
    if config.head == "own" and generates:
        raise UserError(
            f"head='own' is for models that do not generate, and this is a {type(model).__name__}: "
            "take an expert's head, 'mean' or 'new'"
        )
    if config.head != "new":
        for expert in taken:
            _check_tensors(expert, base_heads(model, of_experts), own=config.head == "own")
    if config.head == "mean":
        _check_labels(taken)
    return {
        "modules_to_save": list(dict.fromkeys(patterns)) or None,
        # PEFT has the head of a classifier trained and saved, whether experts have one or not.
        "head": config.head or ("new" if heads else None),
    }


def _choices(expert: Expert, names: Sequence[str]) -> str:
    """The error where `head` is not stated."""
    modules = ", ".join(sorted({name.rpartition(".")[0] for name in expert.head}))
    return (
        f"expert {expert.name!r} has a head of its own, {modules} (modules_to_save is "
        f"{expert.config['modules_to_save']}), and heads are not mixed. Say which one the routed "
        f"adapter gets: head= the name of an expert ({', '.join(names)}), 'mean' of all heads if "
        "their labels are the same, 'new' to train the base model's with the router, or 'own' if "
        "every expert keeps its head and task= in forward chooses"
    )


def _taken_from(
    config: RoutedLoraConfig, routed: Sequence[Expert], having: Sequence[Expert]
) -> list[Expert]:
    """The experts whose heads are used. `UserError` where one of them has none."""
    if config.head in (None, "new"):
        return list(having)
    if config.head in config.experts:
        chosen = [expert for expert in routed if expert.name == config.head]
    else:
        chosen = list(routed)
    for expert in chosen:
        if not expert.head:
            others = ", ".join(other.name for other in having) or "none"
            raise UserError(
                f"head={config.head!r}: expert {expert.name!r} has no head; of the experts, "
                f"{others} has one"
            )
    return chosen


def base_heads(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The base model's own modules that PEFT takes for these `modules_to_save`, by their names."""
    heads: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{head}.") for head in heads)
        if not is_inside and name.endswith(tuple(patterns)):
            is_wrapped = isinstance(module, ModulesToSaveWrapper)
            heads[name] = module.original_module if is_wrapped else module
    return heads


def _check_outside(expert: Expert, model: nn.Module) -> None:
    """`UserError` where an expert has a module inside the trunk as its own, as an embedding is."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix:
        return
    trunk = getattr(model, prefix, None)
    for name in expert.head:
        if trunk is None or name.startswith(f"{prefix}."):
            raise UserError(
                f"expert {expert.name!r} cannot be routed: modules_to_save is "
                f"{expert.config['modules_to_save']}, and {name} is inside the model; whole "
                "modules cannot be mixed, and only a head can be chosen"
            )


def _check_routed(heads: Mapping[str, nn.Module], experts: Sequence[Expert]) -> None:
    """`UserError` where a head is to be routed as well."""
    for expert in experts:
        for module in expert.factors:
            if any(f"{module}.".startswith(f"{head}.") for head in heads):
                raise UserError(
                    f"expert {expert.name!r} has a LoRA at {module}, which is the head that the "
                    "routed adapter keeps whole (modules_to_save); it cannot be both"
                )


def _check_tensors(expert: Expert, heads: Mapping[str, nn.Module], *, own: bool) -> None:
    """`UserError` where an expert's head does not fit the base model's."""
    of_base: dict[str, Tensor] = {}
    for module, head in heads.items():
        of_base |= {f"{module}.{name}": tensor for name, tensor in head.state_dict().items()}
    where = f"expert {expert.name!r}"
    for name in (*expert.head, *of_base):
        if name not in of_base:
            raise UserError(
                f"{where} has the head {name}, for which the base model has no place: load the "
                "base with the class that it was trained with, such as "
                "AutoModelForSequenceClassification"
            )
        if name not in expert.head:
            raise UserError(f"the file of {where} lacks {name}, which is in the base model's head")
        # The classes are the first dimension, of a weight as of a bias.
        shape = tuple(expert.head[name].shape)
        base = tuple(of_base[name].shape)
        if shape != base and not (own and shape[1:] == base[1:] and len(shape) == len(base)):
            hint = ""
            if shape[1:] == base[1:]:
                hint = f": load the base with num_labels={shape[0]}, or compose with head='own'"
            raise UserError(f"{where}: {name} is {shape}, and {base} in the base model{hint}")


def _check_labels(experts: Sequence[Expert]) -> None:
    """`UserError` where the experts' classes are known not to be the same."""
    named = [expert for expert in experts if expert.labels]
    for expert in named[1:]:
        if expert.labels != named[0].labels:
            raise UserError(
                f"head='mean': the classes of {named[0].name!r} are {', '.join(named[0].labels)}, "
                f"those of {expert.name!r} {', '.join(expert.labels)}: take head='own'"
            )


def check_added(expert: Expert, config: RoutedLoraConfig, model: nn.Module) -> None:
    """`UserError` where an expert that is added to a mean of heads has not a head like these."""
    if not expert.head:
        raise UserError(
            f"expert {expert.name!r} has no head, and head='mean' is for those with one"
        )
    _check_tensors(expert, base_heads(model, config.modules_to_save or ()), own=False)


def shapes_of(expert: Expert) -> dict[str, list[int]]:
    """The shapes of a head's tensors, as a configuration saves them."""
    return {name: list(tensor.shape) for name, tensor in expert.head.items()}


def _wrappers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """The name and the wrapper of each module that PEFT keeps whole for an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            yield name, module


def make_own(model: nn.Module, adapter_name: str, config: RoutedLoraConfig) -> None:
    """Put an empty head per expert in the place of each head of an adapter."""
    for module, wrapper in _wrappers(model, adapter_name):
        shapes = {}
        for expert, described in config.experts.items():
            shapes[expert] = _within(module, described["head"])
        if not all(shapes.values()):  # another module, which the configuration names itself
            continue
        wrapper.modules_to_save[adapter_name] = OwnHeads(wrapper.original_module, shapes)


def make_room(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter's heads memory where the base model has none, as its experts have."""
    for _, wrapper in _wrappers(model, adapter_name):
        head = wrapper.modules_to_save[adapter_name]
        if any(tensor.is_meta for tensor in head.state_dict().values()):
            head.to_empty(device="cpu")


@torch.no_grad()
def fill(
    model: nn.Module, adapter_name: str, config: RoutedLoraConfig, experts: Sequence[Expert]
) -> None:
    """Put the experts' heads, which fit, where PEFT has those of the adapter."""
    routed = [expert for expert in experts if expert.name in config.experts]
    for module, wrapper in _wrappers(model, adapter_name):
        place = wrapper.modules_to_save[adapter_name]
        if isinstance(place, OwnHeads):
            for head, expert in zip(place, routed, strict=True):
                _put(head, _within(module, expert.head))
        elif config.head == "mean":
            _put(place, _mean([_within(module, expert.head) for expert in routed]))
        else:
            for expert in routed:
                if expert.name == config.head:
                    _put(place, _within(module, expert.head))


def _mean(heads: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the heads, tensor by tensor, in float32 or wider."""
    means = {}
    for name, first in heads[0].items():
        dtype = torch.promote_types(first.dtype, torch.float32)
        means[name] = torch.stack([head[name].to(dtype) for head in heads]).mean(dim=0)
    return means


def _put(head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a head, in its dtype. One on the meta device gets them on the CPU."""
    for name, tensor in head.state_dict().items():
        if name not in tensors:  # a module of `modules_to_save` that the experts have not
            continue
        if tensor.is_meta:
            head.load_state_dict({name: tensors[name].cpu()}, strict=False, assign=True)
        else:
            tensor.copy_(tensors[name])


def _within(module: str, by_name: Mapping[str, Any]) -> dict[str, Any]:
    """What has names inside a module, by the names that it has there."""
    prefix = f"{module}."
    return {
        name.removeprefix(prefix): value
        for name, value in by_name.items()
        if name.startswith(prefix)
    }


def take_out(model: nn.Module, adapter_name: str, experts: Sequence[Expert]) -> None:
    """Give experts the heads that they have in an adapter: each its own, or all the same."""
    for module, wrapper in _wrappers(model, adapter_name):
        place = wrapper.modules_to_save[adapter_name]
        heads = list(place) if isinstance(place, OwnHeads) else [place] * len(experts)
        for expert, head in zip(experts, heads, strict=False):  # general ones have none of theirs
            for name, tensor in head.state_dict().items():
                expert.head[f"{module}.{name}"] = tensor


def switch_off_own(model: nn.Module) -> None:
    """Have the base model's head take the place of the experts' own."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and isinstance(active_in(module), OwnHeads):
            module.set_adapter([])
