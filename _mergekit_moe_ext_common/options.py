"""Options that several commands share, each set a dataclass: a field is an option, its default and
its help.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

import click


@dataclass(frozen=True)
class Columns:
    """What the columns are called."""

    text: str = "text"
    messages: str = "messages"
    input: str = "input"
    target: str = "target"


USUAL_COLUMNS = Columns()


def option(default: Any, meaning: str, *, at_least: float | None = None) -> Any:
    """A field of a set of options."""
    return field(default=default, metadata={"help": meaning, "at_least": at_least})


def options_of(options: type, name: str) -> Callable[[Callable], Callable]:
    """Adds a click option per field of the dataclass, and hands the command an instance as
    `name`."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def with_options(**values: Any) -> Any:
            ours = {item.name: values.pop(item.name) for item in fields(options)}
            return command(**{name: options(**ours)}, **values)

        return fields_as_options(options, [item.name for item in fields(options)])(with_options)

    return decorate


class DeferredCommand(click.Command):
    """A command some of whose options come from a host: it is listed without the host, and built
    when it is used.
    """

    def __init__(
        self, name: str, run: Callable[..., None], build: Callable[[], click.Command]
    ) -> None:
        super().__init__(name, help=inspect.getdoc(run))
        self._build = build

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        return self._build().make_context(*args, **kwargs)


def fields_as_options(options: type, names: Sequence[str]) -> Callable[[Callable], Callable]:
    """Adds a click option per named field, in that order."""

    def decorate(command: Callable) -> Callable:
        by_name = {item.name: item for item in fields(options)}
        for name in reversed(names):
            command = _click_option(by_name[name])(command)
        return command

    return decorate


def _click_option(item: Any) -> Callable[[Callable], Callable]:
    flag = "--" + item.name.replace("_", "-")
    meaning, at_least = item.metadata["help"], item.metadata.get("at_least")
    if item.type is bool:
        return click.option(flag, is_flag=True, help=meaning)
    is_union = get_origin(item.type) is not Literal and get_args(item.type)
    kind = next(
        kind
        for kind in (get_args(item.type) if is_union else (item.type,))
        if kind is not type(None)
    )
    if get_origin(kind) is Literal:
        kind = click.Choice(get_args(kind))
    elif at_least is not None:
        kind = (click.IntRange if kind is int else click.FloatRange)(min=at_least)
    return click.option(
        flag, type=kind, default=item.default, show_default=item.default is not None, help=meaning
    )


@dataclass(frozen=True)
class Reading:
    """How a command reads its model and its texts."""

    max_length: int = option(1024, "Number of tokens of a row; longer rows are cut.", at_least=2)
    text_column: str = option("text", "Column of texts, for decoders.")
    messages_column: str = option("messages", "Column of chats, for decoders.")
    input_column: str = option("input", "Column of inputs, for encoder-decoders.")
    target_column: str = option("target", "Column of targets, for encoder-decoders.")
    trust_remote_code: bool = option(False, "Run code that comes with the model (danger).")
    quiet: bool = option(False, "Show no progress bars.")

    @property
    def columns(self) -> Columns:
        return Columns(
            self.text_column, self.messages_column, self.input_column, self.target_column
        )


@dataclass(frozen=True)
class Recipe:
    """How something is trained. Names are transformers', defaults, mostly, too."""

    weight_decay: float = option(0.0, "AdamW's weight decay.", at_least=0)
    lr_scheduler_type: str = option(
        "linear", "Schedule of the learning rate: linear, cosine, constant …"
    )
    warmup_steps: int = option(0, "Number of steps in which the learning rate rises.", at_least=0)
    num_train_epochs: float = option(3.0, "Number of times that the data is read.", at_least=0)
    max_steps: int = option(-1, "Number of steps in all; above 0, it overrides the epochs.")
    per_device_train_batch_size: int = option(
        8, "Number of rows per process and forward pass.", at_least=1
    )
    per_device_eval_batch_size: int = option(
        8, "Number of held-out rows per process and forward pass.", at_least=1
    )
    gradient_accumulation_steps: int = option(1, "Number of forward passes per step.", at_least=1)
    packing: bool = option(False, "Join the texts and cut them into rows of --max-length tokens.")
    held_out: int = option(
        32,
        "Number of rows of each source that are measured, not trained on; see --eval-data.",
        at_least=0,
    )
    eval_steps: float = option(
        0.1, "Measure every so many steps; below 1: a share of all steps.", at_least=0
    )
    save_steps: float = option(
        500.0, "Checkpoint every so many steps; below 1: a share of all steps.", at_least=0
    )
    bf16: bool = option(
        False,
        "Compute in bfloat16, as autocast does; what is trained is kept in float32.",
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations twice: less memory for more time."
    )
    seed: int = option(42, "Seed of the order of the data and of the choice of held-out rows.")
