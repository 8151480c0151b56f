"""The inputs that a weight-ensembling model adapts to: images or texts, their classes, and the
order in which they come.
"""

import hashlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, Value
from transformers import AutoImageProcessor

from _mergekit_moe_ext_common.checkpoints import damaged_file
from _mergekit_moe_ext_common.data import Source, fingerprint, tokenise
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import vocabulary_of
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.modeling.configuration_wemoe import class_names
from mergekit_moe_ext.recipes import Adaptation

LOG = logging.getLogger(__name__)
Kind = Literal["decoder", "encoder-decoder", "text", "image"]


def load_image_processor(model_path: str, reading: Reading) -> Any:
    if importlib.util.find_spec("PIL") is None:
        raise UserError("reading images needs Pillow: pip install 'mergekit-moe-ext[images]'")
    try:
        return AutoImageProcessor.from_pretrained(
            str(Path(model_path).expanduser()), trust_remote_code=reading.trust_remote_code
        )
    # Whatever a damaged file makes its reader raise.
    except Exception as error:
        damaged = damaged_file(Path(model_path).expanduser(), "*processor_config.json")
        raise UserError(
            damaged
            or f"{model_path} has no image processor that can be read: put the "
            "preprocessor_config.json of its base there"
        ) from error


def model_inputs(
    rows: Dataset,
    source: Source,
    kind: Kind,
    prepare: Any,
    config: Any,
    reading: Reading,
    adaptation: Adaptation,
) -> Dataset:
    """The rows as a model of this kind takes them; `prepare` is its tokenizer or image
    processor."""
    if kind in ("text", "image"):
        return classified(rows, source, kind, prepare, config, reading, adaptation)
    return tokenise(
        rows,
        source,
        prepare,
        columns=reading.columns,
        max_length=reading.max_length,
        vocabulary=vocabulary_of(config),
        encoder_decoder=kind == "encoder-decoder",
    )


def classified(
    rows: Dataset,
    source: Source,
    kind: Kind,
    prepare: Any,
    config: Any,
    reading: Reading,
    adaptation: Adaptation,
) -> Dataset:
    """Rows of images or of `input_ids`, with the right class as `label` where it is known."""
    labels = labels_of(rows, source, config, adaptation)
    if kind == "image":
        name = adaptation.image_column
        if not isinstance(rows.features.get(name), Image):
            raise UserError(
                f"{source} (data {source.name!r}) has no column {name!r} of images; there are "
                f"{', '.join(rows.column_names)} (--image-column names another)"
            )
        rows = rows.select_columns([name])
    else:
        texts = len(rows)
        rows = tokenise(
            rows,
            source,
            prepare,
            columns=reading.columns,
            max_length=reading.max_length,
            vocabulary=vocabulary_of(config),
        )
        if len(rows) < texts:
            raise UserError(
                f"{source} (data {source.name!r}) has {texts - len(rows)} rows without text"
            )
    return rows if labels is None else rows.add_column("label", labels)


def labels_of(
    rows: Dataset, source: Source, config: Any, adaptation: Adaptation
) -> list[int] | None:
    """The right classes of the rows, by their numbers in the model's head.

    None where the rows have no classes that fit the head; a `UserError` where the objective needs
    them.
    """
    heads = config.ensembling["heads"]
    column = adaptation.label_column
    names = heads[source.name] if heads else class_names(config)
    size = len(names)
    labels, complaint = _classes_in(rows, source, column, names)
    if labels is not None and all(label is not None and 0 <= label < size for label in labels):
        return labels
    if adaptation.objective == "supervised":
        raise UserError(
            f"{source} (data {source.name!r}) {complaint}, and --objective supervised needs them"
        )
    if column in rows.features:
        LOG.warning("%s (data %r) %s: its accuracy is not measured", source, source.name, complaint)
    return None


def _classes_in(
    rows: Dataset, source: Source, column: str, names: Sequence[str]
) -> tuple[list[Any] | None, str]:
    """The classes of the rows by a column, and a complaint about that column.

    The classes are places in `names`, of which some may be impossible (-1, say); None where the
    column is missing, or is of other classes. The complaint ends a sentence that begins with the
    source, for a caller that cannot use the classes.
    """
    size = len(names)
    numbers = {name: number for number, name in enumerate(names)}
    feature = rows.features.get(column)
    if feature is None:
        return None, f"has no column {column!r} of classes (--label-column names another)"
    if isinstance(feature, ClassLabel):
        # Names say more than numbers, which two data sets may give to classes in another order.
        labels = None
        if set(feature.names) <= numbers.keys():
            labels = [numbers[feature.names[value]] for value in rows[column]]
        elif feature.num_classes == size:
            labels = list(rows[column])
            if not names[0].startswith("LABEL_"):  # else the head has no names of its own
                LOG.warning(
                    "%s (data %r) names other classes than the head: they are taken in order, "
                    "%r for %r and so on",
                    source,
                    source.name,
                    feature.names[0],
                    names[0],
                )
        count = feature.num_classes
        return labels, f"has {count} classes, which are not the {size} of the model's head"
    if isinstance(feature, Value) and "int" in feature.dtype:
        return list(rows[column]), f"has classes in {column!r} that are none of 0 to {size - 1}"
    labels = [numbers.get(str(value), -1) for value in rows[column]]
    return labels, f"has classes in {column!r} that the model's head does not name"


def data_fingerprint(rows: Dataset, image_column: str) -> str:
    """A digest by which other data is recognised: of all token ids of texts, of the file names and
    sizes of images, and of the classes.
    """
    if "input_ids" in rows.column_names:
        columns = [name for name in rows.column_names if name != "label"]
        content = fingerprint(rows.select_columns(columns))
    else:
        files = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        content = str([_name_and_size(file[image_column]) for file in files])
    labels = list(rows["label"]) if "label" in rows.column_names else []
    return hashlib.sha256(f"{content} {labels}".encode()).hexdigest()


def _name_and_size(file: dict[str, Any]) -> tuple[str, int]:
    path = Path(file["path"] or "")
    return path.name, path.stat().st_size if file["bytes"] is None else len(file["bytes"])


class Rounds(torch.utils.data.Dataset):
    """Rows `{task: row}`: `batch` of one task, then as many of the next, for `steps` rounds of all
    tasks.

    Every task's rows come in a random order of their own, and in another one when all were seen.
    """

    def __init__(self, tasks: Mapping[str, Dataset], *, batch: int, steps: int, seed: int):
        self._tasks = list(tasks.items())
        self._batch = batch
        self._steps = steps
        self._seed = seed
        # Every row asks for its order: the last two epochs of each task are remembered.
        self._order = lru_cache(2 * len(tasks))(self._permutation)

    def _permutation(self, task: int, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, task, epoch])
        return generator.permutation(len(self._tasks[task][1]))

    def __len__(self) -> int:
        return self._steps * len(self._tasks) * self._batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        # The row follows from the index alone, so that a resumed training meets the same rows.
        batch_number, place_in_batch = divmod(index, self._batch)
        step, task = divmod(batch_number, len(self._tasks))
        name, rows = self._tasks[task]
        # Every step before this one took a whole batch of this task's rows.
        taken_before = step * self._batch + place_in_batch
        epoch, position = divmod(taken_before, len(rows))
        return {name: rows[int(self._order(task, epoch)[position])]}


class One(torch.utils.data.Dataset):
    """The rows of one task as `{task: row}`."""

    def __init__(self, task: str, rows: Dataset):
        self._task = task
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {self._task: self._rows[index]}
