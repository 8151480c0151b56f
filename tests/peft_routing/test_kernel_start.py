"""How a kernel is started: what Triton has compiled is used again, where it fits."""

from typing import Any

import torch

from peft_routing.kernel_start import Started, start


class Kernel:
    """What Triton makes of a function, which writes down how it is started."""

    def __init__(self, calls: list[Any], name: str, gives: Any) -> None:
        self.calls = calls
        self.name = name
        self.gives = gives

    def __getitem__(self, grid: Any) -> Any:
        def started(*arguments: Any, **options: Any) -> Any:
            self.calls.append((self.name, grid, arguments, options))
            return self.gives

        return started


def make_kernel() -> tuple[Kernel, list[Any]]:
    calls: list[Any] = []
    return Kernel(calls, "searched", Kernel(calls, "compiled", None)), calls


GRID = (3, 2, 1)


def test_a_compiled_kernel_is_used_again_with_the_addresses_of_tensors() -> None:
    kernel, calls = make_kernel()
    started = Started()
    first = torch.zeros(8)
    second = torch.zeros(8)
    started.start(kernel, GRID, [first], [7], [True], num_warps=4)
    started.start(kernel, GRID, [second], [8], [True], num_warps=4)
    assert calls == [
        ("searched", GRID, (first, 7, True), {"num_warps": 4}),
        ("compiled", GRID, (second.data_ptr(), 8, True), {}),
    ]


def test_it_is_not_used_for_other_alignments() -> None:
    kernel, calls = make_kernel()
    started = Started()
    aligned = torch.zeros(8)
    shifted = torch.zeros(9)[1:]
    for tensor in (shifted, aligned, shifted, aligned):
        started.start(kernel, GRID, [tensor], [], [])
    assert [name for name, *_ in calls] == ["searched", "searched", "searched", "compiled"]


def test_an_interpreter_compiles_nothing() -> None:
    calls: list[Any] = []
    kernel = Kernel(calls, "interpreted", None)
    started = Started()
    tensor = torch.zeros(8)
    for _ in range(2):
        started.start(kernel, GRID, [tensor], [1.5], [])
    start(kernel, GRID, [tensor], [1.5], [])
    assert calls == [("interpreted", GRID, (tensor, 1.5), {})] * 3
