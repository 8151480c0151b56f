"""The kernels of a routed layer as one operation of PyTorch's, with its gradients: for training,
and for compiled models, whose compiler sees the kernels.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from peft_routing import kernel, kernel_few
from peft_routing.kernel import _unweigh, _weigh
from peft_routing.kernel_few import _add, _project
from peft_routing.routers.tensors import without_autocast

# The compiler takes a kernel apart. What Triton's interpreter runs, in tests, it leaves whole.
_is_compiled = isinstance(_weigh, triton.JITFunction)
_operation: Any = triton_op if _is_compiled else custom_op


def weigh(
    hidden: Tensor,
    weight: Tensor,
    z: Tensor,
    scalings: Tensor | None,
    *,
    scaling: float,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
    is_estimated: bool,
) -> Tensor:
    """What `kernel.weigh` gives for a router's weight (experts, in), with gradients of the hidden
    states, the weight and z.

    `is_estimated`: the one coefficient of k = 1 has the gradient that `straight_through` gives it.
    """
    options = k, temperature, absolute, is_low_rank, is_estimated, scaling
    weighed, _ = _weigh_with_scores(hidden, weight, z, scalings, *options)
    return weighed


@_operation("peft_routing::weigh", mutates_args=())
def _weigh_with_scores(
    hidden: Tensor,
    weight: Tensor,
    z: Tensor,
    scalings: Tensor | None,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
    is_estimated: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """z weighed, and the scores (tokens, experts), of which the backward pass makes use."""
    scores = weight.new_empty(z.shape[0], weight.shape[0], dtype=torch.float32)
    weighed = kernel.weigh(
        hidden,
        kernel.parts_for(hidden, weight),
        z,
        scalings,
        scaling=scaling,
        k=k,
        temperature=temperature,
        absolute=absolute,
        is_low_rank=is_low_rank,
        scores=scores,
        kernel=wrap_triton(_weigh) if _is_compiled else _weigh,
    )
    return weighed, scores


@_operation("peft_routing::add_to_few", mutates_args=())
def add_to_few(
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
) -> Tensor:
    """What `kernel_few.added` gives. It has no gradients."""
    return kernel_few.added(
        result,
        hidden,
        weight,
        a,
        b,
        scalings,
        k,
        temperature,
        absolute,
        is_low_rank,
        scaling,
        project=wrap_triton(_project) if _is_compiled else _project,
        add=wrap_triton(_add) if _is_compiled else _add,
    )


@_operation("peft_routing::unweigh", mutates_args=())
def _gradients(
    gradient: Tensor,
    scores: Tensor,
    z: Tensor,
    scalings: Tensor | None,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
    is_estimated: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of z and of the scores."""
    return kernel.unweigh(
        gradient,
        scores,
        z,
        scalings,
        scaling=scaling,
        k=k,
        temperature=temperature,
        absolute=absolute,
        is_low_rank=is_low_rank,
        is_estimated=is_estimated,
        kernel=wrap_triton(_unweigh) if _is_compiled else _unweigh,
    )


@_weigh_with_scores.register_fake
def _(
    hidden: Tensor, weight: Tensor, z: Tensor, scalings: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    scores = weight.new_empty(z.shape[0], weight.shape[0], dtype=torch.float32)
    return torch.empty_like(z), scores


@add_to_few.register_fake
def _(result: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(result.contiguous())


@_gradients.register_fake
def _(
    gradient: Tensor, scores: Tensor, z: Tensor, scalings: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(scores)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, z, scalings, *options = inputs
    scores = output[1]
    ctx.mark_non_differentiable(scores)
    ctx.save_for_backward(hidden, weight, z, scalings, scores)
    ctx.options = options


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, z, scalings, scores = ctx.saved_tensors
    of_z, of_scores = _gradients(gradient.contiguous(), scores, z, scalings, *ctx.options)
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad
    of_hidden = None
    of_weight = None
    # In float32, as `routers.tensors.linear` has them.
    with without_autocast(hidden.device):
        if needs_hidden:
            of_hidden = of_scores.mm(weight).to(hidden.dtype)
        if needs_weight:
            of_weight = of_scores.T.mm(hidden.to(weight.dtype))
    return of_hidden, of_weight, of_z, *[None] * (1 + len(ctx.options))


_weigh_with_scores.register_autograd(_backward, setup_context=_keep)
