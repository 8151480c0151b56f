"""CAEM's allocation: against a brute-force reading of appendix A.2, and properties that must
hold."""

import doctest
import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from mergekit_moe_ext.caem import allocation
from mergekit_moe_ext.caem.allocation import allocate, most_used, normalised_entropy


def by_the_letter(entropies, n_m, n_s):
    """A.2, one expert at a time, with dictionaries and explicit rounds."""
    total = sum(map(Fraction, entropies))
    ideal = {
        i: n_m * Fraction(h) / total if total else Fraction(n_m, len(n_s))
        for i, h in enumerate(entropies)
    }
    n, rest = {}, {}
    for i, share in ideal.items():
        n[i] = share.numerator // share.denominator
        rest[i] = share - n[i]
        if n[i] == 0:
            n[i] = 1
        if n[i] > n_s[i]:
            n[i] = n_s[i]
    while sum(n.values()) > n_m:
        most = max(n.values())
        tied = sorted((rest[i], i) for i in n if n[i] == most)
        n[tied[0][1]] -= 1
    missing = n_m - sum(n.values())
    free = {i: n_s[i] - n[i] for i in n if n[i] < n_s[i]}
    if missing and len(free) == 1:
        n[next(iter(free))] += missing
    elif missing and len(free) == 2:
        (a, b) = sorted(free, key=lambda i: (-rest[i], i))
        give = {a: math.ceil(missing / 2), b: missing // 2}
        for one, other in ((a, b), (b, a)):
            if give[one] > free[one]:
                give[other] += give[one] - free[one]
                give[one] = free[one]
        n[a] += give[a]
        n[b] += give[b]
    elif missing:
        while missing:
            left_in_round = dict(rest)
            while left_in_round and missing:
                best = min(left_in_round, key=lambda i: (-left_in_round[i], i))
                del left_in_round[best]
                if n[best] < n_s[best]:
                    n[best] += 1
                    missing -= 1
    return [n[i] for i in sorted(n)]


ENTROPIES = (0.0, 0.05, 0.3, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("sources", [1, 2, 3, 4, 5])
def test_every_small_case(sources):
    """All n_s and n_m to 16, with entropies in every order (of four and five sources a part of the
    orders).
    """
    profiles = list(itertools.product(ENTROPIES, repeat=sources))[
        :: (1, 1, 3, 37, 401)[sources - 1]
    ]
    for entropies in profiles:
        for n_s in range(1, 17):
            for n_m in range(sources, min(16, sources * n_s) + 1):
                got = allocate(entropies, n_m, [n_s] * sources)
                assert got == by_the_letter(entropies, n_m, [n_s] * sources), (entropies, n_m, n_s)
    assert len(profiles) >= 6


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_properties_with_capacities_that_differ(data):
    capacities = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=6))
    entropies = data.draw(
        st.lists(st.floats(0, 1), min_size=len(capacities), max_size=len(capacities))
    )
    n_m = data.draw(st.integers(len(capacities), sum(capacities)))
    got = allocate(entropies, n_m, capacities)
    assert got == by_the_letter(entropies, n_m, capacities)
    assert sum(got) == n_m and all(1 <= n <= c for n, c in zip(got, capacities, strict=True))
    factor = data.draw(st.sampled_from([0.5, 2.0]))  # exact in binary, as long as nothing is tiny
    if all(h == 0 or h > 1e-300 for h in entropies):
        assert allocate([h * factor for h in entropies], n_m, capacities) == got


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.sampled_from([0.0, 0.1, 1 / 3, 1.0]))
def test_equal_entropies_share_evenly(sources, n_s, entropy):
    for n_m in range(sources, sources * n_s + 1):
        got = allocate([entropy] * sources, n_m, [n_s] * sources)
        assert max(got) - min(got) <= 1 and sum(got) == n_m


def test_examples_in_docstrings():
    results = doctest.testmod(allocation)
    assert results.attempted and not results.failed


def test_the_paper_s_figure_and_ties():
    assert allocate([0.2, 0.7, 0.9], 8, [8, 8, 8]) == [1, 3, 4]  # figure 1's allocation
    assert allocate([0.5, 0.5, 0.5], 8, [8, 8, 8]) == [3, 3, 2]  # ties by order
    assert allocate([0.0, 0.0, 1.0], 8, [8, 8, 4]) == [2, 2, 4]


@pytest.mark.parametrize(("n_m", "words"), [(2, "too few"), (25, "too many")])
def test_what_is_impossible(n_m, words):
    with pytest.raises(ValueError, match=words):
        allocate([0.5] * 3, n_m, [8] * 3)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=9).filter(any))
def test_entropy(counts):
    assert normalised_entropy(counts) == pytest.approx(
        entropy(counts) / math.log(len(counts)), abs=1e-12
    )
    assert 0 <= normalised_entropy(counts) <= 1 + 1e-12


def test_entropy_at_its_ends():
    assert normalised_entropy([7]) == 0.0 and normalised_entropy([4, 0, 0]) == 0.0
    assert normalised_entropy([3, 3, 3]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="ever chosen"):
        normalised_entropy([0, 0])


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_the_most_used(counts, data):
    number = data.draw(st.integers(1, len(counts)))
    got = most_used(counts, number)
    assert got == sorted(set(got)) and len(got) == number
    for taken in got:
        for left in set(range(len(counts))) - set(got):
            assert (counts[taken], -taken) > (counts[left], -left)
