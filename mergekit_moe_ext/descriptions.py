"""Merge methods in words, for `mergekit-moe-ext methods` and the reference on the site."""

from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method."""

    name: str
    kind: str  # a type, or the choices
    default: str  # `required`, `optional`, or `default` and the value
    meaning: str | None
    per_model: bool = False  # stated for one entry of `models:`


def description_of(method: Any) -> str:
    """The sentence that says what a registered merge method does, or its name."""
    return getattr(method, "description", method.spec.pretty_name or method.spec.name)


def options_of_method(method: Any) -> list[Parameter]:
    """The options of a structural method of ours, which `parameters:` holds; none of a tensor
    method.
    """
    options = getattr(method, "options_type", None)
    if options is None:
        return []
    parameters = []
    for fields, per_model in (
        (options.model_fields, False),
        (method.model_options_type.model_fields, True),
    ):
        for name, field in fields.items():
            default = _default_in_words(field.is_required(), field.default)
            kind = _type_in_words(field.annotation)
            parameters.append(Parameter(name, kind, default, field.description, per_model))
    return parameters


def tensor_parameters_of(method: Any) -> list[Parameter]:
    """The parameters that a tensor method declares to mergekit."""
    parameters = []
    for parameter in method.spec.parameters:
        default = _default_in_words(parameter.required, parameter.default)
        kind = _type_in_words(parameter.value_type)
        parameters.append(Parameter(parameter.name, kind, default, parameter.description))
    return parameters


def _default_in_words(is_required: bool, default: Any) -> str:
    if is_required:
        return "required"
    # The meaning says what holds where no value is given.
    return "optional" if default is None else f"default {default}"


def _type_in_words(kind: Any) -> str:
    """A type as the reader of a help text knows it: the choices, or names joined by `|`."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        return " | ".join(map(_type_in_words, members))
    return str(kind) if get_args(kind) else getattr(kind, "__name__", str(kind))
