"""The parts of a mixture that are trained, as `--train` names them, and their learning rates.

Every parameter belongs to one of three parts: the router, which in a mixture of FFNs is the gates
of its layers; the projectors, which only a sequence MoE of different architectures has; the rest.
"""

import logging
from collections.abc import Collection, Sequence
from typing import Any

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.mixtures.routers import routers_of, routes_sequences
from mergekit_moe_ext.recipes import Part, Recipe

LOG = logging.getLogger(__name__)
_ROUTER = "router"
_PROJECTORS = "projectors"
_REST = "rest"
_PROJECTOR_NAMES = (".proj_in.", ".proj_out.")


def chosen_parts(part: Part | Sequence[Part], config: Any) -> list[str]:
    """What a user asked for, once each and in order.

    `gates` and `router` are one thing under two names, of which the model's own is taken.
    """
    names = [part] if isinstance(part, str) else list(part)
    if not names:
        raise UserError("name the part that is trained: router, projectors or all")
    own_name = _ROUTER if routes_sequences(config) else "gates"
    chosen = {own_name if name in ("gates", _ROUTER) else name for name in names}
    return ["all"] if "all" in chosen else sorted(chosen)


def parts_to_train(
    chosen: Collection[str], config: Any, names: Collection[str], recipe: Recipe
) -> set[str]:
    """The parts that are trained, of a model whose files hold tensors of these names.

    `UserError` for a part that the model has not, for a router that cannot learn, and for an option
    that concerns a part that is not trained.
    """
    has_projectors = any(infix in name for name in names for infix in _PROJECTOR_NAMES)
    if _PROJECTORS in chosen and not has_projectors:
        raise UserError(
            "this model has no projectors: hetero_moe makes them, with an embedding that its "
            "experts share"
        )
    parts = {_ROUTER if name == "gates" else name for name in chosen}
    if "all" in parts:
        parts = {_ROUTER, _REST}
        if has_projectors:
            parts.add(_PROJECTORS)
    if _ROUTER in parts and routes_sequences(config):
        why_not = _why_no_router_learns(config)
        if why_not and _ROUTER in chosen:
            raise UserError(why_not)
        if why_not:
            parts.remove(_ROUTER)
            if config.routing == "learned":
                LOG.warning("%s; the rest is trained", why_not)
    _check_options(parts, recipe)
    return parts


def _check_options(parts: Collection[str], recipe: Recipe) -> None:
    """`UserError` for an option that concerns a part that is not trained."""
    options: dict[str, tuple[str, Any]] = {
        "--router-learning-rate": (_ROUTER, recipe.router_learning_rate),
        "--projector-learning-rate": (_PROJECTORS, recipe.projector_learning_rate),
        "--router-aux-loss": (_ROUTER, recipe.router_aux_loss or None),
    }
    for option, (part, value) in options.items():
        if value is not None and part not in parts:
            raise UserError(f"{option}: this training has no {part} to train")


def _why_no_router_learns(config: Any) -> str | None:
    """A sentence on a sequence MoE whose router cannot be trained; None where it can."""
    if config.routing != "learned":
        return (
            f"this sequence MoE has no router to train: it routes by {config.routing}; merge with "
            "routing: learned, or train all"
        )
    if config.experts_per_sequence == 1:
        return (
            "the router of this sequence MoE keeps one expert, whose weight is always 1, so that "
            "no loss has a gradient for it: set experts_per_sequence to 2 or more in config.json"
        )
    return None


def parts_by_name(model: Any) -> dict[str, str]:
    """The part that each parameter belongs to. `UserError` if the model has no routers."""
    if not routes_sequences(model.config):
        routers = list(routers_of(model).values())
    else:
        routers = [model.router] if model.config.routing == "learned" else []
    of_routers: set[int] = set()
    for router in routers:
        of_routers |= {id(parameter) for parameter in router.parameters()}
    parts = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in of_routers:
            parts[name] = _ROUTER
        elif any(infix in name for infix in _PROJECTOR_NAMES):
            parts[name] = _PROJECTORS
        else:
            parts[name] = _REST
    return parts


def freeze_others(model: Any, parts: Collection[str]) -> None:
    """Turns gradients off for all parameters that are not trained."""
    by_name = parts_by_name(model)
    for name, parameter in model.named_parameters():
        # What the architecture itself keeps fixed stays so.
        parameter.requires_grad_(parameter.requires_grad and by_name[name] in parts)


def learning_rates(model: Any, recipe: Recipe, of_rest: float) -> dict[str, float]:
    """The learning rate of each parameter, by name: its part's own, or else that of the rest."""
    own_rates = {_ROUTER: recipe.router_learning_rate, _PROJECTORS: recipe.projector_learning_rate}
    rates = {}
    for name, part in parts_by_name(model).items():
        own_rate = own_rates.get(part)
        rates[name] = of_rest if own_rate is None else own_rate
    return rates
