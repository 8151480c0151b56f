"""Options that several commands share: how texts are read, and how the model is."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from mergekit_moe_ext.data import Columns


@dataclass(frozen=True)
class Reading:
    """How a command reads its model and its texts."""

    columns: Columns
    max_length: int
    trust_remote_code: bool
    quiet: bool


def reading_options(command: Callable) -> Callable:
    """Adds the options of `Reading`, and hands them to the command as `reading`."""

    @click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a row.")
    @click.option("--text-column", default="text", show_default=True, help="For decoders.")
    @click.option("--messages-column", default="messages", show_default=True, help="For decoders: chats.")
    @click.option("--input-column", default="input", show_default=True, help="For encoder-decoders.")
    @click.option("--target-column", default="target", show_default=True, help="For encoder-decoders.")
    @click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model (danger).")
    @click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
    @functools.wraps(command)
    def with_reading(
        max_length: int,
        text_column: str,
        messages_column: str,
        input_column: str,
        target_column: str,
        trust_remote_code: bool,
        quiet: bool,
        **others: Any,
    ) -> Any:
        columns = Columns(text_column, messages_column, input_column, target_column)
        return command(reading=Reading(columns, max_length, trust_remote_code, quiet), **others)

    return with_reading
