"""The tokens that given embeddings are those of.

Where several experts read a text, each with an embedding of its own, or where a choice predicts
tokens, embeddings alone do not do. They do where each is exactly what an embedding makes of one
token: then it stands for that token.
"""

import torch
from torch import Tensor, nn

_AT_ONCE = 1024  # vectors that are compared with the whole vocabulary at the same time
# A vector's own row is the nearest of all, but for rounding: the few nearest are compared exactly.
_NEAREST = 4


@torch.no_grad()
def tokens_of(
    embedded: Tensor, embedding: nn.Module, mask: Tensor | None, padding: int
) -> Tensor | None:
    """The tokens (rows, length) that the embedding makes these vectors (rows, length, width) of.

    None where a vector is that of no token, or of several. Those that the mask (rows, length)
    leaves out may be anything, and are called `padding`.
    """
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    # Called, since some embeddings scale what they look up.
    table = embedding(torch.arange(len(weight), device=weight.device))
    vectors = embedded.to(table).flatten(0, 1)
    squares = table.float().square().sum(dim=-1)
    tokens = []
    for part in vectors.split(_AT_ONCE):
        # Minus the squared distance of a vector v to each row, but for |v|², the same for all rows.
        nearness = 2 * part.float() @ table.float().T - squares
        nearest = nearness.topk(min(_NEAREST, len(table)), dim=-1).indices
        is_same = (table[nearest] == part[:, None]).all(dim=-1)
        place = is_same.int().argmax(dim=-1, keepdim=True)
        token = nearest.gather(-1, place)[:, 0]
        tokens.append(torch.where(is_same.sum(dim=-1) == 1, token, -1))
    result = torch.cat(tokens).view(embedded.shape[:2])
    if mask is not None:
        is_padding = mask[:, -result.shape[1] :] == 0
        result = result.masked_fill(is_padding.to(result.device), padding)
    return None if (result < 0).any() else result.to(embedded.device)
