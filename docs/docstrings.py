"""An extension of griffe: it brings our docstrings into the form that the reference can render.

In ours the texts of arguments go on without a further indent, several arguments may share a text,
and an example stands in the text as `>>>`.
"""

import re
from typing import Any

from griffe import Extension, Function, Object

# An argument, or several, and the beginning of what is said of it.
ARGUMENT = re.compile(r"(\w+(?:, \w+)*): (.*)")


class Docstrings(Extension):
    """Rewrites each docstring once it was read from the source."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if isinstance(obj, Function):
            text = with_whole_arguments(text, [parameter.name for parameter in obj.parameters])
        obj.docstring.value = with_fenced_examples(text)


def with_whole_arguments(text: str, names: list[str]) -> str:
    """The docstring with one line for each argument under `Args:`."""
    head, mark, rest = text.partition("Args:\n")
    if not mark:
        return text
    section, _, after = rest.partition("\n\n")
    items: list[list[str]] = []  # an argument's names, and its text
    for line in section.splitlines():
        words = line.strip()
        argument = ARGUMENT.match(words)
        if argument and set(argument[1].split(", ")) <= set(names):
            items.append([argument[1], argument[2]])
        elif items:
            items[-1][1] += f" {words}"
    lines = []
    for together, meaning in items:
        lines += [f"    {name}: {meaning}" for name in together.split(", ")]
    return f"{head}{mark}{chr(10).join(lines)}\n\n{after}"


def with_fenced_examples(text: str) -> str:
    """The docstring with its examples as blocks of code."""
    lines = []
    is_example = False
    for line in text.splitlines():
        if line.startswith(">>>") and not is_example:
            lines.append("```pycon")
            is_example = True
        elif is_example and not line.strip():
            lines.append("```")
            is_example = False
        lines.append(line)
    if is_example:
        lines.append("```")
    return "\n".join(lines)
