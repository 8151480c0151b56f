"""What is of its own in the training of a sequence MoE (MergeME 3.2): what of a text can be
predicted, how long it may be, and the balance of whole texts over experts.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.modeling import SequenceMoEForCausalLM
from mergekit_moe_ext.recipes import Recipe


def first_predicted(config: Any) -> int:
    """The position of the first token that the training predicts: that after those that choose."""
    is_chosen_by_prefix = config.routing != "uniform" and config.routing_prefix == "prefix"
    return config.routing_tokens if is_chosen_by_prefix else 1


def check_sequences(config: Any, reading: Reading, recipe: Recipe) -> None:
    """`UserError` for rows that this sequence MoE cannot be trained on, whatever is in them.

    The model is built without memory: which expert looks its positions up in a table, only its
    modules say.
    """
    if recipe.packing:
        raise UserError(
            "--packing joins texts, and a sequence MoE makes one choice for each: leave it out"
        )
    first = first_predicted(config)
    if reading.max_length <= first:
        raise UserError(
            f"--max-length {reading.max_length}: the first {first} tokens choose the experts "
            "(routing_tokens), and none is left to predict; give a greater length"
        )
    with torch.device("meta"):
        model = SequenceMoEForCausalLM(copy.deepcopy(config))
    for expert in model.experts:
        limit = expert.positions_in_table
        if limit is not None and limit < reading.max_length:
            raise UserError(
                f"--max-length {reading.max_length}: the expert {expert.name!r} has {limit} "
                f"positions; give --max-length {limit} or less, or leave it out of the mixture"
            )


@contextmanager
def recorded_scores(model: Any) -> Iterator[list[Tensor]]:
    """A context with a list of what the router of a sequence MoE returns, (texts, experts) each."""
    scores: list[Tensor] = []
    hook = model.router.register_forward_hook(
        lambda _router, _inputs, output: scores.append(output)
    )
    try:
        yield scores
    finally:
        hook.remove()


@torch.no_grad()
def count_choices(model: Any, batches: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    """How many texts of the batches choose each expert, and, last, how many there are.

    The shape is (experts + 1,).
    """
    number = len(model.experts)
    counts = torch.zeros(number + 1, device=device)
    for batch in batches:
        scores = model.router_scores(
            batch["input_ids"].to(device), batch["attention_mask"].to(device)
        )
        experts = scores.topk(model.config.experts_per_sequence, dim=-1).indices
        counts[:number] += torch.bincount(experts.flatten(), minlength=number).to(device)
        counts[number] += len(scores)
    return counts


def balance_of_texts(scores: Tensor, counts: Tensor, k: int) -> Tensor:
    """The part of a step's load-balancing loss that some of its texts have, a scalar.

    scores: the router's, of these texts: (texts, experts).
    counts: those of `count_choices`, of all texts of the step.

    Over all texts it is N * sum_i f_i P_i (Switch Transformers, equations 4 to 6), with f_i the
    share of all choices, k a text, that fell on expert i, and P_i the mean probability that the
    router gives it before the choice. It is 1 if the load is balanced.
    """
    number = scores.shape[-1]
    texts = counts[number]
    shares = counts[:number] / (k * texts)
    probabilities = scores.float().softmax(dim=-1).sum(dim=0) / texts
    return number * (shares.to(probabilities) * probabilities).sum()
