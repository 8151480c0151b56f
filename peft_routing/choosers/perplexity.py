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
    """Coefficients (batch, experts): softmax over the `top_k` largest of 1/PPL, the others 0.

    An expert's perplexity is that of the model with this expert alone.

    The values in the softmax lie between 0 and 1, so without `top_k` it is a mild preference; with
    `top_k=1` it is a choice. A token is scored by being predicted, so the first is not; nor are
    padding, on either side, and the `special_ids` (`tokenizer.all_special_ids`). With nothing to
    score all experts get the same.

    `input_ids` (batch, length) is the prompt; `token_type_ids`, which some tokenizers return, is
    not used. Sequences times experts are rows of one batch, `rows_at_a_time` in a forward pass,
    which bounds the memory. `UserError` for a model that is no causal language model, or has not
    one active routed adapter.
    """
    check_language_model(model)
    count = len(expert_names(model))
    k = check_top_k(top_k, count)
    prefixes = Prefixes.read(input_ids, attention_mask, special_ids)
    coefficients = torch.full((len(input_ids), count), 1 / count, device=input_ids.device)
    scored = prefixes.scored()
    if not len(scored):
        return coefficients
    each = torch.arange(count, device=scored.device).repeat(len(scored))
    losses = []
    with evaluating(model):
        for rows, experts in zip(
            scored.repeat_interleave(count).split(rows_at_a_time),
            each.split(rows_at_a_time),
            strict=True,
        ):
            alone = functional.one_hot(experts, count).to(coefficients.dtype)
            losses.append(prefixes.of(rows).losses(model, alone))
    reciprocals = torch.exp(-torch.cat(losses)).reshape(-1, count)
    coefficients[scored] = softmax_over_largest(reciprocals, k).to(coefficients)
    return coefficients
