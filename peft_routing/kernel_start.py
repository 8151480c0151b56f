"""How a Triton kernel is started again and again with little of Python's time."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = (
    16  # bytes: Triton compiles one kernel for addresses that are multiples, one for others
)


class Started:
    """A kernel as it was compiled for one kind of call.

    In each call Triton looks for the compiled kernel by the types, values and addresses of all
    arguments, which takes Python longer than a product of PyTorch's. Whoever holds this gives it
    arguments that differ in their addresses and in what is not compiled in, and in nothing else.
    """

    def __init__(self) -> None:
        self._compiled: Any = None

    def start(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        numbers: Sequence[float],
        constants: Sequence[Any],
        **options: int,
    ) -> None:
        """Starts the kernel with its arguments, in their order: tensors, numbers, and what is
        compiled in. `options` are those of the compilation.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        are_aligned = not any(address % _ALIGNMENT for address in addresses)
        with _on(tensors[0].device):
            if self._compiled is not None and are_aligned:
                # Of a tensor Triton asks for its address again, and the driver whether it is one.
                self._compiled[grid](*addresses, *numbers, *constants)
                return
            compiled = kernel[grid](*tensors, *numbers, *constants, **options)
        # On AMD's GPUs what is compiled depends on the sizes of tensors as well. In Triton's
        # interpreter it is None.
        if are_aligned and torch.version.hip is None:
            self._compiled = compiled


class StartedFew:
    """The two kernels of `kernel_few`."""

    def __init__(self) -> None:
        self.project = Started()
        self.add = Started()


def start(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: Sequence[Any],
    **options: int,
) -> None:
    """Starts a kernel once, also one that PyTorch's compiler traces: see `Started.start`."""
    with _on(tensors[0].device):
        kernel[grid](*tensors, *numbers, *constants, **options)


def _on(device: torch.device) -> Any:
    """A context in which kernels start on a device; Triton starts them on the current GPU."""
    if device.type != "cuda":
        return nullcontext()
    # To ask which GPU is the current one takes a fraction of what making it so does.
    if torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
