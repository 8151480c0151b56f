"""The files of a checkpoint: which of them hold its weights, what their headers say, and what is
wrong with those that cannot be read.

Nothing is unpickled, and no tensor is read, apart from those that `check_finite` is given or finds.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from _mergekit_moe_ext_common.errors import UserError

_LFS_POINTER = b"version https://git-lfs"
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_NAMES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What names of tensors begin with, or have in them, where a model was saved inside a wrapper.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
# What a damaged safetensors file makes its reader raise.
_UNREADABLE = (KeyError, OSError, SafetensorError, TypeError, ValueError)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as the file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def first_line(error: Exception) -> str:
    """An error's message in one line, with its kind where the message alone would say little."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    is_plain = isinstance(error, KeyError | AttributeError | IndexError | AssertionError)
    return f"{type(error).__name__}: {line}" if is_plain else line


def weight_files(model: str) -> list[Path]:
    """The safetensors files that hold a model's weights.

    `model` is a directory, or a repository on the Hub, whose files are fetched. `UserError` where
    there are none, or an index does not fit them.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        check_regular(directory)
    single = _file_of(model, SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    index = _file_of(model, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise UserError(no_weights(model))
    return _shards_of(model, index)


def model_fingerprint(model: str) -> str:
    """The sha256 of a model's configuration and weights, wherever they lie.

    Every byte is read. `UserError` as of `weight_files`.
    """
    config = _file_of(model, "config.json")
    if config is None:
        raise UserError(f"{model} has no config.json: it is not a model")
    return sha256_of([config, *weight_files(model)])


def sha256_of(paths: Iterable[Path]) -> str:
    """The sha256 of files, one after the other. `UserError` for one that cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        # Each file goes in by its own sum, so that it matters where one ends.
        try:
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256")
        except OSError as error:
            raise UserError(damage(path, error)) from error
        digest.update(own.digest())
    return digest.hexdigest()


def _file_of(model: str, name: str) -> Path | None:
    directory = Path(model).expanduser()
    if directory.is_dir():
        path = directory / name
        return path if path.exists() else None
    try:
        file = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot fetch {name} of {model}: {first_line(error)}") from error
    return None if file is None else Path(file)


def _shards_of(model: str, index: Path) -> list[Path]:
    """The files that an index names. `UserError` where it, or one of them, is none."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{damage(index, error)}; an index has a `weight_map` from names of tensors to files"
        ) from error
    if not names:
        raise UserError(f"{index} names no files")
    files = []
    for name in names:
        check_shard_name(index, name)
        path = _file_of(model, name)
        if path is None:
            raise UserError(f"{index.parent / name} is missing, though {index.name} names it")
        files.append(path)
    return files


def check_shard_name(index: Path, name: object) -> None:
    """`UserError` where an index names what is no file in its own directory."""
    path = Path(str(name))
    if not isinstance(name, str) or path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{index} names {name!r} as a file of weights; only files in its own directory are read"
        )


def check_regular(directory: Path) -> None:
    """`UserError` where what has a name of a weight or configuration file is no file that ends.

    A pipe or a device would be waited for without end.
    """
    for path in sorted(directory.iterdir()):
        if not path.name.endswith((".safetensors", ".json", ".bin", ".model", ".txt", ".jinja")):
            continue
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {path.readlink()}, which does not exist")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is a pipe or a device, not a file")


def no_weights(model: str) -> str:
    """What to say of a model that has neither `model.safetensors` nor an index."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        return (
            f"{model} has no safetensors weights; pickles are not read, since reading one can run "
            "code: load it with transformers where you trust it, and save it with save_pretrained"
        )
    shards = sorted(directory.glob("*.safetensors"))
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        return f"{directory} is an adapter, not a model; name its base model"
    if shards:
        return (
            f"{directory} has {len(shards)} safetensors files, {shards[0].name} among them, and no "
            f"{SAFE_WEIGHTS_INDEX_NAME}, which says what each of them holds: fetch it from where "
            "they came from"
        )
    pickles: list[Path] = []
    for pattern in _PICKLE_NAMES:
        pickles += sorted(directory.glob(pattern))
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which is not read, since reading one can run code: load "
            "the model with transformers where you trust it, and save it with save_pretrained"
        )
    return f"{directory} has no weights: there is no {SAFE_WEIGHTS_NAME} in it"


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor in the files by its name. `UserError` for a file that is damaged."""
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                    view = opened.get_slice(name)
                    dtype = str_to_torch_dtype[view.get_dtype()]
                    stored[name] = Stored(file, tuple(view.get_shape()), dtype)
        except _UNREADABLE as error:
            raise UserError(damage(file, error)) from error
    return stored


def damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that could not be read, in one sentence."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as unreadable:
        return f"{path} cannot be read: {unreadable.strerror}"
    if start.startswith(_LFS_POINTER):
        return (
            f"{path} is a Git LFS pointer, not the file itself: `git lfs pull` in its repository "
            "fetches it"
        )
    if not start:
        return f"{path} is empty: its copy or download stopped"
    if path.suffix == ".safetensors" and start.startswith(_PICKLES):
        return f"{path} is a pickle under the name of a safetensors file; pickles are not read"
    remedy = ""
    if path.suffix == ".safetensors":
        remedy = "; if its download or copy stopped half way, fetch it again"
    return f"{path} is damaged: {first_line(error)}{remedy}"


def damaged_file(directory: Path, *patterns: str) -> str | None:
    """A sentence on the first file of these names that cannot be read; None if all can be.

    It is for a reader that has failed without saying at which file. Without names, all small files
    are looked at.
    """
    paths: list[Path] = []
    for pattern in patterns or ("*.json", "*.model"):
        paths += directory.glob(pattern)
    for path in sorted(paths):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER or not start:
            # `damage` sees for itself which of the two it is, and never tells of this error.
            return damage(path, ValueError("it is empty"))
        if path.suffix != ".json":
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return damage(path, error)
    return None


def wrapper_of(stored: Collection[str], lacking: Collection[str]) -> str | None:
    """What to say where the tensors that a checkpoint lacks are there under a wrapper's names.

    None where they are not.
    """
    names = set(stored)
    for part, wrapper in _WRAPPERS.items():
        if set(lacking) <= {name.replace(part, "") for name in names}:
            return (
                f"the names of its tensors have `{part}` in them, as {wrapper} leaves it: save the "
                f"model without the wrapper, or take `{part}` out of every name in the file"
            )
    first = min(lacking)
    for name in sorted(names):
        prefix = name.removesuffix(first)
        if prefix != name and {prefix + each for each in lacking} <= names:
            return (
                f"the names of its tensors begin with `{prefix}`, which is no part of them: take "
                "it off every name in the file"
            )
    return None


# By dtype, the integers of the same width and the bits of the exponent.
_EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
_CHECKED_AT_ONCE = 1 << 19  # elements: few enough for a CPU's cache


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. One on the meta device holds nothing."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    plain = tensor.detach()
    is_in_memory = type(plain) is Tensor and plain.device.type == "cpu" and not plain.is_neg()
    if plain.dtype not in _EXPONENTS or not is_in_memory:
        # One pass without a mask as large as the tensor: NaN is both the least and the largest.
        wide = plain.float() if plain.element_size() == 1 else plain
        least, largest = torch.aminmax(wide)
        return bool(torch.isfinite(least) & torch.isfinite(largest))
    # NaN and infinity are the numbers whose exponent is all ones. numpy finds them in one thread as
    # fast as torch does in two, which would wait for each other where a third writes a merge.
    integer, exponent = _EXPONENTS[plain.dtype]
    bits = plain.reshape(-1).view(integer).numpy()
    for start in range(0, len(bits), _CHECKED_AT_ONCE):
        if (bits[start : start + _CHECKED_AT_ONCE] & exponent).max() == exponent:
            return False
    return True


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """`UserError` names the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(
                f"{name} of {where} holds NaN or infinity: take it as it was before its training "
                "diverged or its file was damaged"
            )


def non_finite_in(stored: Mapping[str, Stored]) -> str | None:
    """The name of the first tensor in the files that holds NaN or infinity."""
    by_file: dict[Path, list[str]] = {}
    for name, each in stored.items():
        by_file.setdefault(each.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                if not is_finite(opened.get_tensor(name)):
                    return name
    return None
