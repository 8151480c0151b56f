"""Graph tasks that mergekit lacks: loading with a check for NaN and Inf, copying, constants and
random tensors.
"""

import functools
import hashlib
import math
from collections.abc import Callable

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter

from _mergekit_moe_ext_common.checkpoints import is_finite
from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.views import is_mapped
from mergekit_moe_ext.merging.writer import BehindWriter, Entry

_LET_THROUGH = "`allow_nonfinite: true` under `parameters:` lets it through"
Distribution = Callable[[tuple[int, ...], float, torch.Generator], torch.Tensor]


def cast_finite(tensor: torch.Tensor, dtype: torch.dtype | None, what: str) -> torch.Tensor:
    """`tensor.to(dtype)`, whose values must stay finite; else a `UserError` about `what`."""
    cast = tensor.to(dtype) if dtype else tensor
    if cast is not tensor and not is_finite(cast):
        raise UserError(f"{what} has values too large for {dtype}; {_LET_THROUGH}")
    return cast


class LoadFiniteTensor(LoadTensor):
    """A `LoadTensor` that refuses NaN and Inf, with an error that names model and tensor."""

    def execute(self) -> torch.Tensor | None:
        tensor = as_stored(self)
        return None if tensor is None else self.checked(tensor)

    def checked(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stored tensor in the dtype that is asked for, if it is finite; else an error."""
        label = f"{self.tensor} of {self.model}"
        if not is_finite(tensor):
            raise UserError(f"{label} holds NaN or Inf; {_LET_THROUGH}")
        return cast_finite(tensor, dtype_from_name(self.dtype), label)


def as_stored(load: LoadTensor) -> torch.Tensor | None:
    """What `load` reads, before it is cast or checked."""
    return LoadTensor(**{**dict(load), "dtype": None}).execute()


class RefuseNonfinite(Task[torch.Tensor | None]):
    """A merged tensor in the dtype in which it is written, if it is finite; else an error."""

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
    """A `GatherTensors` whose tensors are loaded by `LoadFiniteTensor`."""

    def arguments(self) -> dict[str, Task]:
        return {key: LoadFiniteTensor(**dict(load)) for key, load in super().arguments().items()}


class CopyTensors(Task[None]):
    """The writing of tensors of the sources to the output as they are, one after the other.

    It is one task for many tensors, because the executor's planning is quadratic in the number of
    tasks that write, and models have thousands of experts.
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
        # What is read by the thread that writes comes first, before all merges, so that there is
        # always something to write.
        if all(_lies_in_file(load) for _, load in self.copies):
            return ""
        return self.copies[0][0]

    def execute(self, writer: TensorWriter) -> None:
        for name, load in self.copies:
            stored = as_stored(load)
            assert stored is not None, f"{load.tensor} of {load.model} is missing"
            make = functools.partial(self._as_written, name, load, stored)
            if isinstance(writer, BehindWriter):
                dtype = dtype_from_name(self.out_dtype or load.dtype) or stored.dtype
                held = 0 if _lies_in_file(load) else stored.nbytes
                writer.save_later(Entry(name, dtype, tuple(stored.shape)), make, held)
            else:
                writer.save_tensor(name, make(), clone=self.clone)

    def _as_written(self, name: str, load: LoadTensor, stored: torch.Tensor) -> torch.Tensor:
        """A tensor of a source as it stands in the output."""
        out_dtype = dtype_from_name(self.out_dtype)
        if isinstance(load, LoadFiniteTensor):
            return cast_finite(load.checked(stored), out_dtype, name)
        cast = stored.to(dtype_from_name(load.dtype)) if load.dtype else stored
        return cast.to(out_dtype) if out_dtype else cast


def _lies_in_file(load: LoadTensor) -> bool:
    """Whether what is read takes no memory until it is used."""
    is_on_cpu = load.device in (None, "cpu")
    return is_on_cpu and is_mapped(LoaderCache().get(load.model), load.tensor)


class StackedExperts(Task[torch.Tensor]):
    """All experts of a layer in one tensor (experts, rows, columns), the tensors of each joined
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
    """A tensor in which the experts that are taken of the sources lie side by side, source after
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
            rows = torch.tensor(indices, device=tensor.device)
            parts.append(tensor.index_select(self.axis, rows))
        if self.scaled_by:
            norms = [_mean_norm_of_rows(load.execute()) for load in self.scaled_by]
            target = sum(norms) / len(norms)
            # A part that has this norm already is left alone, so that a single source stays the
            # same bit for bit; and so are zeros.
            for index, norm in enumerate(norms):
                if norm not in (target, 0):
                    parts[index] = parts[index] * (target / norm)
        joined = torch.cat(parts, dim=self.axis)
        assert joined.shape == self.shape, f"{self.name} is {tuple(joined.shape)}, not {self.shape}"
        return joined


def _mean_norm_of_rows(matrix: torch.Tensor) -> float:
    return matrix.float().norm(dim=1).mean().item()


class Filled(Task[torch.Tensor]):
    """A tensor with one value everywhere."""

    name: str  # sets it apart from other tasks with the same shape, since equal tasks are run once
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

    It depends on the seed and its own name, not on when or where it is made. It is drawn in float32
    on the CPU, then cast.
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
        seed = int.from_bytes(digest[:8], "little", signed=True)
        generator = torch.Generator("cpu").manual_seed(seed)
        tensor = DISTRIBUTIONS[self.mode](self.shape, self.std, generator)
        return tensor.to(dtype_from_name(self.dtype))
