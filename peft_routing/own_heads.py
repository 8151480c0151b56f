"""The head of every expert beside one another, of which a forward pass takes one (`head="own"`).

`task=` in `forward` names the expert. It holds for the whole pass, in the thread that it is in.
"""

import copy
import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.config import RoutedLoraConfig

# transformers' kinds of losses that are told how many classes there are.
_CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)
_NOW = threading.local()  # like given coefficients: torch.compile cannot read a ContextVar


class OwnHeads(nn.ModuleList):
    """One head per expert, of which `task=` chooses one; PEFT has it in place of one head.

    Its tensors are buffers, since PEFT has every parameter in this place trained, and experts keep
    their heads as they are.
    """

    def __init__(self, like: nn.Module, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Heads like the base model's, of the tensors' shapes by expert, full of zeros."""
        super().__init__(_frozen(like, of_expert) for of_expert in shapes.values())
        self.experts = list(shapes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chosen = _current()
        if chosen is None:
            raise UserError("task= chooses a head, so the whole model must be called")
        return self[self.experts.index(chosen.task)](*args, **kwargs)


def _frozen(head: nn.Module, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """A head of the same kind, with buffers of these shapes."""
    head = copy.deepcopy(head)
    for name, parameter in list(head.named_parameters()):
        owner_name, _, last = name.rpartition(".")
        owner = head.get_submodule(owner_name)
        shape = tuple(shapes[name])
        delattr(owner, last)
        owner.register_buffer(last, torch.zeros(shape, dtype=parameter.dtype).to(parameter.device))
        if isinstance(owner, nn.Linear) and last == "weight":
            owner.out_features, owner.in_features = shape
    return head


def _active_own(model: nn.Module) -> list[tuple[nn.Module, OwnHeads]]:
    """The base model's head and the experts' own, where these are active."""
    pairs = []
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            head = active_in(module)
            if isinstance(head, OwnHeads):
                pairs.append((module.original_module, head))
    return pairs


def active_in(wrapper: Any) -> nn.Module:
    """What runs in a wrapper now."""
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[wrapper.active_adapters[0]]


@dataclass(frozen=True)
class TaskOfPass:
    """The task of a forward pass, and its labels, where the model's own loss cannot take them."""

    model: Any
    task: Any
    labels: Tensor | None
    outer: "TaskOfPass | None"


def _current() -> TaskOfPass | None:
    return getattr(_NOW, "chosen", None)


def enter(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start a forward pass with these arguments; returns those for the model itself.

    `UserError` where `task` names no head, or is lacking.
    """
    configs = []
    for config in getattr(model, "peft_config", {}).values():
        if isinstance(config, RoutedLoraConfig):
            configs.append(config)
    task = arguments.get("task")
    active = []
    if any(config.head == "own" for config in configs):
        active = _active_own(model)
    without_task = {name: value for name, value in arguments.items() if name != "task"}
    if not active:
        # Some base model may have a `task` of its own.
        if task is not None and "task" in inspect.signature(type(model).forward).parameters:
            return arguments
        _check_task(task, configs)
        return without_task
    experts = active[0][1].experts
    if task is None and len(experts) == 1:
        task = experts[0]
    if task not in experts:
        raise UserError(f"task={task!r}: choose a head, one of {', '.join(experts)}")
    labels = None
    for of_base, heads in active:
        # The base model's loss is for as many classes as its own head has.
        if _classes(of_base) != _classes(heads[experts.index(task)]):
            labels = without_task.pop("labels", labels)
    _NOW.chosen = TaskOfPass(model, task, labels, _current())
    return without_task


def _check_task(task: Any, configs: Sequence[RoutedLoraConfig]) -> None:
    """`UserError` where `task` is no expert of adapters with one head, or not the one whose head
    that is.
    """
    names: list[str] = []
    for config in configs:
        names += [config.head] if config.head in config.names else config.names
    if task is not None and task not in names:
        raise UserError(f"task={task!r} is none of {', '.join(names)}")


def _classes(head: nn.Module) -> list[int]:
    """The first dimensions of a head's parameters."""
    # Not of its state dict: torch 2.15 does not compile a pass that makes one.
    return [len(parameter) for parameter in head.parameters() if parameter.ndim]


def leave(model: Any) -> TaskOfPass | None:
    """End the model's forward pass; returns what `enter` had chosen for it."""
    chosen = _current()
    if chosen is None or chosen.model is not model:
        return None
    _NOW.chosen = chosen.outer
    return chosen


def with_loss(model: Any, labels: Tensor, items: Any, output: Any) -> Any:
    """The output of a classifier, with the loss that transformers has for as many classes."""
    if getattr(model, "loss_type", None) not in _CLASSIFIERS:
        raise UserError(
            f"labels: the head of this task has another number of classes than the base model's, "
            f"for which {type(model).__name__} has no loss: compute it from the logits"
        )
    logits = output[0]
    config = copy.deepcopy(model.config)
    if 1 in (logits.shape[-1], config.num_labels):
        config.problem_type = None  # regression for one of the two alone
    config.num_labels = logits.shape[-1]
    counted = {} if items is None else {"num_items_in_batch": items}
    loss = model.loss_function(
        labels=labels, logits=logits, pooled_logits=logits, config=config, **counted
    )
    if isinstance(output, tuple):
        return (loss, *output)
    return type(output)(**{**output, "loss": loss})
