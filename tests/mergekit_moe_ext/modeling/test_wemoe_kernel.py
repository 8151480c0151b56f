"""The Triton kernels for sparse task vectors against a loop in float64.

On a machine without a GPU, Triton's interpreter runs them: `pip install triton`, and set
TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import os
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

from mergekit_moe_ext.modeling import wemoe_kernel, wemoe_products, wemoe_tiles  # noqa: E402
from mergekit_moe_ext.modeling.wemoe_calls import Current  # noqa: E402
from mergekit_moe_ext.modeling.wemoe_products import EnsembledLinear  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = [torch.uint16, torch.int32]
EXPERTS = 3
SHAPE = (5, 300)  # of weights: a row is longer than a block of the kernel
KEPT = 400


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter converts subnormal bfloat16 wrongly."""
    if DEVICE == "cuda":
        return
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def widened(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (language.bfloat16, language.float32):
            return values.astype(numpy.uint32) << 16
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", widened)


def stored_at(
    places: Tensor, shape: tuple[int, int], of_columns: torch.dtype
) -> tuple[Tensor, ...]:
    """Columns and row ends of elements at flat indices (experts, kept), which go up."""
    rows, width = shape
    row_ends = []
    for of_expert in places:
        row_ends.append([int((of_expert < row * width).sum()) for row in range(1, rows + 1)])
    columns = (places % width).to(of_columns)
    ends = torch.tensor(row_ends, dtype=torch.int32).view(len(places), rows)
    return columns.to(DEVICE), ends.to(DEVICE)


def random_places(experts: int, kept: int, shape: tuple[int, int]) -> Tensor:
    places = []
    for expert in range(experts):
        generator = torch.Generator().manual_seed(expert)
        order = torch.randperm(shape[0] * shape[1], generator=generator)
        places.append(order[:kept].sort().values)
    return torch.stack(places)


def random_tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def by_loop(c: Tensor, weight: Tensor, values: Tensor, columns: Tensor, row_ends: Tensor) -> Tensor:
    """The weights of all samples, element by element, in float64."""
    merged = []
    for of_sample in c.double().cpu():
        sums = weight.double().cpu().clone()
        for expert, coefficient in enumerate(of_sample):
            start = 0
            for row, end in enumerate(row_ends[expert].tolist()):
                for number in range(start, end):
                    value = values[expert, number].double().cpu()
                    sums[row, int(columns[expert, number].int())] += coefficient * value
                start = end
        merged.append(sums)
    return torch.stack(merged)


def check(c: Tensor, weight: Tensor, values: Tensor, columns: Tensor, row_ends: Tensor) -> None:
    merged = wemoe_kernel.merge(c, weight, values, columns, row_ends)
    assert merged.dtype == torch.float32 and merged.device == weight.device
    expected = by_loop(c, weight, values, columns, row_ends)
    torch.testing.assert_close(merged.double().cpu(), expected, atol=1e-5, rtol=1e-5)
    check_spread(weight, values, columns, row_ends)


def check_spread(weight: Tensor, values: Tensor, columns: Tensor, row_ends: Tensor) -> None:
    vectors = wemoe_kernel.spread(weight, values, columns, row_ends)
    assert vectors.dtype == values.dtype and vectors.device == values.device
    each_alone = torch.eye(len(values))
    expected = by_loop(each_alone, torch.zeros(weight.shape), values, columns, row_ends)
    assert torch.equal(vectors.double().cpu(), expected)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("of_columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_loop(dtype: torch.dtype, of_columns: torch.dtype, samples: int) -> None:
    shapes = (samples, EXPERTS), SHAPE, (EXPERTS, KEPT)
    c, weight, values = random_tensors(dtype, *shapes)
    stored = stored_at(random_places(EXPERTS, KEPT, SHAPE), SHAPE, of_columns)
    check(c, weight, values, *stored)


@pytest.mark.parametrize("first_row", [0, 2, 3])
def test_all_elements_in_some_rows_and_none_in_others(first_row: int) -> None:
    """All experts add to the same columns, and rows are longer than a block."""
    start = first_row * SHAPE[1]
    places = torch.arange(start, start + KEPT).expand(EXPERTS, -1)
    c, weight, values = random_tensors(torch.float32, (2, EXPERTS), SHAPE, (EXPERTS, KEPT))
    check(c, weight, values, *stored_at(places, SHAPE, torch.uint16))


@pytest.mark.parametrize("kept", [0, 1, SHAPE[0] * SHAPE[1]])
@pytest.mark.parametrize("experts", [1, 9])
def test_how_much_is_kept(experts: int, kept: int) -> None:
    c, weight, values = random_tensors(torch.float32, (2, experts), SHAPE, (experts, kept))
    check(c, weight, values, *stored_at(random_places(experts, kept, SHAPE), SHAPE, torch.uint16))


@pytest.mark.parametrize("shape", [(1, 1), (70, 3), (2, 2**15 + 5)])
def test_shapes(shape: tuple[int, int]) -> None:
    kept = shape[0] * shape[1] // 3 + 1 if shape[1] < 100 else 50
    c, weight, values = random_tensors(torch.float32, (3, EXPERTS), shape, (EXPERTS, kept))
    check(c, weight, values, *stored_at(random_places(EXPERTS, kept, shape), shape, torch.uint16))


def test_coefficients_of_a_batch_and_addresses_that_are_not_aligned() -> None:
    """One sample's coefficients, expanded, and tensors that begin in the midst of others."""
    c, weight, values = random_tensors(torch.float32, (1, EXPERTS), SHAPE, (EXPERTS, KEPT))
    stored = stored_at(random_places(EXPERTS, KEPT, SHAPE), SHAPE, torch.uint16)
    check(c.expand(3, -1), weight, values, *stored)
    shifted = []
    for tensor in (weight, values, *stored):
        longer = tensor.new_zeros(tensor.numel() + 1)
        shifted.append(longer[1:].view(tensor.shape).copy_(tensor))
    check(c, *shifted)


@pytest.mark.parametrize("of_columns", COLUMNS)
def test_nothing_is_written_outside_of_a_weight(
    of_columns: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns and row ends of a damaged checkpoint: what lies within is merged as it is."""
    c, weight, values = random_tensors(torch.float32, (2, EXPERTS), SHAPE, (EXPERTS, KEPT))
    columns, row_ends = stored_at(random_places(EXPERTS, KEPT, SHAPE), SHAPE, of_columns)
    left = values.clone()
    wrong = [SHAPE[1], 2**16 - 1] if of_columns == torch.uint16 else [SHAPE[1], -1, -(2**31)]
    for number, column in enumerate(wrong):
        columns[:, number * 7] = torch.tensor(column).to(DEVICE, of_columns)
        left[:, number * 7] = 0
    row_ends[0, -1] = 2**31 - 1
    row_ends[1] = -5

    # The result lies in the midst of a longer tensor.
    margin = 2**17
    numel = len(c) * weight.numel()
    around = torch.full((margin + numel + margin,), 7.0, device=DEVICE)
    result = around[margin : margin + numel].view(len(c), *SHAPE)
    around_vectors = torch.full((margin + EXPERTS * weight.numel() + margin,), 7.0, device=DEVICE)
    stock = Tensor.new_empty

    def given(self: Tensor, *size: int, **options: Any) -> Tensor:
        if size == (EXPERTS, *SHAPE):
            return around_vectors[margin : margin + EXPERTS * weight.numel()].view(size)
        return result if size == result.shape else stock(self, *size, **options)

    monkeypatch.setattr(Tensor, "new_empty", given)
    merged = wemoe_kernel.merge(c, weight, values, columns, row_ends)
    assert merged.data_ptr() == result.data_ptr()
    expected = by_loop(
        c, weight, left, columns.int().clamp(0, SHAPE[1] - 1), row_ends.clamp(0, KEPT)
    )
    torch.testing.assert_close(merged.double().cpu(), expected, atol=1e-5, rtol=1e-5)
    columns_within = columns.int().clamp(0, SHAPE[1] - 1)
    vectors = wemoe_kernel.spread(weight, values, columns, row_ends)
    each_alone = torch.eye(EXPERTS)
    nothing = torch.zeros(SHAPE)
    # An element that is left out writes nothing; in the loop it adds 0 to what another has written.
    spread = by_loop(each_alone, nothing, left, columns_within, row_ends.clamp(0, KEPT))
    assert torch.equal(vectors.double().cpu(), spread)
    torch.manual_seed(0)
    row_ends.random_(-2 * KEPT, 2 * KEPT)
    wemoe_kernel.merge(c, weight, values, columns, row_ends)
    wemoe_kernel.spread(weight, values, columns, row_ends)
    assert (around[:margin] == 7).all() and (around[margin + numel :] == 7).all()
    assert (around_vectors[:margin] == 7).all() and (around_vectors[-margin:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_finds_that_they_agree(dtype: torch.dtype) -> None:
    with torch.device("meta"):  # as a program may have made another device the default
        assert wemoe_kernel._tried(torch.device(DEVICE), dtype)


def test_the_trial_warns_where_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)

    def base_alone(c: Tensor, weight: Tensor, *_stored: Tensor) -> Tensor:
        return weight.expand(len(c), -1, -1)

    def missing(*_arguments: Tensor) -> Tensor:
        raise ZeroDivisionError

    def too_large(*_arguments: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(wemoe_kernel, "merge", base_alone)
    with pytest.warns(UserWarning, match="Triton gives other results than PyTorch on c"):
        assert not wemoe_kernel._tried(device, torch.float32)
    monkeypatch.undo()

    def zeros(weight: Tensor, values: Tensor, *_stored: Tensor) -> Tensor:
        return values.new_zeros(len(values), *weight.shape)

    monkeypatch.setattr(wemoe_kernel, "spread", zeros)
    with pytest.warns(UserWarning, match="Triton gives other results than PyTorch on c"):
        assert not wemoe_kernel._tried(device, torch.float32)
    monkeypatch.setattr(wemoe_kernel, "merge", missing)
    with pytest.warns(UserWarning, match=r"Triton fails \(ZeroDivisionError"):
        assert not wemoe_kernel._tried(device, torch.float32)
    monkeypatch.setattr(wemoe_kernel, "merge", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        wemoe_kernel._tried(device, torch.float32)


@pytest.fixture(params=[2**20, SHAPE[0] * SHAPE[1] * 2], ids=["one tile", "two samples"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are always merged, in tiles of a size, and a CPU has the kernel as a GPU has it."""
    rule = wemoe_tiles.Rule(merging=1, sparse=0, tile=request.param)
    monkeypatch.setitem(wemoe_tiles.RULES, DEVICE, rule)
    monkeypatch.setattr(wemoe_kernel, "_KIND", DEVICE)
    monkeypatch.setattr(wemoe_kernel, "_works", lambda device, dtype: True)


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_map_and_its_gradients(
    dtype: torch.dtype, samples: int, tile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = SHAPE, (EXPERTS, KEPT), (samples, EXPERTS), (samples, 4, SHAPE[1])
    weight, values, c, x = random_tensors(dtype, *shapes)
    base = nn.Linear(*SHAPE[::-1], bias=False, device=DEVICE, dtype=dtype)
    base.weight.data.copy_(weight)
    base.requires_grad_(False)
    module = EnsembledLinear(base, EXPERTS, KEPT, "group", Current())
    module.values.copy_(values)
    stored = stored_at(random_places(EXPERTS, KEPT, SHAPE), SHAPE, torch.uint16)
    module.columns.copy_(stored[0])
    module.row_ends.copy_(stored[1])
    calls = []

    def counted(module: Any, name: str) -> None:
        compute = getattr(wemoe_kernel, name)

        def call(*arguments: Tensor) -> Tensor:
            calls.append(name)
            return compute(*arguments)

        monkeypatch.setattr(module, name, call)

    counted(wemoe_products, "merge")
    counted(wemoe_tiles, "spread")
    weights = by_loop(c, weight, values, *stored)
    x.requires_grad_()
    c.requires_grad_()
    y = module._by_sample(x, c)
    expected = x.detach().double().cpu() @ weights.mT
    way = {"merge"} if samples <= 2 else {"spread"}
    assert set(calls) == way and (y.double().cpu() - expected).norm() < 0.01 * expected.norm()
    calls.clear()
    y.sum().backward()
    of_x = torch.ones_like(expected) @ weights
    assert calls and (x.grad.double().cpu() - of_x).norm() < 0.01 * of_x.norm()
    calls.clear()
    with torch.no_grad():
        merged = module.merged(c).double().cpu()
    assert set(calls) == way and (merged - weights).norm() < 0.01 * weights.norm()
