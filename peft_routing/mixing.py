"""The update of a module's experts, computed in three ways: one result at different costs.

Each way takes x (…, in), the A of all experts below each other (R, in), and B transposed in the
same way (R, out), R being the sum of ranks. So the factors of an expert are contiguous. `weigh`
puts the coefficients on what lies between A and B.

No way makes a tensor of (tokens, experts, out). What is kept for a backward pass grows with the
ranks, not with in or out. The copies of `gathered` are the exception, so that it is not chosen
where gradients are needed.

`dense`    computes every token with every expert: two products, as of one LoRA of rank R. Any
           ranks.
`gathered` copies the factors of each token's experts: for few tokens, as in decoding.
`grouped`  copies each token to its experts: for many tokens that choose few of many experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Mixing = Literal["full", "low_rank"]
SparseWay = Literal["gathered", "grouped"]
Way = Literal["dense", "gathered", "grouped"]
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
# Milliseconds per unit of `work`, as `python benchmarks/routed_lora_rule.py` measured them on one
# thread of a CPU.
COSTS: dict[Way, tuple[float, ...]] = {
    "dense": (0.029, 0.19, 0.016),
    "gathered": (0.12, 0.8),
    "grouped": (0.14, 3.2, 0.21, 1.1, 0.031),
}
HAS_GROUPED_MM = hasattr(functional, "grouped_mm")  # torch 2.7, our oldest, has none


def full(z: Tensor, coefficients: Tensor, scaled: Tensor) -> Tensor:
    """What `mixing="full"` puts between A and B: z_i = A_i x (…, experts, rank), times c_i s_i.

    With it the update is the sum of c_i s_i B_i A_i x.
    """
    return z * scaled.to(z.dtype)[..., None]


def low_rank(z: Tensor, coefficients: Tensor, scaled: Tensor) -> Tensor:
    """What `mixing="low_rank"` puts between A and B (…, experts, rank): the sum of c_j z_j over all
    experts j, times c_i s_i for expert i.

    With it the update is (sum of c_i s_i B_i) (sum of c_j A_j) x: A and B are mixed separately.
    """
    # Each expert's B gets the same mixture, so that the product with all B mixes these as well.
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
    """The update (…, out), with every expert computed for every token."""
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


def of_chosen(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    coefficients: Tensor,
    scaled: Tensor,
    weigh: Weigh,
    k: int,
    way: SparseWay,
) -> Tensor:
    """The update (…, out), where at most k coefficients of a token are not 0.

    `can_be_grouped` says for which tensors `grouped` works.
    """
    # Both ways see a list of tokens, and of each token the k experts with the largest coefficients:
    # the others have the coefficient 0 and add nothing.
    count = scaled.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    coefficients = coefficients.expand(*x.shape[:-1], count).reshape(-1, count)
    scaled = scaled.expand(*x.shape[:-1], count).reshape(-1, count)
    chosen = coefficients.abs().topk(k, dim=-1).indices
    coefficients = coefficients.gather(-1, chosen)
    scaled = scaled.gather(-1, chosen)

    update = of_pairs(tokens, a, b, chosen, coefficients, scaled, weigh, count, way)
    return update.view(*x.shape[:-1], b.shape[-1])


def of_pairs(
    tokens: Tensor,
    a: Tensor,
    b: Tensor,
    chosen: Tensor,
    coefficients: Tensor,
    scaled: Tensor,
    weigh: Weigh,
    count: int,
    way: SparseWay,
) -> Tensor:
    """The update (tokens, out) of tokens (tokens, in), each with its k of `count` experts `chosen`
    (tokens, k) and their coefficients, alone and times the scaling, (tokens, k).
    """

    def weigh_chosen(z: Tensor) -> Tensor:
        return weigh(z, coefficients, scaled)

    rank = len(a) // count
    a = a.unflatten(0, (count, rank))
    b = b.unflatten(0, (count, rank))
    compute = _gathered if way == "gathered" else _grouped
    return compute(tokens, a, b, chosen, weigh_chosen)


def _gathered(
    x: Tensor, a: Tensor, b: Tensor, chosen: Tensor, weigh: Callable[[Tensor], Tensor]
) -> Tensor:
    """(tokens, out), for x (tokens, in), A (experts, rank, in), B (experts, rank, out) and the
    experts `chosen` (tokens, k).
    """
    # With few tokens, reading the weights is what takes the time. Here only the rows of the chosen
    # experts' A and B are read, once per token, and each token has a small product with its copy.
    tokens, k = chosen.shape
    rank = a.shape[1]
    a = a.index_select(0, chosen.flatten()).view(tokens, k * rank, a.shape[2])
    b = b.index_select(0, chosen.flatten()).view(tokens, k * rank, b.shape[2])
    z = (a @ x[..., None]).view(tokens, k, rank)
    z = weigh(z).reshape(tokens, 1, k * rank)
    return (z @ b)[:, 0]


def _grouped(
    x: Tensor, a: Tensor, b: Tensor, chosen: Tensor, weigh: Callable[[Tensor], Tensor]
) -> Tensor:
    """The result of `_gathered`, for the same arguments."""
    # The pairs of a token and an expert are sorted by expert: the pairs of one expert are then a
    # stretch of rows, and one grouped product multiplies each stretch with its expert's factors.
    count, rank = a.shape[:2]
    k = chosen.shape[1]
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(count, device=x.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    token_of_pair = order // k
    z = functional.grouped_mm(x.index_select(0, token_of_pair), a.mT, offs=ends)
    # Between the products the pairs are sorted by token again: low-rank mixing adds up over the
    # experts of a token.
    z = z.index_select(0, order.argsort()).view(len(chosen), k, rank)
    z = weigh(z).flatten(0, 1).index_select(0, order)
    update = functional.grouped_mm(z, b, offs=ends)
    return _PerToken.apply(update, token_of_pair, len(chosen))


class _PerToken(torch.autograd.Function):
    """The sum of each token's rows (pairs, out), as index_add computes it.

    index_add itself would keep all rows for the backward pass, which needs only their tokens.
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

    With `gradients` it is not `gathered`, whose copies would be kept for the backward pass.
    """
    # A GPU computes every expert sooner than it finds out which ones to leave out. On a CPU costs
    # differ by orders of magnitude with the numbers of tokens and experts and with the widths, and
    # an estimate of a few multiplications is cheap enough to be made in every call.
    if x.device.type != "cpu":
        return "dense"
    tokens = x.shape[:-1].numel()
    rank = a.shape[0] // experts
    of_each_way = work(tokens, experts, rank, k, a.shape[1] + b.shape[1])
    of_dense = _cost("dense", of_each_way[0])
    if of_dense <= COSTS["gathered"][0]:  # the mere call of another way takes longer
        return "dense"
    of_gathered = float("inf") if gradients else _cost("gathered", of_each_way[1])
    of_grouped = _cost("grouped", of_each_way[2])
    if of_grouped < min(of_dense, of_gathered) and can_be_grouped(x, a, b, rank):
        return "grouped"
    return "gathered" if of_gathered < of_dense else "dense"


def work(tokens: int, experts: int, rank: int, k: int, width: int) -> tuple[Sequence[float], ...]:
    """The work of `dense`, `gathered` and `grouped`, in the units whose prices are in `COSTS`.

    Units are a call, a thousand experts, and a million numbers that are read, copied or multiplied.
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
    """The estimated milliseconds of one call."""
    return sum([cost * unit for cost, unit in zip(COSTS[way], units, strict=True)])


def can_be_grouped(x: Tensor, a: Tensor, b: Tensor, rank: int) -> bool:
    """Whether torch's grouped product works on these tensors, and is used for them.

    Their rows must be multiples of 16 bytes, and compiled code supports bfloat16 alone.
    """
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    if torch.compiler.is_compiling():
        dtypes = (torch.bfloat16,)
    if not HAS_GROUPED_MM or x.device.type != "cpu" or x.dtype not in dtypes:
        return False
    return all(size * x.element_size() % 16 == 0 for size in (rank, a.shape[1], b.shape[1]))
