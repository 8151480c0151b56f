"""Sparse task vectors added to a weight, or made dense, as one Triton kernel each, for GPUs.

PyTorch's operations go over all kept elements several times. A kernel does so once, in one launch.
Triton comes with torch's builds for GPUs; where it is missing, this file can be imported all the
same.
"""

# mypy: disallow-untyped-defs=False

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except Exception:  # an installation that is broken is no better than none
    triton = None

_KIND = "cuda"  # of devices, by torch's names
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # sums are float32, too narrow for float64
_COLUMNS = (torch.uint16, torch.int32)
_BLOCK = 256  # elements that a program reads at a time
# With more samples a product with dense vectors is faster: on an H100 the kernel took 26 µs for the
# weights of one sample, 768 x 3072 in float32 with a tenth of eight vectors, and 42 for each of 16.
# The product with all eight vectors took 45 for one, and 134 for 16 together.
_MOST_SAMPLES = 2
# A product and a sum are rounded one after the other in every version of Triton, whose defaults
# differ.
_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
_DENSE = (Tensor, nn.Parameter)  # other classes of tensors may have no memory of their own

# Of a trial: a row is longer than a block, and experts keep more than a row.
_ROWS, _WIDTH, _KEPT = 5, 300, 400
_EXPERTS = 3
_SAMPLES = 2


if triton is not None:
    # Triton would compile a kernel again for other sizes and alignments of addresses. They are
    # compiled for none in particular, so that after the trial there is nothing left to compile.
    _GENERAL = ("values", "columns", "row_ends", "result", "rows", "width", "kept")
    _OF_MERGING = ("coefficients", "weight", "samples", "experts", *_GENERAL)

    @triton.jit
    def _stretch(row_ends, row, kept):
        """Where a row's elements begin among those of an expert, and where they end."""
        # The row ends and columns of a damaged checkpoint can be any numbers. What lies outside of
        # the weight is left out: an error would have to be waited for.
        start = tl.maximum(tl.load(row_ends + row - 1, mask=row > 0, other=0), 0)
        end = tl.minimum(tl.load(row_ends + row), kept)
        return start, end

    @triton.jit
    def _elements(values, columns, at, end, width):
        """Some of an expert's elements: their values, columns, and which of them there are."""
        column = tl.load(columns + at, mask=at < end, other=0).to(tl.int32)
        value = tl.load(values + at, mask=at < end, other=0.0)
        return value, column, (at < end) & (column >= 0) & (column < width)

    @triton.jit(do_not_specialize=_OF_MERGING)
    def _merge(
        coefficients, weight, values, columns, row_ends, result, samples, rows, width, experts,
        kept, block: tl.constexpr
    ):  # fmt: skip
        """Makes one row of one sample's weight."""
        # Programs that follow each other make the same row for one sample after the other, so that
        # its elements are still in a cache.
        sample = tl.program_id(0) % samples
        row = tl.program_id(0) // samples
        lanes = tl.arange(0, block)
        base = weight + row.to(tl.int64) * width
        total = result + (sample.to(tl.int64) * rows + row) * width
        for first in range(0, width, block):
            at = first + lanes
            inside = at < width
            tl.store(total + at, tl.load(base + at, mask=inside).to(tl.float32), mask=inside)

        coefficients += sample * experts
        for _ in range(experts):
            # One expert has a column once at most in a row, and each of its columns is added to by
            # one thread. Other threads wrote there before, the base's row or the last expert's
            # elements: those writes have to be over. As experts are added in their order, the
            # result is the same in every run.
            tl.debug_barrier()
            coefficient = tl.load(coefficients).to(tl.float32)
            start, end = _stretch(row_ends, row, kept)
            for first in range(start, end, block):
                value, column, inside = _elements(values, columns, first + lanes, end, width)
                sum_so_far = tl.load(total + column, mask=inside, other=0.0)
                added = coefficient * value.to(tl.float32)
                tl.store(total + column, sum_so_far + added, mask=inside)
            coefficients += 1
            row_ends += rows
            columns += kept
            values += kept

    @triton.jit(do_not_specialize=_GENERAL)
    def _spread(
        values, columns, row_ends, result, rows, width, kept, block: tl.constexpr
    ):  # fmt: skip
        """Makes one row of one expert's dense vector."""
        row = tl.program_id(0) % rows
        expert = (tl.program_id(0) // rows).to(tl.int64)
        lanes = tl.arange(0, block)
        vector = result + (expert * rows + row) * width
        nothing = tl.zeros((block,), result.dtype.element_ty)
        for first in range(0, width, block):
            tl.store(vector + first + lanes, nothing, mask=first + lanes < width)
        # Other threads wrote zeros there: those writes have to be over.
        tl.debug_barrier()
        start, end = _stretch(row_ends + expert * rows, row, kept)
        values += expert * kept
        columns += expert * kept
        for first in range(start, end, block):
            value, column, inside = _elements(values, columns, first + lanes, end, width)
            tl.store(vector + column, value, mask=inside)


def can_merge(c: Tensor, weight: Tensor, stored: Sequence[Tensor]) -> bool:
    """Whether `merge` takes these coefficients (samples, experts), weight and sparse vectors, and
    is the fastest way for them.
    """
    if not 0 < len(c) <= _MOST_SAMPLES or not can_spread(weight, stored):
        return False
    if torch.is_grad_enabled() and (c.requires_grad or weight.requires_grad):
        return False
    is_alike = c.dtype == weight.dtype and c.device == weight.device
    return is_alike and type(c) in _DENSE and weight.is_contiguous()


def can_spread(weight: Tensor, stored: Sequence[Tensor]) -> bool:
    """Whether `spread` takes sparse vectors of this weight. Their device is tried once."""
    # In compiled code PyTorch's compiler joins the operations. A kernel leaves no trace, and knows
    # nothing of gradients, vmap and its like.
    if torch.compiler.is_compiling() or triton is None or weight.device.type != _KIND:
        return False
    is_transformed = maybe_current_level() is not None or forward_ad._current_level >= 0
    if torch.jit.is_tracing() or is_transformed:
        return False
    values, columns, row_ends = stored
    if torch.is_grad_enabled() and values.requires_grad:
        return False
    if weight.dtype not in _DTYPES or values.dtype != weight.dtype:
        return False
    if columns.dtype not in _COLUMNS or row_ends.dtype != torch.int32:
        return False
    for tensor in (values, columns, row_ends):
        if type(tensor) not in _DENSE or tensor.device != weight.device:
            return False
        if not tensor.is_contiguous():
            return False
    if type(weight) not in _DENSE or 0 in (len(values), weight.numel()):
        return False  # a kernel cannot be started for nothing
    return _works(weight.device, weight.dtype)


# What Triton compiled, by kernel, device, and the dtypes of weights and columns.
_compiled: dict[tuple[str, torch.device, torch.dtype, torch.dtype], Any] = {}


def merge(c: Tensor, weight: Tensor, values: Tensor, columns: Tensor, row_ends: Tensor) -> Tensor:
    """The weights (samples, rows, columns) of coefficients (samples, experts), in float32.

    Elements of a damaged checkpoint that lie outside of the weight are left out.
    """
    samples, experts = c.shape
    rows, width = weight.shape
    result = weight.new_empty(samples, rows, width, dtype=torch.float32)
    # The coefficients of a batch may be those of one sample, expanded.
    tensors = (c.contiguous(), weight, values, columns, row_ends, result)
    numbers = (samples, rows, width, experts, values.shape[1])
    _start(_merge, samples * rows, tensors, numbers, columns.dtype)
    return result


def spread(weight: Tensor, values: Tensor, columns: Tensor, row_ends: Tensor) -> Tensor:
    """Sparse vectors of a weight as dense ones (experts, rows, columns), in their dtype.

    Elements of a damaged checkpoint that lie outside of the weight are left out.
    """
    experts, kept = values.shape
    rows, width = weight.shape
    result = values.new_empty(experts, rows, width)
    tensors = (values, columns, row_ends, result)
    _start(_spread, experts * rows, tensors, (rows, width, kept), columns.dtype)
    return result


def _start(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    of_columns: torch.dtype,
) -> None:
    """Starts so many programs of a kernel. Its first tensor has the dtype of weights."""
    first, *_ = tensors
    grid = (programs, 1, 1)
    key = (kernel.__name__, first.device, first.dtype, of_columns)
    compiled = _compiled.get(key)
    with _on(first.device):
        if compiled is None:
            _compiled[key] = kernel[grid](*tensors, *numbers, _BLOCK, **_OPTIONS)
        else:
            # To find the compiled kernel takes Triton's Python about as long as to start it.
            addresses = [tensor.data_ptr() for tensor in tensors]
            compiled[grid](*addresses, *numbers, _BLOCK)


def _on(device: torch.device) -> Any:
    """A context in which kernels start on a device; Triton starts them on the current GPU."""
    # To ask which GPU is the current one takes a fraction of what making it so does. Triton's
    # interpreter, in tests, is on a CPU.
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


_known: dict[tuple[torch.device, torch.dtype], bool] = {}


def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute on a device what PyTorch's operations do, but for rounding.

    It is tried once. A version of Triton that fails or gives something else makes a warning, and is
    not used.
    """
    known = _known.get((device, dtype))
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return False  # a CUDA graph, in which nothing can be tried
        try:
            known = _tried(device, dtype)
        except torch.OutOfMemoryError:
            return False  # for now
        _known[device, dtype] = known
    return known


def _tried(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        agree = all(_is_near(device, dtype, of_columns) for of_columns in _COLUMNS)
        problem = "gives other results than PyTorch"
    except torch.OutOfMemoryError:
        raise  # it says nothing of Triton
    except Exception as error:  # whatever a compiler may raise
        agree = False
        problem = f"fails ({type(error).__name__}: {error})"
    if not agree:
        warnings.warn(
            f"Triton {problem} on {device} in {dtype}, so sparse task vectors take longer there",
            stacklevel=2,
        )
    return agree


def _is_near(device: torch.device, dtype: torch.dtype, of_columns: torch.dtype) -> bool:
    """Whether the kernels give what PyTorch gives in float64 but for rounding, with random vectors
    and columns of a dtype.
    """
    generator = torch.Generator().manual_seed(0)
    c = _random((_SAMPLES, _EXPERTS), generator).to(dtype)
    weight = _random((_ROWS, _WIDTH), generator).to(dtype)
    values = _random((_EXPERTS, _KEPT), generator).to(dtype)
    # Places are random but for one expert that has a whole row, and one that has nothing of it.
    scores = _random((_EXPERTS, _ROWS, _WIDTH), generator)
    scores[0, 1] += 100
    scores[1, 1] -= 100
    places = scores.flatten(1).topk(_KEPT).indices.sort().values
    counts = torch.zeros(_EXPERTS, _ROWS, dtype=torch.int32, device="cpu")
    counts.scatter_add_(1, places // _WIDTH, torch.ones_like(places, dtype=torch.int32))
    row_ends = counts.cumsum(1, dtype=torch.int32)
    columns = (places % _WIDTH).to(of_columns)

    vectors = torch.zeros(_EXPERTS, _ROWS * _WIDTH, dtype=torch.float64, device="cpu")
    vectors.scatter_(1, places, values.double())
    vectors = vectors.view(_EXPERTS, _ROWS, _WIDTH)
    expected = weight.double() + (c.double()[:, :, None, None] * vectors).sum(1)

    tensors = [tensor.to(device) for tensor in (c, weight, values, columns, row_ends)]
    for _ in range(2):  # the second time without Triton's own search for it
        merged = merge(*tensors).to("cpu", torch.float64)
        if not torch.allclose(merged, expected, rtol=1e-5, atol=1e-5):
            return False
        if not torch.equal(spread(*tensors[1:]).to("cpu", torch.float64), vectors):
            return False
    return True


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers in float32 on the CPU, whatever a program has made the default of either."""
    return torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)
