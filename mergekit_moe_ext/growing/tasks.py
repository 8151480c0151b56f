"""The graph task that adds experts to a tensor of all experts, or takes them out."""

import torch
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor


class ArrangedExperts(Task[torch.Tensor]):
    """A tensor of all experts of a layer, its router's included, with the experts in `order`.

    new: makes the part of the new experts, (new, …) whatever the axis; their numbers in `order`
        come after those of the old ones.
    """

    name: str
    old: LoadTensor
    new: Task | None
    axis: int
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def arguments(self) -> dict[str, Task]:
        return {"new": self.new} if self.new else {}

    def group_label(self) -> str:
        return self.name

    def execute(self, new: torch.Tensor | None = None, **_kwargs: object) -> torch.Tensor:
        old = self.old.execute()
        assert old is not None, f"{self.name} is not in the files of {self.old.model}"
        # Experts first, whatever the axis, so that rows are taken one by one from either part.
        entries = old.movedim(self.axis, 0)
        number = len(entries)
        result = entries.new_empty((len(self.order), *entries.shape[1:]))
        for target, index in enumerate(self.order):
            if index < number:
                result[target] = entries[index]
            else:
                assert new is not None
                result[target] = new[index - number]
        arranged = result.movedim(0, self.axis).contiguous()
        assert arranged.shape == self.shape, (
            f"{self.name} is {tuple(arranged.shape)}, not {self.shape}"
        )
        return arranged
