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

HEADS = ("classifier", "score", "classification_head")  # what transformers calls them


@dataclass(frozen=True)
class Landscape:
    """Mean losses in nats: `losses` of each of the `tasks` are (points, points), at the `scales`
    l_1 (row), l_2.
    """

    tasks: tuple[str, str]
    scales: tuple[float, ...]
    losses: tuple[Tensor, Tensor]

    @property
    def joint(self) -> Tensor:
        """L_1 + L_2."""
        return self.losses[0] + self.losses[1]

    def lowest(self, losses: Tensor) -> tuple[float, float, float]:
        """l_1, l_2 and the loss where it is lowest on the grid."""
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
    `batches`, by the same names, are what the model's `forward` takes: of a classifier with the
    right classes as `labels` (samples,), of a decoder with `labels` or without, where its own
    tokens are those to predict, of an encoder-decoder with `labels`; -100 is left out. A loss is
    the mean over all samples or tokens of a task.

    The head of a classifier is no part of the plane: the loss of a task is taken with its source's
    own. `UserError` for other than two sources, models that differ in more than that, and batches
    without labels or for other tasks.
    """
    if len(sources) != 2:
        raise UserError(f"the plane is that of two fine-tunes, not of {len(sources)}")
    if set(batches) != set(sources):
        raise UserError(
            f"there are sources {', '.join(sources)}, and inputs of {', '.join(batches)}"
        )
    model = copy.deepcopy(base).eval()
    head = None if model.can_generate() else _head(model)
    plane = _plane(model, [base, *sources.values()], list(sources), head)
    heads = {
        task: copy.deepcopy(getattr(source, head)).eval()
        for task, source in sources.items()
        if head
    }
    held = {task: list(of_task) for task, of_task in batches.items()}
    found: dict[str, list[float]] = {task: [] for task in sources}
    for first, second in tqdm(
        list(itertools.product(scales, scales)), desc="points", disable=quiet
    ):
        for at, start, one, other in plane:
            # exact at the corners: in this form a source's weights come out as they are
            torch.mul(start, 1 - first - second, out=at).add_(one, alpha=first).add_(
                other, alpha=second
            )
        for task in sources:
            if head:
                setattr(model, head, heads[task])
            found[task].append(_mean_loss(model, task, held[task]))
    one, other = (
        torch.tensor(losses, dtype=torch.float64).view(len(scales), -1) for losses in found.values()
    )
    first_task, second_task = sources
    return Landscape((first_task, second_task), tuple(scales), (one, other))


def _head(model: nn.Module) -> str | None:
    return next((name for name, _ in model.named_children() if name in HEADS), None)


def _plane(
    model: nn.Module, given: Sequence[nn.Module], names: Sequence[str], head: str | None
) -> list[tuple[Tensor, ...]]:
    """Per parameter outside of the head that of the model, the base and both sources."""
    wanted, *all_parameters = (_without(each, head) for each in (model, *given))
    for name, of_source in zip(names, all_parameters[1:], strict=True):
        shapes, of_base = (
            {key: tuple(p.shape) for key, p in each.items()} for each in (of_source, wanted)
        )
        differing = sorted(
            key for key in shapes.keys() | of_base.keys() if shapes.get(key) != of_base.get(key)
        )
        if differing:
            key = differing[0]
            raise UserError(
                f"{name} is no fine-tune of the base: {key} is {shapes.get(key, 'absent')}, "
                f"not {of_base.get(key, 'absent')}"
            )
    return [(at, *(parameters[key] for parameters in all_parameters)) for key, at in wanted.items()]


def _without(model: nn.Module, head: str | None) -> dict[str, Tensor]:
    """Its parameters by name, without those of the head."""
    return {
        name: p
        for name, p in model.named_parameters()
        if not (head and name.startswith(f"{head}."))
    }


def _mean_loss(model: Any, task: str, batches: Sequence[Mapping[str, Tensor]]) -> float:
    total, count = 0.0, 0
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
    """Logits (…, classes) and the right classes (…)."""
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
        inputs["labels"] = labels  # the model makes of them what its decoder reads
    return model(**inputs).logits, labels
