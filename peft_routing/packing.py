"""Rows of several documents each, told apart by position ids that start again, as transformers'
attention does.

Documents are numbered from 0 through all rows: `documents` (rows, tokens) says which one a token is
of. The functions are pure.
"""

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices


def documents_in(position_ids: Tensor) -> Tensor | None:
    """The document of each token (rows, tokens); None where every row is one document."""
    of_row = find_packed_sequence_indices(position_ids)
    if of_row is None:
        return None
    # Through all rows: a row's first document comes after those of the rows above it.
    counts = of_row[:, -1:] + 1
    return of_row + counts.cumsum(dim=0) - counts


def places_in(documents: Tensor) -> Tensor:
    """The place of each token in its document (rows, tokens), from 0."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    before = torch.nn.functional.pad(documents[:, :-1], (1, 0), value=-1)
    # The place of the document's first token, which is the last first token up to here.
    first = torch.where(documents != before, places, 0).cummax(dim=1).values
    return places - first


def means_of(documents: Tensor, values: Tensor, chosen: Tensor | None) -> Tensor:
    """(rows, tokens, n) to (documents, n): the mean over the chosen tokens, or all of them."""
    count = int(documents.max()) + 1
    if chosen is None:
        chosen = torch.ones_like(documents, dtype=torch.bool)
    # Not values * chosen: what is left out may be infinite or NaN.
    kept = torch.where(chosen[..., None], values, 0).flatten(0, 1)
    totals = values.new_zeros(count, values.shape[-1]).index_add(0, documents.flatten(), kept)
    numbers = values.new_zeros(count).index_add(
        0, documents.flatten(), chosen.flatten().to(values.dtype)
    )
    return totals / numbers[:, None].clamp(min=1)


def starts_again(position_ids: Tensor, real: Tensor | None) -> bool:
    """Whether a token that is not padding stands at a position that its row had already."""
    if real is None:
        real = torch.ones_like(position_ids, dtype=torch.bool)
    least = torch.iinfo(position_ids.dtype).min
    highest = position_ids.masked_fill(~real, least).cummax(dim=1).values
    return bool((real[:, 1:] & (position_ids[:, 1:] <= highest[:, :-1])).any())
