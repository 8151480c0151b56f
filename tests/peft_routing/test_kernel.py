"""The Triton kernel of a routed layer against float64, and against PyTorch's operations.

On a machine without a GPU, Triton's interpreter runs it: `pip install triton`, and set
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

from peft_routing import fused, kernel  # noqa: E402
from tests.peft_routing.test_fused import IN, OUT, make_layer, shortly  # noqa: E402

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16, where a GPU multiplies the values."""
    if DEVICE == "cuda":
        return
    import numpy
    from triton import language
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != language.bfloat16:
            return handle
        bits = handle.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), language.float32)

    def of_values(builder: Any, first: Any, second: Any, *others: Any) -> Any:
        return dot(builder, widened(first), widened(second), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", of_values)


def weighed_in_a_loop(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    scalings: torch.Tensor,
    *,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
) -> torch.Tensor:
    """What the kernel is to compute, in float64, token by token and expert by expert."""
    count = len(weight)
    rank = z.shape[1] // count
    rows = []
    for token, state in enumerate(hidden.double()):
        scores = weight.double() @ state
        scores = (scores.abs() if absolute else scores) / temperature
        chosen = sorted(range(count), key=lambda expert: -scores[expert].item())[:k]
        total = sum(scores[expert].exp() for expert in chosen)
        of_token = z[token].double().view(count, rank)
        mean = sum(scores[expert].exp() / total * of_token[expert] for expert in chosen)
        row = torch.zeros(count, rank, dtype=torch.float64, device=z.device)
        for expert in chosen:
            value = mean if is_low_rank else of_token[expert]
            row[expert] = scores[expert].exp() / total * scalings[expert].double() * value
        rows.append(row.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("is_low_rank", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    ("count", "rank", "k", "tokens", "width"),
    [(1, 4, 1, 3, 64), (3, 5, 2, 16, 70), (20, 8, 4, 35, 200), (70, 4, 70, 17, 130)],
)
def test_the_kernel_is_the_loop(
    count: int, rank: int, k: int, tokens: int, width: int, absolute: bool, is_low_rank: bool
) -> None:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(tokens, width, generator=generator).to(DEVICE, HALF)
    weight = torch.randn(count, width, generator=generator).to(DEVICE) / 8
    z = torch.randn(tokens, count * rank, generator=generator).to(DEVICE, HALF)
    scalings = torch.rand(count, generator=generator).to(DEVICE) + 0.5
    options = {"k": k, "temperature": 0.7, "absolute": absolute, "is_low_rank": is_low_rank}
    weighed = kernel.weigh(hidden, kernel.split(weight), z, scalings, **options)
    exact = weighed_in_a_loop(hidden, weight, z, scalings, **options)
    assert (weighed.double() - exact).norm() < 0.006 * exact.norm()


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("scalings", [(2.0,) * 6, (1.0, 2.0, 0.5, 3.0, 1.5, 0.1)])
def test_a_module_by_the_kernel(
    mixing: str, scalings: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_works", lambda device: True)
    options = {"mixing": mixing, "scalings": scalings, "top_k": 2, "router_temperature": 3.0}
    layer = make_layer(dtype=HALF, expert_dtype="bfloat16", **options).to(DEVICE)
    exact = make_layer(expert_dtype="float64", **options).to(DEVICE)
    exact.load_state_dict({name: each.double() for name, each in layer.state_dict().items()})
    calls = []
    weigh = kernel.weigh
    monkeypatch.setattr(kernel, "weigh", lambda *a, **k: calls.append(1) or weigh(*a, **k))
    x = torch.randn(2, 11, IN).to(DEVICE, HALF)
    for change in (1.0, -0.5):
        with torch.no_grad():  # a changed router is noticed
            layer.routed_lora_router["default"].weight.mul_(change)
            exact.routed_lora_router["default"].weight.mul_(change)
        by_kernel = shortly(layer, x, monkeypatch).double()
        by_operations = shortly(exact, x.double(), monkeypatch)
        assert by_kernel.shape == (2, 11, OUT)
        assert (by_kernel - by_operations).norm() < 0.01 * by_operations.norm()
    assert len(calls) == 2


def test_what_the_kernel_does_not_take() -> None:
    assert kernel.fits(256, 16)
    assert not kernel.fits(256, 64)
