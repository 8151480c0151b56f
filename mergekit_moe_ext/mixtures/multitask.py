"""What training on tasks, and with batches of every task in each step, adds to the training of a
mixture (CAEM-MoE 4.3).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from _mergekit_moe_ext_common.data import Source, parse_sources
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.training import split_sources
from mergekit_moe_ext.mixtures.generation import TaskScorer, check_prompts
from mergekit_moe_ext.mixtures.per_task import TaskSampler
from mergekit_moe_ext.mixtures.tasks import Task, with_prompts
from mergekit_moe_ext.recipes import Recipe


def tasks_per_step(recipe: Recipe, data: Sequence[str], weights: Any) -> int:
    """The number of tasks that have batches of their own in every step; 1 where rows are shuffled.

    `UserError` for options of the other way of mixing.
    """
    if recipe.mixing == "shuffled":
        if recipe.samples_per_task is not None:
            raise UserError("--samples-per-task is for --mixing per-task")
        return 1
    if weights:
        raise UserError("--weight is for shuffled rows: --mixing per-task weighs all tasks alike")
    if len(data) < 2:
        raise UserError("--mixing per-task is for several sources: repeat --data")
    return len(data)


def for_tasks(recipe: Recipe, reading: Reading) -> Recipe:
    """The recipe for tasks: decoders learn answers alone, and prompts and answers are cut one by
    one.
    """
    if recipe.packing:
        raise UserError("--packing joins texts, and --tasks has prompts with their answers")
    return replace(
        recipe,
        completions_only=True,
        max_source_length=recipe.max_source_length or reading.max_length,
        max_target_length=recipe.max_target_length or reading.max_length,
    )


def with_best(recipe: Recipe, data: Sequence[str], tasks: Mapping[str, Task]) -> Recipe:
    """The recipe with the measure by which the best model is known, where that is to be written.

    `UserError` for a measure that there is not.
    """
    metric = recipe.metric_for_best_model
    if not recipe.load_best_model_at_end:
        if metric:
            raise UserError("--metric-for-best-model is for --load-best-model-at-end")
        return recipe
    names = [source.name for source in parse_sources(data)]
    measures = [f"{name}_loss" for name in names] + [f"{name}_score" for name in tasks]
    if tasks and all(task.single_task_score for task in tasks.values()):
        measures.append("overall_performance")
    if metric is None:
        # The last measure is the most telling one, but of several tasks it is only one task's.
        metric = measures[-1]
        if len(names) > 1 and metric != "overall_performance":
            raise UserError(
                "--load-best-model-at-end: with several tasks the best model is that of the best "
                "overall performance, for which each needs a single_task_score in --tasks; or "
                f"state --metric-for-best-model: {', '.join(measures)}"
            )
    if metric.removeprefix("eval_") not in measures:
        raise UserError(f"--metric-for-best-model {metric}: there are {', '.join(measures)}")
    return replace(recipe, metric_for_best_model=metric)


def pairs_of(tasks: Mapping[str, Task]) -> Callable[[Dataset, Source], Dataset]:
    """A function that makes inputs and targets of a task's rows."""

    def pairs(rows: Dataset, source: Source) -> Dataset:
        return with_prompts(rows, source, tasks[source.name])

    return pairs


def measured_pairs(
    tasks: Mapping[str, Task],
    data: Sequence[str],
    eval_data: Sequence[str],
    recipe: Recipe,
    tokenizer: Any,
) -> Mapping[str, Dataset]:
    """Inputs and targets, as texts, of the rows that are held out of each task.

    `UserError` for a task of which nothing is, so that no answer could be measured, and for a
    prompt of no tokens.
    """
    _, pairs = split_sources(data, eval_data, recipe, pairs_of(tasks))
    for name in tasks:
        if name not in pairs:
            raise UserError(
                f"nothing is held out of the task {name}, so that no answer of it could be "
                "measured; see --held-out, and eval_data in --tasks"
            )
    check_prompts(pairs, tokenizer)
    return pairs


def scorer_of(
    tasks: Mapping[str, Task],
    pairs: Mapping[str, Dataset],
    tokenizer: Any,
    pad_token_id: int,
    recipe: Recipe,
    reading: Reading,
) -> TaskScorer:
    """What measures a model's answers to these prompts."""
    return TaskScorer(
        tasks,
        pairs,
        tokenizer,
        pad_token_id,
        batch_size=recipe.per_device_eval_batch_size,
        max_source_length=recipe.max_source_length or reading.max_length,
        max_target_length=recipe.max_target_length or reading.max_length,
        quiet=reading.quiet,
    )


def every_epoch(recipe: Recipe) -> dict[str, str]:
    """The Trainer's arguments by which it measures at the end of every epoch.

    Where the best model is kept, checkpoints are of the steps that were measured.
    """
    save_strategy = "epoch" if recipe.load_best_model_at_end else "steps"
    return {"eval_strategy": "epoch", "save_strategy": save_strategy}


def sampler_of(
    sources: Mapping[str, Dataset], recipe: Recipe, arguments: TrainingArguments
) -> TaskSampler:
    """The order of the rows of all sources with `--mixing per-task`."""
    sizes = [len(rows) for rows in sources.values()]
    rows_per_batch = arguments.per_device_train_batch_size * arguments.world_size
    return TaskSampler(
        sizes,
        samples=recipe.samples_per_task or min(sizes),
        rows_per_step=rows_per_batch * recipe.gradient_accumulation_steps,
        seed=recipe.seed,
    )
