"""Arrow's prototypes: exact top right singular vectors of low-rank updates, many at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def top_right_singular_vectors(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Per update B A the unit vector v that maximises |B A v|, up to its sign; zeros for no update.

    Zero is what rounding leaves where an update is the difference of equal ones.

    Takes A (rank, in) and B (out, rank) per update, of any ranks, and returns (updates, in) in
    float64. The work is done on rank x rank matrices, so that a flat spectrum costs no more than a
    steep one: with the Gram matrices G = A Aᵀ and H = Bᵀ B, the singular values of B A are those of
    H^½ G^½, and v is Aᵀ w with H G w = σ² w. Gram matrices square the condition of the factors: up
    to 1e5, which no trained adapter comes near, nothing is lost.
    """
    in_features = factors[0][0].shape[1]
    vectors = torch.zeros(
        len(factors), in_features, dtype=torch.float64, device=factors[0][0].device
    )
    # Updates of one rank go through one batched decomposition: most of its cost is the start.
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, (a, b) in enumerate(factors):
        by_shape.setdefault((a.shape[0], b.shape[0]), []).append(index)
    for (rank, _), indices in by_shape.items():
        if rank:
            vectors[indices] = _of_one_shape(
                torch.stack([factors[index][0] for index in indices]).double(),
                torch.stack([factors[index][1] for index in indices]).double(),
            )
    return vectors


def _of_one_shape(a: Tensor, b: Tensor) -> Tensor:
    """(n, rank, in) and (n, out, rank) to (n, in)."""
    # H G is not symmetric. G^½ H G^½ is, and has the same eigenvalues: with its top eigenvector t,
    # w is H G^½ t. What is shorter than rounding belongs to an update that is zero.
    g = a @ a.mT
    values, rotation = torch.linalg.eigh(g)
    root = (rotation * values.clamp(min=0).sqrt()[:, None, :]) @ rotation.mT  # G^½
    h = b.mT @ b
    top = torch.linalg.eigh(root @ h @ root).eigenvectors[:, :, -1:]
    vectors = (a.mT @ (h @ (root @ top)))[..., 0]
    lengths = vectors.norm(dim=-1, keepdim=True)  # σ²
    rounding = a.shape[-2] * torch.finfo(a.dtype).eps * g.norm(dim=(-2, -1)) * h.norm(dim=(-2, -1))
    return torch.where(lengths > rounding[:, None], vectors / lengths, 0)
