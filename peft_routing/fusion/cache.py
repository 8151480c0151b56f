"""The cache of `compare`: log-probabilities of target tokens, per subject, task and split.

A subject is the base model, with an adapter on it or without. Its log-probabilities of a task's
texts are one file, whose name follows from what they depend on and from nothing else: the sha256 of
the base model, of the adapter and of the token ids. So what was measured once is never measured
again, one more adapter costs one adapter, and a run that was interrupted goes on where it was.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from _mergekit_moe_ext_common.checkpoints import damage
from _mergekit_moe_ext_common.data import collate, decoder_inputs, fingerprint
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import new_file
from peft_routing.routers import wide

# A file of another layout, or of another way to measure, has another name.
_VERSION = 1
_TENSOR = "log_probabilities"


@dataclass(frozen=True)
class Texts:
    """The rows of one split of one task, as token ids.

    counts: the number of target tokens of each row.
    fingerprint: the sha256 of the token ids.
    """

    task: str
    split: str
    rows: Dataset
    counts: list[int]
    fingerprint: str

    @classmethod
    def of(cls, task: str, split: str, rows: Dataset, is_encoder_decoder: bool) -> "Texts":
        """The rows with their counts. `UserError` where no row has a token to predict."""
        counts = []
        for row in rows:
            # A decoder predicts every token but the first; an encoder-decoder every target.
            targets = row.get("labels", row["input_ids"])
            if not is_encoder_decoder:
                targets = targets[1:]
            counts.append(sum(target != -100 for target in targets))
        if not sum(counts):
            raise UserError(f"task {task!r}, {split}: there is no token to predict")
        return cls(task, split, rows, counts, fingerprint(rows))


@dataclass(frozen=True)
class Subject:
    """What is measured: the base model with something on it.

    name: what it is called in messages.
    fingerprint: the sha256 of everything but the base model and the texts that its results depend
    on.
    put_on: makes the model to measure out of the base model. What it returns has `unload`, unless
    it is the base model itself, or `stays_on`.
    stays_on: whether the base model cannot be had back from it, and is loaded again.
    running: makes what is called like a model out of that one, where it is not the model itself.
    """

    name: str
    fingerprint: str
    put_on: Callable[[Any], Any]
    stays_on: bool = False
    running: Callable[[Any], Any] = lambda model: model


@dataclass(frozen=True)
class Measured:
    """A subject's log-probabilities of a task's target tokens, float32 (tokens,), in nats.

    seconds: the time of the forward passes.
    tokens_read: the number of tokens that went through the model, without padding.
    machine: where that time was measured, as `this_machine` calls it.
    """

    log_probabilities: Tensor
    seconds: float
    tokens_read: int
    machine: str


class Cache:
    """A directory of what was measured with one base model."""

    def __init__(self, directory: Path, base_fingerprint: str) -> None:
        self.directory = directory
        self._base = base_fingerprint

    def path(self, subject: Subject, texts: Texts) -> Path:
        """The file of a subject and a task's texts."""
        return self.named(subject, [texts.fingerprint, texts.counts], "safetensors")

    def named(self, subject: Subject, parts: Sequence[Any], suffix: str) -> Path:
        """The file of what follows from a subject and from `parts`, which JSON can write."""
        everything = [_VERSION, self._base, subject.fingerprint, *parts]
        name = hashlib.sha256(json.dumps(everything).encode()).hexdigest()
        return self.directory / f"{name}.{suffix}"

    def has(self, subject: Subject, texts: Texts) -> bool:
        return self.path(subject, texts).exists()

    def read(self, subject: Subject, texts: Texts) -> Measured:
        """What was measured. `UserError` where the file is damaged."""
        path = self.path(subject, texts)
        remedy = "remove it, and it is measured again"
        try:
            with safe_open(path, framework="pt") as file:
                values = file.get_tensor(_TENSOR)
                notes = file.metadata()
            measured = Measured(
                values,
                float(notes["seconds"]),
                int(notes["tokens_read"]),
                notes.get("machine", ""),  # which files of the first version do not say
            )
        # Whatever a damaged file makes its reader raise.
        except Exception as error:
            raise UserError(f"{damage(path, error)}; {remedy}") from error
        if values.shape != (sum(texts.counts),) or not torch.isfinite(values).all():
            raise UserError(f"{path} does not hold what its name says; {remedy}")
        return measured

    def write(self, subject: Subject, texts: Texts, measured: Measured) -> None:
        """Keeps what was measured, whole or not at all. `UserError` where it cannot be written."""
        notes = {
            "subject": subject.name,
            "task": texts.task,
            "split": texts.split,
            "seconds": repr(measured.seconds),
            "tokens_read": str(measured.tokens_read),
            "machine": measured.machine,
        }
        with new_file(self.path(subject, texts)) as partial:
            save_file({_TENSOR: measured.log_probabilities}, partial, metadata=notes)


def processes() -> PartialState:
    """The processes that accelerate has started, or this one."""
    # Without GPUs it would see one process, however many there are, unless it is told.
    return PartialState(cpu=not torch.cuda.is_available())


def fill(
    cache: Cache,
    work: Sequence[tuple[Subject, Sequence[Texts]]],
    load_base: Callable[[], Any],
    pad_token_id: int,
    *,
    batch_size: int,
    quiet: bool,
) -> None:
    """Measures what the cache lacks, on as many processes as accelerate has started.

    `work` has each subject with the texts that it is to read. Each process takes its share of the
    subjects, and afterwards all of it is in the directory.
    `load_base` is called where something is to be measured. `UserError` where a log-probability is
    not finite, and where the directory cannot be written.
    """
    try:
        cache.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {cache.directory}: {error.strerror}") from error
    lacking = []
    for subject, texts in work:
        of_subject = [each for each in texts if not cache.has(subject, each)]
        if of_subject:
            lacking.append((subject, of_subject))

    def measure_and_keep(model: Any, subject: Subject, texts: Texts, bar: Any) -> None:
        measured = measure(model, texts.rows, pad_token_id, batch_size, bar)
        _check(measured, subject, texts)
        cache.write(subject, texts, measured)

    for_each(lacking, measure_and_keep, load_base, quiet=quiet)


class WithRows(Protocol):
    """What a subject is to read."""

    @property
    def rows(self) -> Any: ...


Read = TypeVar("Read", bound=WithRows)


def for_each(
    lacking: Sequence[tuple[Subject, Sequence[Read]]],
    work: Callable[[Any, Subject, Read, Any], None],
    load_base: Callable[[], Any],
    *,
    quiet: bool,
) -> None:
    """Calls `work` with what runs, the subject, what it reads and a bar of rows, for all that is
    lacking.

    Each process takes its share of the subjects, and none returns before all are done. `load_base`
    is called where there is something to do.
    """
    state = processes()
    state.wait_for_everyone()  # so that all of them have looked before one writes
    with state.split_between_processes(lacking) as share:
        total = 0
        for _, of_subject in share:
            total += sum(len(each.rows) for each in of_subject)
        with tqdm(total=total, unit="rows", disable=quiet or not total) as bar:
            base = None
            for subject, of_subject in share:
                bar.set_description(subject.name)
                if base is None:
                    base = load_base().to(state.device).eval()
                model = subject.put_on(base).eval()
                running = subject.running(model)
                for each in of_subject:
                    work(running, subject, each, bar)
                if subject.stays_on:
                    base = None
                elif model is not base:
                    base = model.unload()
                del model, running  # so that no two of them are in memory
    state.wait_for_everyone()


def _check(measured: Measured, subject: Subject, texts: Texts) -> None:
    finite = torch.isfinite(measured.log_probabilities)
    if not finite.all():
        raise UserError(
            f"{subject.name}, task {texts.task!r}, {texts.split}: {int((~finite).sum())} of "
            f"{len(finite)} log-probabilities are NaN or infinite"
        )


@torch.no_grad()
def measure(
    model: Any, rows: Dataset, pad_token_id: int, batch_size: int, bar: Any = None
) -> Measured:
    """A model's log-probabilities of the target tokens of rows, in the order of the rows.

    `bar` shows how many rows are done.
    """
    items = list(rows)
    # Rows of about one length share a batch, so that little of it is padding.
    order = sorted(range(len(items)), key=lambda place: len(items[place]["input_ids"]))
    of_rows: dict[int, Tensor] = {}
    seconds = 0.0
    tokens_read = 0
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = collate([items[place] for place in places], pad_token_id)
        tokens_read += int(batch["attention_mask"].sum())
        began = time.perf_counter()
        values = list(_of_batch(model, {key: each.to(model.device) for key, each in batch.items()}))
        seconds += time.perf_counter() - began
        of_rows.update(zip(places, values, strict=True))
        if bar is not None:
            bar.update(len(places))
    in_order = [of_rows[place] for place in range(len(items))]
    return Measured(torch.cat(in_order), seconds, tokens_read, this_machine())


def _of_batch(model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """(targets,) of each row: the log-probabilities of its target tokens, on the CPU."""
    targets = batch.pop("labels", None)
    if targets is None:
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if model.config.is_encoder_decoder:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        batch["decoder_input_ids"] = decoder_inputs(base, targets)
    else:
        targets = targets[:, 1:]
    logits = model(**batch, use_cache=False).logits
    # One row at a time: the logits of all of them in float32 would take much memory.
    for of_row, of_targets in zip(logits, targets, strict=True):
        is_target = of_targets != -100
        own = wide(of_row[: len(of_targets)][is_target])
        chosen = own.gather(1, of_targets[is_target][:, None])[:, 0]
        yield (chosen - own.logsumexp(dim=1)).float().cpu()


def this_machine() -> str:
    """A digest by which times can be told to be of one machine: its name, GPU and threads."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    parts = [platform.node(), platform.machine(), gpu, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def milliseconds_per_token(measured: Sequence[Measured]) -> float | None:
    """The time of the forward passes per token that was read.

    None where any of them was measured on another machine.
    """
    if any(each.machine != this_machine() for each in measured):
        return None
    seconds = math.fsum(each.seconds for each in measured)
    return 1000 * seconds / sum(each.tokens_read for each in measured)
