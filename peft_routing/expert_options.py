"""Options of several commands that name adapters, and what is written after them."""

from collections.abc import Sequence

import click

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import is_there

EXPERTS = click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="[NAME=]DIR",
    help="LoRA adapter that becomes an expert, by default with the last part of its path as its "
    "name. May be repeated.",
)
EXPERTS_FROM = click.option(
    "--experts-from",
    metavar="DIR",
    help="Directory of LoRA adapters: every subdirectory that holds one becomes an expert of its "
    "name.",
)
LIBRARY = click.option(
    "--library",
    metavar="LIB",
    help="Library whose adapters become experts: a directory that `peft-route library add` wrote.",
)
ONLY = click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Adapter of the library to take. May be repeated. [default: all]",
)
TASKS = click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="NAME=SOURCE",
    help="Texts of a task, which are split into train, validation and test; or three sources with "
    "commas between them. May be repeated. An expert of the same name was trained on the task.",
)


def experts_written(option: str, texts: Sequence[str]) -> dict[str, str] | list[str]:
    """Experts by name where all have one, or a list, which is named by its directories."""
    named = [text for text in texts if "=" in text and not is_there(text)]
    if not named:
        return list(texts)
    if len(named) < len(texts):
        raise UserError(f"{option}: name all experts, or none")
    by_name: dict[str, str] = {}
    for text in texts:
        name, _, directory = text.partition("=")
        if not name or not directory:
            raise UserError(
                f"{option} {text}: write the expert's name and its adapter, NAME=ADAPTER"
            )
        if name in by_name:
            raise UserError(
                f"{option}: two experts are named {name!r}, {by_name[name]} and {directory}: give "
                "each a name of its own"
            )
        by_name[name] = directory
    return by_name
