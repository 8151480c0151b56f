"""Test-time adaptation: a weight-ensembling model's routers learn from inputs without labels.

That is WEMoE 3.3. A step takes one batch of every task through that task's head and lowers the sum
of the mean entropies of their predictions (equation 5). The Hugging Face Trainer does the work, on
one process or, under `accelerate launch`, on many. To it the batches of a step are micro-batches
that it accumulates, so that one task is in memory at a time.

The network stays in inference mode, so that it adapts as it will be used. In a decoder a prediction
is that of a next token, and those of tokens in the prefix, which the coefficients depend on, are
left out.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from datasets import Dataset
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from _mergekit_moe_ext_common.cards import extend_card, in_markdown, sources_in_markdown
from _mergekit_moe_ext_common.data import Source, parse_sources
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import check_model, load_tokenizer
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.positions import check_positions
from _mergekit_moe_ext_common.runs import (
    Losses,
    Measures,
    Run,
    before_and_after,
    checkpoint_bytes,
    first_and_last,
    model_identity,
)
from _mergekit_moe_ext_common.staging import copy_files, model_folder
from _mergekit_moe_ext_common.training import (
    dtypes_of,
    restore_dtypes,
    split_sources,
    with_predicted,
)
from mergekit_moe_ext.merging.card import renew_loading
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.merging.outputs import complete_model
from mergekit_moe_ext.modeling.configuration_wemoe import class_names
from mergekit_moe_ext.recipes import Adaptation, Recipe
from mergekit_moe_ext.wemoe.inputs import (
    Kind,
    One,
    Rounds,
    data_fingerprint,
    load_image_processor,
    model_inputs,
)
from mergekit_moe_ext.wemoe.loading import load_ensemble, read_ensemble
from mergekit_moe_ext.wemoe.predictions import Predictions
from mergekit_moe_ext.wemoe.trainer import AdaptationTrainer

LOG = logging.getLogger(__name__)
_OBJECTIVES = {
    "entropy": "entropy of its predictions",
    "supervised": "cross-entropy to given labels",
}
_KINDS: dict[str, Kind] = {
    "AutoModelForCausalLM": "decoder",
    "AutoModelForSeq2SeqLM": "encoder-decoder",
    "AutoModelForSequenceClassification": "text",
    "AutoModelForImageClassification": "image",
}


def adapt(
    model_path: str,
    output: str | None,
    data: Sequence[str],
    reading: Reading,
    adaptation: Adaptation,
    *,
    eval_data: Sequence[str] = (),
    resume: bool = False,
) -> Measures | None:
    """Adapt the routers of a weight-ensembling model and write the result to `output`.

    `data` are `TASK=SOURCE`; the task is a head's name where the model has several. Returns, per
    task, entropy and accuracy (or, of tokens, loss) before and after; None in all but the main
    process. `output` is `<model>-adapted` if not given. Checkpoints lie in `<output>.checkpoints`
    until the adaptation is complete; `resume` goes on from the last one. Where there are several
    processes, their group is gone afterwards. `UserError` for what cannot be adapted.
    """
    run = Run(output or f"{model_path.rstrip('/')}-adapted", reading)
    architecture, config = read_ensemble(model_path)
    check_model(model_path, config, reading, architecture=architecture)
    kind = _kind(model_path, architecture, config)
    if adaptation.learning_rate is None:
        adaptation = replace(adaptation, learning_rate=_learning_rate(config))
    tasks = [source.name for source in parse_sources(data)]
    _check_tasks(model_path, config, tasks, [source.name for source in parse_sources(eval_data)])
    _check_coefficients_per(model_path, kind, config, adaptation)
    recipe = _recipe(adaptation, len(tasks))
    arguments = _arguments(run, recipe, adaptation, config)
    load = load_image_processor if kind == "image" else load_tokenizer
    prepare = load(model_path, reading)
    prefix = _prefix(kind, config)
    read = _reader(kind, prepare, prefix, config, reading, adaptation)
    with arguments.main_process_first(desc="reading the data"):
        training, held_out = split_sources(data, eval_data, recipe, read)
    run.begin(_settings(model_path, training, held_out, adaptation), resume=resume)
    if run.is_main:
        _announce(training, held_out)

    model = load_ensemble(model_path, architecture, config)
    if kind != "image":
        check_positions(model, {**training, **held_out}, reading.max_length)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    dtypes = dtypes_of(model.routers)
    _prepare_parameters(model)
    run.check_room(size, checkpoint_bytes(model), arguments, rows=0)  # its steps are given
    measured = {task: held_out.get(task, rows) for task, rows in training.items()}
    batch = adaptation.per_device_train_batch_size * run.processes
    trainer = AdaptationTrainer(
        model,
        arguments,
        train_dataset=Rounds(training, batch=batch, steps=adaptation.steps, seed=adaptation.seed),
        eval_dataset={task: One(task, rows) for task, rows in measured.items()},
        predictions=Predictions(
            model, kind, prepare, prefix, adaptation.image_column, adaptation.coefficients_per
        ),
        adaptation=adaptation,
    )
    run.train(trainer)
    run.end_group()
    if not run.is_main:
        return None

    results = first_and_last(trainer.state.log_history, measured)
    restore_dtypes(model.routers, dtypes)
    run.check_converged(trainer, results, "take a lower --learning-rate")
    _report(trainer, results)
    with run.finish() as directory:
        source = model_folder(model_path)
        copy_files(source, directory)
        model.save_pretrained(directory)
        trainer.state.save_to_json(str(directory / "trainer_state.json"))
        heads = list(config.ensembling["heads"])
        renew_loading(directory, architecture._auto_class, remote_code=True, tasks=heads)
        complete_model(directory, model.config, source, model_path)
        extend_card(directory, _card(data, run.settings, results, trainer, sorted(held_out)))
    return results


def _settings(
    model_path: str,
    training: Mapping[str, Dataset],
    held_out: Mapping[str, Dataset],
    adaptation: Adaptation,
) -> dict[str, Any]:
    """What must be the same when the adaptation is resumed."""
    reference = ModelReference.model_validate(model_path)
    images = adaptation.image_column
    return {
        "model": model_identity(model_path),
        "weights": checkpoint_fingerprint(reference, MergeOptions()),
        "data": {task: data_fingerprint(rows, images) for task, rows in training.items()},
        "held_out_data": {task: data_fingerprint(rows, images) for task, rows in held_out.items()},
        **asdict(adaptation),
    }


def _recipe(adaptation: Adaptation, tasks: int) -> Recipe:
    """The adaptation as the Trainer knows it: a step accumulates one batch of every task."""
    return Recipe(
        weight_decay=0.0,
        adam_beta1=adaptation.adam_beta1,
        adam_beta2=adaptation.adam_beta2,
        lr_scheduler_type=adaptation.lr_scheduler_type,
        max_steps=adaptation.steps,
        per_device_train_batch_size=adaptation.per_device_train_batch_size,
        per_device_eval_batch_size=adaptation.per_device_eval_batch_size,
        gradient_accumulation_steps=tasks,
        held_out=adaptation.held_out,
        eval_steps=adaptation.eval_steps or adaptation.steps,
        save_steps=adaptation.save_steps,
        seed=adaptation.seed,
    )


def _arguments(
    run: Run,
    recipe: Recipe,
    adaptation: Adaptation,
    config: Any,
) -> TrainingArguments:
    assert adaptation.learning_rate is not None
    arguments = run.arguments(
        recipe,
        learning_rate=adaptation.learning_rate,
        measure=True,
        max_grad_norm=0.0,
        ddp_find_unused_parameters=config.ensembling.get("per_tensor", False),  # a mask token, say
        ddp_broadcast_buffers=False,  # these are the task vectors
    )
    # Measuring is rare, often only before and after; the objective gets a line more often.
    arguments.logging_steps = max(1, adaptation.steps // 20)
    return arguments


def _reader(
    kind: Kind,
    prepare: Any,
    prefix: int,
    config: Any,
    reading: Reading,
    adaptation: Adaptation,
) -> Callable[[Dataset, Source], Dataset]:
    """A function from a source's rows to inputs of the model."""

    def read(rows: Dataset, source: Source) -> Dataset:
        inputs = model_inputs(rows, source, kind, prepare, config, reading, adaptation)
        return with_predicted(inputs, source, max(1, prefix)) if kind == "decoder" else inputs

    return read


def _announce(training: Mapping[str, Dataset], held_out: Mapping[str, Dataset]) -> None:
    """Says of each task whether the rows adapted to are the ones measured."""
    for task, rows in training.items():
        if task in held_out:
            others = len(held_out[task])
            relation = f"which are not the ones measured; {others} others are measured"
        else:
            relation = "the test inputs themselves, as in the paper; they are the ones measured"
        LOG.info("%s: adapting to %d inputs, %s", task, len(rows), relation)


def _prepare_parameters(model: Any) -> None:
    """Makes the routers all that is trained, and float32: in bfloat16 small steps would be lost."""
    model.requires_grad_(False)
    model.routers.requires_grad_(True)
    model.routers.float()
    # Every process has read what is frozen, and some of it has types that are not sent.
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = sorted(set(model.state_dict()) - trainable)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def _kind(model_path: str, architecture: Any, config: Any) -> Kind:
    auto = architecture._auto_class
    if auto not in _KINDS:
        raise UserError(
            f"{model_path} is {architecture.__name__}; what is adapted are models of classes or "
            f"next tokens, those of {', '.join(_KINDS)}"
        )
    heads = config.ensembling["heads"].values() or [class_names(config)]
    if _KINDS[auto] in ("text", "image") and min(map(len, heads)) < 2:
        raise UserError(f"{model_path} has a head of one class, whose predictions have no entropy")
    return _KINDS[auto]


def _check_tasks(
    model_path: str,
    config: Any,
    tasks: Sequence[str],
    measured: Sequence[str],
) -> None:
    heads = config.ensembling["heads"]
    for task in tasks:
        if heads and task not in heads:
            names = ", ".join(heads)
            complaint = f"{model_path} has no head {task!r}"
            raise UserError(f"{complaint}; write --data TASK=SOURCE with one of {names}")
    for task in measured:
        if task not in tasks:
            raise UserError(f"--eval-data {task}: there is no --data of this name")


def _check_coefficients_per(
    model_path: str, kind: Kind, config: Any, adaptation: Adaptation
) -> None:
    """`UserError` for coefficients of a batch where there is not one set per row to take the mean
    of.
    """
    is_running = kind == "decoder" and config.ensembling["mode"] == "running"
    if adaptation.coefficients_per == "batch" and (is_running or kind == "encoder-decoder"):
        raise UserError(
            f"--coefficients-per batch: in {model_path} every token has coefficients of its own, "
            "so leave it out; mode frozen has one set per row"
        )


def _prefix(kind: Kind, config: Any) -> int:
    """How many tokens of a decoder's row the coefficients depend on as a whole."""
    ensembling = config.ensembling
    frozen = kind == "decoder" and ensembling["mode"] == "frozen" and ensembling["router_layers"]
    return ensembling["routing_tokens"] if frozen else 0


def _learning_rate(config: Any) -> float:
    """The rate of FusionBench's runs for routers, and that of WEMoE's own code for constants.

    At the latter, routers of images with linear heads fail in two seeds of three
    (docs/wemoe_images.md), and the loss of tokens soars (docs/wemoe_texts.md).
    """
    return 1e-4 if config.ensembling["router_layers"] else 1e-3


def _report(trainer: AdaptationTrainer, results: Measures) -> None:
    """Says what a user would not expect: an early stop, the guard at work, worse predictions."""
    steps = trainer.state.global_step
    if steps < trainer.state.max_steps:
        LOG.info("stopped after %d steps: the objective fell no more", steps)
    for task, count in trainer.guarded_steps().items():
        LOG.info("the guard acted on %s in %d of %d steps", task, count, steps)
    for task, measures in results.items():
        if _is_worse(measures):
            remedy = "try a lower --learning-rate or fewer --steps"
            LOG.warning("%s: predictions are surer now and more often wrong; %s", task, remedy)


def _is_worse(measures: Losses) -> bool:
    """Whether a task's entropy fell, and its accuracy fell or its loss rose."""
    unchanged = (0.0, 0.0)
    before, after = measures.get("entropy", unchanged)
    accuracy_before, accuracy_after = measures.get("accuracy", unchanged)
    loss_before, loss_after = measures.get("loss", unchanged)
    return after < before and (accuracy_after < accuracy_before or loss_after > loss_before)


def _card(
    data: Sequence[str],
    settings: Mapping[str, Any],
    results: Measures,
    trainer: AdaptationTrainer,
    held_out: Sequence[str],
) -> list[str]:
    objective = _OBJECTIVES[settings["objective"]]
    text = (
        f"After merging, the routers were adapted with mergekit-moe-ext to lower the {objective} "
        f"on {sources_in_markdown(data)}: {trainer.state.global_step} steps, learning rate "
        f"{settings['learning_rate']} ({settings['lr_scheduler_type']}), "
        f"{settings['per_device_train_batch_size']} rows of each task per process, processes "
        f"{settings['processes']}, seed {settings['seed']}."
    )
    if settings["coefficients_per"] == "batch":
        text += (
            " In steps and in what follows, all rows of a batch had the mean of their "
            "coefficients; the model itself gives every sample its own."
        )
    for task, count in trainer.guarded_steps().items():
        text += f" The collapse guard acted on {in_markdown(task)} in {count} steps."
    inputs = (
        f"other inputs ({sources_in_markdown(held_out)})" if held_out else "the inputs adapted to"
    )
    return [
        "## Adaptation",
        "",
        text,
        "",
        f"Measured on {inputs}:",
        "",
        before_and_after(results, markdown=True),
    ]
