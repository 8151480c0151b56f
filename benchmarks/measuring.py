"""Seconds, memory and operations of a piece of work, on a CPU or a GPU."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(work: Callable[[], object], device: str) -> int:
    """The peak of memory during the work, beyond what was held before, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes of a field of this process's status on Linux, which states kibibytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def best_seconds(work: Callable[[], object], device: str, runs: int = 5) -> float:
    """The fastest of so many runs, or of fewer if they take more than five seconds together."""
    best = float("inf")
    total = 0.0
    for _ in range(runs):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        best = min(best, seconds)
        total += seconds
        if total > 5:
            break
    return best


def best_in_turn(
    works: Mapping[Any, Callable[[], object]], device: str, seconds: float
) -> dict[Any, float]:
    """The fastest run of each in seconds. They are run in turn for about `seconds` seconds, at
    least three rounds and at most fifty.

    With one thread on a CPU it is processor time, so that other work on the machine does not count.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    best = dict.fromkeys(works, float("inf"))
    end = clock() + seconds
    rounds = 0
    while rounds < 3 or (clock() < end and rounds < 50):
        for name, work in works.items():
            started = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], clock() - started)
        rounds += 1
    return best


@torch.no_grad()
def operations(work: Callable[[], object], device: str = "cpu") -> int:
    """The number of operations in one run: on a GPU its kernels and copies, else the operations
    of PyTorch that Python starts.

    It is exact, where times are not. Of a small model the number of launches is what takes time.
    """
    work()  # what is made only once, like a table of sines, does not count
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    count = 0
    for event in profiler.events():
        if device == "cuda":
            count += event.device_type == torch.autograd.DeviceType.CUDA
            continue
        parent = event.cpu_parent
        is_within_another = parent is not None and parent.key.startswith("aten::")
        count += event.key.startswith("aten::") and not is_within_another
    return count
