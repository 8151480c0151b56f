"""Training a mixture of experts, parts or all of it, on several sources at once.

That is MergeME 3.1, 3.2 and appendix A. The Trainer of `trainers.py` does the work, on one process
or, under `accelerate launch`, on many.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from _mergekit_moe_ext_common.cards import extend_card, in_markdown, sources_in_markdown
from _mergekit_moe_ext_common.data import fingerprint, training_batches
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
    vocabulary_of,
)
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.placement import check_can_be_spread
from _mergekit_moe_ext_common.positions import check_positions
from _mergekit_moe_ext_common.runs import (
    Losses,
    Measures,
    Run,
    before_and_after,
    checkpoint_bytes,
    first_and_last,
    losses_before_and_after,
    measurements,
    model_identity,
)
from _mergekit_moe_ext_common.staging import copy_files, has_tokenizer, model_folder
from _mergekit_moe_ext_common.training import (
    check_weights,
    dtypes_of,
    mixed,
    read_sources,
    restore_dtypes,
)
from mergekit_moe_ext.merging.card import drop_training_section
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.merging.outputs import complete_model
from mergekit_moe_ext.mixtures.generation import TaskScorer
from mergekit_moe_ext.mixtures.multitask import (
    every_epoch,
    for_tasks,
    measured_pairs,
    pairs_of,
    sampler_of,
    scorer_of,
    tasks_per_step,
    with_best,
)
from mergekit_moe_ext.mixtures.parts import (
    Part,
    chosen_parts,
    freeze_others,
    learning_rates,
    parts_to_train,
)
from mergekit_moe_ext.mixtures.per_task import TaskSampler
from mergekit_moe_ext.mixtures.routers import recorded, routes_sequences
from mergekit_moe_ext.mixtures.rows import OtherRowsFixed, check_chosen, indices_of
from mergekit_moe_ext.mixtures.sequences import check_sequences, first_predicted
from mergekit_moe_ext.mixtures.tasks import Task, eval_sources_of, sources_of
from mergekit_moe_ext.mixtures.trainers import MoeTrainer, SequenceTrainer, without_labels
from mergekit_moe_ext.recipes import Recipe

LOG = logging.getLogger(__name__)
LEARNING_RATE_OF_ALL = 1e-5  # MergeME's
LEARNING_RATE_OF_PARTS = 1e-3
_ON_CARD = ("learning_rate", "weight_decay", "seed", "processes")
_ON_CARD_IF_STATED = ("router_learning_rate", "projector_learning_rate", "router_aux_loss")


def train(
    model_path: str,
    output: str | None,
    part: Part | Sequence[Part],
    data: Sequence[str],
    reading: Reading,
    recipe: Recipe,
    *,
    weights: Mapping[str, float] | None = None,
    eval_data: Sequence[str] = (),
    resume: bool = False,
    only_experts: Sequence[str] = (),
    device_map: str | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> Losses | Measures | None:
    """Train a mixture of experts and write the result to `output`.

    With `only_experts`, by name or number, the rows of the other experts' gates stay as they are.
    With `device_map="auto"` one process spreads the model over all GPUs and main memory. With
    `tasks`, `data` and `eval_data` are theirs, and answers are measured at the end of every epoch.

    Returns the held-out loss of every source before and after, with `tasks` also the score of each,
    and the overall performance; None in all but the main process.
    `output` is `<model>-trained` if not given. Checkpoints lie in `<output>.checkpoints` until the
    training is complete; `resume` goes on from the last one. Where there are several processes,
    their group is gone afterwards. `UserError` for what cannot be trained.
    """
    config = load_config(model_path, reading)
    is_sequence_moe = routes_sequences(config)
    # A process runs only the experts that its texts chose, and what is split needs all processes.
    # A gate that is split has no rows to keep.
    splits = not is_sequence_moe and not only_experts
    run = Run(
        output or f"{model_path.rstrip('/')}-trained",
        reading,
        splits=splits,
        device_map=device_map,
    )
    headers = check_model(model_path, config, reading)
    aim = _aim(part, only_experts, config, headers, recipe)
    recipe = aim.recipe
    if device_map and "rest" in aim.parts:
        raise UserError(
            "--device-map leaves no room on the GPUs for training all: train a part of the model, "
            "or split it with FSDP2"
        )
    if tasks:
        data = sources_of(tasks)
        eval_data = eval_sources_of(tasks)
        recipe = for_tasks(recipe, reading)
    recipe = with_best(recipe, data, tasks or {})
    aim = aim._replace(recipe=recipe)
    check_weights(data, weights or {})
    batches_per_step = tasks_per_step(recipe, data, weights)
    first_label = 1
    if is_sequence_moe:
        check_sequences(config, reading, recipe)
        first_label = first_predicted(config)
    arguments = run.arguments(
        replace(
            recipe,
            gradient_accumulation_steps=batches_per_step * recipe.gradient_accumulation_steps,
        ),
        learning_rate=aim.learning_rate,
        measure=bool(recipe.held_out or eval_data),
        ddp_find_unused_parameters=True,  # an expert that no token of this process chose
        **(every_epoch(recipe) if tasks else {}),
    )
    if tasks and run.is_split:
        raise UserError("--tasks is not for a model that is split between processes (FSDP)")
    if device_map:
        check_can_be_spread(model_path, config, headers.values())
    tokenizer = load_tokenizer(model_path, reading)
    with arguments.main_process_first(desc="reading the data"):
        sources, held_out, pairs = _read(
            data, eval_data, tasks or {}, tokenizer, config, reading, recipe, first_label
        )
    training = mixed(sources, weights or {}, recipe.seed)
    sampler = sampler_of(sources, recipe, arguments) if batches_per_step > 1 else None
    settings = _settings(model_path, aim, training, held_out, sampler, tasks or {})
    run.begin(settings, resume=resume)

    model = load_model(model_path, config, reading, headers=headers, dtype="auto")
    if not is_sequence_moe:
        check_positions(model, {"--data": training, **held_out}, reading.max_length)
    dtypes = dtypes_of(model)
    freeze_others(model, aim.parts)
    size = sum(parameter.nbytes for parameter in model.parameters())
    rows_per_epoch = len(sampler or training)
    run.check_room(size, checkpoint_bytes(model), arguments, rows_per_epoch)
    _prepare_dtypes(model, recipe.bf16)
    pad_token_id = padding_token(tokenizer, vocabulary_of(config))
    batch = training_batches(model, pad_token_id, first_label)
    if not is_sequence_moe:
        _check_gates(model, training, batch, aim)
    scorer = None
    if tasks:
        scorer = scorer_of(tasks, pairs, tokenizer, pad_token_id, recipe, reading)
    run.place(model, arguments)
    trainer = _trainer(model, arguments, batch, training, held_out, aim, sampler, scorer)
    run.train(trainer)
    run.end_group()
    if not run.is_main:
        return None

    losses: Losses | Measures = losses_before_and_after(trainer, held_out)
    if tasks:
        losses = first_and_last(measurements(trainer), [*held_out, "overall"])
    restore_dtypes(model, dtypes)
    run.check_converged(trainer, losses, "take a lower --learning-rate")
    with run.finish() as directory:
        _write(directory, trainer, model_path, tokenizer, reading)
        if not only_experts:  # of others the rows of the gates are as they were
            drop_training_section(directory, aim.chosen)
        extend_card(directory, _card(aim.chosen, data, run.settings, losses, only_experts))
    return losses


class _Aim(NamedTuple):
    """What of a model is trained, and how.

    chosen: what the user asked for, once each and in order.
    parts: the kinds of parameters that are trained.
    free_rows: the indices of the experts whose rows of the gates alone are trained; none where all
        are.
    learning_rate: that of parts that have none of their own.
    recipe: what was given, with what it leaves to the model and the parts.
    """

    chosen: list[str]
    parts: Collection[str]
    free_rows: list[int]
    learning_rate: float
    recipe: Recipe


def _aim(
    part: Part | Sequence[Part],
    only_experts: Sequence[str],
    config: Any,
    headers: Any,
    recipe: Recipe,
) -> _Aim:
    """`UserError` for parts that the model has not, and for options of parts that stay."""
    chosen = chosen_parts(part, config)
    parts = parts_to_train(chosen, config, headers, recipe)
    free_rows = _free_rows(config, chosen, only_experts)
    rate = _learning_rate(recipe, parts)
    return _Aim(chosen, parts, free_rows, rate, _settled(recipe, config, rate, parts))


def _read(
    data: Sequence[str],
    eval_data: Sequence[str],
    tasks: Mapping[str, Task],
    tokenizer: Any,
    config: Any,
    reading: Reading,
    recipe: Recipe,
    first_label: int,
) -> tuple[dict[str, Dataset], dict[str, Dataset], Mapping[str, Dataset]]:
    """The rows of each source to train on, those held out of it, and, of tasks, the latter once
    more as texts.
    """
    sources, held_out = read_sources(
        data,
        eval_data,
        tokenizer,
        config,
        reading,
        recipe,
        completions_only=recipe.completions_only,
        first_label=first_label,
        max_source_length=recipe.max_source_length,
        max_target_length=recipe.max_target_length,
        prepare=pairs_of(tasks) if tasks else None,
    )
    pairs: Mapping[str, Dataset] = {}
    if tasks:
        pairs = measured_pairs(tasks, data, eval_data, recipe, tokenizer)
    return sources, held_out, pairs


def _trainer(
    model: Any,
    arguments: Any,
    batch: Any,
    training: Dataset,
    held_out: Mapping[str, Dataset],
    aim: _Aim,
    sampler: TaskSampler | None,
    scorer: TaskScorer | None,
) -> MoeTrainer:
    """The Trainer that a model of this kind needs."""
    kind = SequenceTrainer if routes_sequences(model.config) else MoeTrainer
    return kind(
        model,
        arguments,
        data_collator=batch,
        train_dataset=training,
        eval_dataset=held_out or None,
        router_aux_loss=aim.recipe.router_aux_loss,
        learning_rates=learning_rates(model, aim.recipe, aim.learning_rate),
        sampler=sampler,
        scorer=scorer,
        callbacks=[OtherRowsFixed(model, aim.free_rows)] if aim.free_rows else [],
    )


def _learning_rate(recipe: Recipe, parts: Collection[str]) -> float:
    """That of parts that have none of their own."""
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    return LEARNING_RATE_OF_ALL if "rest" in parts else LEARNING_RATE_OF_PARTS


def _settled(recipe: Recipe, config: Any, learning_rate: float, parts: Collection[str]) -> Recipe:
    """The recipe with what it leaves to the model and to the parts that are trained."""
    is_partial = "rest" not in parts
    weight = 0.0
    if routes_sequences(config) and "router" in parts:
        weight = config.router_aux_loss_coef
    return replace(
        recipe,
        learning_rate=learning_rate,
        router_aux_loss=weight if recipe.router_aux_loss is None else recipe.router_aux_loss,
        # Nothing is gained from frozen weights in float32.
        bf16=recipe.bf16 or (is_partial and config.dtype == torch.bfloat16),
    )


def _free_rows(config: Any, chosen: Sequence[str], experts: Sequence[str]) -> list[int]:
    """The indices of the experts whose rows of the gates alone are trained; none where all are."""
    if not experts:
        return []
    if routes_sequences(config):
        raise UserError("--only-experts is for gates: a sequence MoE's router learns as a whole")
    if list(chosen) != ["gates"]:
        raise UserError("--only-experts is for --train gates: it trains their rows of the gates")
    return indices_of(config, experts)


def _check_gates(model: Any, training: Dataset, batch: Any, aim: _Aim) -> None:
    """`UserError` for gates, or the rows of them that are trained, without anything to learn."""
    _check_gradient(model, batch([training[0]]), aim.parts, aim.recipe)
    if aim.free_rows and not aim.recipe.router_aux_loss:
        check_chosen(model, _first_batches(training, batch), aim.free_rows)


def _first_batches(training: Dataset, batch: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Sixteen rows from all over the data, one at a time."""
    number = min(16, len(training))
    for index in range(number):
        yield without_labels(batch([training[index * len(training) // number]]))


def _settings(
    model_path: str,
    aim: _Aim,
    training: Dataset,
    held_out: Mapping[str, Dataset],
    sampler: TaskSampler | None,
    tasks: Mapping[str, Task],
) -> dict[str, Any]:
    """What must be the same when the training is resumed."""
    reference = ModelReference.model_validate(model_path)
    settings: dict[str, Any] = {
        "model": model_identity(model_path),
        "train": ", ".join(aim.chosen),
        "weights": checkpoint_fingerprint(reference, MergeOptions()),
        "data": fingerprint(training),
        "held_out_data": {name: fingerprint(rows) for name, rows in held_out.items()},
    }
    if aim.free_rows:
        settings["only_experts"] = aim.free_rows
    settings |= asdict(aim.recipe)
    if sampler:
        settings["rows"] = sampler.sizes
    if tasks:
        settings["tasks"] = {name: task.model_dump() for name, task in tasks.items()}
    return settings


def _write(
    directory: Path, trainer: MoeTrainer, model_path: str, tokenizer: Any, reading: Reading
) -> None:
    """Writes the trained model with the files of the model that it was, the tokenizer's as they
    were read.
    """
    source = model_folder(model_path)
    copy_files(source, directory, tokenizer)
    if not has_tokenizer(directory):
        # Read again: the one that cut the texts has cutting among its settings now.
        load_tokenizer(model_path, reading).save_pretrained(directory)
    model = trainer.model
    model.save_pretrained(directory)
    trainer.state.save_to_json(str(directory / "trainer_state.json"))
    is_trusted = reading.trust_remote_code
    complete_model(directory, model.config, source, model_path, is_trusted=is_trusted)


def _prepare_dtypes(model: Any, bf16: bool) -> None:
    """Makes what is trained float32, and without --bf16 the rest as well.

    In bfloat16 small steps would be rounded away.
    """
    for parameter in model.parameters():
        if parameter.requires_grad or not bf16:
            parameter.data = parameter.data.float()


def _check_gradient(
    model: Any,
    batch: dict[str, torch.Tensor],
    parts: Collection[str],
    recipe: Recipe,
) -> None:
    """Finds gates that keep one expert and give it all the weight: no loss has a gradient for them.

    `UserError` where the gates alone are trained, else a warning.
    """
    if recipe.router_aux_loss or (getattr(model.config, "num_experts_per_tok", None) or 1) > 1:
        return
    model.eval()
    start = {name: tensor[:, :16] for name, tensor in without_labels(batch).items()}
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16)
    with autocast, recorded(model) as choices:
        model(**start, use_cache=False)
    for name, choice in choices.items():
        if choice.weights.shape[-1] > 1:
            continue
        router = [p for p in model.get_submodule(name).parameters() if p.requires_grad]
        # The weight of the one expert is the router's probability, or that divided by itself, which
        # is constant. Rounding leaves the constant a small gradient, hence the comparison.
        weights_norm = _gradient_norm(choice.weights.sum(), router)
        probability = choice.logits.float().softmax(-1).amax(-1)
        probability_norm = _gradient_norm(probability.sum(), router)
        is_constant = weights_norm <= (0.01 if recipe.bf16 else 1e-4) * probability_norm
        if not is_constant:
            continue
        complaint = (
            "the gates of this model choose one expert and give it all the weight (as "
            f"{name} does), so the loss has no gradient for them; give --router-aux-loss, or merge "
            "with experts_per_token: 2"
        )
        if "rest" not in parts:
            raise UserError(complaint)
        LOG.warning("%s", complaint)
        return


def _gradient_norm(value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> float:
    """The sum of the norms of the gradients of `value` for each of the parameters."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return sum(gradient.norm().item() for gradient in gradients if gradient is not None)


def _card(
    chosen: Sequence[str],
    data: Sequence[str],
    settings: Mapping[str, Any],
    losses: Losses | Measures,
    only_experts: Sequence[str],
) -> list[str]:
    subjects = {
        "gates": "the gates alone were",
        "router": "the router alone was",
        "projectors": "the projectors alone were",
        "all": "all parameters were",
    }
    subject = "projectors and router were" if len(chosen) > 1 else subjects[chosen[0]]
    if only_experts:
        named = ", ".join(in_markdown(expert) for expert in only_experts)
        subject = f"the gates' rows of the experts {named} alone were"
    sources = sources_in_markdown(data)
    names = [*_ON_CARD, *[name for name in _ON_CARD_IF_STATED if settings[name]]]
    numbers = ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in names)
    lines = [
        "## Training",
        "",
        f"After merging, {subject} trained with mergekit-moe-ext on {sources}: {numbers}.",
    ]
    if losses:
        lines += ["", before_and_after(losses, markdown=True)]
    return lines
