"""What every training of ours shares: reading the data, the Trainer's arguments, measuring, resuming.

Held-out losses are means over tokens, whatever the batches and processes. (The stock Trainer's are means over
batches.)
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import is_torch_bf16_gpu_available

from _mergekit_moe_ext_common.data import Source, load, pack, parse_sources, tokenise
from _mergekit_moe_ext_common.options import Reading, Recipe

_SETTINGS = "settings.json"
_TRAINED = "trained.safetensors"
MEASURES = ("loss", "entropy", "accuracy")


class BarTrainer(Trainer):
    """The Trainer, with a bar and lines that a person can read, and no checkpoint of the last step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(NoLastCheckpoint())
        if not self.args.disable_tqdm:
            self.add_callback(Progress())


def let_go(trainer: Trainer) -> None:
    """Waits for all processes, and lets go of the model that is spread over them.

    Were that the last to hold their group, the group would be taken down while Python's lock is held, and with Gloo
    that can wait forever for a thread that wants the lock.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()


def part_processes(trainer: Trainer) -> None:
    """The processes part here, each when all have come so far: only one writes what was trained."""
    let_go(trainer)
    trainer.accelerator.end_training()


class TrainedOnly:
    """For a Trainer whose checkpoints hold what is trained, in float32, by the names in the model, and no more."""

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad},
            directory / _TRAINED,
        )

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / _TRAINED)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if saved.keys() != trained.keys():
            raise click.ClickException(f"{resume_from_checkpoint} is a checkpoint of another training")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


class TokenTrainer(BarTrainer):
    """The Trainer, with held-out losses over tokens."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_metrics=_mean_over_tokens, **kwargs)
        self._loss_shifts_labels = not self.model.config.is_encoder_decoder

    def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per row the sum of the losses of its tokens, and their number."""
        if self._loss_shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = functional.cross_entropy(
            logits.float().transpose(1, 2), labels.to(logits.device), ignore_index=-100, reduction="none"
        )
        return losses.sum(dim=1), (labels != -100).sum(dim=1).to(losses.device)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits
        losses, counts = self.token_losses(logits, labels)
        return None, losses, counts


def _mean_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    return {"loss": float(prediction.predictions.sum() / prediction.label_ids.sum())}


class Progress(ProgressCallback):
    """The Trainer's bar, with a line per measurement that a person can read."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        for key, value in (logs or {}).items():
            name, _, measure = key.removeprefix("eval_").rpartition("_")
            if key == "loss" or (key.startswith("eval_") and measure in MEASURES):
                what = f"measured on {name}" if name else "training"
                self.training_bar.write(f"step {state.global_step:>6}  {measure} {value:.4f}  {what}")


class NoLastCheckpoint(TrainerCallback):
    """The Trainer checkpoints the last step as well; the trained model itself is written right after it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False


def training_arguments(
    recipe: Recipe, reading: Reading, checkpoints: Path, *, learning_rate: float, measure: bool, **more: Any
) -> TrainingArguments:
    """What the Trainer knows of the recipe, and how it reports and checkpoints. `ClickException` if it refuses."""
    known = {item.name for item in fields(TrainingArguments)}
    values = {name: value for name, value in asdict(recipe).items() if name in known}
    values["learning_rate"] = learning_rate
    if values.pop("gradient_checkpointing"):
        values |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if recipe.eval_steps <= 0 or recipe.save_steps <= 0:
        raise click.ClickException("--eval-steps and --save-steps must be above 0")
    for name in ("eval_steps", "save_steps"):  # counts are whole
        values[name] = int(values[name]) if values[name] >= 1 else values[name]
    try:
        arguments = TrainingArguments(
            str(checkpoints),
            **values,
            eval_strategy="steps" if measure else "no",
            eval_on_start=measure,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=recipe.bf16 and not is_torch_bf16_gpu_available(),  # else the Trainer refuses bf16 on a CPU
            save_strategy="steps",
            save_total_limit=2,
            logging_steps=values["eval_steps"],
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=reading.quiet,
            **more,
        )
    except ValueError as error:
        raise click.ClickException(str(error).splitlines()[0]) from error
    # With several GPUs in one process the Trainer would copy the model to each, away from our hooks;
    # `accelerate launch` is the way to use them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def read_data(
    data: Sequence[str],
    weights: Mapping[str, float],
    eval_data: Sequence[str],
    tokenizer: Any,
    config: Any,
    reading: Reading,
    recipe: Recipe,
    *,
    completions_only: bool = False,
    first_label: int = 1,
) -> tuple[Dataset, dict[str, Dataset]]:
    """What is trained on, the sources mixed, and what is held out of each, as token ids.

    Rows without a token to predict at `first_label` or after it are left out: of a decoder's rows the first token
    is never predicted.
    """
    names = [source.name for source in parse_sources(data)]
    for name, weight in weights.items():
        if name not in names:
            raise click.ClickException(f"--weight {name}: there is no such source; there are {', '.join(names)}")
        if weight <= 0:
            raise click.ClickException(f"--weight {name}: {weight} is not above 0; leave the source out instead")

    def tokens(rows: Dataset, source: Source) -> Dataset:
        encoded = tokenise(
            rows,
            source,
            tokenizer,
            columns=reading.columns,
            max_length=None if recipe.packing else reading.max_length,
            encoder_decoder=config.is_encoder_decoder,
            completions_only=completions_only,
        )
        if recipe.packing:
            if "labels" in encoded.column_names:
                raise click.ClickException("--packing joins texts, which inputs with their targets are not")
            encoded = pack(encoded, reading.max_length, tokenizer.eos_token_id)
        return encoded if config.is_encoder_decoder else with_predicted(encoded, source, first_label)

    training, held_out = split_sources(data, eval_data, recipe, tokens)
    return _mixed(training, weights, recipe.seed), held_out


def split_sources(
    data: Sequence[str], eval_data: Sequence[str], recipe: Recipe, prepare: Callable[[Dataset, Source], Dataset]
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Per source what is trained on, and what is held out of it or given for measuring; both as prepared."""
    measured = parse_sources(eval_data)
    training, held_out = {}, {source.name: prepare(load(source), source) for source in measured}
    for source in parse_sources(data):
        rows = load(source)
        if recipe.held_out and source.name not in held_out:
            if len(rows) <= recipe.held_out:
                raise click.ClickException(
                    f"{source} (data {source.name!r}) has {len(rows)} rows, and {recipe.held_out} are to be held out; "
                    "see --held-out and --eval-data"
                )
            split = rows.train_test_split(test_size=recipe.held_out, seed=recipe.seed)
            rows, held_out[source.name] = split["train"], prepare(split["test"], source)
        training[source.name] = prepare(rows, source)
    return training, held_out


def with_predicted(encoded: Dataset, source: Source, first_label: int) -> Dataset:
    """A decoder's rows with a token to predict at `first_label` or after it. `ClickException` if there are none."""
    kept = encoded.filter(
        lambda row: any(label != -100 for label in row.get("labels", row["input_ids"])[first_label:]),
        desc="leaving out rows that teach nothing",
    )
    if len(kept) == 0:
        raise click.ClickException(
            f"data {source.name!r} has no row with a token to predict at position {first_label} or after"
        )
    return kept


def _mixed(training: Mapping[str, Dataset], weights: Mapping[str, float], seed: int) -> Dataset:
    """Rows of the sources at random, by their weights, until each was read once; without weights all of them."""
    if len(training) == 1 or not weights:
        return concatenate_datasets(list(training.values()))
    numbers = [weights.get(name, 1.0) for name in training]
    return interleave_datasets(
        list(training.values()),
        probabilities=[number / sum(numbers) for number in numbers],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def last_checkpoints(
    checkpoints: Path,
    settings: dict[str, Any],
    parts: Sequence[str] = ("",),
    *,
    resume: bool,
    finished: Collection[str] = (),
) -> dict[str, str | None]:
    """Where each part of a training, a directory in `checkpoints`, starts: its last complete checkpoint, or None.

    `ClickException` if there is a training and it is not to be resumed, or none to resume, or another.
    """
    found = {part: _complete(checkpoints / part) for part in parts}
    if not resume:
        if finished or any(found.values()) or any(checkpoints.glob("*/checkpoint-*/trainer_state.json")):
            raise click.ClickException(
                f"{checkpoints} holds an unfinished training; --resume goes on with it, or remove it"
            )
        return dict.fromkeys(parts)
    if not finished and not any(found.values()):
        raise click.ClickException(f"there is no checkpoint in {checkpoints} to resume from")
    before = json.loads((checkpoints / _SETTINGS).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise click.ClickException(
                f"the training in {checkpoints} had another {name.replace('_', ' ')}: {before.get(name)}, not {value}"
            )
    return {part: str(complete[-1]) if complete else None for part, complete in found.items()}


def _complete(directory: Path) -> list[Path]:
    return sorted(
        (path.parent for path in directory.glob("checkpoint-*/trainer_state.json")),
        key=lambda path: int(path.name.rsplit("-", 1)[1]),
    )


def remove_checkpoints(checkpoints: Path, parts: Sequence[str]) -> None:
    """Those of a training that is complete, and nothing that somebody else put there."""
    for part in parts:
        shutil.rmtree(checkpoints / part, ignore_errors=True)
    (checkpoints / _SETTINGS).unlink(missing_ok=True)
    with suppress(OSError):
        checkpoints.rmdir()


def keep_settings(checkpoints: Path, settings: Mapping[str, Any]) -> None:
    """Beside the checkpoints: what must be the same when they are resumed from."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    partial = checkpoints / f".{_SETTINGS}.partial"
    partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    partial.replace(checkpoints / _SETTINGS)


def first_and_last(history: Sequence[dict[str, Any]], names: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The held-out loss of each source before and after."""
    losses = {name: [entry[key] for entry in history if (key := f"eval_{name}_loss") in entry] for name in names}
    return {name: (values[0], values[-1]) for name, values in losses.items()}
