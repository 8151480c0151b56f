"""Checkpoints in other layouts than the Hub's, which is the one that merges know: that in which
transformers 5 keeps a model in memory (`save_pretrained(…, save_original_format=False)`), with the
experts of a layer in one tensor, say, and names from before it (`LayerNorm.gamma` of the first
BERT).

They are read as if they were in the layout of the Hub.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from mergekit_moe_ext.merging.manifest import hub_state
from mergekit_moe_ext.merging.views import Derivation, Layer, unchanged


def hub_layer(
    config: PretrainedConfig,
    stored: Mapping[str, tuple[int, ...]],
    hub_names: Collection[str],
) -> Layer:
    """The layer of a view that shows a checkpoint in the layout of the Hub; empty for one that is
    in it, or in none that transformers knows.

    stored: the shapes of the tensors in its files, by name.
    hub_names: the names that it has on the Hub.
    """
    lacking = set(hub_names) - stored.keys()
    surplus = stored.keys() - set(hub_names)
    if not lacking or not surplus:
        return ()
    model, _ = hub_state(config)
    derivations = []
    for name in sorted(surplus & model.state_dict().keys()):
        # By transformers' own conversion, of one tensor at a time, which is enough for all layouts
        # of experts. What is made of several tensors at once is left to the complaint about what is
        # lacking.
        made = revert_weight_conversion(model, {name: torch.empty(stored[name], device="meta")})
        if made.keys() <= lacking:
            names = tuple(made)
            derivations.append(Derivation(name, names, _reverting(model, name, names)))
    others = stored.keys() - model.state_dict().keys()
    return (*derivations, *renaming_layer(config, others, lacking))


def renaming_layer(
    config: PretrainedConfig, stored: Collection[str], known_names: Collection[str]
) -> Layer:
    """The layer of a view that shows tensors by their names of today, where they are stored under
    others that transformers still reads: those of old, and in a checkpoint of the trunk alone those
    without the trunk's name.

    known_names: the names of today that there may be.
    """
    lacking = set(known_names) - set(stored)
    surplus = set(stored) - set(known_names)
    if not lacking or not surplus:
        return ()
    model, _ = hub_state(config)
    renamings = [
        each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)
    ]
    derivations = []
    for name in sorted(surplus):
        renamed, _ = rename_source_key(name, renamings, [])
        for candidate in (renamed, f"{model.base_model_prefix}.{renamed}"):
            if candidate in lacking:
                derivations.append(Derivation(name, (candidate,), unchanged))
                lacking.remove(candidate)
                break
    return tuple(derivations)


def _reverting(
    model: Any, name: str, names: tuple[str, ...]
) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """The function of a stored tensor that gives those that it is on the Hub."""

    def revert(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        made = revert_weight_conversion(model, {name: tensor})
        return [made[each] for each in names]

    return revert
