"""Graph tasks that mergekit lacks: loading with a check for NaN and Inf, copying, constants and
random tensors.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter

from _mergekit_moe_ext_common.errors import UserError

_LET_THROUGH = "`allow_nonfinite: true` under `parameters:` lets it through"
Distribution = Callable[[tuple[int, ...], float, torch.Generator], torch.Tensor]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or Inf. Makes no copy: the extremes show both."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def cast_finite(tensor: torch.Tensor, dtype: torch.dtype | None, what: str) -> torch.Tensor:
    """`tensor.to(dtype)`, whose values must stay finite. `UserError` says `what` does not fit."""
    cast = tensor.to(dtype) if dtype else tensor
    if cast is not tensor and not is_finite(cast):
        raise UserError(f"{what} has values too large for {dtype}; {_LET_THROUGH}")
    return cast


class LoadFiniteTensor(LoadTensor):
    """`LoadTensor` that refuses NaN and Inf, naming model and tensor."""

    def execute(self) -> torch.Tensor | None:
        tensor = LoadTensor(**{**dict(self), "dtype": None}).execute()
        if tensor is None:
            return None
        what = f"{self.tensor} of {self.model}"
        if not is_finite(tensor):
            raise UserError(f"{what} holds NaN or Inf; {_LET_THROUGH}")
        return cast_finite(tensor, dtype_from_name(self.dtype), what)


class RefuseNonfinite(Task[torch.Tensor | None]):
    """Passes a merged tensor on in the dtype in which it is written, if it is finite."""

    tensor_task: Task
    name: str
    out_dtype: str | None = None

    def arguments(self) -> dict[str, Task]:
        return {"tensor": self.tensor_task}

    def group_label(self) -> str | None:
        return self.tensor_task.group_label()

    def execute(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if not is_finite(tensor):
            raise UserError(f"merging {self.name} gave NaN or Inf; {_LET_THROUGH}")
        return cast_finite(tensor, dtype_from_name(self.out_dtype), self.name)


class GatherFiniteTensors(GatherTensors):
    """`GatherTensors` whose tensors are loaded by `LoadFiniteTensor`."""

    def arguments(self) -> dict[str, Task]:
        return {key: LoadFiniteTensor(**dict(load)) for key, load in super().arguments().items()}


class CopyTensors(Task[None]):
    """Writes tensors of the sources to the output as they are, one after the other.

    One task for many tensors, because the executor's planning is quadratic in the number of tasks
    that write, and models have thousands of experts.
    """

    copies: tuple[tuple[str, LoadTensor], ...]  # name in the output, and what loads it
    writer_task: TensorWriterTask
    out_dtype: str | None = None
    clone: bool = False

    def arguments(self) -> dict[str, Task]:
        return {"writer": self.writer_task}

    def priority(self) -> int:
        return 1000

    def group_label(self) -> str:
        return self.copies[0][0]

    def execute(self, writer: TensorWriter) -> None:
        out_dtype = dtype_from_name(self.out_dtype)
        for name, load in self.copies:
            tensor = load.execute()
            if isinstance(load, LoadFiniteTensor):
                tensor = cast_finite(tensor, out_dtype, name)
            elif out_dtype:
                tensor = tensor.to(out_dtype)
            writer.save_tensor(name, tensor, clone=self.clone)


class StackedExperts(Task[torch.Tensor]):
    """All experts of a layer in one tensor: (experts, rows, columns). Of each, its tensors joined
    along the rows.
    """

    experts: tuple[tuple[LoadTensor, ...], ...]
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> torch.Tensor:
        stacked = torch.empty(self.shape, dtype=dtype_from_name(self.dtype), device="cpu")
        for expert, parts in zip(stacked, self.experts, strict=True):
            rows = expert.chunk(len(parts))
            for target, load in zip(rows, parts, strict=True):
                target.copy_(load.execute())
        return stacked


class ExpertRows(Task[torch.Tensor]):
    """A tensor in which experts lie side by side: those of the sources that are taken, source after
    source.

    With `scaled_by`, the router's matrix of every source, the part of each source is multiplied by
    a number that brings the mean norm of that matrix's rows to its average over the sources.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    sources: tuple[tuple[LoadTensor, tuple[int, ...]], ...]
    scaled_by: tuple[LoadTensor, ...] = ()

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> torch.Tensor:
        parts = []
        for load, indices in self.sources:
            tensor = load.execute()
            parts.append(
                tensor.index_select(self.axis, torch.tensor(indices, device=tensor.device))
            )
        if self.scaled_by:
            norms = [_mean_norm_of_rows(load.execute()) for load in self.scaled_by]
            target = sum(norms) / len(norms)
            # one that has this norm already is left alone, so that a single source stays bit for
            # bit; and so are zeros
            parts = [
                part if n in (target, 0) else part * (target / n)
                for part, n in zip(parts, norms, strict=True)
            ]
        joined = torch.cat(parts, dim=self.axis)
        assert joined.shape == self.shape, f"{self.name} is {tuple(joined.shape)}, not {self.shape}"
        return joined


def _mean_norm_of_rows(matrix: torch.Tensor) -> float:
    return matrix.float().norm(dim=1).mean().item()


class Filled(Task[torch.Tensor]):
    """One value everywhere."""

    name: str  # makes it another task than the next one of the same shape
    shape: tuple[int, ...]
    dtype: str
    value: float = 0.0

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> torch.Tensor:
        return torch.full(self.shape, self.value, dtype=dtype_from_name(self.dtype), device="cpu")


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


def _uniform(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    bound = std * math.sqrt(3)  # a uniform distribution over (-bound, bound) has this std
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def _zeros(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape, device="cpu")


DISTRIBUTIONS: dict[str, Distribution] = {
    "random": _normal,
    "uniform_random": _uniform,
    "zeros": _zeros,
}


class RandomTensor(Task[torch.Tensor]):
    """A gate, or another tensor that starts at random.

    It depends on the seed and its own name, not on when or where it is made. Drawn in float32 on
    the CPU, then cast.
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
        generator = torch.Generator("cpu").manual_seed(
            int.from_bytes(digest[:8], "little", signed=True)
        )
        return DISTRIBUTIONS[self.mode](self.shape, self.std, generator).to(
            dtype_from_name(self.dtype)
        )
