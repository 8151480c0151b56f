"""TIES and DARE on whichever device the tensors are: on a GPU by the Triton kernels of `fused`.

Triton comes with torch's builds for GPUs. Where it is missing or does not compute what PyTorch
does, and for float64, the operations of `ties` and `drop` do the work there, too.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mergekit_moe_ext.tensor.kernels import drop, ties
from mergekit_moe_ext.tensor.kernels.trim import kept_count

_FUSED = (torch.float32, torch.bfloat16, torch.float16)  # Triton hands numbers over in float32
_TRIED = 70_001  # elements of the tensors of a trial: several programs, of several blocks


def merge_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The result of `ties.merge_ties`, for the same arguments."""
    merge = _fused_ties if _can_be_fused(base, tensors) else ties.merge_ties
    return merge(base, tensors, weights, densities, normalize=normalize, scale=scale)


def merge_dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    keys: Sequence[int],
    *,
    scale: float,
    elect_sign: bool,
) -> Tensor:
    """The result of `drop.merge_dare`, for the same arguments."""
    merge = _fused_dare if _can_be_fused(base, tensors) else drop.merge_dare
    return merge(base, tensors, weights, densities, keys, scale=scale, elect_sign=elect_sign)


def _can_be_fused(base: Tensor, tensors: Sequence[Tensor]) -> bool:
    if base.device.type != "cuda" or base.dtype not in _FUSED or not base.numel():
        return False
    alike = all(each.dtype == base.dtype and each.device == base.device for each in tensors)
    return alike and _work(base.device, base.dtype)


def _fused_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool,
    scale: float,
) -> Tensor:
    flat_base, *flat_tensors = _flat(base, *tensors)
    counts = [kept_count(base.numel(), density) for density in densities]
    merged = _kernels().merge_ties(
        flat_base, flat_tensors, counts, weights, normalize=normalize, scale=scale
    )
    return merged.view(base.shape)


def _fused_dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    keys: Sequence[int],
    *,
    scale: float,
    elect_sign: bool,
) -> Tensor:
    flat_base, *flat_tensors = _flat(base, *tensors)
    merged = _kernels().merge_dare(
        flat_base,
        flat_tensors,
        keys,
        [drop.hash_bound(density) for density in densities],
        drop.rescaled(weights, densities),
        scale=scale,
        elect_sign=elect_sign,
    )
    return merged.view(base.shape)


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().reshape(-1).contiguous() for tensor in tensors]


def _kernels() -> ModuleType:
    """The module `fused`, which needs Triton."""
    return importlib.import_module("mergekit_moe_ext.tensor.kernels.fused")


@cache
def _work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute on a device, bit for bit, what PyTorch's operations do.

    A version of Triton that fails or rounds otherwise gives a warning, and is not used.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        base, *tensors = _trial_tensors(device, dtype)
        arguments = base, tensors, [1.0, 0.7, -0.3], [0.8, 0.1, 0.5]
        keys = [1, 2**40 + 3, 2**63 + 5]
        agree = True
        for flag in (True, False):
            by_kernel = _fused_ties(*arguments, normalize=flag, scale=0.3)
            by_torch = ties.merge_ties(*arguments, normalize=flag, scale=0.3)
            agree &= torch.equal(by_kernel, by_torch)
            by_kernel = _fused_dare(*arguments, keys, scale=0.3, elect_sign=flag)
            by_torch = drop.merge_dare(*arguments, keys, scale=0.3, elect_sign=flag)
            agree &= torch.equal(by_kernel, by_torch)
        problem = "gives other results than PyTorch"
    except torch.cuda.OutOfMemoryError:
        raise  # it says nothing of Triton
    except Exception as error:  # whatever a compiler may raise
        agree = False
        problem = f"fails ({type(error).__name__}: {error})"
    if not agree:
        warnings.warn(
            f"Triton {problem} on {device} in {dtype}, so fast_ties and dare take longer there",
            stacklevel=2,
        )
    return agree


def _trial_tensors(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """A base and three fine-tunes, many of whose values are equal in two of them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for is_rounded in (True, False, True, True):
        # With --multi-gpu mergekit makes a GPU the default device, which no such generator has.
        values = torch.randn(_TRIED, generator=generator, device="cpu", dtype=torch.float32)
        made.append((values.mul(64).round() / 64 if is_rounded else values).to(device, dtype))
    return made
