"""The tasks of `compare`: what is learned on, chosen on and measured on."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from _mergekit_moe_ext_common.data import Source, load, parse_sources, tokenise
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import vocabulary_of
from _mergekit_moe_ext_common.options import Reading
from peft_routing.fusion.cache import Texts

LOG = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")
# Of one source: half of the rows for training, a quarter each for the others.
_BY_TRAIN_TEST = 0.5
_FEWEST_ROWS = 4


def read_tasks(
    tasks: Mapping[str, str],
    tokenizer: Any,
    config: Any,
    reading: Reading,
    *,
    completions_only: bool = False,
    max_samples: int | None = None,
    seed: int = 42,
) -> dict[str, list[Texts]]:
    """The texts of each split, a task after the other.

    Args:
        tasks: SOURCE, whose rows are split here, or TRAIN,VALIDATION,TEST by the task's name, each
            `SOURCE[:SPLIT]`.
        config: that of the base model.
        completions_only: score the answers alone.
        max_samples: the first so many rows of each source.
        seed: of the split of one source.

    `UserError` for what cannot be read. A warning says where a row of the test is in another split.
    """
    if not tasks:
        raise UserError("there is no task: name one with --task, math=math.jsonl")
    texts: dict[str, list[Texts]] = {split: [] for split in SPLITS}
    for task, written in tasks.items():
        sources = _sources(task, written)
        encoded = []
        for source in sources:
            encoded.append(
                tokenise(
                    load(source, max_samples),
                    source,
                    tokenizer,
                    columns=reading.columns,
                    max_length=reading.max_length,
                    vocabulary=vocabulary_of(config),
                    encoder_decoder=config.is_encoder_decoder,
                    completions_only=completions_only,
                )
            )
        if len(encoded) == 1:
            encoded = _split(task, encoded[0], seed)
        for split, rows in zip(SPLITS, encoded, strict=True):
            texts[split].append(Texts.of(task, split, rows, config.is_encoder_decoder))
        _warn_of_overlap(task, encoded)
    return texts


def _sources(task: str, written: str) -> list[Source]:
    """One source or three. `UserError` for another number, or an empty one."""
    parts = written.split(",")
    if len(parts) not in (1, len(SPLITS)) or not all(parts):
        raise UserError(
            f"--task {task}={written}: name one source, which is split, or three: "
            "TRAIN,VALIDATION,TEST"
        )
    return [parse_sources([f"{task}={part}"])[0] for part in parts]


def _split(task: str, rows: Dataset, seed: int) -> list[Dataset]:
    if len(rows) < _FEWEST_ROWS:
        raise UserError(
            f"task {task!r} has {len(rows)} rows, too few for a split into train, validation and "
            "test: name three sources, TRAIN,VALIDATION,TEST"
        )
    halves = rows.train_test_split(test_size=_BY_TRAIN_TEST, seed=seed)
    quarters = halves["test"].train_test_split(test_size=_BY_TRAIN_TEST, seed=seed)
    return [halves["train"], quarters["train"], quarters["test"]]


def _warn_of_overlap(task: str, splits: list[Dataset]) -> None:
    """A warning where rows are measured on that coefficients are learned or chosen on."""
    train, validation, test = splits
    elsewhere = {_digest(row) for row in train} | {_digest(row) for row in validation}
    common = sum(_digest(row) in elsewhere for row in test)
    if common:
        LOG.warning(
            "task %r: %d of %d rows of the test are in train or validation, too: its figures are "
            "too good",
            task,
            common,
            len(test),
        )


def _digest(row: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(repr(sorted(row.items())).encode()).digest()
