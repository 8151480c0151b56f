"""Options that several commands share.

A set of options is a dataclass, where Python code states it as well: a field is an option, with its
default and its help text. What only a command has is a click option.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from _mergekit_moe_ext_common.errors import UserError

Decorator = Callable[[Callable], Callable]
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class Columns:
    """The names of the columns of a data set, and what messages say of the options that state
    them.
    """

    text: str = "text"
    messages: str = "messages"
    input: str = "input"
    target: str = "target"
    advice: str = "--text-column, --input-column and --target-column name others"


USUAL_COLUMNS = Columns()


def option(default: Any, meaning: str, *, at_least: float | None = None) -> Any:
    """A field of a set of options: its default, its help text and its smallest value."""
    return field(default=default, metadata={"help": meaning, "at_least": at_least})


def options_of(options: type, name: str) -> Decorator:
    """A decorator that adds a click option per field of a dataclass.

    The command gets them as one instance of that dataclass, called `name`.
    """
    names = [item.name for item in fields(options)]

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def with_options(**values: Any) -> Any:
            own = {item: values.pop(item) for item in names}
            return command(**{name: options(**own)}, **values)

        return fields_as_options(options, names)(with_options)

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


def in_order(*decorators: Decorator) -> Decorator:
    """One decorator in place of several, which a help page lists in this order."""

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def fields_as_options(options: type, names: Sequence[str]) -> Decorator:
    """A decorator that adds a click option per named field of a dataclass, in that order."""
    by_name = {item.name: item for item in fields(options)}
    return in_order(*[_click_option(by_name[name]) for name in names])


def _click_option(item: Any) -> Decorator:
    flag = "--" + item.name.replace("_", "-")
    meaning = item.metadata["help"]
    if item.type is bool:
        return click.option(flag, is_flag=True, help=meaning)
    # Of `int | None` click needs the `int`: None is what it gives where the option is left out.
    kind = item.type
    is_optional = get_origin(kind) is not Literal and type(None) in get_args(kind)
    if is_optional:
        kind = get_args(kind)[0]
    at_least = item.metadata.get("at_least")
    if get_origin(kind) is Literal:
        kind = click.Choice(get_args(kind))
    elif at_least is not None:
        limited = click.IntRange if kind is int else FiniteRange
        kind = limited(min=at_least)
    return click.option(
        flag, type=kind, default=item.default, show_default=item.default is not None, help=meaning
    )


def is_there(text: str) -> bool:
    """Whether a text is a path that leads somewhere."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a null character
        return False


class FiniteRange(click.FloatRange):
    """A number in a range. NaN is in none, and infinity is no number."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


def values_by_name(option: str, texts: Sequence[str], form: str = "NAME=VALUE") -> dict[str, str]:
    """The values of an option that is written as `form` says and may be repeated.

    `UserError` for a text without `=`, and for a name that is there twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"{option} {text}: write {form}")
        if name in values:
            raise UserError(
                f"{option}: {name!r} is named twice, with {values[name]} and {value}; name it once"
            )
        values[name] = value
    return values


def numbers_by_name(option: str, texts: Sequence[str]) -> dict[str, float]:
    """The numbers of an option that is written NAME=NUMBER and may be repeated.

    `UserError` for what is not a number, and as of `values_by_name`.
    """
    numbers = {}
    for name, value in values_by_name(option, texts, "NAME=NUMBER").items():
        try:
            numbers[name] = float(value)
        except ValueError:
            raise UserError(f"{option} {name}={value}: {value} is not a number") from None
    return numbers


TRUST_REMOTE_CODE = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the base model (danger)."
)
RESUME = click.option(
    "--resume", is_flag=True, help="Go on after the last checkpoint of an interrupted run."
)


def output_directory(meaning: str, *, required: bool = False) -> Decorator:
    """`-o`, the directory that a command writes."""
    return click.option("-o", "--output-dir", type=click.Path(), required=required, help=meaning)


def training_options(output: str, *, needs_data: bool = True, device_map: bool = True) -> Decorator:
    """The options of a training on texts: what it reads, where it writes, and how it goes on.

    `output` is the help text of the output directory; `needs_data` says whether `--data` is the
    only way to name the texts. Without `device_map` one device holds the model.
    """
    options: list[Decorator] = [
        click.option(
            "--data",
            multiple=True,
            required=needs_data,
            metavar="[NAME=]SOURCE",
            help="Texts to train on. May be repeated.",
        ),
        click.option(
            "--weight",
            "weights",
            multiple=True,
            metavar="NAME=NUMBER",
            help="Relative likelihood that a source is drawn, whatever its size; 1 for those not "
            "named. An epoch then ends when each was read once. [default: all rows of all sources "
            "are read]",
        ),
        click.option(
            "--eval-data",
            multiple=True,
            metavar="[NAME=]SOURCE",
            help="Texts to measure on, in place of the held-out rows of the source of that name.",
        ),
        output_directory(output),
        RESUME,
    ]
    if device_map:
        options.append(
            click.option(
                "--device-map",
                type=click.Choice(["auto"]),
                help="Have one process spread a model over all GPUs and, where they are too small, "
                "main memory. [default: one device holds it]",
            )
        )
    return in_order(*options)


def counting_options(data: str, output: str, plot: str) -> Decorator:
    """The options of a command that runs texts and writes what the routers did with them.

    The arguments are the help texts of the options that they are called by.
    """
    return in_order(
        click.option("--data", multiple=True, required=True, metavar="[TASK=]SOURCE", help=data),
        click.option("-o", "--output", type=_NEW_FILE, help=output),
        click.option("--plot", type=_NEW_FILE, help=plot),
        click.option(
            "--html",
            type=_NEW_FILE,
            help="Page to write, which shows the expert of each token, layer by layer: *.html. It "
            "needs no network.",
        ),
        click.option(
            "--max-samples",
            type=click.IntRange(min=1),
            help="Number of rows of each source that are read, from the first. [default: all]",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            help="Number of rows at a time.",
        ),
    )


@dataclass(frozen=True)
class Reading:
    """The way in which a command reads its model and its texts."""

    max_length: int = option(1024, "Number of tokens of a row; longer rows are cut.", at_least=2)
    text_column: str = option("text", "Column of texts, for decoders.")
    messages_column: str = option("messages", "Column of chats, for decoders.")
    input_column: str = option("input", "Column of inputs (encoder-decoder, --completions-only).")
    target_column: str = option(
        "target", "Column of targets (encoder-decoder, --completions-only)."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model (danger).")
    quiet: bool = option(False, "Hide progress bars.")

    @property
    def columns(self) -> Columns:
        return Columns(
            text=self.text_column,
            messages=self.messages_column,
            input=self.input_column,
            target=self.target_column,
        )


# Those of transformers' that need no settings of their own.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


@dataclass(frozen=True)
class TrainingOptions:
    """The settings of a training. Names, and most defaults, are those of transformers."""

    weight_decay: float = option(0.0, "AdamW's weight decay.", at_least=0)
    lr_scheduler_type: Schedule = option("linear", "Schedule of the learning rate.")  # noqa: RUF009
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

    @property
    def length(self) -> str:
        """How long the training is, in words for a card."""
        if self.max_steps > 0:
            return f"{self.max_steps} step{'' if self.max_steps == 1 else 's'}"
        return f"{self.num_train_epochs:g} epoch{'' if self.num_train_epochs == 1 else 's'}"
