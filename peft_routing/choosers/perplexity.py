"""`perplexity`: the experts that find a prompt the least surprising (MergeME 3.1.3)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from peft_routing.choosers.experts import check_top_k, expert_names, softmax_over_largest
from peft_routing.choosers.prefixes import Prefixes, check_language_model, evaluating


@torch.no_grad()
def perplexity(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    token_type_ids: Tensor | None = None,
    top_k: int | None = None,
    special_ids: Sequence[int] = (),
    rows_at_a_time: int = 8,
) -> Tensor:
    """Coefficients (batch, experts): the softmax over the `top_k` largest of 1/PPL; the others
    are 0.

    An expert's perplexity is that of the model with this expert alone. The values in the softmax
    lie between 0 and 1, so that it is a mild preference without `top_k`, and a choice with
    `top_k=1`.

    A token is scored by being predicted, so the first one is not scored. Neither are padding, on
    either side, and the `special_ids` (`tokenizer.all_special_ids`). Where nothing is left to
    score, all experts get the same coefficient.

    `input_ids` (batch, length) is the prompt. `token_type_ids`, which some tokenizers return, is
    not used. Every sequence is a row for every expert, and a forward pass takes `rows_at_a_time` of
    these rows, which bounds the memory. `UserError` for a model that is not a causal language
    model, or does not have exactly one active routed adapter.
    """
    check_language_model(model)
    count = len(expert_names(model))
    k = check_top_k(top_k, count)
    prefixes = Prefixes.read(input_ids, attention_mask, special_ids)
    coefficients = torch.full((len(input_ids), count), 1 / count, device=input_ids.device)
    scored = prefixes.scored()
    if not len(scored):
        return coefficients
    # Pairs of a sequence and an expert, all experts of a sequence one after the other, are the rows
    # of forward passes: a row's coefficients are 1 for its expert, so that each runs alone.
    sequences = scored.repeat_interleave(count)
    experts = torch.arange(count, device=scored.device).repeat(len(scored))
    losses = []
    with evaluating(model):
        for start in range(0, len(sequences), rows_at_a_time):
            rows = slice(start, start + rows_at_a_time)
            alone = functional.one_hot(experts[rows], count).to(coefficients.dtype)
            losses.append(prefixes.of(sequences[rows]).losses(model, alone))
    # 1/PPL is exp of minus the mean loss of the tokens.
    reciprocals = torch.exp(-torch.cat(losses)).reshape(-1, count)
    coefficients[scored] = softmax_over_largest(reciprocals, k).to(coefficients)
    return coefficients
