"""Outputs that appear whole or not at all.

A directory is written into a hidden one beside it, which one rename then puts into place. What a
killed command left behind is recognised by its name and removed by the next one with the same
output. A file is written under another name and renamed. Whether either can be written is found out
before the work that it is to hold.
"""

import atexit
import errno
import glob
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from _mergekit_moe_ext_common.errors import UserError

LOG = logging.getLogger(__name__)
# What a model's directory is known to have beside its weights and its config.json: what
# transformers' classes read (`vocab_files_names` of every tokenizer, slow ones of transformers 4
# among them), less what would be unpickled, and what people write for people.
_OF_TOKENIZERS = frozenset(
    (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "bpe.codes",
        "byte_maps.json",
        "dict.txt",
        "emoji.json",
        "entity_vocab.json",
        "merges.txt",
        "normalizer.json",
        "prophetnet.tokenizer",
        "sentencepiece.bpe.model",
        "sentencepiece.model",
        "source.spm",
        "spiece.model",
        "spm.model",
        "spm_char.model",
        "target.spm",
        "target_vocab.json",
        "tekken.json",
        "tiktoken.model",
        "tokenizer.model",
        "vocab-src.json",
        "vocab-tgt.json",
        "vocab.json",
        "vocab.txt",
        "word_pronunciation.json",
        "word_shape.json",
    )
)
_OF_PROCESSORS = frozenset(
    (
        "audio_tokenizer_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    )
)
_TEMPLATES = frozenset(("chat_template.jinja", "chat_template.json"))
_MORE_TEMPLATES = "additional_chat_templates"
_SETTINGS = _OF_PROCESSORS | {"generation_config.json"}
_DOCUMENTS = frozenset(("README.md", "mergekit_config.yml"))
# Some carry their version in their names: `tokenizer.4.0.json`, `tokenizer.model.v3`.
_TOKENIZER_PATTERN = re.compile(
    r"tokenizer\.\d+(\.\d+)*\.json|tokenizer\.model\.v\d+(m\d+)?|[\w-]+\.tiktoken"
)
_LICENCE_PATTERN = re.compile(
    r"(licen[cs]e|notice|copying|(acceptable_)?use_policy)([-_][\w-]+)*(\.(txt|md|rst))?",
    re.IGNORECASE,
)
# The same for the Hub, which takes patterns of the shell.
_HUB_PATTERNS = [
    *sorted(_OF_TOKENIZERS | _TEMPLATES | _SETTINGS | _DOCUMENTS),
    f"{_MORE_TEMPLATES}/*.jinja",
    "tokenizer.*.json",
    "tokenizer.model.v*",
    "*.tiktoken",
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*USE_POLICY*"),
]
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(out_path: str) -> Path:
    """The resolved output directory, if it may be written. `UserError` if not."""
    out = Path(out_path).expanduser().resolve()
    if out.name:
        _check_name(out, f".{out.name}.partial-00000000")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out_path} is a file; name a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"{out_path} is not empty and nothing in it is overwritten; remove it or name another "
            "directory"
        )
    if os.path.ismount(out):
        raise UserError(f"{out_path} is a mount point; name a directory inside it")
    _check_folder(out)
    return out


def check_new_file(path: Path) -> None:
    """`UserError` if the file exists or cannot be written."""
    _check_name(path, path.name)
    if os.path.lexists(path):
        raise UserError(f"{path} exists and is not overwritten; remove it or name another")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")
    _check_folder(path)


def _check_name(path: Path, longest: str) -> None:
    """`UserError` if no file of the name `longest` could lie beside the path."""
    try:
        os.lstat(path.with_name(longest))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}") from error


def _check_folder(path: Path) -> None:
    """`UserError` if nothing can be made in the nearest directory above the path."""
    folder = _nearest_existing(path.parent)
    try:
        # Rights say too little: a file system can be read-only, or a quota used up.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {folder} is not a directory that you may write to "
            f"({error.strerror})"
        ) from error


def check_room(out: Path, needed: int, checkpoints: int = 0) -> None:
    """`UserError` if the output's disk lacks room for so many bytes of it and of checkpoints."""
    existing = _nearest_existing(out)
    free = shutil.disk_usage(existing).free
    if free < needed + checkpoints:
        taken = f"the output takes {needed / 1e9:.1f} GB"
        if checkpoints:
            taken += f" and its checkpoints {checkpoints / 1e9:.1f} GB"
        raise UserError(f"{taken}, but {existing} has {free / 1e9:.1f} GB free")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields a directory of the same name to write into; on success it becomes `out`."""
    prefix = f".{out.name}.partial-"
    lock = FileLock(out.parent / f"{prefix}lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another command is writing to {out}") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    try:
        for stale in out.parent.glob(f"{glob.escape(prefix)}*"):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        # Threads that still write when we fail are joined only at exit, so clean up once more then.
        atexit.register(shutil.rmtree, staging, ignore_errors=True)
        try:
            directory = staging / out.name
            directory.mkdir()
            with _disk_errors_explained(out):
                yield directory
                _flush_to_disk(directory)
            directory.rename(_still_free(out))
            _flush(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields another name in the same directory to write to; on success the file becomes `path`.

    `UserError` where it cannot be written.
    """
    # The name is short, since that of `path` may be as long as a name can be; its suffix is what
    # matplotlib knows a format by.
    suffix = path.suffix if len(path.suffix) <= 16 else ""
    partial = path.with_name(f".partial-{secrets.token_hex(4)}{suffix}")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def model_folder(model: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The directory of a model, or of its files in the cache of the Hub, all but the weights."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["config.json", *_HUB_PATTERNS, "*.py"]
    return Path(
        snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
    )


def copy_files(model: Path, directory: Path, tokenizer: Any = None) -> None:
    """What a model's directory is known to have beside its weights: tokenizer, card, licence …

    `tokenizer` is the one that was loaded from there, whose class may name further files. Nothing
    else is taken, and nothing through a link that leads out of the directory.
    """
    more = tokenizer.vocab_files_names.values() if tokenizer is not None else ()
    copy_tokenizer(model, directory, [name for name in more if name == Path(name).name])
    copy_settings(model, directory)
    for path in sorted(model.iterdir()):
        if path.name in _DOCUMENTS or _LICENCE_PATTERN.fullmatch(path.name):
            copy_file(model, path.name, directory)


def copy_tokenizer(model: Path, directory: Path, more: Collection[str] = ()) -> None:
    """The files of a tokenizer and its chat templates, as they are."""
    for path in sorted(model.iterdir()):
        is_known = path.name in _OF_TOKENIZERS | _TEMPLATES | set(more)
        if is_known or _TOKENIZER_PATTERN.fullmatch(path.name):
            copy_file(model, path.name, directory)
    for template in sorted((model / _MORE_TEMPLATES).glob("*.jinja")):
        copy_file(model, f"{_MORE_TEMPLATES}/{template.name}", directory)


def copy_settings(model: Path, directory: Path) -> None:
    """The settings of generation and of whatever reads images, sounds and videos."""
    for name in sorted(_SETTINGS):
        copy_file(model, name, directory)


def copy_file(model: Path, name: str, directory: Path) -> bool:
    """Copies one file of a model's directory, where it is there and no link leads out of it.

    Returns whether it was copied.
    """
    path = model / name
    if not os.path.lexists(path):
        return False
    if not _is_of_model(path, model):
        LOG.warning("%s is not copied: it is no file of %s", path, model)
        return False
    target = directory / name
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
    return True


def has_tokenizer(directory: Path) -> bool:
    """Whether a model's directory holds what a tokenizer is read from, besides its settings."""
    settings = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    names = {path.name for path in directory.iterdir()}
    return not names.isdisjoint(_OF_TOKENIZERS.difference(settings))


def _is_of_model(path: Path, model: Path) -> bool:
    """Whether a path leads to a regular file of the model's directory, of the same name.

    In the cache of the Hub files are links to `blobs` beside `snapshots`, or to the `blobs` that
    all models share.
    """
    model = model.resolve()
    real = path.resolve()
    if not real.is_file():
        return False
    # Under another name a link within the directory may lead to what would not be copied.
    if real.is_relative_to(model):
        return real.name == path.name
    repository = model.parents[1] if len(model.parents) > 1 else model
    if model.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    blobs = (repository / "blobs", repository.parent / "blobs")
    return any(real.is_relative_to(folder) for folder in blobs)


def _still_free(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} was written to by something else meanwhile; it is left as it is")
    return out


def _nearest_existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


@contextmanager
def _disk_errors_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # safetensors reports the same through an error of its own
        texts = [os.strerror(number) for number in _NO_ROOM]
        if getattr(error, "errno", None) in _NO_ROOM or any(text in str(error) for text in texts):
            raise UserError(f"no room to write {out}: {error}; nothing was left there") from error
        raise


def _flush_to_disk(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _flush(path)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
