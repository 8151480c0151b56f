"""Tensors that a checkpoint holds joined and a model has apart (DINOv2's `weights_in`, which is the
gate's and the up projection's).

A view shows the parts beside what is stored, so that a merge can name both.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mergekit_moe_ext.merging.manifest import hub_names
from mergekit_moe_ext.merging.views import Derivation


def joined_tensors(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor]
) -> dict[str, Derivation]:
    """By the name of each stored tensor that several of the model's are joined to, what makes these
    of it, and it itself.

    `model` and `state` are those of `hub_state`. Tensors that are stored in any other way are left
    out.
    """
    used = hub_names(model, state)
    parts: dict[str, list[str]] = {}
    own_state = model.state_dict()
    for name, tensor in own_state.items():
        if name not in used:
            stored_names = list(revert_weight_conversion(model, {name: tensor}))
            if len(stored_names) == 1:
                parts.setdefault(stored_names[0], []).append(name)
    joined = {}
    axes: dict[str, int | None] = {}
    for stored, names in parts.items():
        if len(names) < 2 or stored not in state:
            continue
        shapes = [tuple(own_state[name].shape) for name in names]
        # All layers are converted alike, and to try each would take as long as to read the model.
        pattern = re.sub(r"\d+", "*", stored)
        if pattern not in axes:
            axes[pattern] = _axis(model, names, shapes)
        axis = axes[pattern]
        if axis is not None:
            sizes = [shape[axis] for shape in shapes]
            joined[stored] = Derivation(stored, (stored, *names), _splitting(sizes, axis))
    return joined


def _axis(
    model: PreTrainedModel, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> int | None:
    """The axis along which transformers joins these tensors as they are; None if it does more."""
    # Each element has a number of its own, so that a change of their order would be seen.
    numbered = []
    first = 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        numbers = torch.arange(first, first + size, dtype=torch.int32, device="cpu")
        numbered.append(numbers.reshape(shape))
        first += size
    (made,) = revert_weight_conversion(model, dict(zip(names, numbered, strict=True))).values()
    for axis in range(made.ndim):
        others = [(*shape[:axis], *shape[axis + 1 :]) for shape in shapes]
        fit_together = all(each == others[0] for each in others)
        if fit_together and torch.equal(made, torch.cat(numbered, dim=axis)):
            return axis
    return None


def _splitting(sizes: Sequence[int], axis: int) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """The function of a joined tensor that gives it and its parts."""

    def split(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return (tensor, *tensor.split(list(sizes), dim=axis))

    return split
