"""Arrow's prototypes: the exact top right singular vectors of many low-rank updates at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def top_right_singular_vectors(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(updates, in), in float64: for each update B A the unit vector v that maximises |B A v|, up
    to its sign.

    `factors` are A (rank, in) and B (out, rank) of each update, of any ranks. An update that is 0,
    or that is only what rounding leaves of the difference of equal ones, gets zeros.

    The work is done on matrices of (rank, rank), so that a flat spectrum costs no more than a steep
    one. With the Gram matrices G = A Aᵀ and H = Bᵀ B, the singular values of B A are those of
    H^½ G^½, and v is Aᵀ w with H G w = σ² w. Gram matrices square the condition numbers of the
    factors: up to 1e5, which no trained adapter comes near, nothing is lost.
    """
    in_features = factors[0][0].shape[1]
    vectors = torch.zeros(
        len(factors), in_features, dtype=torch.float64, device=factors[0][0].device
    )
    # Updates of one rank go through one batched decomposition: most of its cost is that of a call.
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, (a, b) in enumerate(factors):
        by_shape.setdefault((a.shape[0], b.shape[0]), []).append(index)
    for (rank, _), indices in by_shape.items():
        if rank:
            # Made float64 one by one, since float8 cannot be stacked with another dtype.
            vectors[indices] = _of_one_shape(
                torch.stack([factors[index][0].double() for index in indices]),
                torch.stack([factors[index][1].double() for index in indices]),
            )
    return vectors


def _of_one_shape(a: Tensor, b: Tensor) -> Tensor:
    """(n, in): the vectors of n updates with A (n, rank, in) and B (n, out, rank)."""
    # H G is not symmetric. G^½ H G^½ is, and it has the same eigenvalues: with its top eigenvector
    # t, w is H G^½ t. A vector that is shorter than rounding errors belongs to an update of 0.
    g = a @ a.mT
    values, rotation = torch.linalg.eigh(g)
    root = (rotation * values.clamp(min=0).sqrt()[:, None, :]) @ rotation.mT  # G^½
    h = b.mT @ b
    top = torch.linalg.eigh(root @ h @ root).eigenvectors[:, :, -1:]
    vectors = (a.mT @ (h @ (root @ top)))[..., 0]
    lengths = vectors.norm(dim=-1, keepdim=True)  # σ²
    rounding = a.shape[-2] * torch.finfo(a.dtype).eps * g.norm(dim=(-2, -1)) * h.norm(dim=(-2, -1))
    return torch.where(lengths > rounding[:, None], vectors / lengths, 0)
