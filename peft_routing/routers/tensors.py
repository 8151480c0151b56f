"""Arithmetic that routers, mixing and choosers share: dtypes, constants, largest scores."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.nn import functional


def wide(values: Tensor) -> Tensor:
    """The values in float32, or as they are where that is wider."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which scores are computed: float32, or the widest of the tensors'."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products are computed in the dtype of their factors."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The products of a router, in float32 or wider, whatever the model computes in.

    Rows and scores in half precision choose other experts where two are nearly alike.
    """
    dtype = wide_dtype(hidden, weight)
    with without_autocast(hidden.device):
        return functional.linear(
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )


def over_tokens(coefficients: Tensor, x: Tensor) -> Tensor:
    """Coefficients (batch, experts) as (batch, 1 …, experts), with as many dimensions as x."""
    return coefficients.reshape(len(coefficients), *[1] * (x.ndim - 2), -1)


def is_captured(device: torch.device) -> bool:
    """Whether work that is given to a device now is recorded into a CUDA graph: it runs only when
    the graph is replayed, and its results lie in the graph's own memory.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is at work."""
    return maybe_current_level() is not None or forward_ad._current_level >= 0


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was told: what is kept may be read on another of its
    streams next, which would not wait.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Constant:
    """Numbers that no cast of the model rounds, as a tensor that is made once per dtype and device.

    Each new tensor would make a GPU wait.
    """

    def __init__(self, values: Sequence[float]):
        self.values = list(values)
        self._tensors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            # What a compiled graph makes lies in its own memory, and does not outlast its call.
            if len(set(self.values)) == 1:
                return torch.full((len(self.values),), self.values[0], dtype=dtype, device=device)
            numbers = [torch.full((), value, dtype=dtype, device=device) for value in self.values]
            return torch.stack(numbers)
        key = dtype, device
        if key not in self._tensors:
            with torch.inference_mode(False):  # it may be needed in a backward pass later
                self._tensors[key] = torch.tensor(self.values, dtype=dtype, device=device)
        return self._tensors[key]


class Source:
    """A tensor in its present state: whether what was made of it still holds."""

    __slots__ = ("address", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.address = tensor.data_ptr()
        self.version = tensor._version  # torch counts the changes in place

    def holds_for(self, tensor: Tensor) -> bool:
        """Whether this tensor is the one, unchanged."""
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
        )


# Up to so many scores it is cheaper to take out the smallest than to put in the largest. Where two
# are equal the two choose differently, so that the number of scores alone decides.
FEW = 32


def largest(scores: Tensor, k: int) -> Tensor:
    """The scores with minus infinity in place of all but the k largest of the last dimension."""
    count = scores.shape[-1]
    if k == count:
        return scores
    if count <= FEW:
        return scores.scatter(-1, smallest(scores, count - k), float("-inf"))
    values, indices = scores.topk(k, dim=-1)
    return torch.full_like(scores, float("-inf")).scatter(-1, indices, values)


def straight_through(chosen: Tensor, probabilities: Tensor) -> Tensor:
    """The coefficients `chosen`, 1 for one expert and 0 for all others, with a gradient.

    The chosen expert i has the coefficient 1 + p_i - stop_gradient(p_i), where p are the
    probabilities of all experts, in the same shape (…, experts). Its value is exactly 1, and its
    gradient is that of p_i, as if the expert's output were multiplied by p_i, which is what Switch
    Transformers do (Fedus et al. 2021, equation 2). This is an estimator (straight-through): no
    loss that is computed with the coefficient 1 has this gradient.
    """
    return chosen.detach() * (1 + (probabilities - probabilities.detach()))


def smallest(scores: Tensor, count: int, dim: int = -1) -> Tensor:
    """The places of so many of the smallest scores along a dimension, in any order."""
    return scores.topk(count, dim=dim, largest=False, sorted=False).indices
