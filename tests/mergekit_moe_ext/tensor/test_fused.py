"""The Triton kernels against PyTorch's operations, bit for bit.

On a machine without a GPU, Triton's interpreter runs them: `pip install triton`, and set
TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import os
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

from mergekit_moe_ext.tensor.kernels import drop, fused, on_gpu, ties  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMEL = 5003
SHORT = 803
SHORT_BLOCK = 64


def tensors(
    dtype: torch.dtype, count: int = 3, rounded: bool = False, numel: int = NUMEL
) -> list[torch.Tensor]:
    """A base and so many sources; `rounded` to a few values, so that many are equal."""
    generator = torch.Generator().manual_seed(count)
    made = []
    for _ in range(count + 1):
        values = torch.randn(numel, generator=generator)
        made.append((values.round() if rounded else values).to(DEVICE, dtype))
    return made


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 to bfloat16, where a GPU rounds to the nearest, and
    converts subnormal bfloat16 wrongly.
    """
    if DEVICE == "cuda":
        return
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (language.float32, language.bfloat16):
            as_torch = torch.from_numpy(values.copy()).to(torch.bfloat16)
            return as_torch.view(torch.uint16).numpy()
        if (source, target) == (language.bfloat16, language.float32):
            return values.astype(numpy.uint32) << 16
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties(dtype: torch.dtype, count: int, normalize: bool, rounded: bool) -> None:
    base, *sources = tensors(dtype, count, rounded)
    weights = [1.0, 0.7, -0.3][:count]
    densities = [0.8, 0.1, 0.5][:count]
    arguments = base.view(-1), sources, weights, densities
    for scale in (1.0, 0.3):
        expected = ties.merge_ties(*arguments, normalize=normalize, scale=scale)
        same(on_gpu._fused_ties(*arguments, normalize=normalize, scale=scale), expected)


def same_ties(
    tensors: list[torch.Tensor], densities: list[float], normalize: bool = True, scale: float = 1.0
) -> None:
    base, *sources = tensors
    arguments = base, sources, [1.0, 0.7, -0.3, 0.5][: len(sources)], densities
    expected = ties.merge_ties(*arguments, normalize=normalize, scale=scale)
    same(on_gpu._fused_ties(*arguments, normalize=normalize, scale=scale), expected)


@pytest.fixture(params=["as it is", "few programs", "histograms only", "no histograms"])
def division(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the elements are divided among blocks and programs, and how they are counted."""
    if request.param == "as it is":
        return
    monkeypatch.setattr(fused, "_COUNTED_BLOCK", SHORT_BLOCK)
    monkeypatch.setattr(fused, "_COUNTING_WARPS", 1)
    monkeypatch.setattr(fused, "_COUNTING_PROGRAMS", 3)
    monkeypatch.setattr(fused, "_COUNTED_AT_ONCE", 2)  # of three sources
    few = {"few programs": 4, "histograms only": -1, "no histograms": SHORT_BLOCK}
    monkeypatch.setattr(fused, "_FEW", few[request.param])


@pytest.mark.parametrize("numel", [1, 2, SHORT_BLOCK - 1, SHORT_BLOCK, SHORT_BLOCK + 1, SHORT])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_how_the_elements_are_divided(
    dtype: torch.dtype, rounded: bool, numel: int, division: None
) -> None:
    same_ties(tensors(dtype, 3, rounded, numel), [0.8, 0.1, 0.5])


@pytest.mark.parametrize("kept", [1, SHORT_BLOCK, SHORT_BLOCK + 1, 2 * SHORT_BLOCK - 1, SHORT - 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_are_kept_up_to_the_same_index(
    dtype: torch.dtype, kept: int, division: None
) -> None:
    """At the borders of blocks, and where all elements are equal but a few that are larger."""
    density = (kept + 0.5) / SHORT
    base = torch.zeros(SHORT, dtype=dtype, device=DEVICE)
    equal = torch.ones_like(base)
    equal[::2] = -1
    same_ties([base, equal], [density])
    some_larger = equal.clone()
    some_larger[10::100] = 3
    zeros = torch.zeros_like(base)
    zeros[SHORT_BLOCK : SHORT_BLOCK + 30] = -2
    same_ties([base, some_larger, zeros, equal], [density, density, 0.5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_of_every_digit(dtype: torch.dtype, division: None) -> None:
    """All bits at random: subnormal numbers, huge ones, infinities and NaN."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(0)
    made = [torch.zeros(SHORT, dtype=dtype, device=DEVICE)]
    for _ in range(3):
        bits = torch.randint(limits.min, limits.max, (SHORT,), generator=generator)
        made.append(bits.to(integer).view(dtype).to(DEVICE))
    for densities in ([0.9, 0.5, 0.01], [2e-3, 0.999, 0.2]):
        same_ties(made, densities)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("density", [-1.0, 0.0, 0.3, 0.5, 1.0])
def test_nothing_but_one_value(value: float, density: float) -> None:
    for dtype in DTYPES:
        base = torch.zeros(NUMEL, dtype=dtype, device=DEVICE)
        same_ties([base, torch.full_like(base, value)], [density])


def test_more_sources_than_are_counted_at_once() -> None:
    base, *sources = tensors(torch.bfloat16, 2 * fused._COUNTED_AT_ONCE + 1)
    densities = [number / len(sources) for number in range(1, len(sources) + 1)]
    arguments = base, sources, [0.3] * len(sources), densities
    expected = ties.merge_ties(*arguments, normalize=True, scale=1.0)
    same(on_gpu._fused_ties(*arguments, normalize=True, scale=1.0), expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has nothing to wait for")
def test_nothing_waits_for_the_device() -> None:
    made = tensors(torch.float32)
    same_ties(made, [0.8, 0.1, 1.0])  # the kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        base, *sources = made
        for densities in ([0.8, 0.1, 0.5], [0.8, 0.0, 1.0]):
            on_gpu._fused_ties(base, sources, [1.0] * 3, densities, normalize=True, scale=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("densities", [[0.0, 1.0, 1e-9], [-1.0, 2.0, 0.999]])
def test_densities_at_the_ends(densities: list[float]) -> None:
    base, *sources = tensors(torch.float32)
    arguments = base, sources, [1.0, 1.0, 0.5], densities
    expected = ties.merge_ties(*arguments, normalize=True, scale=1.0)
    same(on_gpu._fused_ties(*arguments, normalize=True, scale=1.0), expected)
    expected = drop.merge_dare(*arguments, [1, 2, 3], scale=1.0, elect_sign=False)
    same(on_gpu._fused_dare(*arguments, [1, 2, 3], scale=1.0, elect_sign=False), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype: torch.dtype) -> None:
    base, *sources = tensors(dtype)
    sources[0][::7] = torch.nan
    sources[1][::11] = torch.inf
    sources[2][::13] = -torch.inf
    sources[0][::17] = -torch.inf  # beside an infinity of the other sign, now and then
    for density in (0.05, 0.5):  # of the first source, NaN alone are more than a twentieth
        arguments = base, sources, [1.0, 0.7, -0.3], [density] * 3
        expected = ties.merge_ties(*arguments, normalize=True, scale=0.5)
        same(on_gpu._fused_ties(*arguments, normalize=True, scale=0.5), expected)
        expected = drop.merge_dare(*arguments, [1, 2, 3], scale=0.5, elect_sign=True)
        same(on_gpu._fused_dare(*arguments, [1, 2, 3], scale=0.5, elect_sign=True), expected)


@pytest.mark.parametrize("elect_sign", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dare(dtype: torch.dtype, count: int, elect_sign: bool) -> None:
    base, *sources = tensors(dtype, count)
    keys = [1, 2**40 + 3, 2**64 - 5][:count]
    weights = [1.0, 0.7, -0.3][:count]
    arguments = base, sources, weights, [0.8, 0.1, 0.5][:count], keys
    expected = drop.merge_dare(*arguments, scale=0.3, elect_sign=elect_sign)
    same(on_gpu._fused_dare(*arguments, scale=0.3, elect_sign=elect_sign), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_finds_that_they_agree(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "_TRIED", NUMEL)
    assert on_gpu._work.__wrapped__(torch.device(DEVICE), dtype)


def test_the_trial_warns_where_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "_TRIED", NUMEL)
    monkeypatch.setattr(on_gpu, "_fused_dare", lambda base, *_arguments, **_options: base)
    with pytest.warns(UserWarning, match="other results than PyTorch on c"):
        assert not on_gpu._work.__wrapped__(torch.device(DEVICE), torch.float32)
    monkeypatch.setattr(on_gpu, "_kernels", lambda: 1 / 0)
    with pytest.warns(UserWarning, match=r"Triton fails \(ZeroDivisionError"):
        assert not on_gpu._work.__wrapped__(torch.device(DEVICE), torch.float32)
