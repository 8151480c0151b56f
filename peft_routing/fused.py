"""A module's update in few operations.

On a small input, and on a GPU, time goes with the number of operations and with what Python does
between them. So the scaling of the experts and the base layer's output go into the product with B,
and what does not change between calls is looked up once. Nothing of a parameter is kept.

This is for routers whose scores are products with the hidden state, token by token, and experts of
one rank. All others go the general way, to the same result.

On a GPU, and in bfloat16, a Triton kernel does what lies between the two products, in training and
in compiled models as well; and two kernels do the whole update of a few tokens where nothing is
trained, in 16 bits or float32. PyTorch's operations do it where Triton is missing or fails, for
more experts than the kernels take, and in other dtypes. They have no gradients and are not
compiled: there the general way is taken instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from peft_routing import mixing
from peft_routing.kernel_start import Started, StartedFew
from peft_routing.kernel_trial import works
from peft_routing.routers.base import Router
from peft_routing.routers.linear import LinearRouter
from peft_routing.routers.tensors import (
    FEW,
    Source,
    is_captured,
    is_transformed,
    largest,
    smallest,
    wait_for,
    wide_dtype,
)

_PLANS = 1000  # for so many numbers of tokens they are kept
# What the kernels for a few tokens take: each token reads A anew, though mostly from a cache, and
# adds the experts that it has chosen. On an H200 one token took their first form a third to a half
# of what it took the other kernel, and 16 tokens up to one and a half times as long.
_FEW_TOKENS = 8
_FEW_CHOSEN = 16
_OF_FEW = (torch.float32, torch.bfloat16, torch.float16)
_FORWARD = nn.Linear.forward  # which others may replace later


class Plan(NamedTuple):
    """How a call is computed: the dtypes of the products with the experts and of the scores, the
    way, and whether the base layer's output can be added within the last product without loss.

    add: `kernel_few.added`, for a few tokens; weigh: `kernel.weigh`, between the products; None
        where it is not for them. Each holds what Triton has compiled for these calls.
    """

    dtype: torch.dtype
    of_scores: torch.dtype
    way: mixing.Way
    can_add: bool
    add: Callable[..., Tensor] | None
    weigh: Callable[..., Tensor] | None


class Fused:
    """The experts and the router of an adapter at one module, made ready for calls."""

    def __init__(self, experts: Any, router: Any) -> None:
        self.experts = experts
        self.router = router
        self.count = len(experts.site.ranks)
        self.rank = sum(experts.site.ranks)
        scalings = experts.site.scalings
        # One scaling for all is a factor of the product with B; others belong to coefficients.
        self.differ = len(set(scalings)) > 1
        self.scaling = 1.0 if self.differ else scalings[0]
        self.is_low_rank = experts.mixing == "low_rank"
        self._plans: dict[Any, Plan] = {}
        self._split: tuple[Source, Tensor] | None = None

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

    def added_to(self, result: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor | None:
        """The output (…, out) of the base layer and the update for its input (…, in).

        None where this call must go the general way. The base layer's output is lost where nobody
        else holds it.
        """
        router = self.router
        # Not by their names as attributes, which PyTorch would look for in several places.
        of_experts = self.experts._parameters
        a = of_experts.get("A")
        b = of_experts.get("B")
        weight = router._parameters.get("weight")
        if a is None or b is None or weight is None or not self._holds(x, a, weight):
            return None
        needs_gradients = torch.is_grad_enabled() and (
            x.requires_grad or a.requires_grad or b.requires_grad or weight.requires_grad
        )
        # What trains factors needs these themselves, not their copies in bfloat16. A router of one
        # expert is warned of on the general way.
        if needs_gradients and (a.requires_grad or b.requires_grad or not router.learns):
            return None
        is_compiling = torch.compiler.is_compiling()
        # Kernels leave no trace, and know nothing of vmap and its like.
        if torch.jit.is_tracing() or (not is_compiling and is_transformed()):
            return None
        # The kernels for a few tokens have no gradients, that of the base layer's output neither.
        is_final = not (needs_gradients or (torch.is_grad_enabled() and result.requires_grad))
        if needs_gradients or is_compiling or torch.is_autocast_enabled(x.device.type):
            tokens = x.reshape(-1, x.shape[-1])
            if is_final and self._takes_few(tokens, result, a, b, weight, as_operation=True):
                from peft_routing import kernel_op  # needs Triton

                rows = result.reshape(-1, result.shape[-1])
                output = self._by_few(rows, tokens, weight, a, b, kernel_op.add_to_few)
                return output.view_as(result)
            if not self._takes_kernel(x, result, weight, as_operation=True):
                return None
            return self._by_operation(result, tokens, weight, needs_gradients)
        number = x.numel() // x.shape[-1]
        plan = self._plan(number, x, result, weight)
        if plan.add is not None and is_final:
            a, b = self.experts.cast_factors(a, b, plan.dtype)
            return self._by_few(result, x, weight, a, b, plan.add)
        tokens = x.reshape(number, x.shape[-1])
        if plan.weigh is not None:
            is_own = is_final and is_lost_after(base_layer, result)
            a, b = self.experts.cast_factors(a, b, torch.bfloat16)
            return self._by_kernel(result, tokens, weight, a, b, plan.weigh, is_own)
        scores = self._scores(_cast(tokens, plan.of_scores), _cast(weight, plan.of_scores))
        tokens = _cast(tokens, plan.dtype)
        a, b = self.experts.cast_factors(a, b, plan.dtype)
        if plan.way != "dense":
            update = self._of_chosen(tokens, a, b, scores.squeeze(-1), plan.way)
            return result + update.view_as(result)
        z = functional.linear(tokens, a).view(number, self.count, self.rank // self.count)
        weighed = _cast(self._weighed(z, self._coefficients(scores)), plan.dtype)
        weighed = weighed.view(number, self.rank)
        if not plan.can_add:
            update = weighed.mm(b) if self.scaling == 1 else weighed.mm(b) * self.scaling
            return result + update.view_as(result)
        if is_final and result.dtype == plan.dtype and is_lost_after(base_layer, result):
            return _add_product(result, weighed, b, self.scaling)
        output = _cast(result.reshape(-1, result.shape[-1]), plan.dtype)
        # Not `view(result.shape)`: to take a shape apart costs Python as much as the product.
        return torch.addmm(output, weighed, b, alpha=self.scaling).view_as(result)

    def _by_few(
        self,
        result: Tensor,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        add: Callable[..., Tensor],
    ) -> Tensor:
        """The output (…, out) for a few tokens, by two kernels."""
        return add(
            result,
            x,
            weight,
            a,
            b,
            self._scalings(x.device),
            self.router.k,
            self.router.temperature,
            self.router.absolute,
            self.is_low_rank,
            self.scaling,
        )

    def _scalings(self, device: torch.device) -> Tensor | None:
        """The scalings (experts,), where they differ: a number costs kernels nothing."""
        return self.experts.scalings(torch.float32, device) if self.differ else None

    def _by_kernel(
        self,
        result: Tensor,
        tokens: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        weigh: Callable[..., Tensor],
        is_own: bool,
    ) -> Tensor:
        """The output where nothing has a gradient: the kernel is started without an operation of
        PyTorch's around it, which takes Python longer.
        """
        weighed = weigh(
            tokens,
            self._split_rows(weight),
            functional.linear(tokens, a),
            self._scalings(tokens.device),
            scaling=self.scaling,
            k=self.router.k,
            temperature=self.router.temperature,
            absolute=self.router.absolute,
            is_low_rank=self.is_low_rank,
        )
        if is_own:
            return _add_product(result, weighed, b)
        return torch.addmm(result.reshape(-1, result.shape[-1]), weighed, b).view_as(result)

    def _by_operation(
        self, result: Tensor, tokens: Tensor, weight: Tensor, needs_gradients: bool
    ) -> Tensor:
        """The output by the kernel as autograd and compilers know it."""
        from peft_routing import kernel_op  # needs Triton

        k = self.router.k
        is_trained = needs_gradients and weight.requires_grad
        a, b = self.experts.factors_in(torch.bfloat16)
        weighed = kernel_op.weigh(
            tokens,
            weight,
            functional.linear(tokens, a),
            self._scalings(tokens.device),
            scaling=self.scaling,
            k=k,
            temperature=self.router.temperature,
            absolute=self.router.absolute,
            is_low_rank=self.is_low_rank,
            is_estimated=k == 1 and self.count > 1 and is_trained,
        )
        return torch.addmm(result.reshape(-1, result.shape[-1]), weighed, b).view_as(result)

    def _split_rows(self, weight: Tensor) -> Tensor:
        """The router's rows as the kernel takes them: a copy, made anew when they change."""
        from peft_routing import kernel  # needs Triton

        # Rows that are trained may change unnoticed: some optimizers write to `.data`.
        if weight.requires_grad or weight.is_inference():
            return kernel.split(weight)
        if self._split is None or not self._split[0].holds_for(weight):
            if is_captured(weight.device):
                return kernel.split(weight)
            with torch.inference_mode(False), torch.no_grad():
                self._split = Source(weight), kernel.split(weight)
            wait_for(weight.device)
        return self._split[1]

    def _holds(self, x: Tensor, a: Tensor, weight: Tensor) -> bool:
        """Whether a call in these circumstances can go this way."""
        router = self.router
        if (router.is_balanced and router.training) or router.choice is not None:
            return False  # the choice is counted, or made for other modules as well
        if x.is_meta or a.is_meta or weight.is_meta:
            return False
        return not (is_watched(router) or is_watched(self.experts))

    def _scores(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """What the router chooses by (tokens, experts, 1): the last dimension is z's, later."""
        scores = functional.linear(tokens, weight).unsqueeze(-1)
        if self.router.absolute:
            scores = scores.abs()
        if self.router.temperature != 1:
            scores = scores / self.router.temperature
        return scores

    def _coefficients(self, scores: Tensor) -> Tensor:
        """The coefficients (tokens, experts, 1) of scores (tokens, experts, 1), which are lost."""
        k = self.router.k
        if k < self.count <= FEW:
            dropped = smallest(scores, self.count - k, dim=1)
            scores = scores.scatter_(1, dropped, float("-inf"))
        elif k < self.count:
            values, chosen = scores.topk(k, dim=1)
            return torch.zeros_like(scores).scatter_(1, chosen, values.softmax(dim=1))
        return scores.softmax(dim=1)

    def _weighed(self, z: Tensor, coefficients: Tensor) -> Tensor:
        """z (tokens, experts, rank of each) times the coefficients (tokens, experts, 1)."""
        if self.is_low_rank:
            z = (z * coefficients).sum(dim=1, keepdim=True)
        if self.differ:
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
        if self.differ:
            scaled = scaled * self.experts.scalings(scaled.dtype, scaled.device)[chosen]
        elif self.scaling != 1:
            scaled = scaled * self.scaling
        weigh = mixing.low_rank if self.is_low_rank else mixing.full
        return mixing.of_pairs(tokens, a, b, chosen, coefficients, scaled, weigh, self.count, way)

    def _plan(self, tokens: int, x: Tensor, result: Tensor, weight: Tensor) -> Plan:
        """How a call with so many tokens is computed."""
        experts = self.experts
        k = self.router.k
        a = experts._parameters["A"]
        b = experts._parameters["B"]
        dtypes = x.dtype, result.dtype, weight.dtype, a.dtype
        key = tokens, k, dtypes, x.device, result.device, weight.device, a.device, b.device
        plan = self._plans.get(key)
        if plan is None:
            dtype = experts.dtype_of_products(x, result)
            way: mixing.Way = "dense"
            if k < self.count:
                way = mixing.cheapest(x.to(dtype), a, b, self.count, k, gradients=False)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            can_add = torch.promote_types(dtype, result.dtype) == dtype
            add = None
            weigh = None
            rows = x.reshape(-1, x.shape[-1])
            if self._takes_few(rows, result, a, b, weight, as_operation=False):
                from peft_routing import kernel_few  # needs Triton

                add = partial(kernel_few.added, few=StartedFew())
            elif self._takes_kernel(x, result, weight, as_operation=False):
                from peft_routing import kernel  # needs Triton

                weigh = partial(kernel.weigh, started=Started())
            plan = Plan(dtype, wide_dtype(x, weight), way, can_add, add, weigh)
            if is_captured(x.device):
                return plan  # what has not been tried before is tried in a later call
            self._plans[key] = plan
        return plan

    def _takes_kernel(
        self, x: Tensor, result: Tensor, weight: Tensor, *, as_operation: bool
    ) -> bool:
        """Whether a kernel does what lies between the products."""
        if not (x.dtype == result.dtype == torch.bfloat16 and weight.dtype == torch.float32):
            return False
        if self.experts.dtype_of_products(x, result) != torch.bfloat16:
            return False
        return self._works(x, as_operation, is_few=False)

    def _takes_few(
        self,
        tokens: Tensor,
        result: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        *,
        as_operation: bool,
    ) -> bool:
        """Whether kernels do the whole update, of a few tokens (tokens, in)."""
        if tokens.dtype != result.dtype or tokens.dtype not in _OF_FEW:
            return False
        # They compute in float32.
        of_products = self.experts.dtype_of_products(tokens, result)
        if torch.float64 in (of_products, weight.dtype) or self.router.k > _FEW_CHOSEN:
            return False
        if any(each.device != tokens.device for each in (result, a, b, weight)):
            return False
        # The number of tokens comes last: where it may vary, a compiler asks for it only if there
        # are kernels.
        return self._works(tokens, as_operation, is_few=True) and tokens.shape[0] <= _FEW_TOKENS

    def _works(self, x: Tensor, as_operation: bool, is_few: bool) -> bool:
        """Whether kernels do what they should on the device of x."""
        return works(
            x.device,
            x.dtype,
            self.count,
            self.rank // self.count,
            self.router.absolute,
            self.is_low_rank,
            self.router.k,
            self.differ,
            as_operation,
            is_few,
        )


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for a call of the module: by a hook, or by a `forward` in its place.

    So accelerate's offloading brings parameters where they are needed.
    """
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(has_hooks) or "forward" in module.__dict__


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, without a call where it is in that already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def is_lost_after(base_layer: nn.Module, result: Tensor) -> bool:
    """Whether a base layer's output is a new tensor that nobody but its caller holds: that of
    PyTorch's own linear layer, without a hook or a mode of PyTorch's that sees it.
    """
    if type(base_layer) is not nn.Linear or type(result) is not Tensor:
        return False
    if is_watched(base_layer) or _has_any_global_hook():
        return False
    # Selective checkpointing keeps what operations give, and so may any other mode.
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    # Compiled alone, it may give memory that belongs to a CUDA graph.
    is_stock = nn.Linear.forward is _FORWARD and base_layer._compiled_call_impl is None
    return is_stock and result.is_contiguous()


def _add_product(output: Tensor, weighed: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """The output (…, out), to which weighed (tokens, rank) times B is added in its place.

    Else it is copied first, which takes as long as the product where experts are few.
    """
    output.view(-1, b.shape[1]).addmm_(weighed, b, alpha=scaling)
    return output


def has_methods_of_base(kind: type[Router]) -> bool:
    """Whether a linear router scores and chooses as the base classes do."""
    own = (kind.scores, kind.coefficients, kind.forward, kind._tempered)
    return own == (
        LinearRouter.scores,
        Router.coefficients,
        Router.forward,
        Router._tempered,
    )
