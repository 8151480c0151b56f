"""One module's experts: few tokens choosing few of many go another way, to the same result and the same gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_routing.config import Site
from peft_routing.layer import Experts

OUT, IN = 7, 5


def experts(count, rank, mixing, dtype=torch.float64, scalings=None):
    generator = torch.Generator().manual_seed(0)
    scalings = scalings or tuple(0.5 + i for i in range(count))
    made = Experts(Site((rank,) * count, scalings), IN, OUT, mixing, dtype)
    made.fill(
        [
            (torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator))
            for _ in range(count)
        ]
    )
    return made


def sparse(shape, count, kept, seed=0, dtype=torch.float64):
    """Coefficients of which at most `kept` are not 0, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, count, generator=generator, dtype=dtype)
    return torch.zeros_like(values).scatter(-1, values.topk(kept, dim=-1).indices, values)


def by_hand(made, x, coefficients):
    """Updates written out, token by token."""
    flat, weights = x.reshape(-1, IN), coefficients.expand(*x.shape[:-1], -1).reshape(-1, coefficients.shape[-1])
    rows = []
    for token, weight in zip(flat, weights, strict=True):
        pairs = [(a, b * s) for (a, b), s in zip(made.factors(), made.site.scalings, strict=True)]
        if made.mixing == "full":
            rows.append(sum(w * (b @ (a @ token)) for w, (a, b) in zip(weight, pairs, strict=True)))
        else:
            a = sum(w * a for w, (a, _) in zip(weight, pairs, strict=True))
            rows.append(sum(w * b for w, (_, b) in zip(weight, pairs, strict=True)) @ (a @ token))
    return torch.stack(rows).reshape(*x.shape[:-1], OUT) if rows else x.new_zeros(*x.shape[:-1], OUT)


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (2, 1), (0, 1), (1, 1, 1)])
def test_the_chosen_alone_give_the_same(mixing, shape, monkeypatch):
    made, x = experts(128, 3, mixing), torch.randn(*shape, IN, dtype=torch.float64)
    coefficients = sparse(shape, 128, 2)
    expected = by_hand(made, x, coefficients)
    calls = []
    stock = Experts._of_the_chosen
    monkeypatch.setattr(Experts, "_of_the_chosen", lambda *args: (calls.append(args), stock(*args))[1])
    assert torch.allclose(made(x, coefficients, 2), expected, atol=1e-10)
    assert len(calls) == 1
    assert torch.allclose(made(x, coefficients), expected, atol=1e-10)
    assert len(calls) == 1


@settings(max_examples=40, deadline=None)
@given(
    mixing=st.sampled_from(["full", "low_rank"]),
    count=st.integers(1, 6),
    rank=st.integers(0, 3),
    kept=st.integers(1, 6),
    tokens=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_both_ways_are_the_loop(mixing, count, rank, kept, tokens, seed):
    kept = min(kept, count)
    made, x = experts(count, rank, mixing), torch.randn(2, tokens, IN, dtype=torch.float64)
    coefficients = sparse((2, tokens), count, kept, seed)
    expected = by_hand(made, x, coefficients)
    assert torch.allclose(made(x, coefficients), expected, atol=1e-9)
    if rank:
        scaled = coefficients * torch.tensor(made.site.scalings, dtype=torch.float64)
        assert torch.allclose(made._of_the_chosen(x, coefficients, scaled, kept), expected, atol=1e-9)


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
def test_gradients_are_the_same(mixing):
    made = experts(128, 3, mixing)
    gradients = []
    for kept in (2, None):
        x = torch.linspace(-1, 1, IN, dtype=torch.float64)[None].requires_grad_()
        logits = torch.linspace(0, 3, 128, dtype=torch.float64)[None].requires_grad_()
        largest = torch.full_like(logits, -torch.inf).scatter(-1, logits.topk(2).indices, logits.topk(2).values)
        made(x, largest.softmax(-1), kept).square().sum().backward()
        gradients.append((x.grad, logits.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-10) and one.abs().max() > 0
    assert made.A.grad is None and made.B.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_halves_are_close(dtype):
    made, x = experts(64, 4, "full", dtype, (0.5,) * 64), torch.ones(1, IN, dtype=dtype)
    coefficients = sparse((1,), 64, 2, dtype=torch.float32).abs()
    few, all_ = made(x, coefficients, 2), made(x, coefficients)
    assert few.dtype == dtype
    assert torch.allclose(few.float(), all_.float(), rtol=2e-2, atol=2e-2)


def test_nan_in_one_token_stays_there():
    made, x = experts(256, 2, "full"), torch.randn(2, IN, dtype=torch.float64)
    coefficients = sparse((2,), 256, 2)
    x[0, 0] = torch.nan
    update = made(x, coefficients, 2)
    assert update[0].isnan().all() and update[1].isfinite().all()


def test_mixed_ranks_take_the_other_way():
    made = Experts(Site((1, 2) * 64, (1.0,) * 128), IN, OUT, "full", torch.float64)
    made.fill([(torch.ones(1 + i % 2, IN), torch.ones(OUT, 1 + i % 2)) for i in range(128)])
    coefficients = sparse((1,), 128, 2)
    x = torch.randn(1, IN, dtype=torch.float64)
    assert torch.allclose(made(x, coefficients, 2), by_hand(made, x, coefficients), atol=1e-10)
