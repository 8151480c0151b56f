"""Which experts a changed mixture has, in which order, and by which names.

A mixture's config may name its experts (`expert_names`), so that a user need not know their
numbers. Every function here is pure.
"""

from collections.abc import Sequence

from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.caem.checks import check_routing
from mergekit_moe_ext.merging.wrappers import language_config
from mergekit_moe_ext.mixtures.experts import (
    expert_names,
    experts_per_token,
    index_of_expert,
    num_experts,
    with_num_experts,
)


def order_with_new(config: PretrainedConfig, new: int) -> tuple[int, ...]:
    """The experts of the mixture with this config and `new` more, which are numbered after the
    mixture's own, in their order in the output.

    A router that chooses among groups of neighbours gets the same number of new experts at the end
    of every group, so that the old ones keep their groups; any other gets them at the end.
    `UserError` where they do not fill the groups evenly.
    """
    old = num_experts(config)
    groups = getattr(language_config(config), "n_group", None) or 1
    if new % groups:
        raise UserError(
            f"the router of {config.architectures[0]} chooses among {groups} groups of experts, "
            f"which must stay of one size: add {groups} experts, or a multiple of that, not {new}"
        )
    order: list[int] = []
    for group in range(groups):
        # The group's own experts, and then its part of the new ones.
        order += range(group * old // groups, (group + 1) * old // groups)
        order += range(old + group * new // groups, old + (group + 1) * new // groups)
    return tuple(order)


def order_without(config: PretrainedConfig, experts: Sequence[str]) -> tuple[int, ...]:
    """The experts that are left of the mixture with this config, in their order, without those
    that are given by number or name.

    `UserError` for an expert that is not there, and where too few are left for the router.
    """
    old = num_experts(config)
    removed = set()
    for expert in experts:
        index = index_of_expert(config, expert)
        if index in removed:
            raise UserError(f"expert {expert} is to be removed twice")
        removed.add(index)
    order = tuple(index for index in range(old) if index not in removed)
    if not order:
        raise UserError("no expert would be left")
    groups = getattr(language_config(config), "n_group", None) or 1
    removed_per_group = [0] * groups
    for index in removed:
        removed_per_group[index * groups // old] += 1
    if len(set(removed_per_group)) > 1:
        raise UserError(
            f"the router of {config.architectures[0]} chooses among {groups} groups of experts, "
            "which must stay of one size: remove as many of each group (they lose "
            f"{', '.join(map(str, removed_per_group))})"
        )
    return order


def arranged_config(
    config: PretrainedConfig, order: Sequence[int], new_names: Sequence[str | None] = ()
) -> PretrainedConfig:
    """The config of a mixture that has the experts in `order`, of which those beyond the number
    that `config` has are new and are called `new_names`.

    `UserError` for a router that cannot choose among that many, and for a name that is not one.
    """
    changed = with_num_experts(config, len(order))
    per_token = experts_per_token(config)
    if per_token > len(order):
        raise UserError(
            f"a token is sent to {per_token} experts, and only {len(order)} would be left"
        )
    check_routing(changed, len(order))
    names = [*expert_names(config), *new_names]
    set_expert_names(changed, [names[index] for index in order])
    return changed


def set_expert_names(config: PretrainedConfig, names: Sequence[str | None]) -> None:
    """Write the names of a mixture's experts into its config, if any has one.

    `UserError` for a name that two experts have, that is a number, or that is empty.
    """
    stated = [name for name in names if name is not None]
    for name in stated:
        if not name.strip() or name.isdigit():
            raise UserError(f"{name!r} cannot be an expert's name: give it a word")
        if stated.count(name) > 1:
            raise UserError(f"two experts are called {name!r}; give each a name of its own")
    if stated:
        config.expert_names = list(names)
