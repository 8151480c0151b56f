"""Graph tasks that mergekit lacks: loading with a check for NaN and Inf, and copying many tensors."""

import click
import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or Inf. Makes no copy: the extremes show both."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


class LoadFiniteTensor(LoadTensor):
    """`LoadTensor` that refuses NaN and Inf, naming model and tensor."""

    def execute(self) -> torch.Tensor | None:
        tensor = super().execute()
        if tensor is not None and not is_finite(tensor):
            raise click.ClickException(
                f"{self.tensor} of {self.model} holds NaN or Inf; "
                "`allow_nonfinite: true` under `parameters:` lets it through"
            )
        return tensor


class GatherFiniteTensors(GatherTensors):
    """`GatherTensors` whose tensors are loaded by `LoadFiniteTensor`."""

    def arguments(self) -> dict[str, Task]:
        return {key: LoadFiniteTensor(**dict(load)) for key, load in super().arguments().items()}


class CopyTensors(Task[None]):
    """Writes tensors of the sources to the output as they are, one after the other.

    One task for many tensors, because the executor's planning is quadratic in the number of tasks
    that write, and models have thousands of experts.
    """

    copies: tuple[tuple[str, ModelReference, str], ...]  # name in the output, source, name there
    writer_task: TensorWriterTask
    load: type[LoadTensor]
    dtype: str | None = None
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
        for output_name, model, source_name in self.copies:
            tensor = self.load(model=model, tensor=source_name, dtype=self.dtype).execute()
            writer.save_tensor(output_name, tensor.to(out_dtype) if out_dtype else tensor, clone=self.clone)
