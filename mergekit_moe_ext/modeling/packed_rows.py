"""Rows of several documents each, as a data collator packs them.

Documents are told apart by position ids that start again, as transformers' attention tells them
apart. In a sequence MoE each chooses experts of its own, so that a packed row is taken apart into a
row per document, and what comes out is put together again. Weight-ensembling models have one set of
coefficients per row, and refuse such rows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

# What collators give beside position ids, or instead of them.
_SIGNS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_MORE_SIGNS = ("max_length_q", "max_length_k")


class PackedRows:
    """The places of documents in packed rows (rows, tokens)."""

    def __init__(self, of_row: Tensor) -> None:
        """`of_row` (rows, tokens) is the number of each token's document in its row, from 0."""
        # Through all rows: a row's first document comes after those of the rows above it.
        counts = of_row[:, -1:] + 1
        self.documents = of_row + counts.cumsum(dim=0) - counts
        # A token's place in its row less that of its document's first token, which is the last
        # first token up to it.
        places = torch.arange(of_row.shape[1], device=of_row.device).expand_as(of_row)
        is_first = torch.ones_like(of_row, dtype=torch.bool)
        is_first[:, 1:] = of_row[:, 1:] != of_row[:, :-1]
        self.places = places - torch.where(is_first, places, 0).cummax(dim=1).values
        self.number = int(counts.sum())
        self.longest = int(self.places.max()) + 1

    def apart(self, packed: Tensor, fill: int = 0) -> Tensor:
        """(rows, tokens, …) to (documents, tokens of the longest, …); `fill` stands behind."""
        size = (self.number, self.longest, *packed.shape[2:])
        indices = self.documents.to(packed.device), self.places.to(packed.device)
        return packed.new_full(size, fill).index_put(indices, packed)

    def together(self, apart: Tensor) -> Tensor:
        """(documents, tokens, …) to (rows, tokens, …)."""
        return apart[self.documents.to(apart.device), self.places.to(apart.device)]


def without_signs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that only say where documents of packed rows lie."""
    signs = {*_SIGNS, *_MORE_SIGNS}
    return {name: value for name, value in arguments.items() if name not in signs}


def packed_rows(
    shape: torch.Size,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    arguments: Mapping[str, Any],
    *,
    has_cache: bool,
) -> PackedRows | None:
    """The documents of the input, of `shape` (rows, tokens); None where each row is one.

    `arguments` are others of the same pass. `ValueError` where rows are packed, and their documents
    cannot be told apart.
    """
    if position_ids is None:
        name = _sign_in(arguments)
        if name is not None:
            raise ValueError(
                f"{name}=: a sequence MoE tells packed documents apart by position_ids that start "
                "again: give these too (DataCollatorWithFlattening makes them)"
            )
        return None
    # One token at a time is a step with a cache.
    if position_ids.ndim != 2 or position_ids.shape[1] != shape[1] or shape[1] < 2:
        return None
    positions = position_ids.expand(shape[0], -1)
    if attention_mask is None and not has_cache:
        of_row = find_packed_sequence_indices(positions)
        return None if of_row is None else PackedRows(of_row)
    if _starts_again(positions, attention_mask):
        raise ValueError(
            "position_ids start again within a row, and packed documents are told apart only "
            "without an attention_mask and without a cache: leave these out, or give each "
            "document a row"
        )
    return None


def refuse_packed_rows(arguments: Mapping[str, Any], mask: Tensor | None) -> None:
    """`ValueError` for the input of a decoder whose rows hold several documents each; `mask` (rows,
    tokens so far) says which tokens are padding.
    """
    positions = arguments.get("position_ids")
    starts_again = False
    # One token at a time is a step with a cache; some models have positions of several dimensions.
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] > 1:
        starts_again = _starts_again(positions, mask)
    if starts_again or _sign_in(arguments) is not None:
        raise ValueError(
            "the rows hold several documents each (position_ids start again, or "
            "cu_seq_lens_q= or seq_idx= are given), and routers give one set of coefficients per "
            "row: give each document a row, or give coefficients="
        )


def _sign_in(arguments: Mapping[str, Any]) -> str | None:
    """The name of an argument that tells where packed documents lie, if one is given."""
    return next((name for name in _SIGNS if arguments.get(name) is not None), None)


def _starts_again(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether a token that is not padding stands at a position that its row had already."""
    is_real = torch.ones_like(positions, dtype=torch.bool)
    if mask is not None and mask.ndim == 2:
        is_real = mask[:, -positions.shape[1] :].to(positions.device).bool()
    highest = torch.where(is_real, positions, -1).cummax(dim=1).values
    return bool((is_real[:, 1:] & (positions[:, 1:] <= highest[:, :-1])).any())
