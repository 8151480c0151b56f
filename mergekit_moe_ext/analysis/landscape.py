"""The losses of two tasks on the plane of their task vectors (WEMoE, figures 2 and 7).

At theta_0 + l_1 tau_1 + l_2 tau_2 no single model is best for both tasks.
`examples/loss_landscape.py` prints and draws what is measured here.
"""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from _mergekit_moe_ext_common.errors import UserError

HEADS = ("classifier", "score", "classification_head")  # transformers' names for them


@dataclass(frozen=True)
class Landscape:
    """Mean losses in nats of two tasks, on a grid.

    losses: of each of the `tasks`, (points, points), at the `scales` l_1 (row) and l_2 (column).
    """

    tasks: tuple[str, str]
    scales: tuple[float, ...]
    losses: tuple[Tensor, Tensor]

    @property
    def joint(self) -> Tensor:
        """The sum of the two losses, L_1 + L_2."""
        return self.losses[0] + self.losses[1]

    def lowest(self, losses: Tensor) -> tuple[float, float, float]:
        """The point l_1, l_2 of the grid at which these losses are lowest, and the loss there."""
        row, column = divmod(int(losses.argmin()), len(self.scales))
        return self.scales[row], self.scales[column], losses[row, column].item()


@torch.no_grad()
def loss_landscape(
    base: Any,
    sources: Mapping[str, Any],
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    scales: Sequence[float],
    *,
    quiet: bool = True,
) -> Landscape:
    """The losses at base + l_1 (first - base) + l_2 (second - base), for each l_1 and l_2 in
    `scales`.

    `base` and the two `sources`, by the names of their tasks, are loaded models of one class; none
    is changed, and there is one copy more of the base while this runs. Buffers are the base's.
    `batches`, by the same names, hold the arguments of the model's `forward`. Those of a classifier
    have the right classes as `labels` (samples,), those of an encoder-decoder have `labels`, and
    those of a decoder may have `labels` in place of its own tokens; -100 is left out. A loss is the
    mean over all samples or tokens of a task.

    The head of a classifier is not part of the plane: the loss of a task is taken with its source's
    own. `UserError` for other than two sources, for models that differ in more than the head, and
    for batches without labels or for other tasks.
    """
    if len(sources) != 2:
        raise UserError(f"the plane is that of two fine-tunes, not of {len(sources)}")
    if set(batches) != set(sources):
        raise UserError(
            f"there are sources {', '.join(sources)}, and inputs of {', '.join(batches)}"
        )
    model = copy.deepcopy(base).eval()
    head = None if model.can_generate() else _head(model)
    plane = _plane(model, base, sources, head)
    heads = {}
    if head:
        for task, source in sources.items():
            heads[task] = copy.deepcopy(getattr(source, head)).eval()
    inputs = {task: list(task_batches) for task, task_batches in batches.items()}
    losses: dict[str, list[float]] = {task: [] for task in sources}
    points = list(itertools.product(scales, scales))
    for first_scale, second_scale in tqdm(points, desc="points", disable=quiet):
        for target, start, first, second in plane:
            # Not start + l (source - start): in this form the corners are exact, and a source's
            # weights come out as they are.
            torch.mul(start, 1 - first_scale - second_scale, out=target)
            target.add_(first, alpha=first_scale).add_(second, alpha=second_scale)
        for task in sources:
            if head:
                setattr(model, head, heads[task])
            losses[task].append(_mean_loss(model, task, inputs[task]))
    first_task, second_task = sources
    return Landscape(
        (first_task, second_task),
        tuple(scales),
        (_grid(losses[first_task], len(scales)), _grid(losses[second_task], len(scales))),
    )


def _grid(losses: Sequence[float], rows: int) -> Tensor:
    return torch.tensor(losses, dtype=torch.float64).view(rows, -1)


def _head(model: nn.Module) -> str | None:
    return next((name for name, _ in model.named_children() if name in HEADS), None)


def _plane(
    model: nn.Module, base: nn.Module, sources: Mapping[str, nn.Module], head: str | None
) -> list[tuple[Tensor, ...]]:
    """For each parameter outside of the head, those of the model, the base and both sources."""
    targets = _without(model, head)
    origins = [_without(base, head)]
    base_shapes = {key: tuple(target.shape) for key, target in targets.items()}
    for name, source in sources.items():
        parameters = _without(source, head)
        shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
        for key in sorted(shapes.keys() | base_shapes.keys()):
            if shapes.get(key) != base_shapes.get(key):
                raise UserError(
                    f"{name} is not a fine-tune of the base: {key} is "
                    f"{shapes.get(key, 'absent')}, not {base_shapes.get(key, 'absent')}"
                )
        origins.append(parameters)
    plane = []
    for key, target in targets.items():
        plane.append((target, *(parameters[key] for parameters in origins)))
    return plane


def _without(model: nn.Module, head: str | None) -> dict[str, Tensor]:
    """The parameters of a model by name, without those of the head."""
    parameters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if head is None or not name.startswith(f"{head}."):
            parameters[name] = parameter
    return parameters


def _mean_loss(model: Any, task: str, batches: Sequence[Mapping[str, Tensor]]) -> float:
    total = 0.0
    count = 0
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits, labels = _predicted(model, task, inputs)
        losses = functional.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), reduction="sum"
        )
        total += losses.item()
        count += int((labels != -100).sum())
    if not count:
        raise UserError(f"the inputs of {task!r} have nothing to predict")
    return total / count


def _predicted(model: Any, task: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits (…, classes) for a batch, and the right classes (…)."""
    if model.can_generate() and not model.config.is_encoder_decoder:
        labels = inputs.pop("labels", None)
        if labels is None:
            labels = inputs["input_ids"]
            if "attention_mask" in inputs:
                labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        return model(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:]
    labels = inputs.pop("labels", None)
    if labels is None:
        raise UserError(f"the inputs of {task!r} have no labels")
    if model.can_generate() and "decoder_input_ids" not in inputs:
        inputs["labels"] = labels  # from these the model makes the decoder's inputs
    return model(**inputs).logits, labels
