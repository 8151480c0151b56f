"""An output directory that appears whole or not at all.

The merge writes into a hidden directory beside the output, which one rename then puts into place.
What a killed merge left behind is recognised by its name and removed by the next merge to the same
output.
"""

import atexit
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from _mergekit_moe_ext_common.errors import UserError

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(out_path: str) -> Path:
    """The resolved output directory, if it may be written. `UserError` if not."""
    out = Path(out_path).expanduser().resolve()
    if out.is_file():
        raise UserError(f"{out_path} is a file; name a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"{out_path} is not empty and nothing in it is overwritten; remove it or name another "
            "directory"
        )
    if os.path.ismount(out):
        raise UserError(f"{out_path} is a mount point; name a directory inside it")
    parent = _nearest_existing(out.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"cannot write {out_path}: {parent} is not a directory that you may write to"
        )
    return out


def check_room(out: Path, needed: int) -> None:
    """`UserError` if the output's disk has fewer than `needed` bytes free."""
    existing = _nearest_existing(out)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the output takes {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free"
        )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields a directory of the same name to write into; on success it becomes `out`."""
    prefix = f".{out.name}.partial-"
    lock = FileLock(out.parent / f"{prefix}lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another merge is writing to {out}") from None
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


def copy_files(model: Path, directory: Path) -> None:
    """What lies beside a model's weights: tokenizer, card, the merge's configuration, code."""
    for path in model.iterdir() if model.is_dir() else ():
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copy(path, directory / path.name)


def extend_card(directory: Path, lines: Sequence[str]) -> None:
    """A further section at the end of the card."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {directory.name}\n"
    card.write_text(text.rstrip() + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _still_free(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} was written to by something else during the merge; it is left as it is"
        )
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
