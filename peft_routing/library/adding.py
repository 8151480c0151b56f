"""Adapters into a library and out of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import load_config
from _mergekit_moe_ext_common.options import Reading
from peft_routing.adapter_files import fingerprint, hub_revision, read_config
from peft_routing.expert import Expert, check_experts, read_expert
from peft_routing.library.catalogue import Entry, Library, locked
from peft_routing.library.centroids import Base, write_centroids
from peft_routing.library.sketches import sketch, sketch_file, write_sketch
from peft_routing.loading import empty_model


def add(
    directory: str,
    experts: Mapping[str, str],
    reading: Reading,
    *,
    base: str | None = None,
    tasks: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
) -> Library:
    """Adds adapters to a library, which is made where there is none, and their index.

    Args:
        directory: the library's.
        experts: the adapters by name, each a directory or `owner/name[/subfolder]` on the Hub.
        base: the model that the library is for, where it is new; what its first adapter names if
            None.
        tasks: the task of an adapter by its name, where it is not the adapter's own name.
        data: the source of the texts that an adapter was trained on, by its name. The base model
            reads them for the adapter's centroid.
        max_samples: the first so many rows of each source; all if None.
        batch_size: rows at a time.

    `UserError` for a name that is there, an adapter that cannot be read or does not fit the base
    model, and a directory that is no library; nothing is added then.
    """
    if not experts:
        raise UserError("there is no adapter to add: name one with --expert, or --experts-from")
    tasks = tasks or {}
    data = data or {}
    for option, names in (("--task", tasks), ("--data", data)):
        unknown = sorted(names.keys() - experts.keys())
        if unknown:
            raise UserError(f"{option} {unknown[0]}: no adapter of that name is added")
    _check_directory(directory)
    with locked(directory):
        library = _library(directory, experts, base)
        both = sorted(experts.keys() & library.entries.keys())
        if both:
            raise UserError(f"{directory} has an adapter {both[0]!r} already; remove it first")
        empty = empty_model(load_config(library.base, reading), reading)
        # All are read once before anything is written, each alone: they may be many.
        entries = {}
        for name, path in experts.items():
            expert = _read(name, path, empty)
            task = tasks.get(name, name)
            entries[name] = _entry(library, expert, path, task, data.get(name))
        reader_of_texts = Base(library.base, reading) if data else None
        texts = {}
        if reader_of_texts:
            for name, source in data.items():
                texts[entries[name].sha256] = reader_of_texts.read(f"{name}={source}", max_samples)
        library.index.mkdir(exist_ok=True)
        for name, path in experts.items():
            file = sketch_file(library.index, entries[name].sha256)
            if not file.exists():
                write_sketch(sketch(_read(name, path, empty)), file)
        if reader_of_texts:
            write_centroids(library, reader_of_texts, texts, batch_size=batch_size)
        library.entries.update(entries)
        library.write()
    return library


def _check_directory(directory: str) -> None:
    """`UserError` for a directory that has files and is no library."""
    root = Path(directory).expanduser()
    if root.is_file():
        raise UserError(f"{directory} is a file; name a directory")
    if root.is_dir() and not (root / "library.json").exists():
        others = [path.name for path in root.iterdir() if path.name not in (".lock", "index")]
        if others:
            raise UserError(
                f"{directory} is no library and has {others[0]} in it; name a new directory"
            )


def _library(directory: str, experts: Mapping[str, str], base: str | None) -> Library:
    """The library to add to. `UserError` where it is for another base model than `base`."""
    root = Path(directory).expanduser().resolve()
    if (root / "library.json").exists():
        library = Library.open(directory)
        if base is not None and _resolved(base) != _resolved(library.base):
            raise UserError(
                f"{directory} is a library for {library.base}, not for {base}; make another for it"
            )
        return library
    if base is None:
        name, path = next(iter(experts.items()))
        try:
            base = read_config(path, f"expert {name!r} ({path})").get("base_model_name_or_path")
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        if not base:
            raise UserError(f"expert {name!r} does not say what its base model is: give --base")
    return Library(root, _resolved(base), {})


def _resolved(base: str) -> str:
    """A directory as it is called from anywhere; a name on the Hub as it is."""
    path = Path(base).expanduser()
    return str(path.resolve()) if path.is_dir() else base


def _read(name: str, path: str, empty: nn.Module) -> Expert:
    try:
        expert = read_expert(name, path, empty)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    check_experts([expert], empty)
    return expert


def _entry(library: Library, expert: Expert, path: str, task: str, data: str | None) -> Entry:
    where = f"expert {expert.name!r} ({path})"
    revision = hub_revision(path, where)
    ranks = {a.shape[0] for a, _ in expert.factors.values()}
    return Entry(
        path=path.partition("@")[0] if revision else library.reference(path),
        revision=revision,
        sha256=fingerprint(path, where),
        base=expert.config.get("base_model_name_or_path"),
        ranks=sorted(ranks),
        targets=sorted({module.rpartition(".")[2] for module in expert.factors}),
        task=task,
        data=data,
    )


def remove(directory: str, names: Sequence[str]) -> Library:
    """Takes adapters out of a library; their files and what was computed of them stay.

    `UserError` for a name that is not there.
    """
    Library.open(directory)  # before a lock makes a directory
    with locked(directory):
        library = Library.open(directory)
        for name in names:
            library.check_name(name)
        for name in names:
            library.entries.pop(name, None)
        library.write()
    return library


def reader(library: Library, reading: Reading) -> Callable[[int], Expert]:
    """The function from the number of an adapter to the adapter, which it reads anew.

    `UserError` where files are missing or have changed.
    """
    located = list(library.experts().items())
    empty = empty_model(load_config(library.base, reading), reading)

    def read(number: int) -> Expert:
        name, path = located[number]
        return _read(name, path, empty)

    return read
