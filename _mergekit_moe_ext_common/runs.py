"""A training of ours from its first check to its card, and the table of what it changed.

`mergekit-moe-ext train` and `adapt` and `peft-route train` take the same steps in the same order.
What each of them trains, on what and by which Trainer, is its own; the steps around that are `Run`.
"""

import json
import logging
import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from _mergekit_moe_ext_common.cards import in_markdown
from _mergekit_moe_ext_common.checkpoints import (
    check_regular,
    damaged_file,
    is_finite,
    read_headers,
)
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import silence
from _mergekit_moe_ext_common.options import Reading, TrainingOptions
from _mergekit_moe_ext_common.placement import check_device_map, gather, spread
from _mergekit_moe_ext_common.sharding import (
    check_launch,
    is_split_wanted,
    make_whole,
    warn_of_missing_processes,
)
from _mergekit_moe_ext_common.staging import check_output, check_room, staged
from _mergekit_moe_ext_common.tables import in_columns
from _mergekit_moe_ext_common.training import MEASURES, training_arguments

LOG = logging.getLogger(__name__)
_SETTINGS = "settings.json"
_NOT_KEPT_EARLIER = ("held_out_data", "base_weights")
Losses = dict[str, tuple[float, float]]  # of each source, before and after
Measures = dict[str, Losses]  # of each task, by the name of what was measured


class Run:
    """One training: where it writes, where it starts, and what is done around it.

    A run has one part, whose name is empty, or several, each with a Trainer and a directory of
    checkpoints of its own. Methods are called in the order in which they stand here.
    """

    def __init__(
        self,
        output: str,
        reading: Reading,
        *,
        splits: bool = False,
        device_map: str | None = None,
    ) -> None:
        """Nothing is written yet. `UserError` where `output` cannot be.

        `splits` says that the model may be split between processes: each trainer is a
        `TrainedOnly`. `device_map="auto"` has one process spread it over devices instead.
        `UserError` where accelerate was told to do what this training cannot.
        """
        check_launch(splits=splits)
        silence(reading)
        self.out = check_output(output)
        self.checkpoints = self.out.with_name(f"{self.out.name}.checkpoints")
        self.starts: dict[str, str | None] = {}
        # How many processes there are, and which one writes, only the Trainer's arguments know.
        self.is_main = True
        self.processes = 1
        self.is_split = False
        self._reading = reading
        self._device_map = device_map
        self._tied: Sequence[Sequence[str]] = ()
        self.settings: dict[str, Any] = {}
        self._is_new = False  # whether this run makes the directory of the checkpoints

    def arguments(
        self,
        recipe: TrainingOptions,
        *,
        learning_rate: float,
        measure: bool,
        part: str = "",
        **more: Any,
    ) -> TrainingArguments:
        """The Trainer's arguments for one part. `UserError` where the Trainer refuses them."""
        arguments = training_arguments(
            recipe,
            self._reading,
            self.checkpoints / part,
            learning_rate=learning_rate,
            measure=measure,
            **more,
        )
        self.is_main = arguments.should_save
        self.processes = arguments.world_size
        check_device_map(self._device_map, self.processes)
        # accelerate sets FSDP up in a group of one process as well.
        self.is_split = is_split_wanted() and torch.distributed.is_initialized()
        return arguments

    def begin(
        self,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        parts: Sequence[str] = ("",),
        finished: Collection[str] = (),
    ) -> None:
        """Finds where each part starts: at its last complete checkpoint, or afresh (None).

        `settings` are what must be the same when a run is resumed; `finished` are the parts that
        need no training any more. `UserError` where there is an interrupted run and it is not to be
        resumed, and where there is none, or another one, and it is.
        """
        warn_of_missing_processes(self.processes)
        self.settings = {**settings, "processes": self.processes, "fsdp": self.is_split}
        complete = {part: _complete_checkpoints(self.checkpoints / part) for part in parts}
        is_begun = bool(finished) or any(complete.values())
        if resume:
            if not is_begun:
                raise UserError(f"there is no checkpoint in {self.checkpoints} to resume from")
            self._check_settings()
            for part, paths in complete.items():
                self.starts[part] = str(paths[-1]) if paths else None
                if paths:
                    _check_readable(paths[-1])
            return
        # Parts of other names, say of other learning rates, are an interrupted run as well.
        if is_begun or any(self.checkpoints.glob("*/checkpoint-*/trainer_state.json")):
            remedy = "--resume goes on with it, or remove it"
            raise UserError(f"{self.checkpoints} holds an unfinished training; {remedy}")
        self.starts = dict.fromkeys(parts)
        self._is_new = not self.checkpoints.exists()

    def _check_settings(self) -> None:
        if not (self.checkpoints / _SETTINGS).is_file():
            raise UserError(
                f"{self.checkpoints} has no {_SETTINGS}, by which a resumed training is compared; "
                "remove it, and train without --resume"
            )
        damaged = damaged_file(self.checkpoints, _SETTINGS)
        if damaged:
            raise UserError(f"{damaged}; remove {self.checkpoints}, and train without --resume")
        earlier = json.loads((self.checkpoints / _SETTINGS).read_text(encoding="utf-8"))
        earlier.setdefault("fsdp", False)  # runs of earlier versions, which split no model
        for name, value in self.settings.items():
            if name in _NOT_KEPT_EARLIER and name not in earlier:
                continue
            if earlier.get(name) != value:
                raise UserError(
                    f"the training in {self.checkpoints} had another {name.replace('_', ' ')}: "
                    f"{earlier.get(name)}, not {value}"
                )

    def check_room(
        self,
        output: int,
        checkpoint: int,
        arguments: TrainingArguments,
        rows: int,
    ) -> None:
        """`UserError` where the disk lacks room for the output and the checkpoints before it.

        `output` and `checkpoint` are their sizes in bytes; every part trains on so many `rows`, and
        keeps its checkpoints until the output is written.
        """
        written = checkpoints_written(arguments, rows)
        kept = min(written, arguments.save_total_limit or written)
        at_once = kept * len(self.starts)
        if written > kept:
            at_once += 1  # the oldest goes when the next is whole
        # Those of a run that is resumed take their room already.
        there = 0
        for part in self.starts:
            there += len(_complete_checkpoints(self.checkpoints / part))
        check_room(self.out, output, max(0, at_once - there) * checkpoint)

    def place(self, model: torch.nn.Module, arguments: TrainingArguments) -> None:
        """Spreads a part's model over devices, where that was asked for; before its Trainer is
        made.
        """
        if self._device_map:
            self._tied = spread(model, arguments)

    def train(self, trainer: Trainer, part: str = "") -> None:
        """Trains one part, from where it starts, and waits until all processes have.

        A model that was split between processes is whole in the main one afterwards, for saving,
        and one that was spread over devices in main memory.
        """
        if self.is_main:
            self._keep_settings()
        try:
            with _without_a_second_comparison():
                trainer.train(resume_from_checkpoint=self.starts[part])
        except BaseException as error:
            if self.is_main and self._is_new:
                self._remove_what_is_empty(part)
            if self.is_main and isinstance(error, KeyboardInterrupt):
                self._say_how_to_go_on()
            raise
        # Let go of the model that is spread over the processes. Were it the last to hold their
        # group, the group would be taken down while Python's lock is held, and with Gloo that can
        # wait forever for a thread that wants the lock.
        trainer.accelerator.wait_for_everyone()
        trainer.model_wrapped = trainer.model
        if self._device_map:
            gather(trainer.model, self._tied)
        trainer.accelerator.free_memory()
        if self.is_split:
            make_whole(trainer.model, keeps=self.is_main)

    def _say_how_to_go_on(self) -> None:
        if any(self.checkpoints.glob("**/checkpoint-*/trainer_state.json")):
            LOG.warning("%s has checkpoints: a resumed run goes on from the last", self.checkpoints)

    def _keep_settings(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoints / f".{_SETTINGS}.partial"
        partial.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
        partial.replace(self.checkpoints / _SETTINGS)

    def end_group(self) -> None:
        """Ends the group of processes: what is left to do, only the main one does."""
        PartialState().destroy_process_group()

    def check_converged(self, trainer: Trainer, losses: Losses | Measures, advice: str) -> None:
        """`UserError` where a training has diverged: nothing is written.

        Checkpoints stay where they are.
        """
        symptom = divergence(trainer, losses)
        if symptom is None:
            return
        if not any(_complete_checkpoints(self.checkpoints / part) for part in self.starts):
            self._remove_checkpoints()
            raise UserError(f"the training diverged: {symptom}; {advice}")
        raise UserError(
            f"the training diverged: {symptom}; {advice}, and remove {self.checkpoints}, which "
            "this training left"
        )

    @contextmanager
    def finish(self) -> Iterator[Path]:
        """Yields a directory that becomes the output, and then removes the checkpoints."""
        with staged(self.out) as directory:
            yield directory
        self._remove_checkpoints()

    def _remove_what_is_empty(self, part: str) -> None:
        """Removes what a part that failed has left, if no training can go on from it, and the
        directory of the checkpoints with the last part. What other parts have finished stays.
        """
        if _complete_checkpoints(self.checkpoints / part):
            return
        if part:
            shutil.rmtree(self.checkpoints / part, ignore_errors=True)
        others = [path for path in self.checkpoints.iterdir() if path.name != _SETTINGS]
        if not part or not others:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _remove_checkpoints(self) -> None:
        # What somebody else has put beside the checkpoints of several parts stays.
        for part in self.starts:
            shutil.rmtree(self.checkpoints / part, ignore_errors=True)
        (self.checkpoints / _SETTINGS).unlink(missing_ok=True)
        with suppress(OSError):
            self.checkpoints.rmdir()


@contextmanager
def _without_a_second_comparison() -> Iterator[None]:
    """Keeps transformers from comparing the arguments of a training that is resumed. `Run.begin`
    has compared all of them, and steps that are given as a share are other ones to transformers.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "do not match the ones in the `trainer_state.json`" not in record.getMessage()

    logger = logging.getLogger("transformers.trainer_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def checkpoints_written(arguments: TrainingArguments, rows: int) -> int:
    """How many checkpoints one training on so many rows writes; none of its last step."""
    steps = arguments.max_steps
    if arguments.save_strategy == "epoch" and steps <= 0:
        return max(0, math.ceil(arguments.num_train_epochs) - 1)
    # As the Trainer counts: batches per epoch and steps per epoch are rounded up, and so is what is
    # a share of all steps.
    if steps <= 0:
        batch = arguments.per_device_train_batch_size * arguments.world_size
        of_epoch = math.ceil(math.ceil(rows / batch) / arguments.gradient_accumulation_steps)
        steps = math.ceil(arguments.num_train_epochs * of_epoch)
    interval = arguments.save_steps
    if interval < 1:
        interval = math.ceil(interval * steps)
    # The multiples of the interval before the last step.
    return max(0, (steps - 1) // int(interval))


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """The size of what is trained in a checkpoint: it and Adam's two means of it, in float32."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return 3 * 4 * sum(parameter.numel() for parameter in trained)


def divergence(trainer: Trainer, losses: Losses | Measures) -> str | None:
    """A sentence on the trained parameter or the loss that is not finite; None if all are."""
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not is_finite(parameter):
            return f"{name} holds NaN or infinity"
    for name, values in losses.items():
        pairs = [values] if isinstance(values, tuple) else values.values()
        if not all(math.isfinite(after) for _, after in pairs):
            return f"what was measured on {name} is not a number"
    return None


def _complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that were written to their end, the last step last."""
    states = directory.glob("checkpoint-*/trainer_state.json")
    paths = [state.parent for state in states if _step(state.parent).isdecimal()]
    return sorted(paths, key=lambda path: int(_step(path)))


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def _check_readable(checkpoint: Path) -> None:
    """`UserError` for a checkpoint with a file that is damaged, or a pickle that would run code.

    The state of the optimizer and of the random numbers are pickles of torch, which the Trainer
    reads without running anything in them.
    """
    remedy = f"remove {checkpoint}, and --resume goes on from the one before it, if there is one"
    check_regular(checkpoint)
    damaged = damaged_file(checkpoint)
    if damaged:
        raise UserError(f"{damaged}; {remedy}")
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{checkpoint} has no safetensors file of what was trained; {remedy}")
    read_headers(weights)
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        try:
            with safe_globals():
                torch.load(path, map_location="meta", weights_only=True)
        # Whatever a damaged pickle makes its reader raise.
        except Exception as error:
            raise UserError(
                f"{path} is damaged, or holds more than tensors and numbers; {remedy}"
            ) from error


def model_identity(model: str) -> str:
    """How settings name a model: a directory by its full path, one on the Hub by its name."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def first_and_last(history: Sequence[Mapping[str, Any]], names: Collection[str]) -> Measures:
    """What was measured first and last in a Trainer's history, per source or task and measure."""
    measured: Measures = {}
    for name in names:
        for measure in MEASURES:
            key = f"eval_{name}_{measure}"
            values = [entry[key] for entry in history if key in entry]
            if values:
                measured.setdefault(name, {})[measure] = (values[0], values[-1])
    return measured


def measurements(trainer: Trainer) -> Sequence[Mapping[str, Any]]:
    """A Trainer's history up to the model that it has at its end, which may be the best one."""
    history = trainer.state.log_history
    if not trainer.args.load_best_model_at_end:
        return history
    return [entry for entry in history if entry["step"] <= trainer.state.best_global_step]


def losses_before_and_after(trainer: Trainer, names: Collection[str]) -> Losses:
    """The held-out loss of each source before and after."""
    measured = first_and_last(measurements(trainer), names)
    return {name: measures["loss"] for name, measures in measured.items()}


def before_and_after(measured: Losses | Measures, *, markdown: bool = False) -> str:
    """A table of losses per source, or of measures per task, for a terminal or in Markdown."""
    labels = ["held-out loss"]
    rows = []
    for name, values in measured.items():
        if isinstance(values, tuple):
            rows.append([name, *_numbers(values)])
        else:
            labels = ["task", "measure"]
            rows += [[name, measure, *_numbers(pair)] for measure, pair in values.items()]
    heading = [*labels, "before", "after"]
    if markdown:
        rule = "|" + "---|" * len(labels) + "---:|---:|"
        lines = [f"| {' | '.join(map(in_markdown, row))} |" for row in [heading, *rows]]
        return "\n".join([lines[0], rule, *lines[1:]])
    return in_columns([heading, *rows], labels=len(labels), least_width=8)


def _numbers(pair: tuple[float, float]) -> list[str]:
    return [f"{number:.4f}" for number in pair]
