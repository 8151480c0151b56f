"""Texts to train on, to measure and to count with, read by `datasets`, as token ids.

A source is written `[NAME=]SOURCE[:SPLIT]`. SOURCE is a file (jsonl, json, csv, tsv or txt, which
may be compressed by gz, bz2 or xz, parquet or arrow), a directory of such, a directory written by
`save_to_disk`, or `owner/name[/config]` on the Hub. SPLIT is a split as `datasets` writes it,
`train` if not given. Columns are `messages` (a chat) or `text` for decoders, and `input` and
`target` for encoder-decoders and for decoders that learn completions only; where there are both,
`messages` are read and not `text`.
"""

import bz2
import gzip
import hashlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from jinja2 import TemplateError

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import USUAL_COLUMNS, Columns, is_there

_BUILDERS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tsv": "csv",
    ".txt": "text",
}
_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".bz2": bz2.open,
    ".gz": gzip.open,
    ".xz": lzma.open,
}
_COMPRESSED = ("csv", "json", "text")  # builders that read compressed files
_PART = r"\w+(?:\[[^\]]*\])?"
_SPLIT = re.compile(rf"(.+?):({_PART}(?:\+{_PART})*)")
_NAME = re.compile(r"([^=/:]+)=(.+)")
# Rows in one call of a tokenizer. A call costs more than a short row does, and one for many long
# rows holds all of their tokens before it cuts them.
_ROWS_PER_CALL = 128
_UNREADABLE = (TypeError, ValueError, KeyError, TemplateError)  # what a bad row raises
Rows = dict[str, list[Any]]
Encoder = Callable[[Rows], dict[str, list[list[int]]]]


@dataclass(frozen=True)
class Source:
    """Texts to read: their name in tables and messages, where they are, and which split."""

    name: str
    path: str
    split: str = "train"

    def __str__(self) -> str:
        return self.path if self.split == "train" else f"{self.path}:{self.split}"


def parse_sources(texts: Iterable[str]) -> list[Source]:
    """The sources that are written `[NAME=]SOURCE[:SPLIT]`. `UserError` if two have one name."""
    sources = [_parse(text) for text in texts]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are called {name!r}; name them: --data NAME=SOURCE")
    return sources


def _parse(text: str) -> Source:
    # A path may have `=` and `:` in it: what exists as it stands is not taken apart.
    name = None
    path = text
    split = "train"
    named = _NAME.fullmatch(text)
    if named and not is_there(text):
        name, path = named.groups()
        name = name.strip()
    with_split = _SPLIT.fullmatch(path)
    if with_split and not is_there(path):
        path, split = with_split.groups()
    if not path:
        raise UserError(
            f"--data {text!r} names no file, directory or dataset: [NAME=]SOURCE[:SPLIT]"
        )
    return Source(name or Path(path).name.split(".")[0], path, split)


def load(source: Source, max_samples: int | None = None) -> Dataset:
    """The rows of a source, the first `max_samples` of them. `UserError` for what cannot be
    read."""
    data = _all_rows(source)
    if max_samples is not None:
        data = data.select(range(min(max_samples, len(data))))
    if len(data) == 0:
        raise UserError(f"{source} (data {source.name!r}) has no rows")
    _check_encoding(data, source)
    return data


def _all_rows(source: Source) -> Dataset:
    """All rows of a source, which may be none. `UserError` for a source that cannot be read."""
    path = Path(source.path).expanduser()
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _saved_split(path, source)
        return load_dataset(**dataset_arguments(source))
    except UserError:  # says what is wrong already
        raise
    except StopIteration:  # what datasets raises for an empty file
        raise UserError(f"{source} (data {source.name!r}) has no rows") from None
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        DatasetGenerationError,
        DatasetNotFoundError,
    ) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"cannot read {source} (data {source.name!r}): {reason}") from error


def _saved_split(path: Path, source: Source) -> Dataset:
    """The split of a dataset that `save_to_disk` wrote. `UserError` where it has no such split."""
    loaded = load_from_disk(path)
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    if source.split not in splits:
        raise UserError(
            f"{source} (data {source.name!r}): a saved dataset is read by whole splits; "
            "there are " + ", ".join(splits)
        )
    return splits[source.split]


def _check_encoding(data: Dataset, source: Source) -> None:
    """`UserError` for a file whose texts are not all UTF-8."""
    # JSON is read as it is, and what is no text would fail where it is used. Only a file is looked
    # at whole: a dataset on the Hub may be huge, and is in UTF-8.
    if not Path(source.path).expanduser().is_file():
        return
    try:
        data.data.validate(full=True)
    except ValueError as error:
        reason = str(error).rpartition(": ")[2]
        raise UserError(
            f"cannot read {source} (data {source.name!r}): not all of its texts are UTF-8 "
            f"({reason}); save it in UTF-8"
        ) from error


def dataset_arguments(source: Source) -> dict[str, Any]:
    """The arguments of `load_dataset` for a source that was not saved by `save_to_disk`.

    `UserError` for a file that does not exist or is of another kind.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        is_compressed = path.suffix in _OPENERS
        suffix = Path(path.stem).suffix if is_compressed else path.suffix
        builder = _BUILDERS.get(suffix)
        if builder is None or (is_compressed and builder not in _COMPRESSED):
            raise UserError(
                f"{path} is none of {', '.join(sorted(_BUILDERS))}, nor a compressed file of text "
                f"(.jsonl{', .jsonl'.join(_OPENERS)})"
            )
        if builder == "json":
            _check_first_row(path)
        delimiter = {"sep": "\t"} if suffix == ".tsv" else {}
        # the file's only split is called train, so a split of it is a slice of that
        return {
            "path": builder,
            "data_files": {"train": str(path)},
            "split": source.split,
            **delimiter,
        }
    if path.is_dir():
        return {"path": str(path), "split": source.split}
    # A name with an owner may be one of the Hub, but not within a directory that is there.
    has_folder = "/" in source.path and path.parent.is_dir()
    is_local = source.path.startswith((".", "/", "~")) or has_folder
    if is_local or path.suffix in {*_BUILDERS, *_OPENERS}:
        raise UserError(f"{source.path} does not exist (data {source.name!r})")
    # owner/name[/config], or the name alone of a dataset without an owner
    parts = source.path.rstrip("/").split("/")
    if len(parts) > 3:
        raise UserError(
            f"{source.path} (data {source.name!r}) is no dataset on the Hub, which is "
            "owner/name[/config], and no directory here"
        )
    config = {"name": parts[2]} if len(parts) == 3 else {}
    return {"path": "/".join(parts[:2]), **config, "split": source.split}


def _check_first_row(path: Path) -> None:
    """`UserError` for JSON whose first row is null, on which Arrow's reader crashes the process."""
    opener = _OPENERS.get(path.suffix)
    with opener(path) if opener else path.open("rb") as file:
        beginning = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if beginning.removeprefix(b"[").lstrip().startswith(b"null"):
        raise UserError(f"the first row of {path} is null: take it out")


def tokenise(
    data: Dataset,
    source: Source,
    tokenizer: Any,
    *,
    columns: Columns = USUAL_COLUMNS,
    max_length: int | None,
    max_target_length: int | None = None,
    vocabulary: int | None = None,
    encoder_decoder: bool = False,
    completions_only: bool = False,
) -> Dataset:
    """The `input_ids` of each row, cut to `max_length` tokens, and `labels` where they differ.

    Labels are an encoder-decoder's targets or, with `completions_only`, a decoder's last answer of
    a chat or target after an input, with -100 for what comes before it. With `max_target_length`
    inputs and targets are cut one by one, without it a decoder's row as a whole. Empty rows are
    left out.
    `UserError` for missing columns, and for a row that cannot be read or has a token that is not
    among the first `vocabulary` ones, which the model knows.
    """
    encode = _encoder(
        source,
        data.column_names,
        tokenizer,
        columns,
        max_length,
        max_target_length,
        encoder_decoder=encoder_decoder,
        completions_only=completions_only,
    )

    def encode_or_explain(rows: Rows, numbers: list[int]) -> dict[str, list[list[int]]]:
        try:
            encoded = encode(rows)
        except _UNREADABLE:  # one by one, so that the message names the row
            encoded = _encoded_one_by_one(encode, rows, numbers, source)
        _check_tokens(encoded, numbers, source, vocabulary)
        is_full = [all(ids) for ids in zip(*encoded.values(), strict=True)]
        return {name: list(compress(column, is_full)) for name, column in encoded.items()}

    # Stated, as nothing can be inferred where the first rows are all empty.
    has_labels = encoder_decoder or completions_only
    names = ("input_ids", "labels") if has_labels else ("input_ids",)
    encoded = data.map(
        encode_or_explain,
        batched=True,
        batch_size=_ROWS_PER_CALL,
        with_indices=True,
        remove_columns=data.column_names,
        features=Features({name: [Value("int32")] for name in names}),
        desc=f"tokenising {source.name}",
    )
    if len(encoded) == 0:
        raise UserError(f"{source} (data {source.name!r}) has no tokens")
    return encoded


def _encoded_one_by_one(
    encode: Encoder, rows: Rows, numbers: Sequence[int], source: Source
) -> dict[str, list[list[int]]]:
    """What `encode` makes of the rows. `UserError` for the first that cannot be read."""
    encoded: dict[str, list[list[int]]] = {}
    for place, number in enumerate(numbers):
        row = {name: column[place : place + 1] for name, column in rows.items()}
        try:
            of_row = encode(row)
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"row {number} of {source} (data {source.name!r}): {reason}") from error
        for name, column in of_row.items():
            encoded.setdefault(name, []).extend(column)
    return encoded


def _check_tokens(
    encoded: Mapping[str, Sequence[Sequence[int]]],
    numbers: Sequence[int],
    source: Source,
    vocabulary: int | None,
) -> None:
    """`UserError` for the first row with a token that the model does not know."""
    if vocabulary is None:
        return
    for number, *of_row in zip(numbers, *encoded.values(), strict=True):
        largest = max(max(ids, default=0) for ids in of_row)
        if largest >= vocabulary:
            raise UserError(
                f"row {number} of {source} (data {source.name!r}): the tokenizer makes the token "
                f"{largest} of it, and the model knows {vocabulary} tokens: this is not its "
                "tokenizer"
            )


def _encoder(
    source: Source,
    present: Sequence[str],
    tokenizer: Any,
    columns: Columns,
    max_length: int | None,
    max_target_length: int | None,
    *,
    encoder_decoder: bool,
    completions_only: bool,
) -> Encoder:
    """The function that makes tokens of some rows, by the columns that are present.

    `UserError` for missing columns, and for a length of targets where there are none.
    """
    if max_target_length is not None:
        is_chat = not encoder_decoder and columns.messages in present
        if is_chat or not (encoder_decoder or completions_only):
            raise UserError(
                f"{source} (data {source.name!r}): --max-source-length and --max-target-length are "
                "for inputs with their targets; --max-length cuts whole texts and chats"
            )
    if encoder_decoder:
        needed = (columns.input, columns.target)
        _require(needed, present, source, "an encoder-decoder needs", columns.advice)
        return _encoder_of_pairs(tokenizer, columns, max_length, max_target_length)
    if completions_only and columns.messages not in present:
        needed = (columns.input, columns.target)
        _require(needed, present, source, "completions need", columns.advice)
        return _encoder_of_completions(tokenizer, columns, max_length, max_target_length)
    if columns.messages in present:
        if not tokenizer.chat_template:
            raise UserError(f"{source} holds chats, but the model's tokenizer has no chat template")
        return _encoder_of_chats(
            tokenizer, columns.messages, max_length, completions_only=completions_only
        )
    _require((columns.text,), present, source, "a decoder needs", columns.advice)
    return _encoder_of_texts(tokenizer, columns.text, max_length)


def _cut_to(max_length: int | None) -> dict[str, Any]:
    """The arguments by which a tokenizer cuts each text; None leaves it whole."""
    return {"truncation": max_length is not None, "max_length": max_length}


def _encoder_of_pairs(
    tokenizer: Any, columns: Columns, max_length: int | None, max_target_length: int | None
) -> Encoder:
    """The encoder of inputs with their targets, for an encoder-decoder.

    Targets without a length of their own are cut as the inputs are.
    """
    cut = _cut_to(max_length)
    cut_target = cut if max_target_length is None else _cut_to(max_target_length)

    def encode(rows: Rows) -> dict[str, list[list[int]]]:
        inputs = _checked(rows[columns.input], columns.input)
        targets = _checked(rows[columns.target], columns.target)
        return {
            "input_ids": tokenizer(inputs, **cut)["input_ids"],
            "labels": tokenizer(text_target=targets, **cut_target)["input_ids"],
        }

    return encode


def _encoder_of_completions(
    tokenizer: Any, columns: Columns, max_length: int | None, max_target_length: int | None
) -> Encoder:
    """The encoder of inputs with their targets, for a decoder: a row is an input and its target.

    A row is cut as a whole, unless targets have a length of their own.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    is_cut_apart = max_target_length is not None
    cut_prompt = _cut_to(max_length) if is_cut_apart else {}

    def encode(rows: Rows) -> dict[str, list[list[int]]]:
        inputs = _checked(rows[columns.input], columns.input)
        targets = _checked(rows[columns.target], columns.target)
        prompts = tokenizer(inputs, **cut_prompt)["input_ids"]
        answers = tokenizer(targets, add_special_tokens=False)["input_ids"]
        wholes = []
        for prompt, answer in zip(prompts, answers, strict=True):
            # All of the answer, unless targets have a length of their own.
            wholes.append(prompt + (answer + end)[:max_target_length])
        return _completions(prompts, wholes, None if is_cut_apart else max_length)

    return encode


def _encoder_of_chats(
    tokenizer: Any, column: str, max_length: int | None, *, completions_only: bool
) -> Encoder:
    """The encoder of chats; with `completions_only` the last answer of each has the labels."""
    options = {"tokenize": True, "return_dict": False}

    def encode(rows: Rows) -> dict[str, list[list[int]]]:
        chats = _checked_chats(rows[column], column)
        wholes = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
        if not completions_only:
            return {"input_ids": [ids[:max_length] for ids in wholes]}
        prompts = []
        for chat, ids in zip(chats, wholes, strict=True):
            prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **options)
            if ids[: len(prompt)] != prompt:
                raise UserError(
                    "the chat template does not continue a prompt, so its last answer cannot be "
                    "found"
                )
            prompts.append(prompt)
        return _completions(prompts, wholes, max_length)

    return encode


def _encoder_of_texts(tokenizer: Any, column: str, max_length: int | None) -> Encoder:
    """The encoder of plain texts."""
    cut = _cut_to(max_length)

    def encode(rows: Rows) -> dict[str, list[list[int]]]:
        # A text that is null is empty, and left out as such.
        texts = ["" if text is None else text for text in rows[column]]
        return {"input_ids": tokenizer(_checked(texts, column), **cut)["input_ids"]}

    return encode


def _checked(texts: list[Any], column: str) -> list[str]:
    """The texts of a column. `TypeError` for what is none, which a tokenizer may take for a pair of
    texts.
    """
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"the column {column!r} holds {str(text)[:40]!r}, which is no text")
    return texts


def _checked_chats(chats: list[Any], column: str) -> list[Any]:
    """The chats of a column. `TypeError` for what is none, of which a template would say little."""
    for chat in chats:
        if not isinstance(chat, list):
            shown = "null" if chat is None else repr(str(chat)[:40])
            raise TypeError(f"the column {column!r} holds {shown}, which is no list of messages")
        for message in chat:
            if not isinstance(message, Mapping):
                shown = "null" if message is None else repr(str(message)[:40])
                raise TypeError(
                    f"the column {column!r} has {shown} among its messages, which is no message"
                )
    return chats


def _completions(
    prompts: Sequence[Sequence[int]], wholes: Sequence[list[int]], max_length: int | None
) -> dict[str, list[list[int]]]:
    """Rows whose labels are the tokens after their prompts, cut to `max_length` tokens."""
    labels = []
    for prompt, ids in zip(prompts, wholes, strict=True):
        labels.append(([-100] * len(prompt) + ids[len(prompt) :])[:max_length])
    return {"input_ids": [ids[:max_length] for ids in wholes], "labels": labels}


def _require(
    needed: Sequence[str], present: Sequence[str], source: Source, who: str, advice: str
) -> None:
    """`UserError` for the first needed column that is not present; `who` needs it."""
    for name in needed:
        if name not in present:
            raise UserError(
                f"{source} (data {source.name!r}) has no column {name!r}: {who} "
                f"{' and '.join(needed)}; there are {', '.join(present)} ({advice})"
            )


def pack(data: Dataset, length: int, separator: int | None) -> Dataset:
    """The rows joined, with `separator` after each, and cut into rows of `length` tokens.

    A thousand rows are joined at a time, so that the last of their new rows may be shorter.
    """

    def joined(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        end = [] if separator is None else [separator]
        ids: list[int] = []
        for row in rows["input_ids"]:
            ids += [*row, *end]
        return {"input_ids": [ids[start : start + length] for start in range(0, len(ids), length)]}

    return data.map(
        joined, batched=True, batch_size=1000, remove_columns=data.column_names, desc="packing"
    )


def fingerprint(data: Dataset) -> str:
    """The sha256 of all token ids: the same for the same texts and tokenizer, wherever they lie."""
    digest = hashlib.sha256()
    for batch in data.with_format("arrow").iter(batch_size=1000):
        for name in sorted(batch.column_names):
            rows = batch[name].combine_chunks()
            for numbers in (rows.value_lengths(), rows.flatten()):
                digest.update(numbers.to_numpy(zero_copy_only=False).astype("int64").tobytes())
    return digest.hexdigest()


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right: `input_ids`, `attention_mask`, and, where the rows have
    them, `labels` with -100 as padding.
    """

    def padded(name: str, value: int) -> torch.Tensor:
        tensors = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    ids = padded("input_ids", pad_token_id)
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }
    if "labels" in rows[0]:
        batch["labels"] = padded("labels", -100)
    return batch


def training_batches(
    model: Any, pad_token_id: int, first_label: int = 1
) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
    """A data collator: batches as `collate` makes them, with `labels`.

    Where rows have none, they are the tokens themselves. An encoder-decoder gets what its decoder
    reads; a decoder's labels before `first_label`, which it is not to predict, are -100.
    """

    def batch(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tensors = collate(rows, pad_token_id)
        if "labels" not in tensors:
            is_padding = tensors["attention_mask"] == 0
            tensors["labels"] = tensors["input_ids"].masked_fill(is_padding, -100)
        if model.config.is_encoder_decoder:
            # Held-out losses are computed from logits, without labels to make these from.
            tensors["decoder_input_ids"] = decoder_inputs(model, tensors["labels"])
        else:
            tensors["labels"][:, :first_label] = -100
        return tensors

    return batch


class RealTokens(NamedTuple):
    """Which tokens are not padding, as booleans of shape (batch, length)."""

    inputs: torch.Tensor
    targets: torch.Tensor  # what the decoder of an encoder-decoder reads


def real_tokens(batch: Mapping[str, torch.Tensor]) -> RealTokens:
    """The real tokens of a batch as `collate` makes it; without labels, targets are the inputs."""
    inputs = batch["attention_mask"].bool()
    targets = batch["labels"] != -100 if "labels" in batch else inputs
    return RealTokens(inputs, targets)


def decoder_inputs(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """The tokens that an encoder-decoder's decoder reads to predict the labels."""
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise UserError(
            f"{type(model).__name__} does not say what its decoder reads, so it is not run"
        )
    try:
        return model.prepare_decoder_input_ids_from_labels(labels)
    except (AttributeError, ValueError) as error:
        starts = getattr(model.config, "decoder_start_token_id", None) is not None
        key = "pad_token_id" if starts else "decoder_start_token_id"
        raise UserError(
            f"the config of the model does not say how its decoder starts: set `{key}` in "
            "config.json (T5 and Switch Transformers start with the padding token)"
        ) from error
