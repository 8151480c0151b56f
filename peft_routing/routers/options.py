"""A router's options, read from what a user wrote into the dataclass that the router declares."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, get_type_hints

import pydantic
import pydantic_core

from _mergekit_moe_ext_common.errors import UserError


@dataclass(frozen=True)
class NoOptions:
    """The options of a router that has none."""


@dataclass(frozen=True)
class RouterOptions:
    """The options of every router whose coefficients are a softmax; a router may add its own.

    A field is an option: its name, its type and its default. `__post_init__` may raise a
    `ValueError`.

    Attributes:
        top_k: the number of coefficients that are not 0; all if None.
        router_temperature: what divides the scores; 1 if None.
    """

    top_k: int | None = None
    router_temperature: float | None = None


def option_names(options: type) -> list[str]:
    """The names of the fields of a dataclass, in order."""
    return [field.name for field in dataclasses.fields(options)]


def options_of_names(class_name: str, names: Sequence[str]) -> type:
    """A dataclass for options of which only the names are known: it takes any value, and None is
    the default.
    """
    declared = {field.name: field.type for field in dataclasses.fields(RouterOptions)}
    fields = [(name, declared.get(name, Any), None) for name in names]
    return make_dataclass(class_name, fields, frozen=True)


def read_options(
    options: type, values: Mapping[str, Any], where: str, hint: Callable[[str], str]
) -> Any:
    """An instance of the dataclass `options`, each value in the type that its field declares.

    A value is converted when it is unambiguous: "2" and 2.0 become the integer 2. `UserError` names
    an option that is unknown or of the wrong type. `hint` returns, for an unknown one, where else
    it belongs, or an empty text.
    """
    known = option_names(options)
    for name in values:
        if name not in known:
            raise UserError(
                f"{name} is not an option of {where}; {hint(name) or nearest(name, known)}"
            )
    try:
        return _adapter(options).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise UserError(complaint(error, where)) from error


def value_of_text(options: type, name: str, text: str) -> Any:
    """The value of an option that a command line states, in the type of its field.

    It is the text itself where the type takes it (a number, a word, true or false), and else what
    the text says in JSON. `UserError` names the option and the type where neither fits. The text of
    an option that there is not is returned as it is: `read_options` complains of it.
    """
    declared = _declared_types(options).get(name)
    if declared is None:
        return text
    candidates: list[Any] = [text]
    with contextlib.suppress(ValueError):
        candidates.append(json.loads(text))
    if declared is Any:  # takes the text as well, but means the number or the list in it
        return candidates[-1]
    for candidate in candidates:
        try:
            return _adapter(declared).validate_python(candidate)
        except pydantic.ValidationError:
            continue
    kind = inspect.formatannotation(declared).replace("typing.", "")
    raise UserError(f"{name}={text!r} is not of the type {kind}")


def _declared_types(options: type) -> dict[str, Any]:
    types = get_type_hints(options)
    return {name: types[name] for name in option_names(options)}


def saved_options(options: Any) -> dict[str, Any]:
    """The values of options by name, in the types that JSON has."""
    return pydantic_core.to_jsonable_python(options, inf_nan_mode="constants")


def read_value(name: str, declared: Any, value: Any) -> Any:
    """One value in the type that is declared for it. `UserError` names it if it has another."""
    try:
        return _adapter(declared).validate_python(value)
    except pydantic.ValidationError as error:
        raise UserError(complaint(error, name)) from error


def complaint(error: pydantic.ValidationError, where: str) -> str:
    """The first complaint of pydantic, in one line that begins with the option's name."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"][:1]]
    if first["type"] == "value_error":  # from a `__post_init__`, which says all by itself
        return f"{where}: {first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{where} needs {names[0]}"
    start = f"{(names or [where])[0]}={first['input']!r}"
    if first["type"] == "literal_error":
        return f"{start} is none of {first['ctx']['expected'].replace(' or ', ', ')}"
    return f"{start}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the option that could have been meant: the nearest known name, or all names."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"its options are {', '.join(known)}" if known else "it has none"


@functools.cache
def _adapter(declared: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(declared)
