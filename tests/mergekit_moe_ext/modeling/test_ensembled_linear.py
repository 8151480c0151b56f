"""A linear map with weighed task vectors against a naive loop, whatever way it takes and however it
is cut up.
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from mergekit_moe_ext.modeling import wemoe_kernel, wemoe_products, wemoe_tiles
from mergekit_moe_ext.modeling.wemoe_calls import Current, EnsembleCall
from mergekit_moe_ext.modeling.wemoe_products import EnsembledLinear

EXPERTS = 3
KINDS = [(layout, sparse) for layout in ("linear", "conv1d") for sparse in (False, True)]
SHARED = ["one for all", "per sample", "per token"]  # whose coefficients are the same


class Set(nn.Module):
    """The module as its model calls it, with these coefficients."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x, c):
        call = EnsembleCall.__new__(EnsembleCall)
        call.values, call.keeping = {"group": c}, set()
        self.linear.current.call = call
        return self.linear(x)


def change_rule(monkeypatch, **numbers):
    rule = wemoe_tiles.RULES["cpu"]._replace(**numbers)
    monkeypatch.setitem(wemoe_tiles.RULES, "cpu", rule)


@pytest.fixture(params=["merged", "one by one"])
def way(request, monkeypatch):
    if request.param == "merged":
        change_rule(monkeypatch, merging=1, sparse=0)
    else:
        change_rule(monkeypatch, merging=10**6, sparse=10**6)


@pytest.fixture(
    params=[(1, 1), (80, 2), (2**20, 32)], ids=["single rows", "a few rows", "one tile"]
)
def tile(request, monkeypatch):
    change_rule(monkeypatch, tile=request.param[0])
    monkeypatch.setattr(wemoe_tiles, "_ROWS", request.param[1])


def make(
    layout="linear", sparse=False, width=(10, 7), experts=EXPERTS, bias=True, dtype=torch.float64
):
    """The module, and its task vectors (experts, *shape of the weight)."""
    torch.manual_seed(0)
    base = nn.Linear(*width, bias=bias) if layout == "linear" else Conv1D(width[1], width[0])
    base.to(dtype).requires_grad_(False)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    shape, vectors = base.weight.shape, torch.randn(experts, *base.weight.shape, dtype=dtype)
    kept = 11 if sparse else None
    module = EnsembledLinear(base, experts, kept, "group", Current())
    if sparse:
        for index, vector in enumerate(vectors):
            where = torch.randperm(vector.numel())[:kept].sort().values
            mask = (
                torch.zeros(vector.numel(), dtype=torch.bool).index_fill(0, where, True).view(shape)
            )
            module.values[index] = vector[mask]
            module.columns[index] = (where % shape[1]).to(torch.uint16)
            module.row_ends[index] = mask.sum(1).cumsum(0)
            vector.masked_fill_(~mask, 0)
    else:
        module.vectors.copy_(vectors)
    if bias:
        module.bias_vectors.normal_()
    return Set(module), vectors


def inputs(
    shared="per sample", samples=4, tokens=5, width=10, experts=EXPERTS, dtype=torch.float64
):
    torch.manual_seed(1)
    shape = {"one for all": (), "per sample": (samples,), "per token": (samples, tokens)}[shared]
    return torch.randn(samples, tokens, width, dtype=dtype), torch.randn(
        *shape, experts, dtype=dtype
    )


def naive(model, vectors, x, c):
    """Sample by sample, token by token, with whole weights."""
    linear, (samples, tokens, _), rows = model.linear, x.shape, []
    c = (
        c.expand(samples, tokens, -1)
        if c.ndim == 1
        else c[:, None].expand(-1, tokens, -1)
        if c.ndim == 2
        else c
    )
    for sample, token in ((sample, token) for sample in range(samples) for token in range(tokens)):
        weight = linear.weight
        bias = linear.bias if linear.bias is not None else torch.zeros((), dtype=x.dtype)
        for index, vector in enumerate(vectors):
            weight = weight + c[sample, token, index] * vector
            if linear.bias is not None:
                bias = bias + c[sample, token, index] * linear.bias_vectors[index]
        rows.append(x[sample, token] @ (weight if linear.is_transposed else weight.T) + bias)
    return torch.stack(rows).view(samples, tokens, -1)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(("layout", "sparse"), KINDS)
def test_it_is_the_loop(layout, sparse, shared, way, tile):
    model, vectors = make(layout, sparse)
    for samples, tokens in ((4, 5), (1, 5), (5, 1), (2, 0)):
        x, c = inputs(shared, samples, tokens)
        if tokens:
            torch.testing.assert_close(model(x, c), naive(model, vectors, x, c))
        else:
            assert model(x, c).shape == (samples, 0, 7)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(("layout", "sparse"), KINDS)
def test_gradients_are_those_of_differences(layout, sparse, shared, way, tile):
    model, _ = make(layout, sparse, width=(6, 4))
    x, c = inputs(shared, samples=3, tokens=2, width=6)
    weight, bias = model.linear.weight.clone(), model.linear.bias.clone()

    def call(x, c, weight, bias):
        return functional_call(model, {"linear.weight": weight, "linear.bias": bias}, (x, c))

    assert torch.autograd.gradcheck(call, [each.requires_grad_() for each in (x, c, weight, bias)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("layout", "sparse"), KINDS)
def test_every_dtype_is_near_double(layout, sparse, dtype, way, tile):
    half, vectors = make(layout, sparse, dtype=dtype)
    double, wide = copy.deepcopy(half).double(), vectors.double()
    for shared in SHARED:
        x, c = (each.requires_grad_() for each in inputs(shared, dtype=dtype))
        wide_x, wide_c = (each.detach().double().requires_grad_() for each in (x, c))
        actual, expected = half(x, c), naive(double, wide, wide_x, wide_c)
        torch.manual_seed(2)
        direction = torch.randn_like(expected)
        actual.backward(direction.to(dtype))
        expected.backward(direction)
        assert actual.dtype == x.grad.dtype == c.grad.dtype == dtype
        for one, other in ((actual, expected), (x.grad, wide_x.grad), (c.grad, wide_c.grad)):
            assert (one - other).norm() < 20 * torch.finfo(dtype).eps * other.norm()


def test_a_bias_in_a_wider_dtype(way):
    model, _ = make(dtype=torch.bfloat16)
    x, c = inputs(dtype=torch.bfloat16)
    expected = model(x, c)
    model.linear.bias.data = model.linear.bias.data.float()
    torch.testing.assert_close(model(x, c).to(torch.bfloat16), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("layout", "sparse"), KINDS)
def test_under_autocast_it_is_as_a_linear_map_is(layout, sparse, way):
    model, vectors = make(layout, sparse, dtype=torch.float32)
    x, c = inputs(dtype=torch.float32)
    expected = naive(model, vectors, x, c)
    x.requires_grad_(), c.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(x, c)
        actual.float().sum().backward()
    assert actual.dtype == torch.bfloat16 and x.grad.dtype == c.grad.dtype == torch.float32
    assert (actual - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_checkpointing_and_strides_change_nothing(sparse, reentrant, way):
    model, vectors = make(sparse=sparse, bias=False)
    x, c = inputs()
    strided = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    assert not strided.is_contiguous()
    x.requires_grad_(), c.requires_grad_()
    expected = torch.autograd.grad(naive(model, vectors, x, c).square().sum(), [x, c])
    actual = torch.autograd.grad(model(strided, c).square().sum(), [strided, c])
    torch.testing.assert_close(actual, expected)
    checkpoint(model, x, c, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close((x.grad, c.grad), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, c), naive(model, vectors, x, c))


@pytest.mark.parametrize("sparse", [False, True])
def test_one_expert_and_no_weight_on_any(sparse, way):
    model, vectors = make(sparse=sparse, experts=1)
    x, c = inputs(experts=1)
    torch.testing.assert_close(model(x, c), naive(model, vectors, x, c))
    plain = nn.functional.linear(x, model.linear.weight, model.linear.bias)
    torch.testing.assert_close(model(x, torch.zeros_like(c)), plain)


@pytest.mark.parametrize(("layout", "sparse"), KINDS)
def test_nan_stays_with_its_sample(layout, sparse, way, tile):
    model, vectors = make(layout, sparse)
    x, c = inputs()
    expected = naive(model, vectors, x, c)
    x[1], c[2] = torch.nan, torch.inf
    actual = model(x, c)
    torch.testing.assert_close(actual[[0, 3]], expected[[0, 3]])
    assert actual[1].isnan().all() and not actual[2].isfinite().all()


@pytest.mark.parametrize(("layout", "sparse"), KINDS)
def test_merged_is_the_weight(layout, sparse, tile):
    model, vectors = make(layout, sparse)
    _, c = inputs("one for all")
    expected = model.linear.weight + torch.einsum("e,eij->ij", c, vectors)
    torch.testing.assert_close(model.linear.merged(c), expected)


# What gives another view of a tensor, or no tensor: no device has anything to do for it.
VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "mT", "numpy_T"}
NOTHING = {*VIEWS, "expand", "promote_types"}
PLACES = ["arange", "repeat", "searchsorted", "add"]
# By layout of the vectors, number of samples, and tokens of each.
STARTED = {
    (False, 1, 9): ["addmm", "addmm", "linear"],
    (False, 4, 9): ["addmm", "addmm", "baddbmm"],
    (False, 4, 1): ["addmm", "linear", "linear", "baddbmm", "add_"],
    (True, 1, 9): ["addmm", "mul", *PLACES, "to", "index_add_", "linear"],
    (True, 4, 9): ["addmm", "new_zeros", *PLACES, "to", "scatter_", "addmm", "baddbmm"],
}


@pytest.fixture
def like_a_gpu(monkeypatch):
    """The CPU takes the way of a device for which there is no rule."""
    monkeypatch.delitem(wemoe_tiles.RULES, "cpu")
    monkeypatch.setattr(wemoe_tiles, "_searches", lambda device: True)


def started(work):
    """The operations that Python starts, but for those that do nothing."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        work()
    found = []
    for event in record.events():
        parent = event.cpu_parent
        is_within_another = parent is not None and parent.key.startswith("aten::")
        name = event.key.removeprefix("aten::")
        is_nothing = name in NOTHING or (name == "to" and not event.cpu_children)
        if event.key.startswith("aten::") and not is_within_another and not is_nothing:
            found.append(name)
    return found


@pytest.mark.parametrize("case", STARTED)
@torch.no_grad()
def test_it_starts_no_more_operations_than_it_has_to(case, like_a_gpu):
    sparse, samples, tokens = case
    model, _ = make(sparse=sparse)
    x, c = inputs(samples=samples, tokens=tokens)
    assert started(lambda: model(x, c)) == STARTED[case]


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(("layout", "sparse"), KINDS)
def test_a_device_without_a_rule_gives_the_loop(layout, sparse, shared, samples, like_a_gpu):
    model, vectors = make(layout, sparse)
    for tokens in (1, 2, 9):
        x, c = inputs(shared, samples, tokens)
        expected = naive(model, vectors, x, c)
        torch.testing.assert_close(model(x, c), expected)
        x.requires_grad_(), c.requires_grad_()
        expected = torch.autograd.grad(naive(model, vectors, x, c).square().sum(), [x, c])
        actual = torch.autograd.grad(model(x, c).square().sum(), [x, c])
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("width", [3, 2**15 + 1])
@pytest.mark.parametrize("rows", [2, 5])
def test_elements_are_found_where_counting_finds_them(rows, width):
    row_ends = torch.tensor([[0, 2, 2, 4, 4], [1, 1, 3, 3, 4], [4, 4, 4, 4, 4]], dtype=torch.int32)
    columns = torch.tensor([[0, width - 1, 1, 2], [2, 0, width - 1, 0], [0, 1, 2, width - 1]])
    places = (columns.to(torch.uint16), row_ends, width, rows)
    found = wemoe_tiles._places_by_search(*places)
    assert torch.equal(found, wemoe_tiles._places_by_counts(*places))


def test_overlapping_sparse_vectors_are_rounded_once(tile):
    model, vectors = make(sparse=True, width=(3, 4), experts=200, dtype=torch.bfloat16)
    _, c = inputs("one for all", experts=200, dtype=torch.bfloat16)
    exact = model.linear.weight.double() + torch.einsum("e,eij->ij", c.double(), vectors.double())
    merged = model.linear.merged(c).double()
    assert ((merged - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize(("layout", "sparse"), KINDS)
def test_it_compiles_whole_forward_and_backward(layout, sparse):
    model, vectors = make(layout, sparse)
    x, c = (each.requires_grad_() for each in inputs(tokens=9))
    expected = torch.autograd.grad(naive(model, vectors, x, c).square().sum(), [x, c])
    compiled = torch.compile(model.linear._by_sample, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(x, c).square().sum(), [x, c])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("part", ["columns", "row_ends"])
def test_places_outside_of_the_weight_are_an_error(part):
    model, _ = make(sparse=True)
    getattr(model.linear, part)[1, -1] = 12
    with pytest.raises(ValueError, match="outside of the weight"):
        model(*inputs())


@pytest.fixture
def merges(monkeypatch, like_a_gpu):
    """The shapes of the coefficients for which a kernel merged, and "spread" where it made vectors
    dense, on a CPU that seems to have it.
    """
    calls = []

    def spread(weight, values, columns, row_ends):
        calls.append("spread")
        return dense(weight, values, columns, row_ends)

    def dense(weight, values, columns, row_ends):
        vectors = values.new_zeros(len(values), weight.numel())
        places = wemoe_tiles._places_by_counts(columns, row_ends, weight.shape[1], len(weight))
        return vectors.scatter_(1, places.long(), values).view(-1, *weight.shape)

    def merge(c, weight, *stored):
        calls.append(tuple(c.shape))
        return weight + torch.einsum("se,eij->sij", c, dense(weight, *stored))

    monkeypatch.setattr(wemoe_kernel, "triton", object())
    monkeypatch.setattr(wemoe_kernel, "_KIND", "cpu")
    monkeypatch.setattr(wemoe_kernel, "_works", lambda device, dtype: True)
    monkeypatch.setattr(wemoe_products, "merge", merge)
    monkeypatch.setattr(wemoe_tiles, "spread", spread)
    return calls


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_a_kernel_merges_sparse_vectors_forward_and_backward(layout, samples, merges):
    model, vectors = make(layout, sparse=True, dtype=torch.float32)
    x, c = inputs(samples=samples, tokens=9, dtype=torch.float32)
    expected = naive(model, vectors, x, c)
    torch.testing.assert_close(model(x, c), expected)
    way = (samples, EXPERTS) if samples <= 2 else "spread"
    assert merges == [way]
    x.requires_grad_(), c.requires_grad_()
    expected = torch.autograd.grad(naive(model, vectors, x, c).square().sum(), [x, c])
    merges.clear()
    actual = torch.autograd.grad(model(x, c).square().sum(), [x, c])
    assert merges == [way, way, "spread"]  # the last for the gradient of the coefficients
    torch.testing.assert_close(actual, expected)


def test_a_kernel_makes_vectors_dense_for_few_tokens(merges):
    model, vectors = make(sparse=True, dtype=torch.float32)
    x, c = inputs(samples=1, tokens=3, dtype=torch.float32)
    torch.testing.assert_close(model(x, c), naive(model, vectors, x, c))
    assert merges == ["spread"]


@pytest.mark.parametrize(("tile", "way"), [(2 * 70, [(2, EXPERTS)]), (69, ["spread"])])
def test_a_kernel_merges_what_fits_into_a_tile(tile, way, merges, monkeypatch):
    model, vectors = make(sparse=True, dtype=torch.float32)
    x, c = inputs(samples=2, tokens=9, dtype=torch.float32)
    monkeypatch.setitem(wemoe_tiles.RULES, "cpu", wemoe_tiles.PLAIN._replace(tile=tile))
    torch.testing.assert_close(model(x, c), naive(model, vectors, x, c))
    assert merges == way
    merges.clear()
    model.linear.merged(c)
    assert merges == way


def test_a_kernel_is_not_used_where_it_could_not_be(merges, monkeypatch):
    model, vectors = make(sparse=True, dtype=torch.float32)
    linear = model.linear
    x, c = inputs(samples=2, tokens=9, dtype=torch.float32)
    weights = linear.merged(c)
    assert merges == [(2, EXPERTS)]
    merges.clear()
    close = torch.testing.assert_close

    torch.func.vmap(linear.merged)(c[None])
    torch.func.jvp(linear.merged, (c,), (c,))
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.jit, "is_tracing", lambda: True)
        close(linear.merged(c), weights)
    compiled = torch.compile(linear._by_sample, backend="aot_eager", fullgraph=True)
    close(compiled(x, c), naive(model, vectors, x, c))
    c.requires_grad_()
    (gradient,) = torch.autograd.grad(linear.merged(c).sum(), c)
    close(gradient, vectors.sum((1, 2)).expand(2, -1))
    c.requires_grad_(False)
    linear.weight.data = linear.weight.T.contiguous().T
    close(linear.merged(c), weights)
    linear.weight.data = linear.weight.contiguous()
    assert linear.merged(c[:0]).shape == (0, *linear.weight.shape)
    # Vectors do not depend on the coefficients, nor on how the weight lies.
    assert merges == ["spread"] * 3
    merges.clear()
    model.double()
    close(linear.merged(c.double()).float(), weights)
    model.float()
    monkeypatch.setattr(wemoe_kernel, "triton", None)
    close(linear.merged(c), weights)
    assert not merges


def test_a_kernel_is_tried_once_and_not_in_a_cuda_graph(monkeypatch):
    device = torch.device("cuda")
    tried = []

    def try_it(*use):
        tried.append(use)
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        return True

    monkeypatch.setattr(wemoe_kernel, "_known", {})
    monkeypatch.setattr(wemoe_kernel, "_tried", try_it)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not wemoe_kernel._works(device, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not wemoe_kernel._works(device, torch.float32)  # there was no memory for it
    assert wemoe_kernel._works(device, torch.float32)
    assert wemoe_kernel._works(device, torch.float32)
    assert tried == [(device, torch.float32)] * 2


def test_a_triton_that_cannot_be_imported_is_none(tmp_path):
    (tmp_path / "triton.py").write_text("raise RuntimeError('no driver')\n")
    code = "from mergekit_moe_ext.modeling import wemoe_kernel; print(wemoe_kernel.triton)"
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "None\n", ran.stderr
