"""What lies between the two products of a routed layer, as one Triton kernel: for GPUs, where time
goes with the number of launches.

It takes bfloat16 hidden states and z, and computes each token's scores, chooses, and weighs z. A
router's row is split into a high and a low part of bfloat16, whose sum has 16 bits of the 24 of
float32, and products are summed in float32. (A row rounded to bfloat16 has 8, and chooses other
experts where scores nearly tie.) `fused` has the same in PyTorch's operations.
"""

# mypy: disallow-untyped-defs=False

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 16  # of one program; the least that Triton's product takes
# At most so many numbers of one token's z, padded, which lie in a program's registers at once.
MOST_NUMBERS = 8192


def split(rows: Tensor) -> Tensor:
    """Rows (experts, in) as (2, experts, in) in bfloat16: their high parts, and what these lack."""
    high = rows.to(torch.bfloat16)
    low = (rows - high.to(rows.dtype)).to(torch.bfloat16)
    return torch.stack([high, low])


def fits(experts: int, rank: int) -> bool:
    """Whether the kernel takes so many experts of one rank."""
    numbers = _padded(experts) * triton.next_power_of_2(rank)
    return numbers <= MOST_NUMBERS


def weigh(
    hidden: Tensor,
    rows: Tensor,
    z: Tensor,
    scalings: Tensor,
    *,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
) -> Tensor:
    """z (tokens, experts · rank) times each token's coefficients and each expert's scaling.

    The coefficients are the softmax over the k largest scores, which are the products of the
    hidden states (tokens, in) with a router's rows, as `split` gives them, or their absolute
    values, over the temperature. scalings: (experts,) in float32.
    """
    _, experts, width = rows.shape
    tokens = len(z)
    rank = z.shape[1] // experts
    padded = _padded(experts)
    weighed = torch.empty_like(z)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    is_wide = padded > 64
    launch = _weigh[(triton.cdiv(tokens, _TOKENS),)]
    # Triton starts a kernel on the current GPU.
    is_on_gpu = hidden.device.type == "cuda"
    with torch.cuda.device(hidden.device) if is_on_gpu else nullcontext():
        launch(
            hidden,
            rows,
            z,
            scalings,
            weighed,
            tokens,
            width,
            hidden.stride(0),
            k,
            temperature,
            absolute,
            is_low_rank,
            experts,
            rank,
            padded,
            triton.next_power_of_2(rank),
            _TOKENS,
            # The fastest that were tried on an H200: so many columns are read ahead of their use.
            columns=64 if padded > 16 else 128,
            num_warps=8 if is_wide else 4,
            num_stages=3 if is_wide else 5,
        )
    return weighed


def _padded(experts: int) -> int:
    return max(16, triton.next_power_of_2(experts))  # 16 is the least that Triton's product takes


# Numbers that differ from call to call are not compiled in.
@triton.jit(do_not_specialize=["tokens", "k", "temperature"])
def _weigh(
    hidden, rows, z, scalings, weighed, tokens, width, stride, k, temperature,
    absolute: tl.constexpr, is_low_rank: tl.constexpr, experts: tl.constexpr, rank: tl.constexpr,
    padded: tl.constexpr, padded_rank: tl.constexpr, block: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """`block` tokens, of which `columns` hidden numbers are read at a time."""
    first = tl.program_id(0).to(tl.int64) * block
    token = first + tl.arange(0, block)
    expert = tl.arange(0, padded)
    is_expert = expert < experts

    score = tl.zeros((block, padded), tl.float32)
    for start in range(0, width, columns):
        column = start + tl.arange(0, columns)
        is_column = column < width
        states = tl.load(
            hidden + token[:, None] * stride + column[None, :],
            mask=(token < tokens)[:, None] & is_column[None, :],
            other=0.0,
        )
        of_rows = expert[None, :] * width + column[:, None]
        is_in_rows = is_expert[None, :] & is_column[:, None]
        high = tl.load(rows + of_rows, mask=is_in_rows, other=0.0)
        low = tl.load(rows + experts * width + of_rows, mask=is_in_rows, other=0.0)
        score = tl.dot(states, high, score)
        score = tl.dot(states, low, score)
    if absolute:
        score = tl.abs(score)
    score = tl.where(is_expert[None, :], score / temperature, -float("inf"))

    # The largest is taken k times. Of equal ones the first is taken first.
    left = score
    is_kept = score != score  # none, but for NaN, which is to be seen in the result
    for _ in range(k):
        best = tl.argmax(left, 1)
        is_best = expert[None, :] == best[:, None]
        is_kept = is_kept | is_best
        left = tl.where(is_best, -float("inf"), left)
    coefficient = tl.where(is_kept, tl.exp(score - tl.max(score, 1)[:, None]), 0.0)
    coefficient = coefficient / tl.sum(coefficient, 1)[:, None]

    # One token after the other, since the numbers of all would take more registers than there are.
    scaling = tl.load(scalings + expert, mask=is_expert, other=0.0)
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
        value = value * (of_experts * scaling)[:, None]
        tl.store(weighed + at, value.to(weighed.dtype.element_ty), mask=is_number)
