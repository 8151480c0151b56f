"""Sketches, exact products and clusters against what is computed from whole updates."""

import sys

import numpy as np
import pytest
import torch

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.expert import Expert
from peft_routing.library.clusters import (
    cluster,
    mttl_rows,
    read_clusters,
    silhouette,
    unit_vectors,
)
from peft_routing.library.sketches import (
    cosines,
    exact_products,
    sketch,
    sketched_products,
    write_sketch,
)

SIZES = {"q": (48, 40), "v": (24, 40), "down": (40, 96)}  # (out, in)


def make(name, seed, *, rank=4, like=None, far=1.0):
    """An expert; `like` another but for a share `far` of its B."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (rows, columns) in SIZES.items():
        a = torch.randn(rank, columns, generator=generator)
        b = torch.randn(rows, rank, generator=generator)
        if like is not None:
            a = like.factors[module][0]
            b = like.factors[module][1] + far * b
        factors[module] = (a, b)
    scalings = {module: 0.5 + place for place, module in enumerate(SIZES)}
    return Expert(name, {}, factors, scalings)


@pytest.fixture(scope="module")
def experts():
    """Three groups of three, whose members are near each other."""
    made = []
    for group in range(3):
        first = make(f"{group}0", 100 + group)
        made += [first, make(f"{group}1", 110 + group, like=first, far=0.3)]
        made.append(make(f"{group}2", 120 + group, like=first, far=0.3))
    return made


def whole(expert):
    """The update of all modules as one vector."""
    parts = []
    for module, (a, b) in expert.factors.items():
        parts.append((expert.scalings[module] * b.double() @ a.double()).flatten())
    return torch.cat(parts)


def expected_products(experts):
    vectors = torch.stack([whole(expert) for expert in experts])
    return vectors @ vectors.T


def of_sketches(experts, path):
    files = []
    for expert in experts:
        files.append(path / f"{expert.name}.safetensors")
        write_sketch(sketch(expert), files[-1])
    return sketched_products(files)


def test_exact_products_are_those_of_whole_updates(experts):
    found = exact_products(len(experts), experts.__getitem__)
    torch.testing.assert_close(found, expected_products(experts), rtol=1e-9, atol=1e-9)


def test_modules_that_only_one_adapter_has_count_in_its_norm_alone(tmp_path):
    first, second = make("first", 1), make("second", 2)
    del second.factors["q"]
    for found in (
        exact_products(2, [first, second].__getitem__),
        of_sketches([first, second], tmp_path),
    ):
        norms = found.diagonal().sqrt()
        assert norms[0].item() == pytest.approx(whole(first).norm().item(), rel=0.25)
        assert norms[1].item() == pytest.approx(whole(second).norm().item(), rel=0.25)


def test_sketches_give_the_cosines_of_whole_updates(experts, tmp_path):
    names = [expert.name for expert in experts]
    exact = cosines(expected_products(experts), names)
    found = cosines(of_sketches(experts, tmp_path), names)
    assert (found - exact).abs().max() < 0.1
    assert (found - exact).square().mean().sqrt() < 0.04
    assert torch.equal(found, cosines(of_sketches(experts, tmp_path), names))  # the same each time


def test_an_adapter_of_zeros_is_named():
    expert = make("nothing", 3)
    for _, b in expert.factors.values():
        b.zero_()
    products = exact_products(2, [make("some", 1), expert].__getitem__)
    with pytest.raises(UserError, match="'nothing' changes nothing"):
        cosines(products, ["some", "nothing"])


@pytest.mark.parametrize("method", ["average", "kmeans", "mttl"])
@pytest.mark.parametrize("k", [3, None])
def test_planted_groups_are_found(experts, method, k):
    pytest.importorskip("scipy")
    names = [expert.name for expert in experts]
    similar = cosines(expected_products(experts), names)
    rows = mttl_rows(experts) if method == "mttl" else None
    clusters = cluster(names, similar, method=method, k=k, rows=rows)
    assert clusters.of == {name: int(name[0]) for name in names}
    assert clusters.members == {0: names[:3], 1: names[3:6], 2: names[6:]}
    places = [clusters.order.index(name) for name in names[:3]]
    assert max(places) - min(places) == 2  # neighbours in the dendrogram


def test_the_silhouette_is_rousseeuw_s(experts):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(9, 3, generator=generator).double()
    distances = torch.cdist(points, points)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    values = []
    for place in range(9):
        own = [other for other in range(9) if labels[other] == labels[place] and other != place]
        if not own:
            values.append(0.0)
            continue
        inside = sum(distances[place, other] for other in own) / len(own)
        means = []
        for label in set(labels.tolist()) - {labels[place].item()}:
            of_label = [other for other in range(9) if labels[other] == label]
            means.append(sum(distances[place, other] for other in of_label) / len(of_label))
        values.append(((min(means) - inside) / max(min(means), inside)).item())
    assert silhouette(distances, labels) == pytest.approx(sum(values) / 9)
    assert silhouette(distances, torch.zeros(9)) == 0.0


def test_unit_vectors_have_the_cosines(experts):
    similar = cosines(expected_products(experts), [expert.name for expert in experts])
    vectors = unit_vectors(similar)
    torch.testing.assert_close(vectors @ vectors.T, similar, rtol=0, atol=1e-9)


def test_the_rows_of_mttl_are_its_recipe_s(experts):
    vectors = []
    for expert in experts:
        parts = []
        for factors in expert.factors.values():
            parts += [factor.flatten().numpy() for factor in factors]
        vectors.append(np.concatenate(parts))
    array = np.stack(vectors).astype(np.float64)
    thresholds = np.quantile(np.abs(array), 0.8, axis=1)
    array[np.abs(array) <= thresholds[:, None]] = 0
    left, sizes, _ = np.linalg.svd(array, full_matrices=False)
    embedded = left * sizes
    embedded = embedded / np.linalg.norm(embedded, axis=1)[:, None]
    torch.testing.assert_close(
        mttl_rows(experts), torch.as_tensor(embedded @ embedded.T), rtol=0, atol=1e-5
    )


def test_mttl_compares_adapters_of_one_shape(experts):
    with pytest.raises(UserError, match="'wide' has other modules or ranks"):
        mttl_rows([experts[0], make("wide", 1, rank=5)])


def test_without_scipy_clusters_say_what_they_need(experts, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match="clusters need scipy: pip install scipy"):
        cluster(["a", "b"], torch.eye(2))


def test_two_adapters_are_two_clusters_and_one_is_none():
    assert cluster(["a", "b"], torch.eye(2)).of == {"a": 0, "b": 1}
    with pytest.raises(UserError, match="at least two"):
        cluster(["a"], torch.eye(1))


def test_a_file_that_holds_no_clusters_is_named(tmp_path):
    path = tmp_path / "clusters.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="library cluster LIB"):
        read_clusters(path)
