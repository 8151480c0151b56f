"""The update of a module's experts, three ways: the same result at different costs.

All take x (…, in), all experts' A below each other (R, in) and B transposed the same way (R, out),
so that an expert's factors are contiguous, R being the sum of ranks. `weigh` puts the coefficients
on what lies between A and B. No tensor of (tokens, experts, out) is made, and what is kept for a
backward pass grows with ranks, not with in or out, but for the copies of `gathered`, which is not
chosen where gradients are wanted.

`dense`    every token with every expert: two products as of one LoRA of rank R. Any ranks.
`gathered` copies the factors of each token's experts: few tokens, as in decoding.
`grouped`  copies each token to its experts: many tokens that choose few of many experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Mixing = Literal["full", "low_rank"]
Way = Literal["dense", "gathered", "grouped"]
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
# Milliseconds per unit of `work`, as `python benchmarks/routed_lora_rule.py` found them for one
# thread of a CPU.
COSTS: dict[Way, tuple[float, ...]] = {
    "dense": (0.029, 0.19, 0.016),
    "gathered": (0.12, 0.8),
    "grouped": (0.14, 3.2, 0.21, 1.1, 0.031),
}
HAS_GROUPED_MM = hasattr(functional, "grouped_mm")  # torch 2.5, our oldest, has none


def full(z: Tensor, coefficients: Tensor, scaled: Tensor) -> Tensor:
    """z_i (…, experts, rank) times c_i s_i, for the sum of c_i s_i B_i A_i x."""
    return z * scaled.to(z.dtype)[..., None]


def low_rank(z: Tensor, coefficients: Tensor, scaled: Tensor) -> Tensor:
    """The sum of c_j z_j for every expert, times c_i s_i, so that A and B are mixed apart.

    With it the update is (sum of c_i s_i B_i) (sum of c_j A_j) x.
    """
    mixed = (z * coefficients.to(z.dtype)[..., None]).sum(dim=-2, keepdim=True)
    return mixed * scaled.to(z.dtype)[..., None]


def dense(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    coefficients: Tensor,
    scaled: Tensor,
    weigh: Weigh,
) -> Tensor:
    """The update (…, out) by all experts, for every token."""
    count = scaled.shape[-1]
    z = functional.linear(x, a).view(*x.shape[:-1], count, a.shape[0] // count)
    return weigh(z, coefficients, scaled).flatten(-2) @ b


def dense_of_mixed_ranks(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaled: Tensor,
    owners: Tensor,
) -> Tensor:
    """The update (…, out) of `full` mixing, where expert `owners[i]` has row i of A and B."""
    z = functional.linear(x, a)
    return (z * scaled.to(z.dtype)[..., owners]) @ b


def gathered(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    coefficients: Tensor,
    scaled: Tensor,
    weigh: Weigh,
    k: int,
) -> Tensor:
    """The update (…, out), where at most k coefficients of a token are not 0."""
    # For few tokens reading weights is what takes time: only the rows of the chosen experts' A and
    # B are read, once per token, and each token has one small product with its own copy.
    rank = len(a) // scaled.shape[-1]
    coefficients, scaled, chosen = _chosen(x, coefficients, scaled, k)
    rows = chosen[..., None] * rank + torch.arange(rank, device=x.device)
    rows = rows.flatten(1)  # (tokens, k * rank)
    tokens = len(rows)
    a = a.index_select(0, rows.flatten()).unflatten(0, (tokens, k * rank))
    b = b.index_select(0, rows.flatten()).unflatten(0, (tokens, k * rank))
    z = (a @ x.reshape(tokens, x.shape[-1], 1)).view(tokens, k, rank)
    z = weigh(z, coefficients, scaled).reshape(tokens, 1, k * rank)
    return (z @ b).view(*x.shape[:-1], b.shape[-1])


def grouped(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    coefficients: Tensor,
    scaled: Tensor,
    weigh: Weigh,
    k: int,
) -> Tensor:
    """The update (…, out), where at most k coefficients of a token are not 0.

    `can_be_grouped` says what it takes.
    """
    count = scaled.shape[-1]
    coefficients, scaled, chosen = _chosen(x, coefficients, scaled, k)
    # Pairs of token and expert, sorted by expert, so that those of an expert are one stretch of
    # rows, and one product for all stretches multiplies each with its expert's factors.
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(count, device=x.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    tokens = order // k
    a = a.unflatten(0, (count, -1))
    b = b.unflatten(0, (count, -1))
    z = functional.grouped_mm(x.reshape(-1, x.shape[-1]).index_select(0, tokens), a.mT, offs=ends)
    # Between the products the pairs lie by token again, since low-rank mixing adds up over the
    # experts of a token.
    z = z.index_select(0, order.argsort()).view(-1, k, a.shape[1])  # (tokens, k, rank)
    z = weigh(z, coefficients, scaled).flatten(0, 1).index_select(0, order)
    update = functional.grouped_mm(z, b, offs=ends)
    return _PerToken.apply(update, tokens, len(chosen)).view(*x.shape[:-1], b.shape[-1])


class _PerToken(torch.autograd.Function):
    """The sum of each token's rows (pairs, out), as by index_add.

    index_add itself would keep all rows for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, update: Tensor, tokens: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(tokens)
        return update.new_zeros(count, update.shape[-1]).index_add_(0, tokens, update)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def cheapest(x: Tensor, a: Tensor, b: Tensor, experts: int, k: int, *, gradients: bool) -> Way:
    """The way that costs least by the estimate of `work`, for experts of one rank.

    With `gradients` it is not `gathered`.
    """
    # What is cheapest depends on the numbers of tokens and experts and on widths, by orders of
    # magnitude, and an estimate of a few multiplications is cheap enough for every call.
    tokens = x.shape[:-1].numel()
    rank = a.shape[0] // experts
    of_each_way = work(tokens, experts, rank, k, a.shape[1] + b.shape[1])
    of_dense = _cost("dense", of_each_way[0])
    if of_dense <= COSTS["gathered"][0]:  # few experts: a call of another way alone takes longer
        return "dense"
    of_gathered = float("inf") if gradients else _cost("gathered", of_each_way[1])
    of_grouped = _cost("grouped", of_each_way[2])
    if of_grouped < min(of_dense, of_gathered) and can_be_grouped(x, a, b, rank):
        return "grouped"
    return "gathered" if of_gathered < of_dense else "dense"


def work(tokens: int, experts: int, rank: int, k: int, width: int) -> tuple[Sequence[float], ...]:
    """What `dense`, `gathered` and `grouped` take, in units that `COSTS` has the price of.

    These are a call, thousands of experts, and millions of numbers read, copied or multiplied;
    `width` is in + out.
    """
    read = width * 1e-6 * rank
    of_dense = (1, read * experts, read * experts * tokens)
    of_gathered = (1, read * tokens * k)
    of_grouped = (
        1,
        experts / 1e3,
        read * min(experts, tokens * k),
        width * 1e-6 * tokens * k,
        read * tokens * k,
    )
    return of_dense, of_gathered, of_grouped


def _cost(way: Way, units: Sequence[float]) -> float:
    return sum([cost * unit for cost, unit in zip(COSTS[way], units, strict=True)])


def can_be_grouped(x: Tensor, a: Tensor, b: Tensor, rank: int) -> bool:
    """Whether torch's grouped product takes these tensors.

    Their rows must be multiples of 16 bytes, and compiled code takes bfloat16 alone. On a GPU it
    was not measured, and is not used.
    """
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    if torch.compiler.is_compiling():
        dtypes = (torch.bfloat16,)
    if not HAS_GROUPED_MM or x.device.type != "cpu" or x.dtype not in dtypes:
        return False
    return all(size * x.element_size() % 16 == 0 for size in (rank, a.shape[1], b.shape[1]))


def _chosen(
    x: Tensor,
    coefficients: Tensor,
    scaled: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k coefficients of each token that can differ from 0, the same scaled, and whose they are.

    Each is (tokens, k).
    """
    count = scaled.shape[-1]
    coefficients = coefficients.expand(*x.shape[:-1], count).reshape(-1, count)
    scaled = scaled.expand(*x.shape[:-1], count).reshape(-1, count)
    chosen = coefficients.abs().topk(k, dim=-1).indices
    return coefficients.gather(-1, chosen), scaled.gather(-1, chosen), chosen


WAYS = {"gathered": gathered, "grouped": grouped}
