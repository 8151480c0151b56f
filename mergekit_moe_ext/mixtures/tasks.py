"""Tasks as a YAML file describes them: data, prompts, and what an answer is measured by.

A file holds tasks by name:

    news:
      data: news.jsonl
      prompt: "Classify: {text}"
      target: label
      metric: accuracy
"""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from _mergekit_moe_ext_common.data import Source, parse_sources
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.metrics import metric_of


class Task(BaseModel):
    """A task: rows that become prompts and targets, and the metric of what is generated.

    prompt: the input, with names of columns in braces.
    target: the column of the right answer.
    metric: one of `METRICS`, or `package.module:function`.
    max_new_tokens: the number of tokens of an answer; that of a target if None.
    single_task_score: the best score of a model trained on this task alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    eval_data: str | None = None
    prompt: str
    target: str = "target"
    metric: str
    max_new_tokens: int | None = Field(default=None, ge=1)
    single_task_score: float | None = Field(default=None, gt=0)


def read_tasks(path: Path) -> dict[str, Task]:
    """The tasks of a YAML file, by name.

    `UserError` for a file that cannot be read, for what is no task, for a task or a key that stands
    there twice, for a metric that there is not, and where only some of the tasks have a
    `single_task_score`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the tasks of {path}: {error}") from error
    if not isinstance(document, dict) or not document:
        raise UserError(f"{path} is no file of tasks: write `NAME:` with `data:`, `prompt:` …")
    _check_keys(path, text)
    tasks = {}
    for name, values in document.items():
        # YAML reads `null`, `on` and `yes` as other things than names.
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise UserError(f"{path}: {name!r} is no name of a task: write it in quotes")
        if not isinstance(values, dict):
            raise UserError(f"{path}: {name}: write `data:`, `prompt:` … below it")
        try:
            task = Task.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, [name, *first["loc"]]))
            raise UserError(f"{path}: {place}: {first['msg']}") from error
        _check_prompt(f"{path}: {name}", task.prompt)
        metric_of(task.metric)
        tasks[str(name)] = task
    names = [source.name for source in parse_sources(sources_of(tasks))]
    for name, name_read in zip(tasks, names, strict=True):
        if name != name_read:
            raise UserError(f"{path}: {name!r}: a name has letters, digits, `_`, `.` and `-` only")
    _check_single_task_scores(path, tasks)
    return tasks


def _check_keys(path: Path, text: str) -> None:
    """`UserError` for a task's name, or a key of a task, that stands there twice: YAML would take
    the last one in silence.
    """
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(document, yaml.MappingNode)  # as which it was read
    tasks = [task for _name, task in document.value]
    for mapping in [document, *tasks]:
        if not isinstance(mapping, yaml.MappingNode):
            continue
        seen = set()
        for key, _value in mapping.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise UserError(f"{path}, line {line}: {key.value!r} stands there already")
            seen.add(key.value)


def _check_prompt(where: str, prompt: str) -> None:
    """`UserError` for a prompt that is no template, or without a column in it."""
    try:
        fields = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise UserError(f"{where}.prompt: {error}; write a brace of the text twice") from error
    columns = _columns_of(prompt)
    if not any(columns):
        raise UserError(f"{where}.prompt: it names no column, as in 'Classify: {{text}}'")
    if not all(columns):
        raise UserError(f"{where}.prompt: {{}} names no column; write a brace of the text twice")
    for column in columns:
        if "." in column or "[" in column:
            raise UserError(
                f"{where}.prompt: {{{column}}} means a part of a column, which is not looked up; "
                "give the column a name without dots and brackets"
            )
    for _text, name, form, conversion in fields:
        if form or conversion:
            raise UserError(
                f"{where}.prompt: {{{name}}} has a format after `:` or `!`, and texts stand as "
                f"they are: write {{{name}}}"
            )


def _columns_of(prompt: str) -> list[str]:
    return [column for _, column, _, _ in string.Formatter().parse(prompt) if column is not None]


def _check_single_task_scores(path: Path, tasks: Mapping[str, Task]) -> None:
    without = [name for name, task in tasks.items() if task.single_task_score is None]
    if without and len(without) < len(tasks):
        raise UserError(
            f"{path}: {', '.join(without)} has no single_task_score, and others have: the overall "
            "performance needs that of every task"
        )


def sources_of(tasks: Mapping[str, Task]) -> list[str]:
    """The data of the tasks, as `--data` has them."""
    return [f"{name}={task.data}" for name, task in tasks.items()]


def eval_sources_of(tasks: Mapping[str, Task]) -> list[str]:
    """The data that tasks are measured on, of those that state any, as `--eval-data` has them."""
    return [f"{name}={task.eval_data}" for name, task in tasks.items() if task.eval_data]


def with_prompts(rows: Dataset, source: Source, task: Task) -> Dataset:
    """The rows of a task with the columns `input` and `target`.

    `UserError` for missing columns, and for a row with null in one of them.
    """
    columns = _columns_of(task.prompt)
    for column in [*columns, task.target]:
        if column not in rows.column_names:
            raise UserError(
                f"{source} (task {source.name!r}) has no column {column!r}; there are "
                f"{', '.join(rows.column_names)}"
            )

    def pair(row: dict[str, Any]) -> dict[str, str]:
        for column in [*columns, task.target]:
            if row[column] is None:
                raise UserError(
                    f"{source} (task {source.name!r}) has a row with null in the column "
                    f"{column!r}: take it out"
                )
        values = {column: row[column] for column in columns}
        return {"input": task.prompt.format_map(values), "target": str(row[task.target])}

    return rows.map(pair, remove_columns=rows.column_names, desc=f"prompts of {source.name}")
