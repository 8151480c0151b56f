"""Test-time adaptation of a weight-ensembling model: its routers learn from inputs without labels (WEMoE 3.3).

A step takes one batch of every task through that task's head and lowers the sum of the mean entropies of their
predictions (equation 5). The Hugging Face Trainer does the work, on one process or, under `accelerate launch`, on
many. To it the batches of a step are micro-batches that it accumulates, so that one task is in memory at a time.

The network stays in inference mode, so that it adapts as it will be used. In a decoder a prediction is that of a next
token, and those of tokens in the prefix, which the coefficients depend on, are left out.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from datasets import Dataset
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch.nn.parallel import DistributedDataParallel

from _mergekit_moe_ext_common import options as shared_options
from _mergekit_moe_ext_common.data import Source, parse_sources
from _mergekit_moe_ext_common.loading import load_tokenizer, silence
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.staging import check_output, check_room, copy_files, extend_card, staged
from _mergekit_moe_ext_common.training import (
    keep_settings,
    last_checkpoints,
    part_processes,
    split_sources,
    training_arguments,
    with_predicted,
)
from mergekit_moe_ext.merging.card import renew_loading
from mergekit_moe_ext.merging.checkpoint import checkpoint_fingerprint
from mergekit_moe_ext.modeling.configuration_wemoe import class_names
from mergekit_moe_ext.recipes import Adaptation
from mergekit_moe_ext.wemoe.inputs import Kind, One, Rounds, data_fingerprint, load_image_processor, model_inputs
from mergekit_moe_ext.wemoe.loading import load_ensemble, read_ensemble
from mergekit_moe_ext.wemoe.predictions import Predictions
from mergekit_moe_ext.wemoe.trainer import AdaptationTrainer

LOG = logging.getLogger(__name__)
Measured = dict[str, dict[str, tuple[float, float]]]
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
) -> Measured | None:
    """Adapt the routers of a weight-ensembling model and write the result to `output`, `<model>-adapted` if not given.

    `data` are `TASK=SOURCE`; the task is a head's name where the model has several. Returns, per task, entropy and
    accuracy (or, of tokens, loss) before and after; None in all but the main process. Checkpoints lie in
    `<output>.checkpoints` until the adaptation is complete; `resume` goes on from the last one.
    """
    silence(reading)
    out = check_output(output or f"{model_path.rstrip('/')}-adapted")
    checkpoints = out.with_name(f"{out.name}.checkpoints")
    architecture, config = read_ensemble(model_path)
    kind = _kind(model_path, architecture, config)
    rate = _learning_rate(kind, config) if adaptation.learning_rate is None else adaptation.learning_rate
    adaptation = replace(adaptation, learning_rate=rate)
    tasks = [source.name for source in parse_sources(data)]
    _check_tasks(model_path, config, tasks, [source.name for source in parse_sources(eval_data)])
    recipe = shared_options.Recipe(
        lr_scheduler_type="constant",
        max_steps=adaptation.steps,
        per_device_train_batch_size=adaptation.per_device_train_batch_size,
        per_device_eval_batch_size=adaptation.per_device_eval_batch_size,
        gradient_accumulation_steps=len(tasks),
        held_out=adaptation.held_out,
        eval_steps=adaptation.eval_steps or adaptation.steps,
        save_steps=adaptation.save_steps,
        seed=adaptation.seed,
    )
    arguments = training_arguments(
        recipe,
        reading,
        checkpoints,
        learning_rate=rate,
        measure=True,
        max_grad_norm=0.0,
        ddp_find_unused_parameters=config.ensembling.get("per_tensor", False),  # a mask token, say
        ddp_broadcast_buffers=False,  # these are the task vectors
    )
    arguments.logging_steps = max(1, adaptation.steps // 20)
    prepare = load_image_processor(model_path, reading) if kind == "image" else load_tokenizer(model_path, reading)
    prefix = _prefix(kind, config)

    def rows_of(rows: Dataset, source: Source) -> Dataset:
        inputs = model_inputs(rows, source, kind, prepare, config, reading, adaptation)
        return with_predicted(inputs, source, max(1, prefix)) if kind == "decoder" else inputs

    with arguments.main_process_first(desc="reading the data"):
        training, held_out = split_sources(data, eval_data, recipe, rows_of)
    settings = {
        "model": str(Path(model_path).resolve()) if Path(model_path).exists() else model_path,
        "weights": checkpoint_fingerprint(ModelReference.model_validate(model_path), MergeOptions()),
        "data": {task: data_fingerprint(rows, adaptation.image_column) for task, rows in training.items()},
        **asdict(adaptation),
        "processes": arguments.world_size,
    }
    checkpoint = last_checkpoints(checkpoints, settings, resume=resume)[""]
    for task in training if arguments.should_save else ():
        kept = f"{len(held_out[task])} others are measured" if task in held_out else "they are the ones measured"
        LOG.info("%s: adapting to %d inputs, %s", task, len(training[task]), _WHOSE[task in held_out] + "; " + kept)

    model = load_ensemble(model_path, architecture, config)
    check_room(out, sum(t.nbytes for t in model.state_dict().values()))
    dtypes = {name: p.dtype for name, p in model.routers.named_parameters()}
    model.requires_grad_(False)
    model.routers.requires_grad_(True)
    model.routers.float()  # in bfloat16 small steps would be rounded away
    frozen = set(model.state_dict()) - {name for name, p in model.named_parameters() if p.requires_grad}
    # every process has read them, and some have types that are not sent
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(frozen))

    measured = {task: held_out.get(task, rows) for task, rows in training.items()}
    batch = adaptation.per_device_train_batch_size * arguments.world_size
    trainer = AdaptationTrainer(
        model,
        arguments,
        train_dataset=Rounds(training, batch=batch, steps=adaptation.steps, seed=adaptation.seed),
        eval_dataset={task: One(task, rows) for task, rows in measured.items()},
        predictions=Predictions(model, kind, prepare, prefix, adaptation.image_column),
        adaptation=adaptation,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise click.ClickException("FSDP and DeepSpeed are not supported: use `accelerate launch --multi_gpu`")
    if arguments.should_save:
        keep_settings(checkpoints, settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    results = _before_and_after(trainer.state.log_history, list(measured))

    part_processes(trainer)
    if not arguments.should_save:
        return None
    if trainer.state.global_step < adaptation.steps:
        LOG.info("stopped after %d steps: the objective fell no more", trainer.state.global_step)
    guarded = {task: int(count) for task, count in (trainer.guard.acted if trainer.guard else {}).items() if count}
    for task, count in guarded.items():
        LOG.info("the guard acted on %s in %d of %d steps", task, count, trainer.state.global_step)
    for task in _worse(results):
        LOG.warning(
            "%s: predictions are surer now and more often wrong; try a lower --learning-rate or fewer --steps", task
        )
    for name, parameter in model.routers.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    with staged(out) as directory:
        copy_files(Path(model_path).expanduser(), directory)
        model.save_pretrained(directory)
        trainer.state.save_to_json(str(directory / "trainer_state.json"))
        renew_loading(directory, architecture._auto_class, remote_code=True, tasks=list(config.ensembling["heads"]))
        extend_card(directory, _card(data, settings, results, guarded, trainer.state.global_step, sorted(held_out)))
    shutil.rmtree(checkpoints)
    return results


_WHOSE = {True: "which are not the ones measured", False: "the test inputs themselves, as in the paper"}


def _kind(model_path: str, architecture: Any, config: Any) -> Kind:
    auto = architecture._auto_class
    if auto not in _KINDS:
        raise click.ClickException(
            f"{model_path} is {architecture.__name__}; what is adapted are models of classes or next tokens, those of "
            + ", ".join(_KINDS)
        )
    heads = config.ensembling["heads"].values() or [class_names(config)]
    if _KINDS[auto] in ("text", "image") and min(map(len, heads)) < 2:
        raise click.ClickException(f"{model_path} has a head of one class, whose predictions have no entropy")
    return _KINDS[auto]


def _check_tasks(model_path: str, config: Any, tasks: Sequence[str], measured: Sequence[str]) -> None:
    heads = config.ensembling["heads"]
    for task in tasks:
        if heads and task not in heads:
            raise click.ClickException(
                f"{model_path} has no head {task!r}; write --data TASK=SOURCE with one of {', '.join(heads)}"
            )
    for task in measured:
        if task not in tasks:
            raise click.ClickException(f"--eval-data {task}: there is no --data of this name")


def _prefix(kind: Kind, config: Any) -> int:
    """How many tokens of a decoder's row the coefficients depend on as a whole."""
    ensembling = config.ensembling
    frozen = kind == "decoder" and ensembling["mode"] == "frozen" and ensembling["router_layers"]
    return ensembling["routing_tokens"] if frozen else 0


def _learning_rate(kind: Kind, config: Any) -> float:
    """The paper's, and a tenth of it for tokens, whose loss soars at the paper's (docs/wemoe_texts.md)."""
    predicts_tokens = kind in ("decoder", "encoder-decoder")
    return 1e-4 if predicts_tokens and config.ensembling["router_layers"] else 1e-3


def _worse(results: Measured) -> list[str]:
    """The tasks whose entropy fell and whose accuracy fell or loss rose."""

    def fell(measures: Mapping[str, tuple[float, float]], name: str, sign: int = 1) -> bool:
        before, after = measures.get(name, (0.0, 0.0))
        return sign * after < sign * before

    return [
        task
        for task, measures in results.items()
        if fell(measures, "entropy") and (fell(measures, "accuracy") or fell(measures, "loss", -1))
    ]


def _before_and_after(history: Sequence[dict[str, Any]], tasks: Sequence[str]) -> Measured:
    results: Measured = {}
    for task in tasks:
        for measure in ("entropy", "accuracy", "loss"):
            values = [entry[key] for entry in history if (key := f"eval_{task}_{measure}") in entry]
            if values:
                results.setdefault(task, {})[measure] = values[0], values[-1]
    return results


def _card(
    data: Sequence[str],
    settings: Mapping[str, Any],
    results: Measured,
    guarded: Mapping[str, int],
    steps: int,
    held_out: Sequence[str],
) -> list[str]:
    what = "entropy of its predictions" if settings["objective"] == "entropy" else "cross-entropy to given labels"
    on = f"on other inputs ({', '.join(held_out)})" if held_out else "on the inputs adapted to"
    return [
        "## Adaptation",
        "",
        f"After merging, the routers were adapted with mergekit-moe-ext to lower the {what} on {', '.join(data)}: "
        f"{steps} steps, learning rate {settings['learning_rate']}, {settings['per_device_train_batch_size']} rows of "
        f"each task per process, processes {settings['processes']}, seed {settings['seed']}."
        + "".join(f" The collapse guard acted on {task} in {count} steps." for task, count in guarded.items()),
        "",
        f"Measured {on}:",
        "",
        "| task | measure | before | after |",
        "|---|---|---:|---:|",
        *(
            f"| {task} | {measure} | {before:.4f} | {after:.4f} |"
            for task, measures in results.items()
            for measure, (before, after) in measures.items()
        ),
    ]
