"""One module's experts: there are three ways to compute their update, to the same result and the
same gradients.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_routing import mixing as ways
from peft_routing.config import Site
from peft_routing.layer import Experts

OUT, IN = 7, 5
GROUPABLE = 16  # torch's grouped product wants rows of a multiple of 16 bytes
WEIGH = {"full": ways.full, "low_rank": ways.low_rank}
needs_grouped_mm = pytest.mark.skipif(not ways.HAS_GROUPED_MM, reason="torch has no grouped_mm")


def experts(count, rank, mixing, dtype=torch.float64, scalings=None, sizes=(IN, OUT)):
    generator = torch.Generator().manual_seed(0)
    scalings = scalings or tuple(0.5 + i for i in range(count))
    made = Experts(Site((rank,) * count, scalings), *sizes, mixing, dtype)
    made.fill(
        [
            (
                torch.randn(rank, sizes[0], generator=generator),
                torch.randn(sizes[1], rank, generator=generator),
            )
            for _ in range(count)
        ]
    )
    return made


def by(way, made, x, coefficients, k):
    """The update by one of the ways, whatever it costs."""
    scaled = coefficients * torch.tensor(made.site.scalings, dtype=coefficients.dtype)
    given = x, made.A, made.B, coefficients, scaled, WEIGH[made.mixing]
    return ways.dense(*given) if way == "dense" else ways.of_chosen(*given, k, way)


def sparse(shape, count, kept, seed=0, dtype=torch.float64):
    """Coefficients of which at most `kept` are not 0, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, count, generator=generator, dtype=dtype)
    return torch.zeros_like(values).scatter(-1, values.topk(kept, dim=-1).indices, values)


def by_hand(made, x, coefficients):
    """Updates written out, token by token."""
    flat, weights = (
        x.reshape(-1, x.shape[-1]),
        coefficients.expand(*x.shape[:-1], -1).reshape(-1, coefficients.shape[-1]),
    )
    rows = []
    for token, weight in zip(flat, weights, strict=True):
        pairs = [(a, b * s) for (a, b), s in zip(made.factors(), made.site.scalings, strict=True)]
        if made.mixing == "full":
            rows.append(sum(w * (b @ (a @ token)) for w, (a, b) in zip(weight, pairs, strict=True)))
        else:
            a = sum(w * a for w, (a, _) in zip(weight, pairs, strict=True))
            rows.append(sum(w * b for w, (_, b) in zip(weight, pairs, strict=True)) @ (a @ token))
    out = made.B.shape[1]
    return (
        torch.stack(rows).reshape(*x.shape[:-1], out) if rows else x.new_zeros(*x.shape[:-1], out)
    )


@settings(max_examples=60, deadline=None)
@given(
    mixing=st.sampled_from(["full", "low_rank"]),
    count=st.integers(1, 6),
    rank=st.integers(0, 3),
    kept=st.integers(1, 6),
    tokens=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_dense_and_gathered_are_the_loop(mixing, count, rank, kept, tokens, seed):
    kept = min(kept, count)
    made, x = experts(count, rank, mixing), torch.randn(2, tokens, IN, dtype=torch.float64)
    coefficients = sparse((2, tokens), count, kept, seed)
    expected = by_hand(made, x, coefficients)
    for way in ("dense", "gathered"):
        assert torch.allclose(by(way, made, x, coefficients, kept), expected, atol=1e-9)
    assert torch.allclose(made(x, coefficients, kept), expected, atol=1e-9)


@needs_grouped_mm
@settings(max_examples=60, deadline=None)
@given(
    mixing=st.sampled_from(["full", "low_rank"]),
    count=st.integers(1, 9),
    rank=st.sampled_from([4, 8]),
    kept=st.integers(1, 9),
    shape=st.sampled_from([(1,), (0,), (2, 3), (1, 17), (2, 1, 2), (0, 3)]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_grouped_is_the_loop(mixing, count, rank, kept, shape, transposed, seed):
    kept = min(kept, count)
    made = experts(count, rank, mixing, torch.float32, sizes=(GROUPABLE, 2 * GROUPABLE))
    x = torch.randn(*shape, GROUPABLE)
    if transposed:
        x = torch.randn(GROUPABLE, *shape).movedim(0, -1)
    coefficients = sparse(shape, count, kept, seed, torch.float32)
    expected = by_hand(made.double(), x.double(), coefficients.double())
    update = by("grouped", made.float(), x, coefficients, kept)
    assert update.shape == expected.shape
    assert torch.allclose(
        update.double(),
        expected,
        rtol=1e-4,
        atol=1e-4 * max(1, float(expected.abs().max() if expected.numel() else 1)),
    )


@pytest.mark.parametrize("way", ["gathered", pytest.param("grouped", marks=needs_grouped_mm)])
@pytest.mark.parametrize("mixing", ["full", "low_rank"])
def test_one_choice_for_all_tokens_is_broadcast(mixing, way):
    made = experts(9, 4, mixing, torch.float32, sizes=(GROUPABLE, GROUPABLE))
    x = torch.randn(2, 3, GROUPABLE)
    for shape in ((), (2, 1)):
        coefficients = sparse(shape, 9, 2, dtype=torch.float32)
        assert torch.allclose(
            by(way, made, x, coefficients, 2), by_hand(made, x, coefficients), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("way", ["gathered", pytest.param("grouped", marks=needs_grouped_mm)])
@pytest.mark.parametrize("mixing", ["full", "low_rank"])
def test_gradients_are_those_of_dense(mixing, way):
    made = experts(32, 4, mixing, torch.float32, (0.5,) * 32, (GROUPABLE, GROUPABLE))
    gradients = []
    for kept in (2, None):
        x = torch.linspace(-1, 1, 20 * GROUPABLE).view(20, GROUPABLE).requires_grad_()
        logits = torch.linspace(0, 9, 20 * 32).sin().view(20, 32).requires_grad_()
        largest = torch.full_like(logits, -torch.inf).scatter(
            -1, logits.topk(2).indices, logits.topk(2).values
        )
        by(way if kept else "dense", made, x, largest.softmax(-1), kept).square().sum().backward()
        gradients.append((x.grad, logits.grad))
    for one, other in zip(*gradients, strict=True):
        assert (
            torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
            and one.abs().max() > 0
        )
    assert made.A.grad is None and made.B.grad is None


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize(("tokens", "count"), [(1, 128), (64, 8), (64, 128)])
def test_what_is_kept_for_backward_grows_with_ranks_alone(tokens, count, mixing):
    made = experts(count, 4, mixing, torch.float32, sizes=(1024, 2048))
    x = torch.randn(tokens, 1024, requires_grad=True)
    coefficients = sparse((tokens,), count, 2, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x, coefficients, 2)
    factors = {made.A.data_ptr(), made.B.data_ptr()}
    assert (
        max(t.numel() for t in kept if t.data_ptr() not in factors) <= tokens * count * 4
    )  # the rank


def test_ties_are_each_counted_once():
    made, x = experts(8, 3, "full"), torch.randn(5, IN, dtype=torch.float64)
    coefficients = torch.zeros(5, 8, dtype=torch.float64)
    coefficients[:, 2:4] = 0.5
    assert torch.allclose(
        by("gathered", made, x, coefficients, 2), by_hand(made, x, coefficients), atol=1e-10
    )
    assert torch.allclose(
        by("gathered", made, x, coefficients, 5), by_hand(made, x, coefficients), atol=1e-10
    )


@pytest.mark.parametrize(
    ("tokens", "count", "rank", "expected"),
    [
        (1, 4, 4, "dense"),
        (512, 4, 16, "dense"),
        (1, 256, 16, "gathered"),
        pytest.param(512, 256, 16, "grouped", marks=needs_grouped_mm),
    ],
)
def test_the_cheapest_way_depends_on_tokens_experts_and_ranks(tokens, count, rank, expected):
    a, b = torch.empty(count * rank, 1024), torch.empty(count * rank, 2048)
    x = torch.empty(tokens, 1024)
    assert ways.cheapest(x, a, b, count, 2, gradients=False) == expected
    assert ways.cheapest(x, a, b, count, 2, gradients=True) in {expected, "dense", "grouped"} - {
        "gathered"
    }


@pytest.mark.parametrize(
    ("dtype", "rank", "size"),
    [(torch.float64, 16, 64), (torch.float32, 3, 64), (torch.float32, 16, 63)],
)
def test_what_torch_cannot_group_goes_another_way(dtype, rank, size):
    made = experts(256, rank, "full", dtype, sizes=(size, size))
    x, coefficients = torch.randn(64, size, dtype=dtype), sparse((64,), 256, 2, dtype=dtype)
    assert ways.cheapest(x, made.A, made.B, 256, 2, gradients=True) != "grouped"
    assert torch.allclose(made(x, coefficients, 2), made(x, coefficients), rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 200])
def test_no_way_breaks_a_compiled_graph(tokens, dtype):
    made = experts(64, 16, "low_rank", dtype, (0.1,) * 64, (256, 256))
    x, coefficients = (
        torch.randn(tokens, 256, dtype=dtype),
        sparse((tokens,), 64, 2, dtype=torch.float32),
    )
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")(x, coefficients, 2)
    expected = made(x, coefficients)
    assert torch.allclose(compiled, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("way", ["gathered", pytest.param("grouped", marks=needs_grouped_mm)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_halves_are_close(dtype, way):
    made = experts(16, 8, "full", dtype, (0.5,) * 16, (GROUPABLE, GROUPABLE))
    x, coefficients = (
        torch.ones(6, GROUPABLE, dtype=dtype),
        sparse((6,), 16, 2, dtype=torch.float32).abs(),
    )
    few, expected = (
        by(way, made, x, coefficients, 2),
        by_hand(made.double(), x.double(), coefficients.double()),
    )
    assert few.dtype == dtype
    assert torch.allclose(
        few.double(), expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max())
    )


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
