"""Tensor arithmetic of the merge methods: pure functions of tensors, in time linear in their size.

They run over chunks of a flat tensor, so that the memory they need beside their inputs and their
result is a small constant. The result depends neither on the chunk size, nor on the number of
threads, nor on the device.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], *tensors: torch.Tensor
) -> list[Result]:
    """The results of a function for each item, in their order. On a CPU threads of Python take the
    items, as many as torch would use, and each computes alone.

    torch's own threads wait for each other after every operation, and keep a core busy with that,
    which is needed where another thread writes what was merged before. `tensors` are what is
    computed with: where they are small, on another device, or have gradients, nothing of this is
    done.
    """
    threads = torch.get_num_threads()
    is_small = all(tensor.numel() <= _CPU_CHUNK for tensor in tensors)
    is_on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    has_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if threads == 1 or len(items) == 1 or is_small or not is_on_cpu or has_gradients:
        return [function(item) for item in items]

    is_inference = torch.is_inference_mode_enabled()

    def without_gradients(item: Item) -> Result:
        with torch.inference_mode(is_inference), torch.no_grad():  # each thread has its own
            return function(item)

    torch.set_num_threads(1)  # of the threads that begin now, as well
    try:
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            return list(pool.map(without_gradients, items))
    finally:
        torch.set_num_threads(threads)
