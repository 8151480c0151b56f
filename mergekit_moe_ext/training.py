"""Training a mixture of experts: its gates, or all of it, on several sources at once (MergeME 3.1 and appendix A).

The Hugging Face Trainer does the work, on one process or, under `accelerate launch`, on many. Ours differs from it
where a mixture of experts would go wrong:

- The loss is the mean over all tokens of a step, whatever the processes, accumulation steps and padding. The
  load-balancing loss is averaged over them, not added up.
- Held-out losses are means over tokens, and hold no load-balancing loss.
- A checkpoint holds what is trained, in float32, by the names in the model. (The stock Trainer writes a fused expert
  as single experts, and on resuming drops them for names that it does not know.)
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import click
import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
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

from mergekit_moe_ext.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.data import (
    Source,
    collate,
    decoder_inputs,
    fingerprint,
    load,
    pack,
    parse_sources,
    real_tokens,
    tokenise,
)
from mergekit_moe_ext.loading import load_config, load_model, load_tokenizer, padding_token, silence
from mergekit_moe_ext.options import Reading, Recipe
from mergekit_moe_ext.routing import load_balancing_loss, recorded, routers_of
from mergekit_moe_ext.staging import check_output, check_room, staged

LOG = logging.getLogger(__name__)
Part = Literal["gates", "all"]
LEARNING_RATES: dict[Part, float] = {"gates": 1e-3, "all": 1e-5}
_TRAINED = "trained.safetensors"
_SETTINGS = "settings.json"
_ON_CARD = ("learning_rate", "weight_decay", "seed", "processes")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class MoeTrainer(Trainer):
    """See the top of this file."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, router_aux_loss: float, **kwargs: Any):
        super().__init__(*args, compute_metrics=_mean_over_tokens, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of a step
        self._loss_shifts_labels = not self.model.config.is_encoder_decoder
        self._router_aux_loss = router_aux_loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        balancing = bool(self._router_aux_loss) and model.training
        # only here, and not when gradient checkpointing runs the layers again: what it recomputes would stay
        recording: Any = recorded(self.model) if balancing else nullcontext({})
        with recording as choices:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        losses, counts = self._token_losses(outputs.logits, labels)
        processes = self.accelerator.num_processes  # over which the gradients are averaged
        loss = losses.sum() / (num_items_in_batch if num_items_in_batch is not None else counts.sum()) * processes
        if balancing:
            balance = load_balancing_loss(choices, real_tokens(inputs))
            loss = loss + self._router_aux_loss * balance / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
        losses, counts = self._token_losses(logits, labels)
        return None, losses, counts

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad},
            directory / _TRAINED,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / _TRAINED)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if saved.keys() != trained.keys():
            raise click.ClickException(f"{resume_from_checkpoint} is a checkpoint of another training")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


def _mean_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    return {"loss": float(prediction.predictions.sum() / prediction.label_ids.sum())}


class Progress(ProgressCallback):
    """The Trainer's bar, with a line per measurement that a person can read."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        for key, value in (logs or {}).items():
            if key == "loss" or (key.startswith("eval_") and key.endswith("_loss")):
                what = "training" if key == "loss" else f"held-out, {key[5:-5]}"
                self.training_bar.write(f"step {state.global_step:>6}  loss {value:.4f}  {what}")


class NoLastCheckpoint(TrainerCallback):
    """The Trainer checkpoints the last step as well; the trained model itself is written right after it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False


def train(
    model_path: str,
    output: str | None,
    part: Part,
    data: Sequence[str],
    reading: Reading,
    recipe: Recipe,
    *,
    weights: Mapping[str, float] | None = None,
    eval_data: Sequence[str] = (),
    resume: bool = False,
) -> dict[str, tuple[float, float]] | None:
    """Train a mixture of experts and write the result to `output`, `<model>-trained` if not given.

    Returns the held-out loss of every source before and after; None in all but the main process. Checkpoints lie in
    `<output>.checkpoints` until the training is complete; `resume` goes on from the last one. Where there are several
    processes, their group is gone afterwards.
    """
    silence(reading)
    out = check_output(output or f"{model_path.rstrip('/')}-trained")
    checkpoints = out.with_name(f"{out.name}.checkpoints")
    config = load_config(model_path, reading)
    if part == "gates" and config.dtype == torch.bfloat16:  # nothing is gained from frozen weights in float32
        recipe = replace(recipe, bf16=True)
    arguments = _arguments(recipe, reading, checkpoints, LEARNING_RATES[part], bool(recipe.held_out or eval_data))
    tokenizer = load_tokenizer(model_path, reading)
    with arguments.main_process_first(desc="reading the data"):
        training, held_out = _read(data, weights or {}, eval_data, tokenizer, config, reading, recipe)
    settings = {
        "model": str(Path(model_path).resolve()) if Path(model_path).exists() else model_path,
        "train": part,
        "weights": checkpoint_fingerprint(ModelReference.model_validate(model_path), MergeOptions()),
        "data": fingerprint(training),
        **asdict(recipe),
        "learning_rate": arguments.learning_rate,
        "processes": arguments.world_size,
    }
    checkpoint = _checkpoint(checkpoints, settings, resume=resume)

    model = load_model(model_path, config, reading, dtype="auto")
    check_room(out, sum(p.nbytes for p in model.parameters()))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    _choose_parameters(model, part)
    _prepare_dtypes(model, recipe.bf16)
    batch = _batches(model, padding_token(tokenizer))
    _check_gradient(model, batch([training[0]]), part, recipe)

    trainer = MoeTrainer(
        model,
        arguments,
        data_collator=batch,
        train_dataset=training,
        eval_dataset=held_out or None,
        router_aux_loss=recipe.router_aux_loss,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise click.ClickException(
            "FSDP and DeepSpeed are not supported yet: every process holds the whole model; use `accelerate launch "
            "--multi_gpu`"
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(NoLastCheckpoint())
    if not reading.quiet:
        trainer.add_callback(Progress())
    if arguments.should_save:
        checkpoints.mkdir(parents=True, exist_ok=True)
        partial = checkpoints / f".{_SETTINGS}.partial"
        partial.write_text(json.dumps(settings, indent=1))
        partial.replace(checkpoints / _SETTINGS)
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = _first_and_last(trainer.state.log_history, held_out)

    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # the processes part here: only one writes
    if not arguments.should_save:
        return None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
    with staged(out) as directory:
        _copy_files(Path(model_path), directory)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        trainer.state.save_to_json(str(directory / "trainer_state.json"))
        _extend_card(directory, part, data, settings, losses)
    shutil.rmtree(checkpoints)
    return losses


def _arguments(
    recipe: Recipe, reading: Reading, checkpoints: Path, learning_rate: float, measure: bool
) -> TrainingArguments:
    values = asdict(recipe)
    for ours in ("router_aux_loss", "packing", "held_out"):
        del values[ours]
    if values.pop("gradient_checkpointing"):
        values |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if recipe.eval_steps <= 0 or recipe.save_steps <= 0:
        raise click.ClickException("--eval-steps and --save-steps must be above 0")
    if values["learning_rate"] is None:
        values["learning_rate"] = learning_rate
    for name in ("eval_steps", "save_steps"):  # counts are whole
        values[name] = int(values[name]) if values[name] >= 1 else values[name]
    try:
        arguments = TrainingArguments(
            str(checkpoints),
            **values,
            eval_strategy="steps" if measure else "no",
            eval_on_start=measure,
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=True,  # an expert that no token of this process chose
            use_cpu=recipe.bf16 and not is_torch_bf16_gpu_available(),  # else the Trainer refuses bf16 on a CPU
            save_strategy="steps",
            save_total_limit=2,
            logging_steps=values["eval_steps"],
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=reading.quiet,
        )
    except ValueError as error:
        raise click.ClickException(str(error).splitlines()[0]) from error
    # With several GPUs in one process the Trainer would copy the model to each, away from our hooks;
    # `accelerate launch` is the way to use them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _read(
    data: Sequence[str],
    weights: Mapping[str, float],
    eval_data: Sequence[str],
    tokenizer: Any,
    config: Any,
    reading: Reading,
    recipe: Recipe,
) -> tuple[Dataset, dict[str, Dataset]]:
    """What is trained on, the sources mixed, and what is held out of each, as token ids."""
    sources, measured = parse_sources(data), parse_sources(eval_data)
    names = [source.name for source in sources]
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
        )
        if recipe.packing:
            if config.is_encoder_decoder:
                raise click.ClickException("--packing joins texts, which the inputs of an encoder-decoder are not")
            encoded = pack(encoded, reading.max_length, tokenizer.eos_token_id)
        # a decoder predicts every token from the one before it, so a single one teaches nothing
        return encoded.filter(
            lambda row: len(row["input_ids"]) > 1 or "labels" in row, desc="leaving out single tokens"
        )

    training, held_out = {}, {source.name: tokens(load(source), source) for source in measured}
    for source in sources:
        rows = load(source)
        if recipe.held_out and source.name not in held_out:
            if len(rows) <= recipe.held_out:
                raise click.ClickException(
                    f"{source} (data {source.name!r}) has {len(rows)} rows, and {recipe.held_out} are to be held out; "
                    "see --held-out and --eval-data"
                )
            split = rows.train_test_split(test_size=recipe.held_out, seed=recipe.seed)
            rows, held_out[source.name] = split["train"], tokens(split["test"], source)
        training[source.name] = tokens(rows, source)
    for name, encoded in {**training, **held_out}.items():
        if len(encoded) == 0:
            raise click.ClickException(f"data {name!r} has no row of two tokens or more")
    return _mixed(training, weights, recipe.seed), held_out


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


def _checkpoint(checkpoints: Path, settings: dict[str, Any], *, resume: bool) -> str | None:
    """The last complete checkpoint, to resume from; None for a fresh start. `ClickException` if neither fits."""
    complete = sorted(
        (path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")),
        key=lambda path: int(path.name.rsplit("-", 1)[1]),
    )
    if not resume:
        if complete:
            raise click.ClickException(
                f"{checkpoints} holds an unfinished training; --resume goes on with it, or remove it"
            )
        return None
    if not complete:
        raise click.ClickException(f"there is no checkpoint in {checkpoints} to resume from")
    before = json.loads((checkpoints / _SETTINGS).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise click.ClickException(
                f"the training in {checkpoints} had another {name.replace('_', ' ')}: {before.get(name)}, not {value}"
            )
    return str(complete[-1])


def _choose_parameters(model: Any, part: Part) -> None:
    """Leaves gradients to what is trained only."""
    routers = routers_of(model)  # also where all is trained: a model without routers is no mixture of experts
    if part == "gates":
        of_routers = {id(p) for router in routers.values() for p in router.parameters()}
        for parameter in model.parameters():  # what the architecture itself keeps fixed stays so
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in of_routers)


def _prepare_dtypes(model: Any, bf16: bool) -> None:
    """What is trained becomes float32: in bfloat16 small steps would be rounded away. The rest too, without --bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad or not bf16:
            parameter.data = parameter.data.float()


def _batches(model: Any, pad_token_id: int) -> Any:
    """A data collator: `labels` are the tokens themselves for a decoder, the targets for an encoder-decoder."""

    def batch(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tensors = collate(rows, pad_token_id)
        if "labels" in tensors:
            tensors["decoder_input_ids"] = decoder_inputs(model, tensors["labels"])
        else:
            tensors["labels"] = tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, -100)
        return tensors

    return batch


def _check_gradient(model: Any, batch: dict[str, torch.Tensor], part: Part, recipe: Recipe) -> None:
    """Finds gates that keep one expert and give it all the weight: they change nothing, and so they learn nothing."""
    if recipe.router_aux_loss or (getattr(model.config, "num_experts_per_tok", None) or 1) > 1:
        return
    model.eval()
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16)
    with autocast, recorded(model) as choices:
        model(**{name: tensor[:, :16] for name, tensor in batch.items() if name != "labels"}, use_cache=False)
    for name, choice in choices.items():
        if choice.weights.shape[-1] > 1:
            continue
        router = [p for p in model.get_submodule(name).parameters() if p.requires_grad]
        of_weights = _gradient_norm(choice.weights.sum(), router)
        of_softmax = _gradient_norm(choice.logits.float().softmax(-1).amax(-1).sum(), router)
        if of_weights <= (0.01 if recipe.bf16 else 1e-4) * of_softmax:
            complaint = (
                f"the gates of this model choose one expert and give it all the weight (as {name} does), so the loss "
                "has no gradient for them; give --router-aux-loss, or merge with experts_per_token: 2"
            )
            if part == "gates":
                raise click.ClickException(complaint)
            LOG.warning("%s", complaint)
            return


def _gradient_norm(value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> float:
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return sum(gradient.norm().item() for gradient in gradients if gradient is not None)


def _first_and_last(history: Sequence[dict[str, Any]], names: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    losses = {name: [entry[key] for entry in history if (key := f"eval_{name}_loss") in entry] for name in names}
    return {name: (values[0], values[-1]) for name, values in losses.items()}


def _copy_files(model: Path, directory: Path) -> None:
    """What lies beside the weights: tokenizer, card, the merge's configuration, code."""
    for path in model.iterdir() if model.is_dir() else ():
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copy(path, directory / path.name)


def _extend_card(
    directory: Path, part: Part, data: Sequence[str], settings: Mapping[str, Any], losses: Mapping[str, Any]
) -> None:
    card = directory / "README.md"
    lines = [
        "",
        "## Training",
        "",
        f"After merging, {'the gates alone were' if part == 'gates' else 'all parameters were'} trained with "
        f"mergekit-moe-ext on {', '.join(data)}: "
        + ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in _ON_CARD)
        + ".",
    ]
    if losses:
        lines += ["", "| held-out loss | before | after |", "|---|---:|---:|"]
        lines += [f"| {name} | {before:.4f} | {after:.4f} |" for name, (before, after) in losses.items()]
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {directory.name}\n"
    card.write_text(text.rstrip() + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
