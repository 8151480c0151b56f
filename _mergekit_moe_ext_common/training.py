"""The Trainer of all our trainings, its arguments, and the data that it reads.

Held-out losses are means over tokens, whatever the batches and processes. (The stock Trainer's are
means over batches.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

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
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import is_torch_bf16_gpu_available

from _mergekit_moe_ext_common.data import Source, load, pack, parse_sources, tokenise
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import vocabulary_of
from _mergekit_moe_ext_common.options import USUAL_COLUMNS, Reading, Schedule, TrainingOptions
from _mergekit_moe_ext_common.sharding import (
    keep_dtypes,
    load_optimizer,
    part_of,
    reduce_unused,
    reshard,
    save_optimizer,
    split_on_cpu,
)

# What lines and tables name; of the overall performance the Trainer's key ends so.
MEASURES = ("entropy", "accuracy", "loss", "score", "performance")


class BarTrainer(Trainer):
    """The Trainer with a bar, lines that a person can read, and no checkpoint of the last step.

    It leaves the model's configuration as it was. (The stock Trainer turns `use_cache` off.)
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        # Read here, since the stock Trainer changes it when it is made.
        self._uses_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(model, *args, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(NoLastCheckpoint())
        if not self.args.disable_tqdm:
            self.add_callback(Progress())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        if self._uses_cache is not None:
            self.model.config.use_cache = self._uses_cache
        return output

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        split_on_cpu(self.accelerator)
        self.is_fsdp_enabled = self.accelerator.is_fsdp2
        if self.is_fsdp_enabled:
            keep_dtypes(self.accelerator)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # Of a model that is split accelerate leaves this to FSDP's policy.
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        reduce_unused(self.model)
        return prepared


class TrainedOnly:
    """A mixin for a Trainer whose checkpoints hold only the parameters that are trained.

    They are stored in float32, by their names in the model. Of a model that is split between
    processes each of them writes its part, and reads it again.
    """

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)

    def _save(
        self: Any,
        output_dir: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        if not (self.is_fsdp_enabled or self.args.should_save):
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        reshard(self.model)
        tensors = {}
        for name, parameter in _trainable_parameters(self.model).items():
            tensors[name] = part_of(parameter.detach()).contiguous()
        save_file(tensors, directory / self._file("trained", "safetensors"))

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        directory = Path(output_dir)
        save_optimizer(self.optimizer, directory / self._file("optimizer", "pt"))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), directory / SCHEDULER_NAME)
        # What is written next says that the checkpoint is complete.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / self._file("trained", "safetensors")
        tensors = load_file(path) if path.exists() else {}
        parameters = _trainable_parameters(self.model)
        if tensors.keys() != parameters.keys():
            raise UserError(f"{resume_from_checkpoint} is a checkpoint of another training")
        with torch.no_grad():
            for name, parameter in parameters.items():
                part_of(parameter.detach()).copy_(tensors[name])

    def _load_best_model(self: Any) -> None:
        # The last step has no checkpoint: where it is the best, the model is it already.
        if self.state.best_global_step < self.state.global_step:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        if checkpoint is None:
            return
        load_optimizer(self.optimizer, Path(checkpoint) / self._file("optimizer", "pt"))
        state = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _file(self: Any, name: str, suffix: str) -> str:
        """The name of a file of a checkpoint, with this process's part of it if there are parts."""
        if not self.is_fsdp_enabled:
            return f"{name}.{suffix}"
        return f"{name}-{self.args.process_index + 1}-of-{self.args.world_size}.{suffix}"


def _trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


class TokenTrainer(BarTrainer):
    """The Trainer with held-out losses that are means over tokens."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_metrics=_mean_over_tokens, **kwargs)
        self._loss_shifts_labels = not self.model.config.is_encoder_decoder

    def token_losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses of each row's tokens, and their number, both of shape (rows,)."""
        if self._loss_shifts_labels:
            # A decoder's logits at one position predict the token at the next.
            logits = logits[:, :-1]
            labels = labels[:, 1:]
        losses = functional.cross_entropy(
            logits.float().transpose(1, 2),
            labels.to(logits.device),
            ignore_index=-100,
            reduction="none",
        )
        return losses.sum(dim=1), (labels != -100).sum(dim=1).to(losses.device)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits
        # Sums and numbers in place of logits and labels: `_mean_over_tokens` divides their totals.
        losses, counts = self.token_losses(logits, labels)
        return None, losses, counts


def _mean_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    return {"loss": float(prediction.predictions.sum() / prediction.label_ids.sum())}


class Progress(ProgressCallback):
    """The Trainer's bar with a line per measurement that a person can read."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        for key, value in (logs or {}).items():
            name, _, measure = key.removeprefix("eval_").rpartition("_")
            if key == "loss" or (key.startswith("eval_") and measure in MEASURES):
                where = f"measured on {name}" if name else "training"
                line = f"step {state.global_step:>6}  {measure} {value:.4f}  {where}"
                self.training_bar.write(line)


class NoLastCheckpoint(TrainerCallback):
    """A callback against a checkpoint of the last step: the model itself is written after it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)


def training_arguments(
    recipe: TrainingOptions,
    reading: Reading,
    checkpoints: Path,
    *,
    learning_rate: float,
    measure: bool,
    **more: Any,
) -> TrainingArguments:
    """The recipe as the Trainer takes it, with our settings of its reports and checkpoints.

    `more` are further arguments of transformers' own, also in place of these. `UserError` where it
    refuses any.
    """
    names = {item.name for item in fields(TrainingArguments)}
    values = {name: value for name, value in asdict(recipe).items() if name in names}
    values["learning_rate"] = learning_rate
    if values.pop("gradient_checkpointing"):
        values["gradient_checkpointing"] = True
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    _check_recipe(recipe)
    # The Trainer takes what is below 1 for a share of all steps, and wants whole numbers above.
    for name in ("eval_steps", "save_steps"):
        values[name] = int(values[name]) if values[name] >= 1 else values[name]
    usual = {
        "eval_strategy": "steps" if measure else "no",
        "save_strategy": "steps",
        "save_total_limit": 2,
    }
    try:
        arguments = TrainingArguments(
            str(checkpoints),
            **{**usual, **values, **more},
            eval_on_start=measure,
            dataloader_pin_memory=torch.cuda.is_available(),
            # else the Trainer refuses bf16 on a CPU
            use_cpu=recipe.bf16 and not is_torch_bf16_gpu_available(),
            logging_steps=values["eval_steps"],
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=reading.quiet,
        )
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from error
    # With several GPUs in one process the Trainer would copy the model to each, away from our
    # hooks; `accelerate launch` is the way to use them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _check_recipe(recipe: TrainingOptions) -> None:
    """`UserError` for a value of the recipe that the Trainer would take, or refuse in words of its
    own.
    """
    if recipe.eval_steps <= 0 or recipe.save_steps <= 0:
        raise UserError("--eval-steps and --save-steps must be above 0")
    schedules = get_args(Schedule)
    if recipe.lr_scheduler_type not in schedules:
        raise UserError(
            f"--lr-scheduler-type {recipe.lr_scheduler_type} is none of {', '.join(schedules)}"
        )
    for name in ("adam_beta1", "adam_beta2"):
        beta = getattr(recipe, name, 0)  # an option of some commands only
        if not 0 <= beta < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {beta} must be at least 0 and below 1")


def dtypes_of(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """The dtypes of a module's parameters, by name."""
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


def restore_dtypes(module: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Gives parameters that were trained in float32 the dtypes that they had before."""
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def read_data(
    data: Sequence[str],
    weights: Mapping[str, float] | None,
    eval_data: Sequence[str],
    tokenizer: Any,
    config: Any,
    reading: Reading,
    recipe: TrainingOptions,
    *,
    completions_only: bool = False,
    first_label: int = 1,
) -> tuple[Dataset, dict[str, Dataset]]:
    """The rows to train on, all sources mixed, and those held out of each source, as token ids.

    They are those of `read_sources`. `UserError` for sources and weights that do not fit.
    """
    weights = weights or {}
    check_weights(data, weights)
    training, held_out = read_sources(
        data,
        eval_data,
        tokenizer,
        config,
        reading,
        recipe,
        completions_only=completions_only,
        first_label=first_label,
    )
    return mixed(training, weights, recipe.seed), held_out


def check_weights(data: Sequence[str], weights: Mapping[str, float]) -> None:
    """`UserError` for a weight of a source that there is not, and for one that is not above 0."""
    names = [source.name for source in parse_sources(data)]
    for name, weight in weights.items():
        if name not in names:
            known = ", ".join(names)
            raise UserError(f"--weight {name}: there is no such source; there are {known}")
        if weight <= 0:
            complaint = f"{weight} is not above 0; leave the source out instead"
            raise UserError(f"--weight {name}: {complaint}")


def read_sources(
    data: Sequence[str],
    eval_data: Sequence[str],
    tokenizer: Any,
    config: Any,
    reading: Reading,
    recipe: TrainingOptions,
    *,
    completions_only: bool = False,
    first_label: int = 1,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    prepare: Callable[[Dataset, Source], Dataset] | None = None,
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The rows of each source to train on, and those held out of it, as token ids.

    Rows without a token to predict at `first_label` or after it are left out: of a decoder's rows
    the first token is never predicted. Where one of the two lengths is given, inputs and targets
    are cut one by one, and `--max-length` stands for the other. `prepare` makes the rows that are
    tokenised of a source's rows.
    """
    if max_source_length or max_target_length:
        max_target_length = max_target_length or reading.max_length
    source_length = max_source_length or reading.max_length

    def tokens(rows: Dataset, source: Source) -> Dataset:
        if prepare:
            rows = prepare(rows, source)
        encoded = tokenise(
            rows,
            source,
            tokenizer,
            columns=USUAL_COLUMNS if prepare else reading.columns,
            max_length=None if recipe.packing else source_length,
            max_target_length=max_target_length,
            vocabulary=vocabulary_of(config),
            encoder_decoder=config.is_encoder_decoder,
            completions_only=completions_only,
        )
        if recipe.packing:
            if "labels" in encoded.column_names:
                raise UserError("--packing joins texts, which inputs with their targets are not")
            encoded = pack(encoded, reading.max_length, tokenizer.eos_token_id)
        if config.is_encoder_decoder:
            return encoded
        return with_predicted(encoded, source, first_label)

    return split_sources(data, eval_data, recipe, tokens)


def split_sources(
    data: Sequence[str],
    eval_data: Sequence[str],
    recipe: TrainingOptions,
    prepare: Callable[[Dataset, Source], Dataset],
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The rows of each source to train on, and those held out of it or given for measuring.

    Both are as `prepare` makes them. `UserError` for a source with too few rows to hold any out.
    """
    held_out = {source.name: prepare(load(source), source) for source in parse_sources(eval_data)}
    training = {}
    for source in parse_sources(data):
        rows = load(source)
        if recipe.held_out and source.name not in held_out:
            if len(rows) <= recipe.held_out:
                fewer = f"--held-out {max(1, len(rows) // 4)}, or " if len(rows) > 1 else ""
                raise UserError(
                    f"{source} (data {source.name!r}) has {len(rows)} rows, and {recipe.held_out} "
                    f"are to be held out: give more rows, or {fewer}name texts to measure on with "
                    "--eval-data"
                )
            split = rows.train_test_split(test_size=recipe.held_out, seed=recipe.seed)
            rows = split["train"]
            held_out[source.name] = prepare(split["test"], source)
        training[source.name] = prepare(rows, source)
    return training, held_out


def with_predicted(encoded: Dataset, source: Source, first_label: int) -> Dataset:
    """A decoder's rows that have a token to predict at `first_label` or after it.

    `UserError` if there are none.
    """

    def teaches(row: dict[str, Any]) -> bool:
        labels = row.get("labels", row["input_ids"])
        return any(label != -100 for label in labels[first_label:])

    rows = encoded.filter(teaches, desc="leaving out rows that teach nothing")
    if len(rows) == 0:
        position = f"position {first_label} or after"
        hint = ""
        if first_label > 1:
            hint = "; take longer texts, or a model with a smaller routing_tokens"
        raise UserError(
            f"data {source.name!r} has no row with a token to predict at {position}{hint}"
        )
    return rows


def mixed(training: Mapping[str, Dataset], weights: Mapping[str, float], seed: int) -> Dataset:
    """Rows of all sources: without weights each row once, one source after the other.

    With weights, rows are drawn from the sources at random until every source has been read through
    at least once.
    """
    if len(training) == 1 or not weights:
        return concatenate_datasets(list(training.values()))
    numbers = [weights.get(name, 1.0) for name in training]
    return interleave_datasets(
        list(training.values()),
        probabilities=[number / sum(numbers) for number in numbers],
        seed=seed,
        stopping_strategy="all_exhausted",
    )
