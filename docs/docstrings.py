"""An extension of griffe: examples that stand in a docstring as `>>>` become blocks of code."""

from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    """Rewrites each docstring once it was read from the source."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_fenced_examples(obj.docstring.value)


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
