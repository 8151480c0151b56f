"""The whole update of a module for a few tokens, as two Triton kernels: for decoding, where a GPU
waits for one small kernel after the other.

`_project` multiplies a token with the router's rows and with A, some rows in each program, so that
even one token occupies a GPU. `_add` chooses and weighs, and adds the products with B of the chosen
experts alone, some columns of the output in each program. Products are summed in float32. Router
and experts are read in any dtype, so that compiled code has no casts, and a router's rows are not
split.
"""

# mypy: disallow-untyped-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_routing.kernel import (
    chosen_experts,
    padded_experts,
    power_of_2,
    scaling_of,
    softmax_of_kept,
)
from peft_routing.kernel_start import StartedFew, start

# The fastest that were tried on an H200 and an H100, for 8, 64 and 256 experts of rank 16 in
# a module of width 4096.
_ROWS = 2  # of one program of `_project`
_READ = 2048  # at most so many of their columns are read at a time
_WARPS = 8  # which read them
_COLUMNS = 32  # of one program of `_add`, in one warp
_ROWS_AT_ONCE = 64  # of B, of so many columns: a warp has no room for more


def added(
    result: Tensor,
    hidden: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scalings: Tensor | None,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
    scaling: float,
    *,
    few: StartedFew | None = None,
    project: Any = None,
    add: Any = None,
) -> Tensor:
    """The result (…, out) of a base layer and the update for its input (…, in).

    weight: the router's rows (experts, in); A: (experts · rank, in); B: (experts · rank, out);
    scaling: that of all experts; scalings: (experts,) in float32, by which it is multiplied where
    they differ. The coefficients are the softmax over a token's k largest scores, or their absolute
    values, over the temperature. `few` are the kernels as they were compiled for calls like this
    one; `project` and `add` are the kernels as PyTorch traces them.
    """
    hidden = hidden.contiguous()
    result = result.contiguous()
    weight = weight.contiguous()
    a = a.contiguous()
    b = b.contiguous()
    # Compiled in; those of an input might vary for a compiler.
    experts, width = weight.shape
    ranks, columns = b.shape
    rank = ranks // experts
    tokens = hidden.numel() // width
    products = hidden.new_empty(tokens, experts + ranks, dtype=torch.float32)
    # The first programs have the router's rows, all others those of A.
    of_router = -(-experts // _ROWS)
    of_experts = -(-ranks // _ROWS)
    launch = few.project.start if few else start
    launch(
        project or _project,
        (of_router + of_experts, tokens, 1),
        (hidden, weight, a, products),
        (),
        (width, experts, ranks, of_router, _ROWS, min(_READ, power_of_2(width))),
        num_warps=_WARPS,
    )
    output = torch.empty_like(result)
    launch = few.add.start if few else start
    launch(
        add or _add,
        (-(-columns // _COLUMNS), tokens, 1),
        (result, products, b, products if scalings is None else scalings, output),
        (temperature, scaling),
        (
            min(k, experts),
            scalings is not None,
            columns,
            absolute,
            is_low_rank,
            experts,
            rank,
            padded_experts(experts),
            power_of_2(rank),
            experts_at_once(k, rank),
            _COLUMNS,
        ),
        num_warps=warps_of_add(rank, is_low_rank),
    )
    return output


def experts_at_once(k: int, rank: int) -> int:
    """The number of chosen experts, a power of 2, whose rows `_add` reads at once."""
    return max(1, min(power_of_2(k), _ROWS_AT_ONCE // power_of_2(rank)))


def warps_of_add(rank: int, is_low_rank: bool) -> int:
    """The number of warps of `_add`. Low-rank mixing reads z of all experts at once, and every way
    reads a whole expert's rows: for many numbers one warp has no room.
    """
    return 4 if is_low_rank or rank > 32 else 1


@triton.jit
def _products(token, rows, number, is_row, width: tl.constexpr, block: tl.constexpr,
              columns: tl.constexpr):  # fmt: skip
    """The products (block,) of one token with some rows, summed in float32."""
    total = tl.zeros((block, columns), tl.float32)
    for first_column in range(0, width, columns):
        column = first_column + tl.arange(0, columns)
        is_column = column < width
        state = tl.load(token + column, mask=is_column, other=0.0).to(tl.float32)
        row = tl.load(
            rows + number[:, None] * width + column[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        ).to(tl.float32)
        total += row * state[None, :]
    return tl.sum(total, 1)


@triton.jit
def _project(
    hidden, weight, a, products, width: tl.constexpr, experts: tl.constexpr, ranks: tl.constexpr,
    of_router: tl.constexpr, block: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """The products of one token with `block` rows: the router's in the first programs, then A's."""
    program = tl.program_id(0)
    number_of_token = tl.program_id(1).to(tl.int64)
    token = hidden + number_of_token * width
    written = products + number_of_token * (experts + ranks)
    if program < of_router:
        number = (program * block + tl.arange(0, block)).to(tl.int64)
        is_row = number < experts
        score = _products(token, weight, number, is_row, width, block, columns)
        tl.store(written + number, score, mask=is_row)
    else:
        number = ((program - of_router) * block + tl.arange(0, block)).to(tl.int64)
        is_row = number < ranks
        value = _products(token, a, number, is_row, width, block, columns)
        tl.store(written + experts + number, value, mask=is_row)


@triton.jit(do_not_specialize=["temperature", "scaling"])
def _add(
    results, products, b, scalings, outputs, temperature, scaling, k: tl.constexpr,
    differ: tl.constexpr, width: tl.constexpr, absolute: tl.constexpr, is_low_rank: tl.constexpr,
    experts: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr, padded_rank: tl.constexpr,
    at_once: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """`columns` numbers of one token's output."""
    token = tl.program_id(1).to(tl.int64)
    expert = tl.arange(0, padded)
    is_expert = expert < experts
    component = tl.arange(0, padded_rank)
    is_component = component < rank
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    is_column = column < width
    at = token * width + column
    result = tl.load(results + at, mask=is_column, other=0.0).to(tl.float32)

    of_token = products + token * (experts * (1 + rank))
    score = tl.load(of_token + expert, mask=is_expert, other=0.0)
    if absolute:
        score = tl.abs(score)
    # PyTorch's compiler hands a number over in float64, in which all that follows would be.
    score = score / tl.cast(temperature, tl.float32)
    score = tl.where(is_expert, score, -float("inf"))[None, :]
    coefficients = softmax_of_kept(score, chosen_experts(score, expert, k, experts))
    coefficient = tl.sum(coefficients, 0)

    z = of_token + experts
    mixed = tl.zeros((padded_rank,), tl.float32)
    if is_low_rank:
        values = tl.load(
            z + expert[:, None] * rank + component[None, :],
            mask=is_expert[:, None] & is_component[None, :],
            other=0.0,
        )
        mixed = tl.sum(values * coefficient[:, None], 0)
    # The chosen ones have the largest coefficients; those of all others are 0. They are at most k.
    # NaN, which no comparison finds, is to be seen in the output.
    total = tl.zeros((columns,), tl.float32) + 0.0 * tl.sum(coefficient, 0)
    left = tl.where(coefficient == coefficient, coefficient, 0.0)
    # What some of them need is read at once: a GPU waits for its memory longer than for all else.
    slot = tl.arange(0, at_once)
    for first in tl.static_range(0, k, at_once):
        chosen = tl.zeros((at_once,), tl.int32)
        factor = tl.zeros((at_once,), tl.float32)
        for number in tl.static_range(at_once):
            if first + number < k:
                best = tl.argmax(left, 0)
                chosen = tl.where(slot == number, best, chosen)
                factor = tl.where(slot == number, tl.max(left, 0), factor)
                left = tl.where(expert == best, -1.0, left)
        factor *= scaling_of(scalings, chosen, scaling, differ, experts)
        # Where a slot is left over, an expert is not read for nothing.
        is_row = (first + slot < k)[:, None] & is_component[None, :]
        row = chosen[:, None] * rank + component[None, :]
        if is_low_rank:
            value = mixed[None, :] * factor[:, None]
        else:
            value = tl.load(z + row, mask=is_row, other=0.0) * factor[:, None]
        value = tl.reshape(value, (at_once * padded_rank,))
        row = tl.reshape(row, (at_once * padded_rank,)).to(tl.int64)
        is_row = tl.reshape(is_row, (at_once * padded_rank,))
        of_rows = tl.load(
            b + row[:, None] * width + column[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(value[:, None] * of_rows, 0)
    tl.store(outputs + at, (result + total).to(outputs.dtype.element_ty), mask=is_column)
