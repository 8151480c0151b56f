"""The update of a module's experts, three ways: the same result at different costs.

All take x (…, in), all experts' A below each other (R, in) and B transposed the same way (R, out), so that an
expert's factors are contiguous, R being the sum of ranks. `weigh` puts the coefficients on what lies between A and B.
No tensor of (tokens, experts, out) is made, and what is kept for a backward pass grows with ranks, not with in or
out, but for the copies of `gathered`, which is not chosen where gradients are wanted.

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
# Milliseconds per unit of `work`, as `python benchmarks/routed_lora_rule.py` found them for one thread of a CPU.
COSTS: dict[Way, tuple[float, ...]] = {
    "dense": (0.029, 0.19, 0.016),
    "gathered": (0.12, 0.8),
    "grouped": (0.14, 3.2, 0.21, 1.1, 0.031),
}
HAS_GROUPED_MM = hasattr(functional, "grouped_mm")  # torch 2.5, our oldest, has none


def full(z: Tensor, coefficients: Tensor, scaled: Tensor) -> Tensor:
    """For the sum of c_i s_i B_i A_i x: z_i (…, experts, rank) times c_i s_i."""
    return z * scaled.to(z.dtype)[..., None]


def low_rank(z: Tensor, coefficients: Tensor, scaled: Tensor) -> Tensor:
    """For (sum of c_i s_i B_i) (sum of c_j A_j) x: the same mixture for every expert, times c_i s_i."""
    mixed = (z * coefficients.to(z.dtype)[..., None]).sum(dim=-2, keepdim=True)
    return mixed * scaled.to(z.dtype)[..., None]


def dense(x: Tensor, a: Tensor, b: Tensor, coefficients: Tensor, scaled: Tensor, weigh: Weigh) -> Tensor:
    count = scaled.shape[-1]
    z = functional.linear(x, a).view(*x.shape[:-1], count, a.shape[0] // count)
    return weigh(z, coefficients, scaled).flatten(-2) @ b


def dense_of_mixed_ranks(x: Tensor, a: Tensor, b: Tensor, scaled: Tensor, owners: Tensor) -> Tensor:
    """`full` where expert `owners[i]` has row i of A and B."""
    z = functional.linear(x, a)
    return (z * scaled.to(z.dtype)[..., owners]) @ b


def gathered(x: Tensor, a: Tensor, b: Tensor, coefficients: Tensor, scaled: Tensor, weigh: Weigh, k: int) -> Tensor:
    """At most k coefficients of a token are not 0."""
    rank = len(a) // scaled.shape[-1]
    coefficients, scaled, chosen = _chosen(x, coefficients, scaled, k)
    rows = (chosen[..., None] * rank + torch.arange(rank, device=x.device)).flatten(1)  # (tokens, k * rank)
    tokens = len(rows)
    a, b = (factor.index_select(0, rows.flatten()).unflatten(0, (tokens, k * rank)) for factor in (a, b))
    z = (a @ x.reshape(tokens, x.shape[-1], 1)).view(tokens, k, rank)
    z = weigh(z, coefficients, scaled).reshape(tokens, 1, k * rank)
    return (z @ b).view(*x.shape[:-1], b.shape[-1])


def grouped(x: Tensor, a: Tensor, b: Tensor, coefficients: Tensor, scaled: Tensor, weigh: Weigh, k: int) -> Tensor:
    """At most k coefficients of a token are not 0. `can_be_grouped` says what it takes."""
    count = scaled.shape[-1]
    coefficients, scaled, chosen = _chosen(x, coefficients, scaled, k)
    experts, order = chosen.flatten().sort(stable=True)  # pairs of token and expert, by expert
    ends = torch.searchsorted(experts, torch.arange(count, device=x.device), right=True, out_int32=True)
    tokens = order // k
    a, b = a.unflatten(0, (count, -1)), b.unflatten(0, (count, -1))
    z = functional.grouped_mm(x.reshape(-1, x.shape[-1]).index_select(0, tokens), a.mT, offs=ends)
    z = z.index_select(0, order.argsort()).view(-1, k, a.shape[1])  # (tokens, k, rank)
    z = weigh(z, coefficients, scaled).flatten(0, 1).index_select(0, order)
    update = functional.grouped_mm(z, b, offs=ends)
    return _PerToken.apply(update, tokens, len(chosen)).view(*x.shape[:-1], b.shape[-1])


class _PerToken(torch.autograd.Function):
    """The sum of each token's rows (pairs, out), as by index_add, which would keep them all for the backward pass."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, tokens: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(tokens)
        return update.new_zeros(count, update.shape[-1]).index_add_(0, tokens, update)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def cheapest(x: Tensor, a: Tensor, b: Tensor, experts: int, k: int, *, gradients: bool) -> Way:
    """Of the three by the estimate of `work`, for experts of one rank; with `gradients` not `gathered`."""
    tokens, rank = x.shape[:-1].numel(), a.shape[0] // experts
    dense, gathered, grouped = work(tokens, experts, rank, k, a.shape[1] + b.shape[1])
    of_dense = _cost("dense", dense)
    if of_dense <= COSTS["gathered"][0]:  # few experts: a call of another way alone takes longer
        return "dense"
    of_gathered = float("inf") if gradients else _cost("gathered", gathered)
    if _cost("grouped", grouped) < min(of_dense, of_gathered) and can_be_grouped(x, a, b, rank):
        return "grouped"
    return "gathered" if of_gathered < of_dense else "dense"


def work(tokens: int, experts: int, rank: int, k: int, width: int) -> tuple[Sequence[float], ...]:
    """What each way takes: a call, experts, and millions of numbers read, copied or multiplied; `width`: in + out."""
    read = width * 1e-6 * rank
    return (
        (1, read * experts, read * experts * tokens),
        (1, read * tokens * k),
        (1, experts / 1e3, read * min(experts, tokens * k), width * 1e-6 * tokens * k, read * tokens * k),
    )


def _cost(way: Way, units: Sequence[float]) -> float:
    return sum([cost * unit for cost, unit in zip(COSTS[way], units, strict=True)])


def can_be_grouped(x: Tensor, a: Tensor, b: Tensor, rank: int) -> bool:
    """What torch's grouped product takes: rows of multiples of 16 bytes, and compiled bfloat16 alone.

    On a GPU it was not measured, and is not used.
    """
    known = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.float32, torch.bfloat16, torch.float16)
    sizes = (size * x.element_size() for size in (rank, a.shape[1], b.shape[1]))
    return HAS_GROUPED_MM and x.device.type == "cpu" and x.dtype in known and not any(size % 16 for size in sizes)


def _chosen(x: Tensor, coefficients: Tensor, scaled: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token the k coefficients that can differ from 0, scaled too, and whose they are: (tokens, k) each."""
    count = scaled.shape[-1]
    coefficients, scaled = (c.expand(*x.shape[:-1], count).reshape(-1, count) for c in (coefficients, scaled))
    chosen = coefficients.abs().topk(k, dim=-1).indices
    return coefficients.gather(-1, chosen), scaled.gather(-1, chosen), chosen


WAYS = {"gathered": gathered, "grouped": grouped}
