"""The inputs and predictions of a weight-ensembling model or a stock one, for adaptation and the
analyses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction

from _mergekit_moe_ext_common.data import collate, decoder_inputs
from _mergekit_moe_ext_common.loading import padding_token, vocabulary_of
from mergekit_moe_ext.modeling.wemoe_calls import BATCH
from mergekit_moe_ext.wemoe.inputs import Kind
from mergekit_moe_ext.wemoe.objective import entropy


@dataclass(frozen=True)
class Predictions:
    """The batches that a model of one kind reads, and its predictions for them.

    prepare: its tokenizer or image processor.
    prefix: the number of a decoder's first tokens whose predictions do not count.
    coefficients_per: `sample`, or `batch` for the mean of those of a batch's samples.
    """

    model: Any
    kind: Kind
    prepare: Any
    prefix: int
    image_column: str
    coefficients_per: str = "sample"

    def batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
        """The data collator: rows `{task: row}`, all of one task, become `{task: inputs}`."""
        (task,) = set().union(*rows)
        return {task: self._inputs([row[task] for row in rows])}

    def _inputs(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        labels = torch.tensor([row["label"] for row in rows]) if "label" in rows[0] else None
        if self.kind == "image":
            images = [row[self.image_column].convert("RGB") for row in rows]
            tensors = dict(self.prepare(images, return_tensors="pt"))
        else:
            tensors = collate(rows, padding_token(self.prepare, vocabulary_of(self.model.config)))
        if self.kind == "encoder-decoder":
            tensors["decoder_input_ids"] = decoder_inputs(self.model, tensors["labels"])
        return tensors if labels is None else {**tensors, "labels": labels}

    def of(
        self,
        model: Any,
        task: str,
        batch: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The predictions for a batch, one per row of classes, or one per token to predict.

        Returns logits (predictions, classes) in float32; the right classes (predictions,), None
        where they are unknown; and the row of the batch that each prediction is of (predictions,).
        """
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
        if self.model.ensembling.heads:
            inputs["task"] = task
        if self.coefficients_per == "batch":
            inputs["coefficients"] = BATCH
        if self.model.can_generate():
            inputs["use_cache"] = False
        logits = model(**inputs).logits
        labels = batch.get("labels")
        if self.kind == "decoder":
            # The logits at one position predict the token at the next. Predictions of tokens in the
            # prefix depend, through the coefficients, on later tokens, and so do not count.
            real = batch["attention_mask"].bool()
            is_predicted = (real & (real.cumsum(dim=1) > self.prefix))[:, 1:]
            logits = logits[:, :-1][is_predicted]
            labels = batch["input_ids"][:, 1:][is_predicted]
        elif self.kind == "encoder-decoder":
            assert labels is not None
            is_predicted = labels != -100
            logits = logits[is_predicted]
            labels = labels[is_predicted]
        else:
            is_predicted = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return logits.float(), labels, is_predicted.nonzero()[:, 0]

    def by_row(
        self,
        model: Any,
        task: str,
        batch: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The sums of two measures over each row's predictions (rows, 2), and the number of these
        predictions (rows,).

        The first measure is the entropy, the second whether the class is right, or the loss; it is
        NaN where the right classes are unknown.
        """
        logits, classes, rows = self.of(model, task, batch)
        if classes is None:
            second = torch.full(logits.shape[:1], torch.nan, device=logits.device)
        elif self._second == "accuracy":
            second = (logits.argmax(-1) == classes).float()
        else:
            second = functional.cross_entropy(logits, classes, reduction="none")
        size = len(next(iter(batch.values())))
        values = torch.stack([entropy(logits), second], dim=1)
        sums = logits.new_zeros(size, 2).index_add(0, rows, values)
        return sums, torch.bincount(rows, minlength=size)

    @property
    def _second(self) -> str:
        return "accuracy" if self.kind in ("text", "image") else "loss"

    def measures(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means over all predictions, from sums and numbers as `by_row` gives them."""
        sums: Any = prediction.predictions
        means = sums.sum(axis=0, dtype=np.float64) / prediction.label_ids.sum()
        values = {"entropy": float(means[0]), self._second: float(means[1])}
        # The second measure is NaN where the right classes are unknown.
        return {name: value for name, value in values.items() if not np.isnan(value)}
