"""What lies between the two products of a routed layer, as Triton kernels: for GPUs, where time
goes with the number of launches.

`_weigh` takes hidden states and z, computes each token's scores, chooses, and weighs z. In bfloat16
a router's row is split into a high and a low part, whose sum has 16 bits of the 24 of float32, and
products are summed in float32. (A row rounded to bfloat16 has 8, and chooses other experts where
scores nearly tie.) In float32, which is what tests compare, the rows are taken as they are.
`_unweigh` is its backward pass. `kernel_op` makes one operation of the two, which autograd and
`torch.compile` know; `fused` has the same in PyTorch's operations.
"""

# mypy: disallow-untyped-defs=False

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_routing.kernel_start import Started, start

_TOKENS = 16  # of one program; the least that Triton's product takes
_LEAST_COLUMNS = 16  # as well
# At most so many numbers of one token's z, padded, which lie in a program's registers at once.
MOST_NUMBERS = 8192


def split(rows: Tensor) -> Tensor:
    """Rows (experts, in) as (2, experts, in) in bfloat16: their high parts, and what these lack."""
    high = rows.to(torch.bfloat16)
    low = (rows - high).to(torch.bfloat16)
    return torch.stack([high, low])


def parts_for(hidden: Tensor, weight: Tensor) -> Tensor:
    """A router's rows (experts, in) in the parts (parts, experts, in) whose products with the
    hidden states are added up.
    """
    return split(weight) if hidden.dtype == torch.bfloat16 else weight[None]


def fits(experts: int, rank: int) -> bool:
    """Whether the kernels take so many experts of one rank."""
    numbers = padded_experts(experts) * power_of_2(rank)
    return numbers <= MOST_NUMBERS


def weigh(
    hidden: Tensor,
    rows: Tensor,
    z: Tensor,
    scalings: Tensor | None,
    *,
    scaling: float,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
    scores: Tensor | None = None,
    kernel: Any = None,
    started: Started | None = None,
) -> Tensor:
    """z (tokens, experts · rank) times each token's coefficients and each expert's scaling.

    The coefficients are the softmax over the k largest scores, which are the products of the
    hidden states (tokens, in) with a router's rows, as `parts_for` gives them, or their absolute
    values, over the temperature. scaling: that of all experts; scalings: (experts,) in float32,
    by which it is multiplied where they differ. The products are written to `scores` (tokens,
    experts), in float32, if that is given. `kernel` is `_weigh` as PyTorch traces it; `started` is
    the kernel as it was compiled for calls like this one.
    """
    # Compiled in, where a compiler might take them for sizes that vary.
    parts = int(rows.shape[0])
    experts = int(rows.shape[1])
    rank = int(z.shape[1]) // experts
    width = rows.shape[2]
    tokens = z.shape[0]
    padded = padded_experts(experts)
    weighed = torch.empty_like(z)
    # Rows that lie one after the other: what Triton compiles depends on how far they lie apart.
    hidden = hidden.contiguous()
    columns, stages = columns_and_stages(padded, parts, hidden.element_size(), hidden.device)
    launch = started.start if started else start
    launch(
        kernel or _weigh,
        (-(-tokens // _TOKENS), 1, 1),
        (
            hidden,
            rows,
            z,
            weighed if scalings is None else scalings,
            weighed,
            weighed if scores is None else scores,
        ),
        (tokens, width, k, temperature, scaling),
        (
            scalings is not None,
            absolute,
            is_low_rank,
            scores is not None,
            parts,
            experts,
            rank,
            padded,
            power_of_2(rank),
            _TOKENS,
            columns,
        ),
        num_warps=8 if padded > 64 else 4,
        num_stages=stages,
    )
    return weighed


@cache
def columns_and_stages(
    padded: int, parts: int, element: int, device: torch.device
) -> tuple[int, int]:
    """How many columns of the router's rows and of the hidden states, whose numbers have `element`
    bytes, a program reads at a time, and the number of pipeline stages, all but one of which are
    read ahead.

    They are the fastest that were tried on an H200 for 8, 64 and 256 experts, and fewer where a GPU
    has less shared memory for what is read ahead.
    """
    if padded <= 16:
        columns = 128
    elif padded <= 256:
        columns = 64
    else:
        columns = 32
    stages = 5 if padded <= 64 else 3
    of_column = element * (parts * padded + _TOKENS)
    shared_memory = _shared_memory(device)
    while stages > 2 and (stages - 1) * columns * of_column > shared_memory:
        stages -= 1
    while columns > _LEAST_COLUMNS and columns * of_column > shared_memory:
        columns //= 2
    return columns, stages


def _shared_memory(device: torch.device) -> int:
    """The bytes of shared memory that a program can have; an H200's where nothing is known."""
    if device.type != "cuda":
        return 227 * 1024
    # A kibibyte of each program is the system's.
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024


def unweigh(
    gradient: Tensor,
    scores: Tensor,
    z: Tensor,
    scalings: Tensor | None,
    *,
    scaling: float,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
    is_estimated: bool,
    kernel: Any = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of z (tokens, experts · rank), and of the scores (tokens, experts) in float32,
    from the gradient (tokens, experts · rank) of what `weigh` gives.

    `scores` are those that it wrote. `is_estimated`: the one coefficient of k = 1 has the gradient
    of its expert's probability among all, as `straight_through` says. `kernel` is `_unweigh` as
    PyTorch traces it.
    """
    tokens = scores.shape[0]
    experts = int(scores.shape[1])  # compiled in, as the rank
    rank = int(z.shape[1]) // experts
    padded = padded_experts(experts)
    padded_rank = power_of_2(rank)
    of_z = torch.empty_like(z)
    of_scores = torch.empty_like(scores)
    start(
        kernel or _unweigh,
        (tokens, 1, 1),
        (gradient, scores, z, of_scores if scalings is None else scalings, of_z, of_scores),
        (k, temperature, scaling),
        (
            scalings is not None,
            absolute,
            is_low_rank,
            is_estimated,
            experts,
            rank,
            padded,
            padded_rank,
        ),
        num_warps=8 if padded * padded_rank > 2048 else 4,
    )
    return of_z, of_scores


def padded_experts(experts: int) -> int:
    """The number of experts that a kernel's tensors have room for."""
    return max(16, power_of_2(experts))  # 16 is the least that Triton's product takes


# Triton has this and a division, which kernels can call as well: from Python each takes 2 µs, a
# hundredth of a whole call.
def power_of_2(number: int) -> int:
    """The least power of 2 that is no less than a positive number."""
    return 1 << (number - 1).bit_length()


@triton.jit
def chosen_experts(score, expert, k, experts: tl.constexpr):
    """Which of the experts (tokens, padded) have one of a token's k largest scores."""
    # The largest is taken k times. Of equal ones the first is taken first. Where k is the number of
    # experts, all are taken at once, and those that only pad have scores of minus infinity.
    left = score
    is_kept = (score != score) | (k == experts)  # NaN is to be seen in the result
    for _ in range(k % experts):
        best = tl.argmax(left, 1)
        is_best = expert[None, :] == best[:, None]
        is_kept = is_kept | is_best
        left = tl.where(is_best, -float("inf"), left)
    return is_kept


@triton.jit
def softmax_of_kept(score, is_kept):
    """The softmax over those that are kept (tokens, padded), the largest among them."""
    exponential = tl.where(is_kept, tl.exp(score - tl.max(score, 1)[:, None]), 0.0)
    return exponential / tl.sum(exponential, 1)[:, None]


@triton.jit
def scaling_of(scalings, expert, scaling, differ: tl.constexpr, experts: tl.constexpr):
    """The scalings of some experts."""
    # As a temperature, it comes from PyTorch's compiler in float64.
    scaling = tl.cast(scaling, tl.float32) + tl.zeros(expert.shape, tl.float32)
    if differ:
        scaling *= tl.load(scalings + expert, mask=expert < experts, other=0.0)
    return scaling


# Numbers that differ from call to call are not compiled in.
@triton.jit(do_not_specialize=["tokens", "k", "temperature", "scaling"])
def _weigh(
    hidden, rows, z, scalings, weighed, scores, tokens, width, k, temperature, scaling,
    differ: tl.constexpr, absolute: tl.constexpr, is_low_rank: tl.constexpr,
    keeps_scores: tl.constexpr, parts: tl.constexpr, experts: tl.constexpr, rank: tl.constexpr,
    padded: tl.constexpr, padded_rank: tl.constexpr, block: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """`block` tokens, of which `columns` hidden numbers are read at a time."""
    first = tl.program_id(0).to(tl.int64) * block
    token = first + tl.arange(0, block)
    expert = tl.arange(0, padded)
    is_expert = expert < experts

    score = tl.zeros((block, padded), tl.float32)
    for first_column in range(0, width, columns):
        column = first_column + tl.arange(0, columns)
        is_column = column < width
        states = tl.load(
            hidden + token[:, None] * width + column[None, :],
            mask=(token < tokens)[:, None] & is_column[None, :],
            other=0.0,
        )
        of_rows = expert[None, :] * width + column[:, None]
        is_in_rows = is_expert[None, :] & is_column[:, None]
        high = tl.load(rows + of_rows, mask=is_in_rows, other=0.0)
        # "ieee" is for float32, which is not to be rounded to TensorFloat-32.
        score = tl.dot(states, high, score, input_precision="ieee")
        if parts == 2:
            low = tl.load(rows + experts * width + of_rows, mask=is_in_rows, other=0.0)
            score = tl.dot(states, low, score, input_precision="ieee")
    if keeps_scores:
        is_score = (token < tokens)[:, None] & is_expert[None, :]
        tl.store(scores + token[:, None] * experts + expert[None, :], score, mask=is_score)
    if absolute:
        score = tl.abs(score)
    # PyTorch's compiler hands a number over in float64, in which all that follows would be.
    score = score / tl.cast(temperature, tl.float32)
    score = tl.where(is_expert[None, :], score, -float("inf"))
    coefficient = softmax_of_kept(score, chosen_experts(score, expert, k, experts))

    # One token after the other, since the numbers of all would take more registers than there are.
    of_scaling = scaling_of(scalings, expert, scaling, differ, experts)
    component = tl.arange(0, padded_rank)
    of_token = expert[:, None] * rank + component[None, :]
    is_number = is_expert[:, None] & (component < rank)[None, :]
    number_of_token = tl.arange(0, block)
    for number in range(tl.minimum(block, tokens - first)):
        is_token = (number_of_token == number)[:, None]
        of_experts = tl.sum(tl.where(is_token, coefficient, 0.0), 0)
        at = (first + number) * experts * rank + of_token
        value = tl.load(z + at, mask=is_number, other=0.0).to(tl.float32)
        if is_low_rank:
            value = tl.sum(value * of_experts[:, None], 0)[None, :]
        value = value * (of_experts * of_scaling)[:, None]
        tl.store(weighed + at, value.to(weighed.dtype.element_ty), mask=is_number)


@triton.jit(do_not_specialize=["k", "temperature", "scaling"])
def _unweigh(
    gradient, scores, z, scalings, of_z, of_scores, k, temperature, scaling,
    differ: tl.constexpr, absolute: tl.constexpr, is_low_rank: tl.constexpr,
    is_estimated: tl.constexpr, experts: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr,
    padded_rank: tl.constexpr
):  # fmt: skip
    """One token, whose tensors are (1, padded), or (padded, padded_rank)."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, padded)
    is_expert = expert < experts
    temperature = tl.cast(temperature, tl.float32)  # as in `_weigh`
    product = tl.load(scores + token * experts + expert, mask=is_expert, other=0.0)
    magnitude = tl.abs(product) if absolute else product
    score = tl.where(is_expert, magnitude / temperature, -float("inf"))[None, :]
    coefficients = softmax_of_kept(score, chosen_experts(score, expert, k, experts))
    coefficient = tl.sum(coefficients, 0)

    of_scaling = scaling_of(scalings, expert, scaling, differ, experts)
    component = tl.arange(0, padded_rank)
    at = token * experts * rank + expert[:, None] * rank + component[None, :]
    is_number = is_expert[:, None] & (component < rank)[None, :]
    value = tl.load(z + at, mask=is_number, other=0.0).to(tl.float32)
    arriving = tl.load(gradient + at, mask=is_number, other=0.0).to(tl.float32)

    # y is c s z, or with low-rank mixing c s m, where m is the sum of c z over all experts.
    if is_low_rank:
        mixed = tl.sum(value * coefficient[:, None], 0)
        of_mixed = tl.sum(arriving * (coefficient * of_scaling)[:, None], 0)
        of_coefficient = of_scaling * tl.sum(arriving * mixed[None, :], 1)
        of_coefficient += tl.sum(value * of_mixed[None, :], 1)
        of_value = coefficient[:, None] * of_mixed[None, :]
    else:
        of_coefficient = of_scaling * tl.sum(arriving * value, 1)
        of_value = (coefficient * of_scaling)[:, None] * arriving
    tl.store(of_z + at, of_value.to(of_z.dtype.element_ty), mask=is_number)

    # The gradient of a softmax; of the chosen expert's probability among all, where that stands
    # for the one coefficient.
    mean = tl.sum(coefficient * of_coefficient, 0)
    if is_estimated:
        probability = tl.sum(softmax_of_kept(score, is_expert[None, :]), 0)
        of_chosen = tl.sum(coefficient * probability, 0)
        of_score = mean * of_chosen * (coefficient - probability)
    else:
        of_score = coefficient * (of_coefficient - mean)
    of_score = of_score / temperature
    if absolute:
        sign = tl.where(product > 0, 1.0, tl.where(product < 0, -1.0, 0.0))
        of_score = of_score * sign
    tl.store(of_scores + token * experts + expert, of_score, mask=is_expert)
