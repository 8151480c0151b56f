"""The Triton kernels against PyTorch's operations, bit for bit.

On a machine without a GPU, Triton's interpreter runs them: `pip install triton`, and set
TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

from mergekit_moe_ext.tensor.kernels import drop, on_gpu, ties  # noqa: E402
from mergekit_moe_ext.tensor.kernels.trim import magnitude_threshold  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMEL = 5003


def tensors(dtype: torch.dtype, count: int = 3, rounded: bool = False) -> list[torch.Tensor]:
    """A base and so many sources; `rounded` to a few values, so that many are equal."""
    generator = torch.Generator().manual_seed(count)
    made = []
    for _ in range(count + 1):
        values = torch.randn(NUMEL, generator=generator)
        made.append((values.round() if rounded else values).to(DEVICE, dtype))
    return made


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 to bfloat16, where a GPU rounds to the nearest."""
    if DEVICE == "cuda":
        return
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(values, source, target, mode)
        as_torch = torch.from_numpy(values.copy()).to(torch.bfloat16)
        return as_torch.view(torch.uint16).numpy()

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_threshold_is_counted_alike(dtype: torch.dtype) -> None:
    base, source = tensors(dtype, 1)
    counted = on_gpu._kernels().count
    for density in (0.001, 0.3, 0.8):
        expected = magnitude_threshold(source, density, base)
        assert magnitude_threshold(source, density, base, counted) == expected
        expected = magnitude_threshold(source, density)
        assert magnitude_threshold(source, density, None, counted) == expected
