"""The two files of a LoRA adapter: where they are, and what is in them.

No code that comes with a file is run: `adapter_model.bin` is read by
`torch.load(weights_only=True)`, which takes tensors and plain values alone.
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor

from _mergekit_moe_ext_common.checkpoints import damage, sha256_of
from _mergekit_moe_ext_common.errors import UserError

# What torch says of a pickle that names anything but tensors and plain values.
_CODE = ("GLOBAL", "Can only build", "Can only create", "unrecognized function")


def adapters_in(directory: str) -> dict[str, str]:
    """Every subdirectory that holds an adapter, by its name, in the order of the names.

    `UserError` where there is none.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise UserError(f"{directory}: there is no such directory")
    if (root / CONFIG_NAME).exists():
        raise UserError(
            f"{directory} is an adapter itself: name the directory that its directory lies in"
        )
    adapters = {}
    for path in sorted(root.iterdir()):
        if (path / CONFIG_NAME).is_file():
            adapters[path.name] = str(path)
    if not adapters:
        raise UserError(f"no subdirectory of {directory} has an {CONFIG_NAME}")
    return adapters


def read_config(path: str, where: str) -> dict[str, Any]:
    """The configuration of an adapter, as its file says it.

    `where` begins the message of a `UserError`. `FileNotFoundError` where there is no such file.
    """
    file = _file(path, CONFIG_NAME, where)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{where}: {damage(file, error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{where}: {file} holds no names with values")
    return config


def common_task(paths: Sequence[str]) -> str | None:
    """The task that all adapters were made for.

    None where they differ, or where one cannot be read, of which composing says why.
    """
    tasks = set()
    for path in paths:
        try:
            tasks.add(read_config(path, path).get("task_type"))
        except (OSError, UserError):
            return None
    return tasks.pop() if len(tasks) == 1 else None


def read_labels(path: str) -> tuple[str, ...]:
    """The names of the classes, by the model's configuration beside an adapter, if there is one.

    Names that transformers made up (LABEL_0 …) say nothing.
    """
    try:
        config = json.loads(_file(path, "config.json", path).read_text(encoding="utf-8"))
        names = [config["id2label"][key] for key in sorted(config["id2label"], key=int)]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return ()
    return () if names == [f"LABEL_{index}" for index in range(len(names))] else tuple(names)


def read_tensors(path: str, where: str, key_mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of an adapter by their names; errors as of `read_config`.

    `key_mapping` is what PEFT takes under that name: patterns of old names of modules, and new
    names.
    """
    file = weights_file(path, where)
    try:
        tensors = load_peft_weights(str(file.parent), device="cpu", key_mapping=dict(key_mapping))
    except Exception as error:
        raise UserError(f"{where}: {_unreadable(file, error)}") from error
    _check_tensors(tensors, f"{where}: {file}")
    return tensors


def weights_file(path: str, where: str) -> Path:
    """The file of an adapter's tensors, safetensors where there is one; errors as of
    `read_config`.
    """
    try:
        return _file(path, SAFETENSORS_WEIGHTS_NAME, where)
    except FileNotFoundError as error:
        # That the Hub was not reached is no reason to take other weights.
        cause = error.__cause__
        is_absent = cause is None or isinstance(cause, EntryNotFoundError)
        if not is_absent or isinstance(cause, LocalEntryNotFoundError):
            raise
        try:
            return _file(path, WEIGHTS_NAME, where)
        except FileNotFoundError:
            raise error from None


def fingerprint(path: str, where: str) -> str:
    """The sha256 of an adapter's configuration and tensors; errors as of `read_config`."""
    return sha256_of([_file(path, CONFIG_NAME, where), weights_file(path, where)])


def hub_revision(path: str, where: str) -> str | None:
    """The commit of an adapter on the Hub, None for a directory; errors as of `read_config`."""
    if Path(path).expanduser().is_dir():
        return None
    # The Hub's cache keeps the files of a commit in `snapshots/COMMIT`. Folders around the cache,
    # which come first, may have that name as well.
    parts = _file(path, CONFIG_NAME, where).parts
    last = max(place for place, part in enumerate(parts) if part == "snapshots")
    return parts[last + 1]


def read_pickle(file: Path, where: str) -> Any:
    """What `torch.save` wrote, on the CPU. `UserError` if that is more than tensors and values."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{where}: {_unreadable(file, error)}") from error


def _unreadable(file: Path, error: Exception) -> str:
    """What is wrong with a file of tensors that could not be read.

    A damaged one makes torch raise a dozen kinds, all of whose messages say how to run its code.
    """
    if isinstance(error, pickle.UnpicklingError) and any(each in str(error) for each in _CODE):
        return (
            f"{file} holds more than tensors, and to read the rest would run code that comes with "
            "it: load it with the program that wrote it, where you trust it, and save the tensors "
            "alone"
        )
    if file.suffix == ".safetensors":
        return damage(file, error)
    return damage(file, ValueError("torch.load cannot read it; fetch it again"))


def _check_tensors(content: Any, where: str) -> None:
    """`UserError` for anything but tensors by their names."""
    values = content.items() if isinstance(content, dict) else [(None, content)]
    for name, value in values:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{where} holds a {type(value).__name__} where tensors by their names belong"
            )


def _file(path: str, name: str, where: str) -> Path:
    """A file of an adapter, downloaded where it is on the Hub: `owner/name[/subfolder]`, with
    `@revision` where it is not the newest that is wanted.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{where}: {directory} has no {name}")
        return directory / name
    if _looks_local(path):
        raise FileNotFoundError(f"{where}: there is no such directory")
    on_hub, _, revision = path.partition("@")
    owner, _, rest = on_hub.partition("/")
    repository, _, subfolder = rest.partition("/")
    try:
        return Path(
            hf_hub_download(
                f"{owner}/{repository}",
                name,
                subfolder=subfolder or None,
                revision=revision or None,
            )
        )
    except (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise FileNotFoundError(
            f"{where}: no such directory, and no {name} on the Hub: {str(error).splitlines()[0]}"
        ) from error


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist can only be a directory, not `owner/name` on the Hub."""
    owner, _, repository = path.partition("/")
    begins_locally = path.startswith((".", "/", "~")) or Path(owner).exists()
    return begins_locally or not repository or path.endswith("/") or "\\" in path
