"""The scores of a model on tasks, without training it: of merged models, soups and tests."""

from pathlib import Path

from _mergekit_moe_ext_common.data import load, parse_sources
from _mergekit_moe_ext_common.loading import (
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
    silence,
    vocabulary_of,
)
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.mixtures.generation import TaskScorer, check_prompts
from mergekit_moe_ext.mixtures.tasks import read_tasks, with_prompts


def task_scores(
    model: str | Path,
    tasks: str | Path,
    *,
    reading: Reading | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """The scores of a model's answers to tasks, as `train --tasks` measures them.

    Args:
        model: a directory, or a name on the Hub.
        tasks: a YAML file of tasks. Of each its `eval_data` is read, or its `data` without any.
        reading: how rows are read; `Reading(quiet=True)` if None. Prompts are cut to its
            `max_length`.
        batch_size: the number of rows at a time.

    Returns `<task>_score` of each task, from 0 to 1, and `overall_performance` where the tasks have
    a `single_task_score`. All processes get the same.

    `UserError` for a model, tasks or data that cannot be read.

    >>> scores = task_scores("trained", "tasks.yml")
    >>> list(scores)
    ['news_score', 'squad_score', 'xsum_score', 'overall_performance']
    """
    reading = reading or Reading(quiet=True)
    silence(reading)
    path = str(model)
    by_name = read_tasks(Path(tasks))
    measured = [f"{name}={task.eval_data or task.data}" for name, task in by_name.items()]
    pairs = {}
    for source in parse_sources(measured):
        pairs[source.name] = with_prompts(load(source), source, by_name[source.name])
    config = load_config(path, reading)
    tokenizer = load_tokenizer(path, reading)
    check_prompts(pairs, tokenizer)
    scorer = TaskScorer(
        by_name,
        pairs,
        tokenizer,
        padding_token(tokenizer, vocabulary_of(config)),
        batch_size=batch_size,
        max_source_length=reading.max_length,
        max_target_length=reading.max_length,
        quiet=reading.quiet,
    )
    return scorer(load_model(path, config, reading, dtype="auto").eval())
