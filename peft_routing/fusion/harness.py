"""What tasks of lm_eval say of fusions, beside the loss: `compare --lm-eval`.

lm_eval asks and scores as its own command does; only the model is handed to it. What it says of a
subject is kept in the cache, and is not measured again.
"""

import contextlib
import copy
import difflib
import hashlib
import importlib
import inspect
import io
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _mergekit_moe_ext_common.checkpoints import damage
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import new_file
from peft_routing.fusion.cache import Cache, Subject, for_each
from peft_routing.fusion.candidates import Candidate
from peft_routing.fusion.generation import Ensemble
from peft_routing.fusion.report import HarnessScore, Row
from peft_routing.fusion.rows import subject_of
from peft_routing.fusion.strategies import BY_TASK

_NEEDS = "--lm-eval needs lm_eval: pip install 'mergekit-moe-ext[lm-eval]'"
_FEWSHOT_SEED = 1234  # that of lm_eval's own command
# Samples behind a standard error that has no formula, which is then known to about 2 percent.
# lm_eval's own 100 000 would take longer than many a task, for each fusion.
_BOOTSTRAP = 1000


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm_eval, or a group of its tasks that has a metric of its own.

    loaded: what lm_eval made of it.
    rows: what a model is asked.
    limit: the number of documents of each task that are asked, from the first; all if None.
    fingerprint: the sha256 of what is asked, as token ids, and of how answers are scored.
    """

    name: str
    loaded: Any
    rows: list[Any]
    limit: int | None
    fingerprint: str


def harness_tasks(
    specs: Sequence[str], tokenizer: Any, *, limit: int | None, quiet: bool
) -> list[HarnessTask]:
    """The tasks of these names or YAML files, ready to be asked.

    `UserError` where lm_eval is not installed, where it cannot read a task, and for what has no
    metric of its own, runs code that a model writes, or needs images.
    """
    if not specs:
        return []
    try:
        manager_type = importlib.import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        raise UserError(_NEEDS) from error
    # Reading the index of all tasks that come with lm_eval takes long.
    are_files = all(Path(spec).is_file() for spec in specs)
    manager = manager_type(include_defaults=not are_files)
    if not hasattr(manager, "load"):
        raise UserError(f"the lm_eval that is installed is too old. {_NEEDS}")
    tasks: dict[str, HarnessTask] = {}
    for spec in specs:
        with _hushed(quiet):
            task = _task(spec, manager, tokenizer, limit)
        if task.name in tasks:
            raise UserError(f"--lm-eval {spec}: there are two tasks called {task.name!r}")
        tasks[task.name] = task
    return list(tasks.values())


def _task(spec: str, manager: Any, tokenizer: Any, limit: int | None) -> HarnessTask:
    where = f"--lm-eval {spec}"
    if spec not in manager.all_tasks and not Path(spec).is_file():
        near = difflib.get_close_matches(spec, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists those there are"
        raise UserError(f"{where}: there is no such task of lm_eval, and no such file; {hint}")
    if Path(spec).is_file() and re.search("^group:", Path(spec).read_text("utf-8"), re.MULTILINE):
        raise UserError(f"{where}: a file of a group; name its tasks one by one")
    try:
        loaded = manager.load([spec])
        for task in loaded["tasks"].values():
            _check_runnable(where, task)
            # As lm_eval's own command has it.
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
    except UserError:
        raise
    except Exception as error:  # whatever a task's own code, its data set or the Hub raises
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    name = _name_of(where, loaded)
    requests = []
    for task in loaded["tasks"].values():
        requests += task.instances
    return HarnessTask(name, loaded, requests, limit, _fingerprint(loaded, tokenizer))


def _check_runnable(where: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"{where}: the task runs code that a model writes. Run lm_eval itself on what is "
            "recommended, where that can do no harm"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{where}: the task has images, and models of texts are compared")


def _name_of(where: str, loaded: Mapping[str, Any]) -> str:
    """The name that results have: of the one task, or of a group that has a metric of its own."""
    tasks = list(loaded["tasks"])
    groups = list(loaded["groups"].values())
    if not groups and len(tasks) == 1:
        return str(tasks[0])
    if groups and groups[0].aggregate_metric_list:
        return str(groups[0].name)
    raise UserError(
        f"{where}: it is several tasks without a metric of their own; name them: {', '.join(tasks)}"
    )


def _fingerprint(loaded: Mapping[str, Any], tokenizer: Any) -> str:
    version = importlib.import_module("lm_eval").__version__
    parts: list[Any] = [version]
    for name, task in loaded["tasks"].items():
        config = dict(task.dump_config())
        config.pop("metadata", None)  # which has the path of the file
        parts.append([name, config])
        for request in task.instances:
            texts = [part for part in request.args if isinstance(part, str)]
            ids = [tokenizer(text)["input_ids"] for text in texts]
            parts.append([request.request_type, request.doc, request.args, ids])
    for group in loaded["groups"].values():
        parts.append([group.name, group.aggregate_metric_list])
    text = json.dumps(parts, sort_keys=True, default=_in_words)
    return hashlib.sha256(text.encode()).hexdigest()


def _in_words(value: Any) -> str:
    """What stands for a value that is no JSON: of a function its source, since its address is
    another one in each process.
    """
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"


def with_harness(
    rows: Sequence[Row],
    tasks: Sequence[HarnessTask],
    cache: Cache,
    experts: Mapping[str, str],
    candidates: Mapping[str, Candidate],
    load_base: Callable[[], Any],
    tokenizer: Any,
    *,
    batch_size: int,
    quiet: bool,
) -> list[Row]:
    """The rows with what lm_eval measures of each, but of those that go by our task.

    What is not in the cache is measured, on as many processes as accelerate has started.
    `UserError` where lm_eval gives no number.
    """
    if not tasks:
        return list(rows)
    subjects: dict[str, Subject] = {}
    for row in rows:
        if row.kind != BY_TASK:
            subjects[row.name] = subject_of(row, experts, candidates)
    lacking: dict[str, tuple[Subject, dict[str, HarnessTask]]] = {}
    for subject in subjects.values():  # of which several may be alike
        for task in tasks:
            if not _file(cache, subject, task).exists():
                _, of_subject = lacking.setdefault(subject.fingerprint, (subject, {}))
                of_subject[task.name] = task
    work = [(subject, list(of_subject.values())) for subject, of_subject in lacking.values()]

    def ask_and_keep(running: Any, subject: Subject, task: HarnessTask, bar: Any) -> None:
        with _hushed(quiet):
            results = _asked(running, task, tokenizer, batch_size)
        bar.update(len(task.rows))
        with new_file(_file(cache, subject, task)) as partial:
            partial.write_text(json.dumps(results))

    for_each(work, ask_and_keep, load_base, quiet=quiet)
    with_scores = []
    for row in rows:
        scores = {}
        if row.name in subjects:
            for task in tasks:
                scores[task.name] = _read(_file(cache, subjects[row.name], task), task.name)
        with_scores.append(replace(row, lm_eval=scores))
    return with_scores


def _asked(running: Any, task: HarnessTask, tokenizer: Any, batch_size: int) -> dict[str, Any]:
    """What lm_eval measures of a model or an ensemble, by the names of its metrics, and which of
    these are the better the higher they are.
    """
    evaluate = importlib.import_module("lm_eval").evaluate
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    is_ensemble = isinstance(running, Ensemble)
    model = running.model if is_ensemble else running
    # Each evaluation draws the examples of a prompt anew: the same ones for all that is compared.
    for asked_task in task.loaded["tasks"].values():
        asked_task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    with running.installed() if is_ensemble else contextlib.nullcontext():
        with _without_advice():
            # It gives the tokenizer a padding token.
            asked = wrapper(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
            )
        found = evaluate(
            asked,
            task.loaded,
            limit=task.limit,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP,
        )
    numbers = {}
    for name, value in found["results"][task.name].items():
        # A metric has its filter behind a comma; what has none is a count or a name.
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if "," in name and is_number:
            numbers[name] = float(value)
    return {"metrics": numbers, "higher_is_better": found["higher_is_better"].get(task.name, {})}


def _file(cache: Cache, subject: Subject, task: HarnessTask) -> Path:
    """The file of what lm_eval said of a subject."""
    return cache.named(subject, ["lm_eval", task.fingerprint], "lm_eval.json")


def _read(file: Path, task: str) -> HarnessScore:
    """The first metric of what lm_eval said, and all of them. `UserError` for a damaged file, and
    where there is no number.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        metrics = content["metrics"]
        higher_is_better = content["higher_is_better"]
    except (KeyError, OSError, TypeError, ValueError) as error:
        remedy = "remove it, and it is measured again"
        raise UserError(f"{damage(file, error)}; {remedy}") from error
    names = [name for name in metrics if "_stderr," not in name]
    if not names:
        raise UserError(f"lm_eval gives no number for the task {task}")
    metric, _, filtered = names[0].partition(",")
    return HarnessScore(
        metric=metric if filtered == "none" else names[0],
        value=metrics[names[0]],
        standard_error=metrics.get(f"{metric}_stderr,{filtered}"),
        higher_is_better=higher_is_better.get(metric),
        metrics=metrics,
    )


@contextlib.contextmanager
def _hushed(quiet: bool) -> Iterator[None]:
    """Has what lm_eval prints go to standard error and, where `quiet` is set, nowhere: its bars
    have no option.
    """
    target = io.StringIO() if quiet else sys.stderr
    with contextlib.redirect_stdout(target), contextlib.redirect_stderr(target):
        yield


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keeps back what lm_eval says to everybody who hands it a model."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
