"""Training the router of a routed adapter (Trade-offs 4.3, 4.4 and appendix A): all tasks mixed, no task ids.

The Hugging Face Trainer does the work, on one process or, under `accelerate launch`, on many. One training per
learning rate, each from the same start; the one with the lowest held-out loss is kept.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from _mergekit_moe_ext_common import options
from _mergekit_moe_ext_common.data import collate, decoder_inputs, fingerprint
from _mergekit_moe_ext_common.loading import load_tokenizer, padding_token, silence
from _mergekit_moe_ext_common.options import Reading, option
from _mergekit_moe_ext_common.staging import check_output, check_room, staged
from _mergekit_moe_ext_common.training import (
    TokenTrainer,
    first_and_last,
    keep_settings,
    last_checkpoints,
    let_go,
    read_data,
    remove_checkpoints,
    training_arguments,
)
from peft_routing.config import RoutedLoraConfig
from peft_routing.loading import base_of, load_adapter_config, load_routed

LEARNING_RATES = (1e-3, 1e-4, 1e-5)  # the paper tunes over these
_RESULT = "result.json"
Losses = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Recipe(options.Recipe):
    """How a router is trained. Defaults are the paper's or, mostly, transformers'."""

    num_train_epochs: float = option(5.0, "How often the data is read (the paper's 5).", at_least=0)
    completions_only: bool = option(
        False,
        "Loss on answers alone: the last turn of a chat, or a target after its input. Without it, on all tokens.",
    )
    router_aux_loss: float = option(0.0, "Weight of the load-balancing loss, averaged over modules.", at_least=0)


@dataclass(frozen=True)
class Result:
    """Of one learning rate: each source's held-out loss before and after."""

    learning_rate: float
    losses: Losses

    @property
    def mean(self) -> float:
        return sum(after for _, after in self.losses.values()) / max(1, len(self.losses))


def train(
    adapter: str,
    output: str | None,
    data: Sequence[str],
    reading: Reading,
    recipe: Recipe,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    base: str | None = None,
    weights: Mapping[str, float] | None = None,
    eval_data: Sequence[str] = (),
    resume: bool = False,
) -> list[Result]:
    """Train the router of the routed adapter in a directory, and write the result to `output`.

    Returns what each learning rate gave, the best first. `output` is `<adapter>-trained` if not given; checkpoints lie
    in `<output>.checkpoints` until the training is complete, and `resume` goes on from there. `ClickException` for
    what cannot be trained.
    """
    silence(reading)
    out = check_output(output or f"{adapter.rstrip('/')}-trained")
    checkpoints = out.with_name(f"{out.name}.checkpoints")
    measured = bool(recipe.held_out or eval_data)
    if len(learning_rates) > 1 and not measured:
        raise click.ClickException("without held-out rows no learning rate can be chosen: give one --learning-rate")
    config = load_adapter_config(adapter)
    if recipe.router_aux_loss:
        config.router_aux_loss_coef = recipe.router_aux_loss
        _check(config)
    base, base_config = base_of(base, config, reading)
    tokenizer = load_tokenizer(base, reading)
    arguments = {
        rate: training_arguments(
            recipe, reading, checkpoints / f"lr-{rate:g}", learning_rate=rate, measure=measured, label_names=["labels"]
        )
        for rate in learning_rates
    }
    first = next(iter(arguments.values()))
    first_label = 1 if config.granularity == "token" else config.routing_tokens
    with first.main_process_first(desc="reading the data"):
        training, held_out = read_data(
            data,
            weights or {},
            eval_data,
            tokenizer,
            base_config,
            reading,
            recipe,
            completions_only=recipe.completions_only,
            first_label=first_label,
        )
    settings = {
        "adapter": hashlib.sha256((Path(adapter) / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest(),
        "base_model": base,
        "data": fingerprint(training),
        **asdict(recipe),
        "learning_rates": list(learning_rates),
        "processes": first.world_size,
    }
    results, starts = _earlier(checkpoints, settings, learning_rates, resume=resume)

    check_room(out, (2 + len(learning_rates)) * (Path(adapter) / SAFETENSORS_WEIGHTS_NAME).stat().st_size)
    routed = load_routed(adapter, config, base, base_config, reading, is_trainable=True)
    model = routed.get_base_model()
    if not any(parameter.requires_grad for parameter in routed.parameters()):
        raise click.ClickException(f"router={config.router!r} has nothing to learn")
    if getattr(model, "is_loaded_in_4bit", False) and first.device.type == "cpu":
        raise click.ClickException(
            "on a CPU, bitsandbytes lets no gradient through 4-bit layers once they have run: train on a GPU, or give "
            "the base model as it was before it was quantised (--base)"
        )
    if first.should_save:
        keep_settings(checkpoints, settings)

    def batch(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tensors = collate(rows, padding_token(tokenizer))
        if "labels" not in tensors:
            tensors["labels"] = tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, -100)
        if not base_config.is_encoder_decoder:
            tensors["labels"][:, :first_label] = -100
        else:  # held-out losses are computed from logits, without labels
            tensors["decoder_input_ids"] = decoder_inputs(model, tensors["labels"])
        return tensors

    for rate, start in starts.items():
        routed.load_adapter(adapter, "default", is_trainable=True)
        routed.train()
        trainer = TokenTrainer(
            routed, arguments[rate], data_collator=batch, train_dataset=training, eval_dataset=held_out or None
        )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise click.ClickException("FSDP and DeepSpeed are not supported: every process holds the whole model")
        trainer.train(resume_from_checkpoint=start)
        results[rate] = Result(rate, first_and_last(trainer.state.log_history, held_out))
        if first.should_save:
            directory = checkpoints / f"lr-{rate:g}"
            routed.save_pretrained(str(directory / "trained"))
            (directory / _RESULT).write_text(json.dumps(results[rate].losses), encoding="utf-8")
        let_go(trainer)

    ranked = sorted(results.values(), key=lambda result: (math.isnan(result.mean), result.mean))
    if math.isnan(ranked[0].mean):
        raise click.ClickException("the training diverged at every learning rate: the held-out loss is not a number")
    if first.should_save:
        with staged(out) as directory:
            shutil.copytree(checkpoints / f"lr-{ranked[0].learning_rate:g}" / "trained", directory, dirs_exist_ok=True)
            _extend_card(directory, data, recipe, ranked, first.world_size)
        remove_checkpoints(checkpoints, [f"lr-{rate:g}" for rate in learning_rates])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return ranked if first.should_save else []


def _check(config: RoutedLoraConfig) -> None:
    try:
        config.router_class.check(config)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _earlier(
    checkpoints: Path, settings: dict[str, Any], learning_rates: Sequence[float], *, resume: bool
) -> tuple[dict[float, Result], dict[float, str | None]]:
    """What an interrupted training has finished, and where each of the others starts: a checkpoint, or afresh."""
    parts = {f"lr-{rate:g}": rate for rate in learning_rates}
    finished = {part: rate for part, rate in parts.items() if (checkpoints / part / _RESULT).exists()}
    starts = last_checkpoints(checkpoints, settings, list(parts), resume=resume, finished=finished)
    results = {}
    for part, rate in finished.items():
        losses = json.loads((checkpoints / part / _RESULT).read_text(encoding="utf-8"))
        results[rate] = Result(rate, {name: (before, after) for name, (before, after) in losses.items()})
    return results, {rate: starts[part] for part, rate in parts.items() if part not in finished}


def _extend_card(
    directory: Path, data: Sequence[str], recipe: Recipe, ranked: Sequence[Result], processes: int
) -> None:
    card = directory / "README.md"
    lines = [
        "",
        "## Router training",
        "",
        f"On {', '.join(data)}: {recipe.num_train_epochs:g} epochs, learning rate {ranked[0].learning_rate:g} "
        f"(of {', '.join(f'{result.learning_rate:g}' for result in ranked)}), seed {recipe.seed}, "
        f"{processes} process{'es' if processes > 1 else ''}.",
    ]
    if ranked[0].losses:
        lines += ["", "| held-out loss | before | after |", "|---|---:|---:|"]
        lines += [f"| {name} | {before:.4f} | {after:.4f} |" for name, (before, after) in ranked[0].losses.items()]
    card.write_text(card.read_text(encoding="utf-8").rstrip() + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
