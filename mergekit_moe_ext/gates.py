"""How the gates of an upcycled mixture of experts start."""

import hashlib
import math
from collections.abc import Callable

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Task

GateInit = Callable[[tuple[int, ...], float, torch.Generator], torch.Tensor]


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


def _uniform(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    bound = std * math.sqrt(3)  # a uniform distribution over (-bound, bound) has this std
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def _zeros(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape, device="cpu")


GATE_MODES: dict[str, GateInit] = {"random": _normal, "uniform_random": _uniform, "zeros": _zeros}


class InitialGate(Task[torch.Tensor]):
    """One layer's gate, of shape (experts, hidden).

    It depends on the seed and its own name, not on when or where it is made. Drawn in float32 on the
    CPU, then cast.
    """

    name: str
    shape: tuple[int, ...]
    mode: str
    std: float
    seed: int
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str:
        return self.name

    def execute(self, **_kwargs: object) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{self.name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return GATE_MODES[self.mode](self.shape, self.std, generator).to(dtype_from_name(self.dtype))
