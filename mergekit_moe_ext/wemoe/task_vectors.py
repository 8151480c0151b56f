"""Graph tasks that make task vectors, source minus base, whole or pruned."""

from typing import Literal

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from torch import Tensor


class TaskVectors(Task[Tensor]):
    """The task vectors of one tensor, source minus base: (sources, *shape), in float32 or wider."""

    base: LoadTensor
    sources: tuple[LoadTensor, ...]

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str:
        return self.base.tensor

    def execute(self, **_kwargs: object) -> Tensor:
        start = _loaded(self.base)
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        vectors = start.new_empty(len(self.sources), *start.shape)
        for vector, source in zip(vectors, self.sources, strict=True):
            torch.sub(_loaded(source).to(start), start, out=vector)
        return vectors


def _loaded(load: LoadTensor) -> Tensor:
    tensor = load.execute()
    assert tensor is not None
    return tensor


class Stacked(Task[Tensor]):
    """Whole task vectors in the dtype in which they are written."""

    vectors: TaskVectors
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {"vectors": self.vectors}

    def execute(self, vectors: Tensor) -> Tensor:
        return vectors.to(dtype_from_name(self.dtype))


class Pruned(Task[tuple[Tensor, Tensor]]):
    """The largest elements of each task vector by magnitude, and their flat indices, both (sources,
    kept).
    """

    vectors: TaskVectors
    kept: int

    def arguments(self) -> dict[str, Task]:
        return {"vectors": self.vectors}

    def execute(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        # In the order of their places, since the layer looks for the elements of some rows.
        flat = vectors.flatten(1)
        largest = flat.abs().topk(self.kept, dim=1, sorted=False).indices
        places = largest.sort(dim=1).values
        return flat.gather(1, places), places


class WithZeros(Task[Tensor]):
    """Pruned task vectors with zeros where elements were dropped, (sources, *shape), in the dtype
    in which they are written.
    """

    pruned: Pruned
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {"pruned": self.pruned}

    def execute(self, pruned: tuple[Tensor, Tensor]) -> Tensor:
        values, places = pruned
        dense = values.new_zeros(self.shape)
        dense.flatten(1).scatter_(1, places, values)
        return dense.to(dtype_from_name(self.dtype))


class PartOfPruned(Task[Tensor]):
    """One tensor of a pruned task vector: `values`, the `columns` that they lie in, or `row_ends`,
    where each row ends among them.
    """

    pruned: Pruned
    part: Literal["values", "columns", "row_ends"]
    shape: tuple[int, ...]
    width: int
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {"pruned": self.pruned}

    def execute(self, pruned: tuple[Tensor, Tensor]) -> Tensor:
        values, places = pruned
        if self.part == "values":
            return values.to(dtype_from_name(self.dtype))
        if self.part == "columns":
            return (places % self.width).to(torch.uint16 if self.width <= 2**16 else torch.int32)
        # Places go up, so that a row ends before the first place that is in the next one.
        next_rows = torch.arange(1, self.shape[1] + 1, device=places.device) * self.width
        next_rows = next_rows.expand(len(places), -1).contiguous()
        return torch.searchsorted(places, next_rows).int()
