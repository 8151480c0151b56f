"""A module's update in few operations, where no gradient is needed.

On a small input, and on a GPU, time goes with the number of operations and with what Python does
between them. Scores and z = A x come from one product, for which the router's rows lie below A. The
scaling of the experts and the base layer's output go into the product with B. What does not change
between calls is looked up once, and every call sees whether it still holds.

This is for routers whose scores are products with the hidden state, token by token, and experts of
one rank. All others, and training, go the general way, to the same result.
"""

from typing import Any

import torch
from torch import Tensor

from peft_routing import mixing
from peft_routing.routers.base import Router
from peft_routing.routers.linear import LinearRouter
from peft_routing.routers.tensors import FEW, Source, largest, smallest, wide_dtype

# How often A may be found elsewhere than it was left: who moves it all the time, as offloading
# does, is not helped by rows that are put together anew in every call.
_MOVES = 4
_PLANS = 1000  # for so many numbers of tokens they are kept
Plan = tuple[torch.dtype, torch.dtype, mixing.Way]


class Fused:
    """The experts and the router of an adapter at one module, made ready for calls."""

    def __init__(self, experts: Any, router: Any) -> None:
        self.experts = experts
        self.router = router
        self.count = len(experts.site.ranks)
        self.rank = sum(experts.site.ranks)
        scalings = experts.site.scalings
        # One scaling for all is a factor of the product with B.
        self.scaling = scalings[0] if len(set(scalings)) == 1 else None
        self.is_low_rank = experts.mixing == "low_rank"
        self._plans: dict[Any, Plan] = {}
        self._moves = 0
        self._rows: Tensor | None = None  # A, and the router's rows below it
        self._columns: Tensor | None = None  # the same, transposed
        self._of_router: Source | None = None  # what the last rows are a copy of

    @staticmethod
    def fits(experts: Any, router: Any) -> bool:
        """Whether this is the same as the general way for these experts and this router."""
        return (
            isinstance(router, LinearRouter)
            and has_methods_of_base(type(router))
            and router.granularity == "token"
            and experts.is_of_one_rank
            and not (experts.site.general or experts.site.has_biases)
            and sum(experts.site.ranks) > 0
        )

    def added_to(self, result: Tensor, x: Tensor) -> Tensor | None:
        """The output (…, out) of the base layer and the update for its input (…, in).

        None where this call must go the general way.
        """
        router = self.router
        # Not by their names as attributes, which PyTorch would look for in several places.
        of_experts = self.experts._parameters
        a, b, weight = of_experts.get("A"), of_experts.get("B"), router._parameters.get("weight")
        if a is None or b is None or weight is None or not self._holds(x, weight):
            return None
        tokens = x.reshape(-1, x.shape[-1])
        count, each = tokens.shape[0], self.rank // self.count
        dtype, of_scores, way = self._plan(count, x, result, weight)
        columns = None
        if a.dtype != dtype:
            a, b = self.experts.factors_in(dtype)
        elif way == "dense" and dtype == of_scores == weight.dtype:
            columns = self._with_router(a, weight)
        # Each row of the products has z of all experts and then their scores. Scores have a last
        # dimension of 1, by which they are broadcast over z.
        if columns is not None:
            products = _cast(tokens, dtype).mm(columns)
            width = self.rank + self.count
            scores = products.as_strided((count, self.count, 1), (width, 1, 1), self.rank)
        else:
            scores = _cast(tokens, of_scores).mm(_cast(weight.t(), of_scores)).unsqueeze(-1)
        if router.absolute:
            scores = scores.abs()
        if router.temperature != 1:
            scores = scores / router.temperature
        if way != "dense":
            update = self._of_chosen(_cast(tokens, dtype), a, b, scores.squeeze(-1), way)
            return result + update.view(result.shape)
        if columns is None:
            products = _cast(tokens, dtype).mm(a.t())
            width = self.rank
        z = products.as_strided((count, self.count, each), (width, each, 1))
        weighed = _cast(self._weighed(z, self._coefficients(scores)), dtype)
        output = _cast(result.reshape(-1, result.shape[-1]), dtype)
        scaling = 1.0 if self.scaling is None else self.scaling
        update = weighed.view(count, self.rank)
        return torch.addmm(output, update, b, alpha=scaling).view(result.shape)

    def _holds(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a call in these circumstances can go this way."""
        router = self.router
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            self._of_router = None  # some optimisers change the rows without torch's counting it
            return False
        if (router.is_balanced and router.training) or router.choice is not None:
            return False  # the choice is counted, or made for other modules as well
        # A hook waits for a call of its module, and this way calls neither.
        for module in (router, self.experts):
            if module._forward_hooks or module._forward_pre_hooks:
                return False
        return not torch.is_autocast_enabled(x.device.type)

    def _coefficients(self, scores: Tensor) -> Tensor:
        """The coefficients (tokens, experts, 1) of scores (tokens, experts, 1), which are lost."""
        k = self.router.k
        if k < self.count <= FEW:
            dropped = smallest(scores, self.count - k, dim=1)
            # Absolute values are nobody else's, unlike a part of the products.
            if self.router.absolute:
                scores = scores.scatter_(1, dropped, float("-inf"))
            else:
                scores = scores.scatter(1, dropped, float("-inf"))
        elif k < self.count:
            values, chosen = scores.topk(k, dim=1)
            return torch.zeros_like(scores).scatter_(1, chosen, values.softmax(dim=1))
        return scores.softmax(dim=1)

    def _weighed(self, z: Tensor, coefficients: Tensor) -> Tensor:
        """z (tokens, experts, rank of each) times the coefficients (tokens, experts, 1)."""
        if self.is_low_rank:
            z = (z * coefficients).sum(dim=1, keepdim=True)
        if self.scaling is None:
            scalings = self.experts.scalings(coefficients.dtype, coefficients.device)
            coefficients = coefficients * scalings[:, None]
        return z * coefficients

    def _of_chosen(
        self, tokens: Tensor, a: Tensor, b: Tensor, scores: Tensor, way: mixing.SparseWay
    ) -> Tensor:
        """The update (tokens, out), of which only the experts that are chosen are computed."""
        k = self.router.k
        if self.count <= FEW:
            scores = largest(scores, k)
        values, chosen = scores.topk(k, dim=-1)
        coefficients = values.softmax(dim=-1)
        scaled = coefficients
        if self.scaling is None:
            scaled = scaled * self.experts.scalings(scaled.dtype, scaled.device)[chosen]
        elif self.scaling != 1:
            scaled = scaled * self.scaling
        weigh = mixing.low_rank if self.is_low_rank else mixing.full
        return mixing.of_pairs(tokens, a, b, chosen, coefficients, scaled, weigh, self.count, way)

    def _with_router(self, a: Tensor, weight: Tensor) -> Tensor | None:
        """A and the router's rows, transposed (in, rank + experts); None where they keep moving."""
        rows = self._rows
        is_whole = rows is not None and a.data_ptr() == rows.data_ptr() and a.dtype == rows.dtype
        if is_whole and self._of_router is not None and self._of_router.holds_for(weight):
            return self._columns
        if a.is_inference() or weight.is_inference() or a.is_meta:
            return None
        with torch.inference_mode(False), torch.no_grad():
            if not is_whole:
                self._moves += 1
                if self._moves > _MOVES:
                    return None
                rows = a.new_empty(self.rank + self.count, a.shape[1])
                rows[: self.rank] = a
                # The parameter moves to where its copy is, so that nothing is held twice.
                a.data = rows[: self.rank]
                self._rows, self._columns = rows, rows.T
            assert rows is not None
            rows[self.rank :] = weight
            self._of_router = Source(weight)
        return self._columns

    def _plan(self, tokens: int, x: Tensor, result: Tensor, weight: Tensor) -> Plan:
        """The dtypes of the products with the experts and of the scores, and the cheapest way, for
        so many tokens.
        """
        experts, k = self.experts, self.router.k
        a, b = experts._parameters["A"], experts._parameters["B"]
        key = tokens, k, x.dtype, result.dtype, weight.dtype, a.dtype, x.device
        plan = self._plans.get(key)
        if plan is None:
            dtype = experts.dtype_of_products(x, result)
            way: mixing.Way = "dense"
            if k < self.count:
                way = mixing.cheapest(x.to(dtype), a, b, self.count, k, gradients=False)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = dtype, wide_dtype(x, weight), way
        return plan


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, without a call where it is in that already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def has_methods_of_base(kind: type[Router]) -> bool:
    """Whether a linear router scores and chooses as the base classes do."""
    own = (kind.scores, kind.coefficients, kind.forward, kind._tempered)
    return own == (
        LinearRouter.scores,
        Router.coefficients,
        Router.forward,
        Router._tempered,
    )
