"""The experts that there are to choose from, and the softmax over the best of them."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.layer import RoutedLoraLayer
from peft_routing.routers import largest


def active_adapter(model: Any) -> tuple[str, list[RoutedLoraLayer]]:
    """The name of the one active routed adapter, and its modules.

    `UserError` where none or several are active, and where adapters are disabled.
    """
    layers = [module for module in model.modules() if isinstance(module, RoutedLoraLayer)]
    names: set[str] = set()
    for layer in layers:
        names.update(name for name in layer.active_adapters if name in layer.routed_lora_experts)
    if len(names) != 1:
        active = ", ".join(sorted(names)) or "none"
        raise UserError(f"choosing needs exactly one active routed adapter; active: {active}")
    if any(layer.disable_adapters for layer in layers):
        raise UserError(
            "choosing needs the adapters enabled: with disable_adapter() all experts are alike"
        )
    name = names.pop()
    return name, [layer for layer in layers if name in layer.routed_lora_experts]


def expert_names(experts_or_model: Any) -> list[str]:
    """The experts' names in the order of the coefficients.

    Of a model these are the experts of its active adapter.
    """
    if isinstance(experts_or_model, torch.nn.Module):
        adapter, layers = active_adapter(experts_or_model)
        return list(layers[0].router_of(adapter).experts)
    return list(experts_or_model)


def check_known(names: Iterable[str], experts: Sequence[str], where: str) -> None:
    """`UserError` for the first name that is not an expert, with the nearest one that is."""
    for name in names:
        if name not in experts:
            near = difflib.get_close_matches(str(name), experts, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(experts)}"
            raise UserError(f"{where}: there is no expert {name!r}; {hint}")


def check_top_k(top_k: int | None, count: int) -> int:
    """The number of experts that keep a coefficient: `top_k`, or all `count` of them if None."""
    if top_k is not None and not 1 <= top_k <= count:
        raise UserError(f"top_k={top_k} is not between 1 and the number of experts, {count}")
    return top_k or count


def softmax_over_largest(values: Tensor, k: int) -> Tensor:
    """The softmax over the k largest of the last dimension; the others are 0 (MergeME 3.1.3)."""
    return torch.softmax(largest(values, k), dim=-1)
