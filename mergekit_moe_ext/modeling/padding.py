"""The padding of tokens for which no attention mask is given, as evaluation tools leave it out.

Only tokens at an end of a row can be padding. A token that also begins or ends texts (`pad` is
often `eos`) may stand there as itself: `generate` of transformers then takes nothing for padding,
and neither does attention here. A choice for a whole text is another matter: it leaves such tokens
out at the right end, so that a text chooses alike whatever stands behind it in a batch.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class InferredMasks(NamedTuple):
    """Which tokens (rows, length) are seen, and which may choose; None where all are."""

    attention: Tensor | None
    choice: Tensor | None


def inferred_masks(tokens: Tensor, config: Any, special: Iterable[int] = ()) -> InferredMasks:
    """The masks of tokens (rows, length) by the padding token of a model's configuration.

    `special` are more tokens of which none chooses at the right end. Rows of nothing but padding
    are left as they are.
    """
    pad: Any = getattr(config, "pad_token_id", None)
    ends = {*_ids(config, "eos_token_id"), *_ids(config, "bos_token_id")}
    unclear = sorted({*special, *ends, *_ids(config, "pad_token_id")})
    if not unclear:
        return InferredMasks(None, None)
    unclear_tokens = tokens.new_tensor(unclear)
    is_at_right_alone = pad is None or pad in ends
    # A text mostly ends in a token of its own, and then there is no more to find out.
    if is_at_right_alone and not torch.isin(tokens[:, -1:], unclear_tokens).any():
        return InferredMasks(None, None)
    not_choosing = _first_run(torch.isin(tokens, unclear_tokens).flip(1)).flip(1)
    if is_at_right_alone:
        return InferredMasks(None, _mask(not_choosing))
    is_pad = tokens.eq(pad)
    leading = _first_run(is_pad)
    trailing = _first_run(is_pad.flip(1)).flip(1)
    return InferredMasks(_mask(leading | trailing), _mask(leading | not_choosing))


def _ids(config: Any, key: str) -> list[int]:
    """The tokens of one role, of which a model may have several or none."""
    value = getattr(config, key, None)
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _first_run(is_meant: Tensor) -> Tensor:
    """Where a row (rows, length) has been True from its first place on."""
    return is_meant.long().cumprod(dim=1).bool()


def _mask(padding: Tensor) -> Tensor | None:
    """The mask that leaves padding out; None where there is none."""
    padding = padding & ~padding.all(dim=1, keepdim=True)
    return (~padding).long() if padding.any() else None
