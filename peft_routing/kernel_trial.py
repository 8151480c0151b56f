"""Whether the kernels of a routed layer compute on a device what PyTorch computes there."""

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_routing import mixing
from peft_routing.kernel_start import Started, StartedFew
from peft_routing.routers.tensors import is_captured, largest

# Not a multiple of the tokens of one program, and columns enough to be read ahead of their use.
_TOKENS = 19
_WIDTH = 64
_FEW = 3  # tokens for the kernels that take a few
_WIDTH_OF_FEW = 2100  # which they read in two turns
_SCALING = 1.5  # of all experts
_CLEAR = 0.01  # scores that differ by less may choose otherwise


class Use(NamedTuple):
    """What kernels are compiled for: hidden states of a dtype, so many experts of one rank, scores
    that are absolute values or not, a way of mixing, how many experts are chosen, whether their
    scalings differ, whether gradients or a compiled model need the kernels as an operation, and
    whether they are those for a few tokens.
    """

    dtype: torch.dtype
    experts: int
    rank: int
    absolute: bool
    is_low_rank: bool
    k: int
    differ: bool
    as_operation: bool
    is_few: bool


@torch.compiler.assume_constant_result
def works(
    device: torch.device,
    dtype: torch.dtype,
    experts: int,
    rank: int,
    absolute: bool,
    is_low_rank: bool,
    k: int,
    differ: bool,
    as_operation: bool,
    is_few: bool,
) -> bool:
    """Whether the kernels can be used on a device, which is tried there once; the rest is `Use`,
    field by field, since a compiler hands over an empty tuple in place of a named one.

    A version of Triton with which they do not compute what they should, or a GPU with too little
    memory for them, gives a warning, and they are not used.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if type(torch.empty(0)) is not Tensor:
        return False  # an export, in which nothing can be tried
    use = Use(dtype, experts, rank, absolute, is_low_rank, k, differ, as_operation, is_few)
    known = _known.get((device, use))
    if known is None:
        if is_captured(device):
            return False  # a CUDA graph, in which nothing can be tried
        try:
            known = _tried(device, use)
        except torch.cuda.OutOfMemoryError:
            return False  # for now
        _known[device, use] = known
    return known


_known: dict[tuple[torch.device, Use], bool] = {}


def _tried(device: torch.device, use: Use) -> bool:
    try:
        kernels: Any = importlib.import_module("peft_routing.kernel")
        if not kernels.fits(use.experts, use.rank):
            return False
        # It may be asked within a pass that has no gradients.
        with torch.inference_mode(False), torch.enable_grad():
            agree = compute_alike(device, use)
        problem = "gives other results than PyTorch"
    except torch.cuda.OutOfMemoryError:
        raise  # it says nothing of Triton
    except Exception as error:  # whatever a compiler may raise
        agree = False
        problem = f"fails ({type(error).__name__}: {error})"
    if not agree:
        warnings.warn(
            f"Triton {problem} on {device} with {use.experts} experts of rank {use.rank}, so "
            "routed layers take longer there",
            stacklevel=2,
        )
    return agree


def compute_alike(device: torch.device, use: Use) -> bool:
    """Whether the kernels' results, and their gradients, are those of float64 but for rounding."""
    if use.is_few:
        # Experts are read as they are held, or as copies in the dtype of the hidden states.
        return all(_add_alike(device, use, each) for each in {torch.float32, use.dtype})
    generator = torch.Generator().manual_seed(0)
    hidden = _random((_TOKENS, _WIDTH), generator).to(device, torch.bfloat16)
    weight = _random((use.experts, _WIDTH), generator).to(device)
    z = _random((_TOKENS, use.experts * use.rank), generator).to(device, torch.bfloat16)
    scalings, each_scaling = _scalings(use, device)
    exact_inputs = [each.double().requires_grad_(use.as_operation) for each in (hidden, weight, z)]
    exact_hidden, exact_weight, exact_z = exact_inputs
    exact, is_clear = _exactly(exact_hidden, exact_weight, exact_z, each_scaling, use)

    options = {
        "scaling": _SCALING,
        "k": use.k,
        "temperature": 1.0,
        "absolute": use.absolute,
        "is_low_rank": use.is_low_rank,
    }
    if not use.as_operation:
        kernels: Any = importlib.import_module("peft_routing.kernel")
        rows = kernels.parts_for(hidden, weight)
        started = Started()
        for _ in range(2):  # the second time without Triton's own search for it
            weighed = kernels.weigh(hidden, rows, z, scalings, **options, started=started)
            if not _is_near(weighed[is_clear], exact[is_clear]):
                return False
        return True
    operation: Any = importlib.import_module("peft_routing.kernel_op")
    inputs = [each.requires_grad_() for each in (hidden, weight, z)]
    weighed = operation.weigh(*inputs, scalings, **options, is_estimated=False)
    arriving = _random(exact.shape, generator).to(device, torch.bfloat16)
    arriving = arriving * is_clear[:, None]
    gradients = torch.autograd.grad(weighed, inputs, arriving)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, arriving.double())
    are_near = [_is_near(weighed[is_clear], exact[is_clear])]
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        are_near.append(_is_near(gradient, exact_gradient))
    return all(are_near)


def _add_alike(device: torch.device, use: Use, of_experts: torch.dtype) -> bool:
    """Whether the kernels for a few tokens give what float64 gives but for rounding."""
    generator = torch.Generator().manual_seed(0)
    ranks = use.experts * use.rank
    made = []
    for shape, dtype in (
        ((_FEW, _WIDTH), use.dtype),  # the base layer's output
        ((_FEW, _WIDTH_OF_FEW), use.dtype),
        ((use.experts, _WIDTH_OF_FEW), torch.float32),
        ((ranks, _WIDTH_OF_FEW), of_experts),
        ((ranks, _WIDTH), of_experts),
    ):
        made.append(_random(shape, generator).to(device, dtype))
    result, hidden, weight, a, b = made
    scalings, each_scaling = _scalings(use, device)
    z = hidden.double() @ a.double().T
    weighed, is_clear = _exactly(hidden.double(), weight.double(), z, each_scaling, use)
    exact = result.double() + weighed @ b.double()

    outputs = []
    choice = use.k, 1.0, use.absolute, use.is_low_rank, _SCALING
    if use.as_operation:
        operation: Any = importlib.import_module("peft_routing.kernel_op")
        outputs.append(operation.add_to_few(*made, scalings, *choice))
    else:
        kernels: Any = importlib.import_module("peft_routing.kernel_few")
        few = StartedFew()
        for _ in range(2):  # the second time without Triton's own search for them
            outputs.append(kernels.added(*made, scalings, *choice, few=few))
    return all(_is_near(output[is_clear], exact[is_clear]) for output in outputs)


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers in float32 on the CPU, whatever a program has made the default of either."""
    return torch.randn(tuple(shape), generator=generator, device="cpu", dtype=torch.float32)


def _scalings(use: Use, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The scalings that kernels are given beside the number, and in float64 what they are then."""
    if not use.differ:
        return None, torch.full((use.experts,), _SCALING, device=device, dtype=torch.float64)
    scalings = torch.linspace(0.5, 1.5, use.experts, device=device, dtype=torch.float32)
    return scalings, _SCALING * scalings.double()


def _exactly(
    hidden: Tensor, weight: Tensor, z: Tensor, scalings: Tensor, use: Use
) -> tuple[Tensor, Tensor]:
    """z weighed, by PyTorch's operations, and which of its tokens have a clear choice."""
    k = use.k
    scores = hidden @ weight.T
    if use.absolute:
        scores = scores.abs()
    coefficients = largest(scores, k).softmax(dim=1)
    weigh = mixing.low_rank if use.is_low_rank else mixing.full
    of_experts = z.view(-1, use.experts, use.rank)
    weighed = weigh(of_experts, coefficients, coefficients * scalings).reshape(z.shape)
    in_order = scores.sort(dim=1, descending=True).values
    if k == use.experts:
        return weighed, torch.ones(len(z), dtype=torch.bool, device=z.device)
    return weighed, in_order[:, k - 1] - in_order[:, k] > _CLEAR


def _is_near(values: Tensor, exact: Tensor) -> bool:
    # Where there is nothing to choose a gradient is 0, and only rounding is left.
    difference = (values.double() - exact).norm()
    return bool(difference <= 0.02 * exact.norm() + 1e-3)
