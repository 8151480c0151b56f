"""`library.json`: the adapters of a library by name, where each lies, and what it is."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from _mergekit_moe_ext_common.checkpoints import damage
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import new_file
from peft_routing.adapter_files import fingerprint

_FILE = "library.json"
_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """An adapter of a library.

    path: its directory, relative to the library's parent where it lies below that, or
    `owner/name[/subfolder]` on the Hub.
    revision: the commit on the Hub; None for a directory.
    sha256: of its configuration and tensors.
    base: the base model that it names.
    ranks: the ranks that its modules have, each once.
    targets: the last parts of the names of its modules, each once.
    task: the task that it was trained on, by name.
    data: the source of the texts that it was trained on.
    scores: its loss on tasks, in nats per token, as `select` has measured it.
    """

    path: str
    revision: str | None
    sha256: str
    base: str | None
    ranks: list[int]
    targets: list[str]
    task: str
    data: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Library:
    """The adapters of a library by name, in the order in which they were added.

    base: the model that all of them are for: a directory, or a name on the Hub.
    """

    directory: Path
    base: str
    entries: dict[str, Entry]

    @classmethod
    def open(cls, directory: str) -> "Library":
        """The library in a directory. `UserError` where there is none, or it is damaged."""
        root = Path(directory).expanduser().resolve()
        file = root / _FILE
        if not file.is_file():
            raise UserError(
                f"{directory} has no {_FILE}: `peft-route library add {directory} …` makes a "
                "library"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["version"] != _VERSION:
                raise UserError(
                    f"{file} is of version {content['version']}, and this package reads {_VERSION}"
                )
            entries = {name: _entry(values) for name, values in content["adapters"].items()}
            return cls(root, _base_of(root, str(content["base"])), entries)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{damage(file, error)}; mend it, or add the adapters anew") from error

    def write(self) -> None:
        """Writes `library.json`, whole or not at all. `UserError` where it cannot be written."""
        adapters = {name: asdict(entry) for name, entry in self.entries.items()}
        base = self.reference(self.base) if Path(self.base).is_dir() else self.base
        content = {"version": _VERSION, "base": base, "adapters": adapters}
        with new_file(self.directory / _FILE) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @property
    def index(self) -> Path:
        """The directory of what was computed of each adapter, by its sha256."""
        return self.directory / "index"

    @property
    def cache(self) -> Path:
        """The directory of measured log-probabilities, as `compare --cache` takes it."""
        return self.directory / "cache"

    def location(self, name: str) -> str:
        """Where an adapter lies, as every command takes it."""
        entry = self.entries[name]
        if entry.revision is not None:
            return f"{entry.path}@{entry.revision}"
        return str(self.directory.parent / entry.path)

    def reference(self, path: str) -> str:
        """How the library refers to a directory: so that both can be moved together."""
        target = Path(path).expanduser().resolve()
        if target.is_relative_to(self.directory.parent):
            return str(target.relative_to(self.directory.parent))
        return str(target)

    def experts(self, only: tuple[str, ...] = ()) -> dict[str, str]:
        """The directory of each adapter by name: all of them, or `only` those.

        `UserError` for a name that is not in the library, and for an adapter whose files are no
        longer those that were added.
        """
        for name in only:
            self.check_name(name)
        experts = {name: self.location(name) for name in only or self.entries}
        for name, path in experts.items():
            where = f"{name!r} of the library {self.directory} ({path})"
            try:
                current = fingerprint(path, where)
            except FileNotFoundError as error:
                raise UserError(
                    f"{error}; remove it from the library, or put it back where it was"
                ) from error
            if current != self.entries[name].sha256:
                raise UserError(
                    f"{where}: its files have changed since it was added; remove it and add it "
                    "again"
                )
        return experts

    def check_name(self, name: str) -> None:
        """`UserError` for a name that is not in the library."""
        if name not in self.entries:
            names = ", ".join(self.entries) or "none"
            raise UserError(f"{self.directory} has no adapter {name!r}; there are {names}")


def _base_of(root: Path, base: str) -> str:
    """The base model of a library: as `reference` has written it, or a name on the Hub."""
    directory = root.parent / base
    return str(directory) if directory.is_dir() else base


def _entry(values: Mapping[str, Any]) -> Entry:
    """An entry by its fields; those that a later version may add are an error of their name."""
    known = {each.name for each in fields(Entry)}
    surplus = sorted(values.keys() - known)
    if surplus:
        raise ValueError(f"there is no field {surplus[0]!r} of an adapter")
    return Entry(**values)


@contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keeps other commands from changing a library meanwhile. `UserError` where it cannot be
    written.
    """
    root = Path(directory).expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        with lock:
            yield
    except UserError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"cannot write {directory}: {reason}") from error
