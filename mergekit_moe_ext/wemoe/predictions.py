"""What a weight-ensembling model, or a stock one, reads and predicts, for adaptation and for the analyses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction

from _mergekit_moe_ext_common.data import collate, decoder_inputs
from _mergekit_moe_ext_common.loading import padding_token
from mergekit_moe_ext.wemoe.inputs import Kind
from mergekit_moe_ext.wemoe.objective import entropy


@dataclass(frozen=True)
class Predictions:
    """What a model of one kind reads and predicts."""

    model: Any
    kind: Kind
    prepare: Any  # tokenizer or image processor
    prefix: int  # a decoder's tokens that are not predicted
    image_column: str

    def batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
        """A data collator of rows `{task: row}` of one task."""
        (task,) = {name for row in rows for name in row}
        return {task: self._inputs([row[task] for row in rows])}

    def _inputs(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        labels = torch.tensor([row["label"] for row in rows]) if "label" in rows[0] else None
        if self.kind == "image":
            images = [row[self.image_column].convert("RGB") for row in rows]
            tensors = dict(self.prepare(images, return_tensors="pt"))
        else:
            tensors = collate(rows, padding_token(self.prepare))
        if self.kind == "encoder-decoder":
            tensors["decoder_input_ids"] = decoder_inputs(self.model, tensors["labels"])
        return tensors if labels is None else {**tensors, "labels": labels}

    def of(self, model: Any, task: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits (predictions, classes) in float32, the right classes if known, and the rows that they are of."""
        more: dict[str, Any] = {"task": task} if self.model.ensembling.heads else {}
        if self.model.can_generate():
            more["use_cache"] = False
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, **more).logits
        labels = batch.get("labels")
        if self.kind == "decoder":
            real = batch["attention_mask"].bool()
            chosen = (real & (real.cumsum(dim=1) > self.prefix))[:, 1:]
            logits, labels = logits[:, :-1][chosen], batch["input_ids"][:, 1:][chosen]
        elif self.kind == "encoder-decoder":
            assert labels is not None
            chosen = labels != -100
            logits, labels = logits[chosen], labels[chosen]
        else:
            chosen = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return logits.float(), labels, chosen.nonzero()[:, 0]

    def by_row(self, model: Any, task: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per row the sums of entropy and of right classes or losses (rows, 2), and their number (rows,)."""
        logits, classes, rows = self.of(model, task, batch)
        if classes is None:
            second = torch.full(logits.shape[:1], torch.nan, device=logits.device)
        elif self._second == "accuracy":
            second = (logits.argmax(-1) == classes).float()
        else:
            second = functional.cross_entropy(logits, classes, reduction="none")
        size = len(next(iter(batch.values())))
        sums = logits.new_zeros(size, 2).index_add(0, rows, torch.stack([entropy(logits), second], dim=1))
        return sums, torch.bincount(rows, minlength=size)

    @property
    def _second(self) -> str:
        return "accuracy" if self.kind in ("text", "image") else "loss"

    def measures(self, prediction: EvalPrediction) -> dict[str, float]:
        sums: Any = prediction.predictions
        means = sums.sum(axis=0, dtype=np.float64) / prediction.label_ids.sum()
        named = dict(zip(("entropy", self._second), map(float, means), strict=True))
        return {name: value for name, value in named.items() if value == value}
