"""Training the router of a routed adapter (Trade-offs 4.3, 4.4 and appendix A).

All tasks are mixed, and no row says which task it is of. The Hugging Face Trainer does the work, on
one process or, under `accelerate launch`, on many. There is one training per learning rate, each
from the same start; the one with the lowest held-out loss is kept.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import TrainingArguments

from _mergekit_moe_ext_common.cards import extend_card, sources_in_markdown
from _mergekit_moe_ext_common.checkpoints import damaged_file, weight_files
from _mergekit_moe_ext_common.data import fingerprint, training_batches
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.fingerprints import weights_fingerprint
from _mergekit_moe_ext_common.loading import load_tokenizer, padding_token, vocabulary_of
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.placement import check_can_be_spread
from _mergekit_moe_ext_common.positions import check_positions
from _mergekit_moe_ext_common.runs import (
    Losses,
    Run,
    before_and_after,
    checkpoint_bytes,
    divergence,
    losses_before_and_after,
)
from _mergekit_moe_ext_common.training import TokenTrainer, TrainedOnly, mixed, read_data
from peft_routing.config import RoutedLoraConfig
from peft_routing.loading import CLASSES, base_of, check_routed, load_adapter_config, load_routed
from peft_routing.recipes import LEARNING_RATES, Recipe

LOG = logging.getLogger(__name__)
_TRAINED = "trained"
_RESULT = "result.json"


class RouterTrainer(TrainedOnly, TokenTrainer):
    """The Trainer, whose checkpoints hold the router alone."""


@dataclass(frozen=True)
class TokenRows:
    """The rows to train on and those to measure on, as token ids, by the name of their source.

    Each has a token to predict.
    """

    training: Mapping[str, Dataset]
    held_out: Mapping[str, Dataset]


@dataclass(frozen=True)
class Result:
    """Each source's held-out loss before and after a training at one learning rate."""

    learning_rate: float
    losses: Losses

    @property
    def mean(self) -> float:
        """The mean of the sources' losses afterwards; 0 where nothing was held out."""
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
    rows: TokenRows | None = None,
    resume: bool = False,
    device_map: str | None = None,
) -> list[Result]:
    """Train the router of the routed adapter in a directory, and write the result to `output`.

    Returns what each learning rate gave, the best first; nothing in all but the main process.
    `output` is `<adapter>-trained` if not given. Checkpoints lie in `<output>.checkpoints` until
    the training is complete, and `resume` goes on from there. Where there are several processes,
    their group is gone afterwards. With `device_map="auto"` one process spreads the base model over
    all GPUs and main memory. Where there are `rows`, they are what is read, and `data` are only
    named. `UserError` for what cannot be trained.
    """
    run = Run(
        output or f"{adapter.rstrip('/')}-trained", reading, splits=True, device_map=device_map
    )
    parts = {_part(rate): rate for rate in learning_rates}
    measure = rows is not None or bool(recipe.held_out or eval_data)
    arguments = _arguments(run, recipe, parts, measure=measure)
    first = next(iter(arguments.values()))
    config = _read_config(adapter, recipe)
    if run.is_main and config.router == "arrow":
        LOG.warning(
            "router='arrow' needs no training: this moves its rows away from the experts' main "
            "directions"
        )
    base, base_config = base_of(base, config, reading)
    headers = check_routed(adapter, config, base, base_config, reading)
    if device_map:
        check_can_be_spread(base, base_config, headers.values())
    tokenizer = load_tokenizer(base, reading)
    first_label = 1 if config.granularity == "token" else config.routing_tokens
    with first.main_process_first(desc="reading the data"):
        if rows is not None:
            training = mixed(rows.training, weights or {}, recipe.seed)
            held_out = dict(rows.held_out)
        else:
            training, held_out = read_data(
                data,
                weights,
                eval_data,
                tokenizer,
                base_config,
                reading,
                recipe,
                completions_only=recipe.completions_only,
                first_label=first_label,
            )
    stored = Path(adapter) / SAFETENSORS_WEIGHTS_NAME
    settings = _settings(stored, base, training, held_out, recipe, learning_rates)
    # A learning rate whose training is finished has a result, and is not trained again.
    finished = [part for part in parts if (run.checkpoints / part / _RESULT).exists()]
    run.begin(settings, resume=resume, parts=list(parts), finished=finished)
    results = [_read_result(run.checkpoints / part, parts[part]) for part in finished]

    def load() -> Any:
        return load_routed(
            adapter, config, base, base_config, reading, headers=headers, is_trainable=True
        )

    routed = load()
    rows_by_source = {"--data": training, **held_out}
    check_positions(routed.get_base_model(), rows_by_source, reading.max_length)
    _check_trainable(routed, config, first.device)
    # Every learning rate keeps its adapter until the best is copied.
    size = stored.stat().st_size
    kept = (1 + len(learning_rates)) * size
    run.check_room(kept, size + checkpoint_bytes(routed), first, len(training))
    pad_token_id = padding_token(tokenizer, vocabulary_of(base_config))
    data_of_all = {
        "data_collator": training_batches(routed.get_base_model(), pad_token_id, first_label),
        "train_dataset": training,
        "eval_dataset": held_out or None,
    }
    unfinished = {part: rate for part, rate in parts.items() if part not in finished}
    results += _train_each(run, unfinished, arguments, data_of_all, adapter, routed, load)

    run.end_group()
    if not run.is_main:
        return []
    ranking = _ranking(results)
    with run.finish() as directory:
        trained = run.checkpoints / _part(ranking[0].learning_rate) / _TRAINED
        shutil.copytree(trained, directory, dirs_exist_ok=True)
        extend_card(directory, _card(data, recipe, ranking, run.processes))
    return ranking


def is_interrupted(output: str) -> bool:
    """Whether there was a training for this output that `resume` would go on with."""
    checkpoints = Path(f"{output}.checkpoints")
    states = checkpoints.glob("*/checkpoint-*/trainer_state.json")
    return any(states) or any(checkpoints.glob(f"*/{_RESULT}"))


def _train_each(
    run: Run,
    parts: Mapping[str, float],
    arguments: Mapping[str, TrainingArguments],
    data: Mapping[str, Any],
    adapter: str,
    routed: Any,
    load: Callable[[], Any],
) -> list[Result]:
    """Trains at the learning rate of each part; the results, in the main process alone.

    `data` are the Trainer's arguments for it, and `routed` is what `load` loads.
    """
    results = []
    for part, rate in parts.items():
        # Each from the same start. What was split once stays so.
        if routed is None:
            routed = load()
        else:
            routed.load_adapter(adapter, "default", is_trainable=True)
        routed.train()
        run.place(routed, arguments[part])
        trainer = RouterTrainer(routed, arguments[part], **data)
        run.train(trainer, part)
        if run.is_main:
            results.append(_write_result(run, part, rate, trainer, data["eval_dataset"] or {}))
        if run.is_split:
            routed = None
    return results


def _part(learning_rate: float) -> str:
    """The directory of a learning rate's checkpoints and result."""
    return f"lr-{learning_rate:g}"


def _read_config(adapter: str, recipe: Recipe) -> RoutedLoraConfig:
    config = load_adapter_config(adapter)
    if config.task_type in CLASSES:
        raise UserError(
            f"{adapter} is for classifying or features ({config.task_type}), and this trains on "
            "texts without labels: train it as PEFT's adapters are, by transformers' Trainer"
        )
    if recipe.router_aux_loss:
        config.router_aux_loss_coef = recipe.router_aux_loss
        config.router_class.check(config)
    # Of a router like the adapter's own only the choice matters, not its width.
    router = config.router_class(config, config.names, in_features=1)
    if not router.learns:
        raise UserError(router.why_it_learns_nothing)
    return config


def _arguments(
    run: Run,
    recipe: Recipe,
    parts: Mapping[str, float],
    *,
    measure: bool,
) -> dict[str, TrainingArguments]:
    """The Trainer's arguments for each learning rate.

    `UserError` where there are several of them and nothing is measured.
    """
    if len(parts) > 1 and not measure:
        complaint = "without held-out rows no learning rate can be chosen"
        raise UserError(f"{complaint}: give one --learning-rate")
    arguments = {}
    for part, rate in parts.items():
        arguments[part] = run.arguments(
            recipe,
            part=part,
            learning_rate=rate,
            measure=measure,
            label_names=["labels"],
        )
    return arguments


def _settings(
    stored: Path,
    base: str,
    training: Dataset,
    held_out: Mapping[str, Dataset],
    recipe: Recipe,
    learning_rates: Sequence[float],
) -> dict[str, Any]:
    """What must be the same when the training is resumed, and for all learning rates, whose losses
    are compared.
    """
    return {
        "adapter": hashlib.sha256(stored.read_bytes()).hexdigest(),
        "base_model": base,
        "base_weights": weights_fingerprint(weight_files(base)),
        "data": fingerprint(training),
        "held_out_data": {name: fingerprint(rows) for name, rows in held_out.items()},
        **asdict(recipe),
        "learning_rates": list(learning_rates),
    }


def _check_trainable(routed: Any, config: RoutedLoraConfig, device: torch.device) -> None:
    if not any(parameter.requires_grad for parameter in routed.parameters()):
        raise UserError(f"router={config.router!r} has nothing to learn")
    if getattr(routed.get_base_model(), "is_loaded_in_4bit", False) and device.type == "cpu":
        raise UserError(
            "on a CPU, bitsandbytes lets no gradient through 4-bit layers once they have run: "
            "train on a GPU, or give the base model as it was before it was quantised (--base)"
        )


def _read_result(directory: Path, learning_rate: float) -> Result:
    damaged = damaged_file(directory, _RESULT)
    if damaged:
        raise UserError(f"{damaged}; remove it, and its learning rate is trained again")
    pairs = json.loads((directory / _RESULT).read_text(encoding="utf-8"))
    losses = {name: (before, after) for name, (before, after) in pairs.items()}
    return Result(learning_rate, losses)


def _write_result(
    run: Run,
    part: str,
    learning_rate: float,
    trainer: RouterTrainer,
    held_out: Mapping[str, Dataset],
) -> Result:
    """The result of a training that has ended, which is written with the adapter.

    `UserError` where it has diverged and was the only one.
    """
    losses = losses_before_and_after(trainer, held_out)
    if not held_out:  # and then one learning rate
        run.check_converged(trainer, losses, "take a lower --learning-rate")
    elif divergence(trainer, losses):
        losses = {name: (before, math.nan) for name, (before, _) in losses.items()}
    # The adapter goes first, and the result appears whole: where there is one, its training is
    # finished.
    directory = run.checkpoints / part
    trainer.model.save_pretrained(str(directory / _TRAINED))
    partial = directory / f"{_RESULT}.partial"
    partial.write_text(json.dumps(losses), encoding="utf-8")
    partial.replace(directory / _RESULT)
    return Result(learning_rate, losses)


def _ranking(results: Sequence[Result]) -> list[Result]:
    """The results, the lowest loss first. `UserError` where no loss is a number."""
    ranking = sorted(results, key=lambda result: (math.isnan(result.mean), result.mean))
    if math.isnan(ranking[0].mean):
        complaint = "the training diverged at every learning rate"
        raise UserError(f"{complaint}: the held-out loss is not a number")
    return ranking


def _card(
    data: Sequence[str],
    recipe: Recipe,
    ranking: Sequence[Result],
    processes: int,
) -> list[str]:
    best = ranking[0]
    rates = ", ".join(f"{result.learning_rate:g}" for result in ranking)
    lines = [
        "## Router training",
        "",
        f"On {sources_in_markdown(data)}: {recipe.length}, learning rate "
        f"{best.learning_rate:g} (of {rates}), seed {recipe.seed}, {processes} "
        f"process{'es' if processes > 1 else ''}.",
    ]
    if best.losses:
        lines += ["", before_and_after(best.losses, markdown=True)]
    return lines
