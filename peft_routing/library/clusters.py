"""Clusters of adapters by the cosines of their updates (model-based clustering, Trade-offs 2.1)."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _mergekit_moe_ext_common.checkpoints import damage
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.figures import pyplot
from peft_routing.expert import Expert
from peft_routing.fusion.worst_case import check_scipy

AVERAGE = "average"
KMEANS = "kmeans"
MTTL = "mttl"
METHODS = (AVERAGE, KMEANS, MTTL)
# mttl's: the share of each adapter's parameters that is set to 0, and the length of what is left.
_MASKED = 0.8
_COMPONENTS = 64
_STARTS = 10  # of k-means, of which the best is kept
_MOST_CLUSTERS = 20  # that are tried where their number is not given


@dataclass(frozen=True)
class Clusters:
    """The cluster of each adapter.

    of: by adapter the number of its cluster, from 0 in the order of the adapters.
    silhouette: the mean of the adapters' silhouettes, between -1 and 1; 0 for one cluster.
    order: the adapters as a dendrogram of average linkage has them, neighbours beside each other.
    """

    method: str
    of: dict[str, int]
    silhouette: float
    order: list[str]

    @property
    def members(self) -> dict[int, list[str]]:
        """The adapters of each cluster."""
        by_cluster: dict[int, list[str]] = {}
        for name, cluster in self.of.items():
            by_cluster.setdefault(cluster, []).append(name)
        return dict(sorted(by_cluster.items()))


def cluster(
    names: Sequence[str],
    cosines: Tensor,
    *,
    method: str = AVERAGE,
    k: int | None = None,
    rows: Tensor | None = None,
    seed: int = 42,
) -> Clusters:
    """Clusters of adapters.

    Args:
        names: the adapters, in the order of `cosines` (adapters, adapters).
        method: `average` linkage of 1 - cosine; `kmeans` on unit vectors that have these cosines;
            `mttl`, k-means on `rows`.
        k: the number of clusters; that of the largest silhouette if None.
        rows: (adapters, n), what `mttl` clusters, as `mttl_rows` gives it.
        seed: of k-means.

    `UserError` where there are fewer adapters than clusters, and without scipy.
    """
    check_scipy("clusters need scipy")
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    count = len(names)
    if count < 2:
        raise UserError("there is one adapter, or none: at least two can be clustered")
    if k is not None and not 1 <= k <= count:
        raise UserError(f"{count} adapters have no {k} clusters")
    distances = 1 - cosines.double()
    distances.fill_diagonal_(0)
    tree = linkage(squareform(distances.numpy(), checks=False), method="average")

    if method == AVERAGE:
        labels_of = functools.partial(_cut, tree)
    else:
        points = rows if method == MTTL else unit_vectors(cosines)
        assert points is not None
        labels_of = functools.partial(_kmeans, points, seed)

    most = max(2, min(count - 1, _MOST_CLUSTERS))
    tried = [k] if k is not None else range(2, most + 1)
    labels, value = _of_largest_silhouette(distances, labels_of, tried)
    # Clusters are numbered in the order of the adapters.
    numbers: dict[int, int] = {}
    of = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        of[name] = numbers.setdefault(label, len(numbers))
    order = [names[place] for place in leaves_list(tree)]
    return Clusters(method, of, value, order)


def _of_largest_silhouette(
    distances: Tensor, labels_of: Callable[[int], Tensor], tried: Iterable[int]
) -> tuple[Tensor, float]:
    """The labels (points,) and their silhouette for that one of the tried numbers of clusters whose
    silhouette is largest; the first of equal ones.
    """
    best = torch.zeros(len(distances), dtype=torch.long)
    best_silhouette = -2.0  # below any
    for number in tried:
        labels = labels_of(number)
        value = silhouette(distances, labels)
        if value > best_silhouette:
            best = labels
            best_silhouette = value
    return best, best_silhouette


def unit_vectors(cosines: Tensor) -> Tensor:
    """(adapters, adapters): vectors that have these cosines, in float64."""
    values, vectors = torch.linalg.eigh(cosines.double())
    return vectors * values.clamp(min=0).sqrt()


def _cut(tree: Any, number: int) -> Tensor:
    """(adapters,): the cluster of each leaf of a dendrogram that is cut into so many clusters."""
    from scipy.cluster.hierarchy import fcluster

    return torch.as_tensor(fcluster(tree, number, criterion="maxclust"))


def _kmeans(points: Tensor, seed: int, number: int) -> Tensor:
    """(points,): the cluster of each point by k-means, by the best of several starts."""
    import numpy as np
    from scipy.cluster.vq import kmeans2

    values = points.double().numpy()
    best = None
    least = float("inf")
    for start in range(_STARTS):
        generator = np.random.default_rng([seed, start])
        # An empty cluster is left empty: there are fewer of them then.
        centres, labels = kmeans2(
            values, number, iter=100, minit="++", missing="warn", rng=generator
        )
        spread = float(((values - centres[labels]) ** 2).sum())
        if best is None or spread < least:
            best = labels
            least = spread
    return torch.as_tensor(best)


def silhouette(distances: Tensor, labels: Tensor) -> float:
    """The mean over points of (b - a) / max(a, b) (Rousseeuw): a is the mean distance to the
    others of its cluster, b that to the nearest other cluster. A point that is alone has 0.

    Args:
        distances: (points, points), with 0 on the diagonal.
        labels: (points,).
    """
    clusters, label_of = labels.unique(return_inverse=True)
    if len(clusters) < 2:
        return 0.0
    belongs = torch.nn.functional.one_hot(label_of).double()  # (points, clusters)
    sizes = belongs.sum(dim=0)
    # By point and cluster, the sum of the distances to the cluster's points.
    sums = distances.double() @ belongs
    # a: the distance of a point to itself is 0, so that its own cluster has one point fewer.
    own = sums.gather(1, label_of[:, None])[:, 0]
    others = (sizes[label_of] - 1).clamp(min=1)
    inside = own / others
    # b: of the clusters that the point is not in, the nearest.
    nearest = (sums / sizes).masked_fill(belongs.bool(), float("inf")).amin(dim=1)
    larger = torch.maximum(inside, nearest)
    values = torch.where(larger > 0, (nearest - inside) / larger, 0.0)
    return torch.where(sizes[label_of] > 1, values, 0.0).mean().item()


def mttl_rows(experts: Iterable[Expert]) -> Tensor:
    """(adapters, adapters): what mttl's recipe (mbc_with_cos_sim) clusters by k-means.

    All entries of A and B are one vector per adapter, without the scaling. The smallest 80 percent
    of each are set to 0. A truncated SVD leaves 64 numbers per adapter, which are scaled to length
    1; the rows are those of their cosines. The vectors are compared a module at a time.

    `UserError` where adapters have different modules or ranks.
    """
    vectors: list[dict[str, Tensor]] = []
    for expert in experts:
        vectors.append(_masked(expert))
        first = {module: tuple(each.shape) for module, each in vectors[0].items()}
        own = {module: tuple(each.shape) for module, each in vectors[-1].items()}
        if own != first:
            raise UserError(
                f"expert {expert.name!r} has other modules or ranks than the first: the recipe of "
                "mttl compares factors, entry by entry; cluster by average or kmeans"
            )
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for module in vectors[0]:
        rows = torch.stack([of_expert[module].to_dense().double() for of_expert in vectors])
        products += rows @ rows.T
    # The left singular vectors times the singular values, by the small matrix of products, whose
    # eigenvalues, in ascending order, are the squares of these.
    values, left = torch.linalg.eigh(products)
    kept = (left * values.clamp(min=0).sqrt())[:, -_COMPONENTS:]
    kept = kept / kept.norm(dim=1, keepdim=True)
    return kept @ kept.T


def _masked(expert: Expert) -> dict[str, Tensor]:
    """By module the entries of A and B in one vector, the smallest of the whole adapter as 0 and
    not kept.
    """
    vectors = {}
    for module, (a, b) in sorted(expert.factors.items()):
        vectors[module] = torch.cat([a.float().flatten(), b.float().flatten()])
    whole = torch.cat(list(vectors.values())).abs()
    # The last entry below numpy's quantile, or at it, which mttl sets to 0 with all smaller ones.
    last = math.floor(_MASKED * (len(whole) - 1))
    threshold = whole.kthvalue(last + 1).values
    return {
        module: each.where(each.abs() > threshold, 0).to_sparse()
        for module, each in vectors.items()
    }


def read_clusters(path: Path) -> dict[str, int]:
    """The cluster of each adapter, by a file that `cluster` has written. `UserError` otherwise."""
    try:
        clusters = json.loads(path.read_text(encoding="utf-8"))["clusters"]
        return {str(name): int(number) for name, number in clusters.items()}
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{damage(path, error)}; `peft-route library cluster LIB -o {path}` writes it"
        ) from error


def draw(clusters: Clusters, names: Sequence[str], cosines: Tensor, path: Path) -> None:
    """Draws the cosines as a picture, in the order of the dendrogram."""
    places = [list(names).index(name) for name in clusters.order]
    plt = pyplot()
    side = min(12.0, 2 + 0.2 * len(names))
    figure, axes = plt.subplots(figsize=(side + 1, side))
    image: Any = axes.imshow(
        cosines[places][:, places], cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest"
    )
    if len(names) <= 64:
        labels = [f"{name} ({clusters.of[name]})" for name in clusters.order]
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), labels, fontsize=7)
    figure.colorbar(image, label="cosine of the updates")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
