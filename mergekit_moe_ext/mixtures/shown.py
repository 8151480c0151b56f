"""What a page of texts (`usage --html`) shows of a mixture: the weight of each expert, token by
token.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from _mergekit_moe_ext_common.data import RealTokens
from _mergekit_moe_ext_common.token_page import ShownTexts
from mergekit_moe_ext.mixtures.routers import PER_SEQUENCE, Choice, stack_of


def show_tokens(
    shown: ShownTexts,
    task: str,
    choices: Mapping[str, Choice],
    inputs: Tensor,
    targets: Tensor | None,
    real: RealTokens,
) -> None:
    """Add the tokens of a batch, inputs and targets (batch, length) apart, with the weights that
    the routers of their stack gave to the experts.
    """
    if targets is None:
        shown.add(task, "", inputs, real.inputs, _weights_of_all(choices, real.inputs.shape))
        return
    stacks = {"encoder": (inputs, real.inputs), "decoder": (targets, real.targets)}
    for stack, (ids, are_real) in stacks.items():
        own = {name: choice for name, choice in choices.items() if stack_of(name) == stack}
        if own:
            shown.add(task, stack, ids, are_real, _weights_of_all(own, are_real.shape))


def show_sequences(
    shown: ShownTexts, task: str, ids: Tensor, is_real: Tensor, weights: Tensor
) -> None:
    """Add the rows of a batch, ids and is_real (batch, length), each token of which has its text's
    weights (batch, experts).
    """
    of_tokens = weights[:, None].expand(-1, ids.shape[1], -1)
    shown.add(task, "", ids, is_real, {PER_SEQUENCE: of_tokens})


def _weights_of_all(choices: Mapping[str, Choice], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Per router the weight (batch, length, experts) of every expert; 0 for what was not chosen."""
    weights = {}
    for name, choice in choices.items():
        is_expert = choice.experts >= 0
        chosen = choice.weights.float().masked_fill(~is_expert, 0)
        of_all = torch.zeros(choice.logits.shape, device=chosen.device)
        of_all.scatter_add_(-1, choice.experts.clamp(min=0).long(), chosen)
        weights[name] = of_all.reshape(*shape, -1)
    return weights
