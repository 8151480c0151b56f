"""Names in model cards: no name, path or text of a user's becomes markup, code or metadata there.

A card is published. So it names what lies on the Hub by its id, and what lies on this machine by
the last part of its path; what is needed to load something again keeps the path, in other files.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from _mergekit_moe_ext_common.options import is_there

# What CommonMark, GitHub's tables and mathematics, or HTML read as more than a character.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$#])")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
# What stands between the parts of `model+adapter` and of `name=source`.
_SEPARATORS = re.compile(r"([+=])")


def in_markdown(text: object) -> str:
    """The text as it reads, on one line, with nothing in it that Markdown or HTML would take."""
    printable = "".join(each if each.isprintable() else " " for each in str(text))
    escaped = _SPECIAL.sub(r"\\\1", " ".join(printable.split()))
    # At the start of a line these make lists and underline headings.
    return f"\\{escaped}" if escaped.startswith(("-", "+", "=")) else escaped


def fenced(text: str, language: str = "") -> str:
    """A block of code that no line of the text ends."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def is_on_hub(name: str) -> bool:
    """Whether a model is one of the Hub, by its looks: `owner/name`, and no such path here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def last_part(path: str) -> str:
    """A path of this machine as its last part; an id on the Hub, or any other text, as it is."""
    if not _is_path(path):
        return path
    last = Path(path).name
    # "." and what ends in ".." say nothing of where they lead.
    return Path(path).resolve().name if last in ("", "..") else last


def _is_path(text: str) -> bool:
    """Whether a text is a path of this machine, perhaps with `:SPLIT` after it."""
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return True
    if "/" not in text or "://" in text:
        return False
    # An id on the Hub has one slash. A sentence may have several, but then it has spaces, too.
    has_folders = text.count("/") > 1 and not re.search(r"\s", text)
    return has_folders or is_there(text) or is_there(text.partition(":")[0])


def without_folders(value: Any) -> Any:
    """A configuration with every path of this machine in it as its last part."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    if is_there(value):
        return last_part(value)
    return "".join(map(last_part, _SEPARATORS.split(value)))


def sources_in_markdown(sources: Sequence[str]) -> str:
    """What `--data` names, for a sentence."""
    return ", ".join(in_markdown(without_folders(source)) for source in sources)


def extend_card(directory: Path, lines: Sequence[str]) -> None:
    """A further section at the end of the card, whose front matter then names no local model.

    In an adapter's card it stands before PEFT's template, which is long and empty.
    """
    card = directory / "README.md"
    if card.exists():
        text = without_local_models(card.read_text(encoding="utf-8"))
    else:
        text = f"# {in_markdown(directory.name)}\n"
    if is_of_peft(text):
        text = section_before_title(text, lines[0], lines[2:])
    else:
        text = text.rstrip() + "\n\n" + "\n".join(lines) + "\n"
    card.write_text(text, encoding="utf-8")


def is_of_peft(card: str) -> bool:
    """Whether PEFT has written a card."""
    return "library_name: peft" in card


def section_before_title(card: str, heading: str, lines: Sequence[str]) -> str:
    """A card whose section of this heading has these lines and is the last one before the title,
    the first heading of the first level. No line of a section begins with `# `.
    """
    without = re.sub(rf"\n*{re.escape(heading)}\n.*?(?=\n+##? |\Z)", "", card, flags=re.DOTALL)
    matter = _FRONT_MATTER.match(without)
    start = matter.end() if matter else 0
    title = re.compile(r"^# ", re.MULTILINE).search(without, start)
    place = title.start() if title else len(without)
    before = without[:place].rstrip() + "\n\n" if without[:place].strip() else ""
    section = "\n".join([heading, "", *lines]).rstrip() + "\n"
    after = "\n" + without[place:] if title else ""
    return before + section + after


def renew_section(card: str, heading: str, lines: Sequence[str]) -> str:
    """A card whose section of this heading, the last one of it, has these lines; none, without."""
    without = re.sub(rf"\n*{re.escape(heading)}\n.*?(?=\n+## |\Z)", "", card, flags=re.DOTALL)
    if not lines:
        return without.rstrip() + "\n"
    return without.rstrip() + "\n\n" + "\n".join([heading, "", *lines]) + "\n"


def without_local_models(card: str) -> str:
    """A card whose `base_model` names models of the Hub alone: the Hub refuses any other."""
    matter = _FRONT_MATTER.match(card)
    try:
        fields = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        return card
    if matter is None or not isinstance(fields, dict) or "base_model" not in fields:
        return card
    named = fields["base_model"]
    models = named if isinstance(named, list) else [named]
    kept = [model for model in models if isinstance(model, str) and is_on_hub(model)]
    if kept == models:
        return card
    if kept:
        fields["base_model"] = kept
    else:
        del fields["base_model"]
    metadata = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) if fields else ""
    return f"---\n{metadata}---\n" + card[matter.end() :]
