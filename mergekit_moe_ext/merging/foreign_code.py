"""Code that a source names: none of it gets into an output unless the user trusts it.

`auto_map` in a configuration, and `custom_pipelines` in that of a model, name Python that
transformers runs where somebody says `trust_remote_code=True`. The card of an output of ours says
that, for our own modelling files; so what a source names beside them would be run as well.
"""

import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from _mergekit_moe_ext_common.cards import in_markdown, last_part, renew_section
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import copy_file

LOG = logging.getLogger(__name__)
HEADING = "## Code that comes with it"
_EXPLANATION = (
    "Not all code here is of mergekit-moe-ext. transformers runs what follows as soon as it is "
    "told to trust this model; read it first."
)
Keeps = Callable[[str], str | None]  # a reference as the output names it; None to leave it out


def settle_code(
    directory: Path,
    own_files: Collection[str],
    source: Path,
    source_name: str,
    *,
    is_trusted: bool,
) -> None:
    """Leaves in the configurations of an output only references to code that lies there.

    `own_files` are our modelling files in `directory`. Where `is_trusted`, the files that `source`
    names come along, and the card, if there is one, says whose they are.
    """
    code = _Code(directory, own_files, source, source_name, is_trusted)
    for path in sorted(directory.glob("*config.json")):
        stored = _read(path, source_name)
        settled = _settled(stored, code.reference)
        if settled != stored:
            text = json.dumps(settled, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
    if code.left_out:
        names = ", ".join(sorted(code.left_out))
        LOG.warning("code that %s names is left out of the output: %s", source_name, names)
    card = directory / "README.md"
    if card.exists():
        text = renew_section(card.read_text(encoding="utf-8"), HEADING, code.description())
        card.write_text(text, encoding="utf-8")


def check_settings(source: Path, source_name: str) -> None:
    """`UserError` where a configuration of a source, which an output would get, is no JSON."""
    for path in sorted(source.glob("*config.json")):
        _read(path, source_name)


def _read(path: Path, source_name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path.name} of {source_name}: {error}") from error


class _Code:
    """What references lead to, and which of them stay."""

    def __init__(
        self,
        directory: Path,
        own_files: Collection[str],
        source: Path,
        source_name: str,
        is_trusted: bool,
    ) -> None:
        self.left_out: set[str] = set()
        self._directory = directory
        self._own_files = own_files
        self._source = source
        self._source_name = last_part(source_name)
        self._is_trusted = is_trusted
        self._owners: dict[str, set[str]] = {}  # of files, by owner

    def reference(self, reference: str) -> str | None:
        """`module.Class`, or `owner/name--module.Class` of another repository, as it stays."""
        repository, _, name = reference.rpartition("--")
        module = name.partition(".")[0]
        if f"{module}.py" in self._own_files:
            return name  # without the repository that it was read from: the file lies here
        if self._is_trusted:
            files = {f"{module}.py"} if repository else self._brought(module)
            if files:
                self._owners.setdefault(repository or self._source_name, set()).update(files)
                return reference
        self.left_out.add(reference)
        return None

    def description(self) -> list[str]:
        """Lines for the card; none where all code is ours."""
        if not self._owners:
            return []
        lines = [_EXPLANATION, ""]
        for owner, files in sorted(self._owners.items()):
            names = ", ".join(map(in_markdown, sorted(files)))
            lines.append(f"- {names}, of {in_markdown(owner)}")
        return lines

    def _brought(self, module: str) -> set[str]:
        """A module of the source and what it imports from beside it, copied; none if it lacks."""
        first = self._source / f"{module}.py"
        if not module.isidentifier() or not first.is_file():
            return set()
        names = {first.name, *(Path(file).name for file in get_relative_import_files(first))}
        for name in names.difference(self._own_files):
            copy_file(self._source, name, self._directory)
        return {name for name in names if (self._directory / name).exists()}


def _settled(value: Any, keep: Keeps) -> Any:
    """A configuration in which `auto_map` and `custom_pipelines`, at any depth, are settled."""
    if isinstance(value, list):
        return [_settled(item, keep) for item in value]
    if not isinstance(value, dict):
        return value
    settled = {}
    for key, item in value.items():
        if key not in ("auto_map", "custom_pipelines"):
            settled[key] = _settled(item, keep)
            continue
        entries = _settled_entries(item, keep)
        if entries:
            settled[key] = entries
    return settled


def _settled_entries(entries: Any, keep: Keeps) -> Any:
    """A mapping of references, or a pair of them as old tokenizers have it, less what goes."""
    if isinstance(entries, dict):
        settled = {name: _settled_entry(entry, keep) for name, entry in entries.items()}
        return {name: entry for name, entry in settled.items() if entry is not None}
    return _settled_entry(entries, keep)


def _settled_entry(entry: Any, keep: Keeps) -> Any:
    """One class, a pair of them (slow and fast), or a pipeline; None if any of it goes."""
    if entry is None or isinstance(entry, str):
        return keep(entry) if entry else None
    if isinstance(entry, dict):
        implementation = _settled_entry(entry.get("impl"), keep)
        return {**entry, "impl": implementation} if implementation else None
    if not isinstance(entry, list):
        return None
    settled = [_settled_entry(each, keep) for each in entry]
    is_whole = all(new or not old for new, old in zip(settled, entry, strict=True))
    return settled if is_whole and any(settled) else None
