"""The kernels against numpy references in float64 written from the papers, and against stock
mergekit.
"""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.merge_methods import TensorGroup, merge_tensors

from mergekit_moe_ext.tensor import kernels
from mergekit_moe_ext.tensor.kernels.drop import mask_key, random_mask
from mergekit_moe_ext.tensor.kernels.trim import magnitude_threshold, trim

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0,), (), (1,), (7,), (3, 5), (40, 1000), (2, 3, 4, 5)]
DENSITIES = [-1.0, 0.0, 1e-9, 0.2, 0.5, 0.8, 0.999, 1.0, 2.0]


@pytest.fixture(
    params=[(64, 1), (100, 3), (1 << 14, 2)], ids=lambda p: f"chunk-{p[0]}-threads-{p[1]}"
)
def split(request, monkeypatch):
    """Several chunk sizes and numbers of threads."""
    chunk, threads = request.param
    monkeypatch.setattr(kernels, "_CPU_CHUNK", chunk)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def reference_trim(values: np.ndarray, density: float) -> np.ndarray:
    """TIES' trim, by a stable sort: the largest magnitudes, lowest index first, NaN above all."""
    flat = values.reshape(-1)
    count = (
        0
        if density <= 0
        else len(flat)
        if density >= 1
        else min(len(flat), max(1, int(density * len(flat))))
    )
    order = np.argsort(-np.where(np.isnan(flat), np.inf, np.abs(flat)), kind="stable")
    nans = np.isnan(flat)[order]
    order = np.concatenate([order[nans], order[~nans]])
    count = max(count, nans.sum()) if density > 0 else 0  # a NaN is never hidden
    result = np.zeros_like(flat)
    result[order[:count]] = flat[order[:count]]
    return result.reshape(values.shape)


def reference_ties(base, tensors, weights, densities, normalize, scale):
    """TIES parameter by parameter: trim, elect, merge (MergeME 3.1.2, with source minus base)."""
    deltas = [
        w * reference_trim(t - base, d) for t, w, d in zip(tensors, weights, densities, strict=True)
    ]
    result = base.astype(np.float64).copy()
    for index in np.ndindex(base.shape):
        values = [float(delta[index]) for delta in deltas]
        positive = sum(values) >= 0
        agreeing = [i for i, v in enumerate(values) if (v > 0 if positive else v < 0)]
        total = sum(values[i] for i in agreeing)
        divisor = sum(weights[i] for i in agreeing) if normalize else 1.0
        result[index] += scale * total / (divisor or 1.0)
    return result


def random_tensor(shape, dtype, seed=0):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
def test_trim(dtype, shape, density, split):
    tensor = random_tensor(shape, dtype)
    got = trim(tensor, density)
    assert got.dtype == dtype and got.shape == tensor.shape
    assert np.array_equal(got.double().numpy(), reference_trim(tensor.double().numpy(), density))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "values",
    [
        [2.0] * 1000,
        [0.0] * 1000,
        [0.0] * 900 + [1.0] * 100,
        [1.0, -1.0] * 500,
        [1.0] * 400 + [2.0] * 600,
        [float("nan")] * 3 + [1.0] * 500 + [float("inf"), float("-inf")] + [-1.0] * 495,
        [3e4, 6e-5, -6e4, 0.0, -0.0] * 200,
        list(range(500)) + list(range(500)),
    ],
    ids=[
        "equal",
        "zeros",
        "mostly zeros",
        "signs",
        "two values",
        "NaN and Inf",
        "huge and tiny",
        "twice",
    ],
)
@pytest.mark.parametrize("density", [0.001, 0.1, 0.4, 0.5, 0.75, 0.999])
def test_trim_of_ties_and_extremes(dtype, values, density, split):
    tensor = torch.tensor(values, dtype=dtype)
    expected = reference_trim(tensor.double().numpy(), density)
    assert np.array_equal(trim(tensor, density).double().numpy(), expected, equal_nan=True)


def test_trim_of_what_is_not_contiguous_leaves_its_input_alone(split):
    tensor = random_tensor((60, 50), torch.float32).t()[::2]
    before = tensor.clone()
    assert np.array_equal(trim(tensor, 0.3).numpy(), reference_trim(before.numpy(), 0.3))
    assert torch.equal(tensor, before)


def test_trim_where_the_sample_misleads(monkeypatch):
    """A sample that sees only zeros: the bracket has to be given up and found again."""
    from mergekit_moe_ext.tensor.kernels import trim as module

    monkeypatch.setattr(module, "_SAMPLE", 10)
    monkeypatch.setattr(module, "_MOST_COLLECTED", 1 << 20)
    tensor = random_tensor((300_000,), torch.float32)
    tensor[:: 300_000 // 10 | 1] = 0
    for density in (0.01, 0.5, 0.99):
        assert np.array_equal(
            trim(tensor, density).numpy(), reference_trim(tensor.numpy(), density)
        )


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=16), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
)
def test_trim_keeps_its_count_and_is_idempotent(values, density):
    tensor = torch.tensor(values)
    count = max(1, int(density * len(values)))
    trimmed = trim(tensor, density)
    kept = trimmed != 0
    assert int(kept.sum()) == min(count, int((tensor != 0).sum()))
    assert torch.equal(trimmed[kept], tensor[kept])
    assert torch.equal(trim(trimmed, density), trimmed)
    dropped = (tensor != 0) & ~kept
    if kept.any() and dropped.any():
        assert tensor[kept].abs().min() >= tensor[dropped].abs().max()


def test_the_threshold_of_a_difference_is_that_of_the_difference(split):
    tensor, base = (
        random_tensor((5000,), torch.float32, 1),
        random_tensor((5000,), torch.float32, 2),
    )
    assert magnitude_threshold(tensor, 0.7, base) == magnitude_threshold(tensor - base, 0.7)


def test_the_threshold_of_a_difference_of_two_dtypes():
    tensor, base = random_tensor((500,), torch.bfloat16, 1), random_tensor((500,), torch.float32, 2)
    for density in (0.01, 0.5):
        assert magnitude_threshold(tensor, density, base) == magnitude_threshold(
            tensor - base, density
        )


CASES = [
    {"weight": [1.0, 1.0, 1.0], "density": [0.8, 0.8, 0.8], "normalize": False, "lambda": 1 / 3},
    {"weight": [0.5, -2.0, 1.0], "density": [0.2, 1.0, 0.6], "normalize": True, "lambda": 1.0},
    {"weight": [0.0, 0.0, 1.0], "density": [0.5, 0.5, 0.5], "normalize": True, "lambda": 0.7},
    {"weight": [0.0, 0.0, 0.0], "density": [0.5, 0.5, 0.5], "normalize": True, "lambda": 1.0},
    {"weight": [1.0, 1.0, 1.0], "density": [0.0, 0.0, 0.0], "normalize": True, "lambda": 1.0},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (30, 40)])
def test_fast_ties_is_ties(case, shape, split):
    tensors = [random_tensor(shape, torch.float64, seed) for seed in range(4)]
    expected = reference_ties(
        tensors[0].numpy(),
        [tensor.numpy() for tensor in tensors[1:]],
        case["weight"],
        case["density"],
        case["normalize"],
        case["lambda"],
    )
    got = merge_tensors(tensors, "fast_ties", base_index=0, parameters=case)
    assert np.allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sources", [1, 2, 3, 4])
@pytest.mark.parametrize("int8_mask", [False, True])
def test_fast_ties_equals_stock_bit_for_bit(case, sources, int8_mask, split):
    tensors = [random_tensor((70, 90), torch.float32, seed) for seed in range(sources + 1)]
    parameters = {
        **{
            key: (value * 3)[:sources] if isinstance(value, list) else value
            for key, value in case.items()
        },
        "int8_mask": int8_mask,
    }
    before = [tensor.clone() for tensor in tensors]
    got = merge_tensors(tensors, "fast_ties", base_index=0, parameters=parameters)
    assert torch.equal(got, merge_tensors(tensors, "ties", base_index=0, parameters=parameters))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def test_fast_ties_of_many_sources_differs_from_stock_in_rounding_only(split):
    """From five summands on torch's own sum depends on where an element stands."""
    tensors = [random_tensor((70, 90), torch.float32, seed) for seed in range(20)]
    parameters = {"weight": 0.3, "density": 0.6, "normalize": True, "lambda": 0.5}
    got, stock = (
        merge_tensors(tensors, name, base_index=0, parameters=parameters)
        for name in ("fast_ties", "ties")
    )
    assert torch.allclose(got, stock, rtol=1e-5, atol=1e-6) and (got == stock).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_ties_in_half_precision_is_as_close_as_stock(dtype, split):
    tensors = [random_tensor((50, 60), dtype, seed) for seed in range(4)]
    parameters = {"weight": 1.0, "density": 1.0, "normalize": False, "lambda": 1 / 3}
    exact = reference_ties(
        tensors[0].double().numpy(),
        [t.double().numpy() for t in tensors[1:]],
        [1.0] * 3,
        [1.0] * 3,
        False,
        1 / 3,
    )
    errors = {
        name: np.abs(
            merge_tensors(tensors, name, base_index=0, parameters=parameters).double().numpy()
            - exact
        ).mean()
        for name in ("ties", "fast_ties")
    }
    assert errors["fast_ties"] <= errors["ties"] * 1.01 and errors["fast_ties"] < 0.02


@pytest.mark.parametrize("name", ["fast_ties", "dare"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_show_in_the_result(name, value, split):
    tensors = [random_tensor((500,), torch.float32, seed) for seed in range(3)]
    tensors[1][17] = value
    got = merge_tensors(tensors, name, base_index=0, parameters={"weight": 1.0, "density": 1.0})
    assert not got[17].isfinite() and int((~got.isfinite()).sum()) == 1


@pytest.mark.parametrize("name", ["fast_ties", "dare"])
def test_only_the_base(name):
    tensor = random_tensor((5,), torch.float32)
    assert torch.equal(
        merge_tensors([tensor], name, base_index=0, parameters={"weight": []}), tensor
    )


def test_gradients_equal_those_of_stock(split):
    parameters = {"weight": [1.0, 0.5], "density": [0.6, 0.9], "normalize": True, "lambda": 0.4}
    gradients = {}
    for name in ("ties", "fast_ties"):
        tensors = [
            random_tensor((20, 30), torch.float64, seed).requires_grad_() for seed in range(3)
        ]
        merged = merge_tensors(tensors, name, base_index=0, parameters=parameters)
        merged.backward(random_tensor((20, 30), torch.float64, 9))
        gradients[name] = [tensor.grad for tensor in tensors]
    for got, expected in zip(gradients["fast_ties"], gradients["ties"], strict=True):
        assert torch.allclose(got, expected)


def test_threads_take_the_chunks_of_a_large_tensor(monkeypatch):
    """Each computes alone, in the modes of the one that asks, whose own threads stay as many."""
    monkeypatch.setattr(kernels, "_CPU_CHUNK", 10)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=60)
    modes = set()

    def square(item):
        together.wait()  # all three at once
        modes.add((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        if item == 5:
            raise ValueError("five")
        return item * item

    large = torch.zeros(11)
    try:
        assert kernels.on_threads(square, [1, 2, 3], large) == [1, 4, 9]
        with torch.inference_mode():
            assert kernels.on_threads(square, [3, 2, 1], large) == [9, 4, 1]
        assert modes == {(1, False), (1, True)}
        with pytest.raises(ValueError, match="five"):
            kernels.on_threads(square, [4, 5, 6], large)
        assert torch.get_num_threads() == 3
        # What is small, or has gradients, or lies elsewhere, is not worth it.
        together = SimpleNamespace(wait=lambda: None)
        modes.clear()
        for tensor in (
            torch.zeros(10),
            torch.zeros(11, requires_grad=True),
            torch.zeros(11, device="meta"),
        ):
            assert kernels.on_threads(square, [1, 2, 3], tensor) == [1, 4, 9]
        assert modes == {(3, False)}
    finally:
        torch.set_num_threads(before)


def splitmix_reference(key: int, index: int) -> int:
    """The mask's hash in Python's own integers."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    low, high = key % 2**32, key >> 32
    first = mix((index + low) % 2**32)
    hashed = mix((first + high + (index >> 32) * 0x3C6EF373) % 2**32)
    return hashed - 2**32 if hashed >= 2**31 else hashed


@pytest.mark.parametrize("start", [0, 1, 10_000, 2**31 - 50, 2**32 - 50, 2**33 + 7])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.999])
def test_random_mask_is_the_hash_of_key_and_index(start, density):
    key = mask_key(7, 1, "model.norm.weight")
    got = random_mask(key, slice(start, start + 100), density, torch.device("cpu"))
    bound = density * 2**32 - 2**31
    assert got.tolist() == [splitmix_reference(key, i) < bound for i in range(start, start + 100)]


def test_random_mask_does_not_depend_on_where_it_is_cut():
    device, key = torch.device("cpu"), mask_key(0, 0, "x")
    whole = random_mask(key, slice(0, 1000), 0.3, device)
    cut = [random_mask(key, slice(a, b), 0.3, device) for a, b in ((0, 1), (1, 333), (333, 1000))]
    assert torch.equal(whole, torch.cat(cut))
    assert (
        random_mask(key, slice(0, 9), 1.0, device).all()
        and not random_mask(key, slice(0, 9), 0.0, device).any()
    )


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
def test_random_masks_are_statistically_sound(density):
    """Over 2^20 elements: the rate, its variance over blocks, and independence of lags, sources and
    names.
    """
    n, device = 1 << 20, torch.device("cpu")
    keys = [mask_key(0, 0, "a"), mask_key(0, 1, "a"), mask_key(0, 0, "b"), mask_key(1, 0, "a")]
    masks = [random_mask(key, slice(0, n), density, device).double().numpy() for key in keys]
    sigma = (density * (1 - density)) ** 0.5
    for mask in masks:
        assert abs(mask.mean() - density) < 5 * sigma / n**0.5
        blocks = (mask.reshape(-1, 1024).sum(1) - 1024 * density) / (sigma * 32)
        assert (
            abs((blocks**2).sum() - 1024) < 5 * (2 * 1024) ** 0.5
        )  # chi-squared with 1024 degrees
        for lag in (1, 2, 3, 64, 128, 1024, 4096, 1 << 16):
            centred = (mask - density) / sigma
            assert abs((centred[lag:] * centred[:-lag]).mean()) < 5 / (n - lag) ** 0.5
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            correlation = ((first - density) * (second - density)).mean() / sigma**2
            assert abs(correlation) < 5 / n**0.5


@pytest.mark.parametrize("elect_sign", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_is_dare(dtype, elect_sign, split):
    """Drop, rescale by 1 / density, sum, times lambda (MergeME 3.1.2), with the masks as given."""
    torch.manual_seed(4)
    tensors = [random_tensor((30, 40), dtype, seed) for seed in range(4)]
    weights, densities = [1.0, 0.5, -2.0], [0.8, 0.3, 1.0]
    parameters = {
        "weight": weights,
        "density": densities,
        "lambda": 1 / 3,
        "elect_sign": elect_sign,
    }
    group = TensorGroup.from_tensors(tensors, base_index=0, name="x")
    (got,) = merge_methods.get("dare")((group,), parameters=parameters)
    base = tensors[0].double()
    values = []
    for position, (tensor, weight, density) in enumerate(
        zip(tensors[1:], weights, densities, strict=True)
    ):
        mask = random_mask(mask_key(4, position, "x"), slice(0, 1200), density, base.device).view(
            30, 40
        )
        values.append(weight * mask.double() * (tensor.double() - base) / density)
    if elect_sign:
        positive = sum(values) >= 0
        values = [value * torch.where(positive, value > 0, value < 0) for value in values]
    expected = base + sum(values) / 3
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.bfloat16: 2e-2,
        torch.float16: 2e-3,
    }[dtype]
    assert got.dtype == dtype and torch.allclose(
        got.double(), expected, rtol=tolerance, atol=tolerance
    )


def test_dare_depends_on_the_seed_and_the_name_only():
    tensors = [random_tensor((100,), torch.float32, seed) for seed in range(3)]

    def dare(seed, name):
        torch.manual_seed(seed)
        torch.randn(5)  # what else was drawn does not matter
        group = TensorGroup.from_tensors(tensors, base_index=0, name=name)
        return merge_methods.get("dare")((group,), parameters={"density": 0.5})[0]

    assert torch.equal(dare(1, "a"), dare(1, "a"))
    assert not torch.equal(dare(1, "a"), dare(2, "a")) and not torch.equal(
        dare(1, "a"), dare(1, "b")
    )


def test_dare_keeps_the_expectation():
    base, tensor = torch.zeros(200_000), torch.ones(200_000)
    got = merge_tensors([base, tensor], "dare", base_index=0, parameters={"density": 0.25})
    assert set(got.tolist()) == {0.0, 4.0} and got.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("module", ["trim", "ties"])
def test_examples_in_docstrings(module):
    import doctest
    import importlib

    results = doctest.testmod(importlib.import_module(f"mergekit_moe_ext.tensor.kernels.{module}"))
    assert results.attempted and not results.failed
