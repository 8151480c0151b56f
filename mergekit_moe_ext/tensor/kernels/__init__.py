"""Tensor arithmetic of the merge methods: pure functions of tensors, in time linear in their size.

They run over chunks of a flat tensor, so that the memory they need beside their inputs and their
result is a small constant. The result depends neither on the chunk size, nor on the number of
threads, nor on the device.
"""

from collections.abc import Iterator

import torch

# Small enough to stay in the CPU's caches from one operation to the next, and large enough that the
# threads of an operation, which wait for each other at its end, do so rarely: on a busy machine
# each such wait may take longer than the work.
_CPU_CHUNK = 1 << 19
_ACCELERATOR_CHUNK = 1 << 24


def chunks(flat: torch.Tensor) -> Iterator[slice]:
    """Consecutive slices that cover a flat tensor, of a size that suits its device."""
    size = _CPU_CHUNK if flat.device.type == "cpu" else _ACCELERATOR_CHUNK
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))
