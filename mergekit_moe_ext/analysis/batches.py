"""Inputs for the analyses of weight-ensembling models and of their sources, read as
`mergekit-moe-ext adapt` reads them.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from _mergekit_moe_ext_common.data import Source, load
from _mergekit_moe_ext_common.loading import load_tokenizer
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.recipes import Adaptation
from mergekit_moe_ext.wemoe.inputs import Kind, load_image_processor, model_inputs
from mergekit_moe_ext.wemoe.predictions import Predictions


def read_batches(
    model_path: str,
    model: Any,
    source: Source,
    reading: Reading,
    *,
    batch_size: int,
    max_samples: int | None = None,
    with_labels: bool = False,
    image_column: str = "image",
    label_column: str = "label",
) -> Iterator[dict[str, Tensor]]:
    """Batches of the first `max_samples` rows of a source, as the model takes them. Images are
    decoded when their batch is read.

    With `with_labels`, a batch of a classifier has the right classes as `labels`, by the numbers of
    the model's one head. `UserError`, before the first batch, for data that cannot be read and for
    classes that are not the model's.
    """
    kind = _kind(model)
    if kind == "image":
        prepare = load_image_processor(model_path, reading)
    else:
        prepare = load_tokenizer(model_path, reading)
    rows = load(source, max_samples)
    if kind in ("image", "text") and not with_labels and label_column in rows.column_names:
        rows = rows.remove_columns(label_column)
    # Classes are those of a stock model, whose head is not a task's. Those of a weight-ensembling
    # model are not read.
    config = SimpleNamespace(
        ensembling={"heads": {}}, num_labels=model.config.num_labels, id2label=model.config.id2label
    )
    objective: Any = "supervised" if with_labels else "entropy"
    options = Adaptation(objective=objective, image_column=image_column, label_column=label_column)
    rows = model_inputs(rows, source, kind, prepare, config, reading, options)
    reader = Predictions(model, kind, prepare, prefix=0, image_column=image_column)

    # A function of its own, so that errors come before the first batch is asked for.
    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), batch_size):
            batch_rows = rows.select(range(start, min(start + batch_size, len(rows))))
            yield reader.batch([{source.name: row} for row in batch_rows])[source.name]

    return batches()


def _kind(model: Any) -> Kind:
    if model.main_input_name == "pixel_values":
        return "image"
    if not model.can_generate():
        return "text"
    return "encoder-decoder" if model.config.is_encoder_decoder else "decoder"
