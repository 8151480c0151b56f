"""`compare`: every fusion of a set of adapters on the same texts (Trade-offs, figure 2)."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from _mergekit_moe_ext_common.checkpoints import model_fingerprint
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
    silence,
    vocabulary_of,
)
from _mergekit_moe_ext_common.metrics import metric_of
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.sharding import check_launch
from _mergekit_moe_ext_common.staging import check_output, staged
from peft_routing.adapter_files import read_config
from peft_routing.expert import check_experts, read_expert
from peft_routing.fusion import report
from peft_routing.fusion.answers import Questions, scored
from peft_routing.fusion.beside import (
    Other,
    beside,
    check_others,
    read_others,
    texts_by_task,
)
from peft_routing.fusion.cache import Cache, Subject, Texts, fill, processes
from peft_routing.fusion.candidates import (
    TOP,
    Candidate,
    add_merges,
    candidates_of,
    size_of,
)
from peft_routing.fusion.harness import harness_tasks, with_harness
from peft_routing.fusion.recommended import write_recommended
from peft_routing.fusion.report import Calibration, Comparison, Row, Selected
from peft_routing.fusion.rows import costs_of, rows_of_candidates, rows_of_tables, table_of
from peft_routing.fusion.selection import (
    curve_on,
    greedy,
    least_that_reaches,
    not_first,
    own_experts,
    random_curves,
)
from peft_routing.fusion.strategies import (
    BY_TASK,
    NEEDS_CLUSTERS,
    OF_CLUSTERS,
    STRATEGIES,
    TRAINED,
    Tables,
)
from peft_routing.fusion.subjects import base_alone, one_expert
from peft_routing.fusion.tasks import read_tasks
from peft_routing.fusion.trained import Planned, Setting, Training, add_trained, planned_of
from peft_routing.fusion.worst_case import PROGRAM_NEEDS_SCIPY, check_scipy
from peft_routing.loading import CLASSES, empty_model

LOG = logging.getLogger(__name__)
_NEEDS_SCIPY = "program_ensemble"


@dataclass(frozen=True)
class _Asked:
    """What is to be compared, once it is known to be comparable.

    own: by task the expert that was trained on it, where it does not have the task's name.
    wanted: the strategies.
    left_out: why one cannot be compared, by its name.
    empty: the base model's architecture.
    planned: the routers that are to be trained.
    directory: that of the cache.
    clusters: the cluster of each expert; None without any.
    others: earlier reports to set beside this one.
    """

    base: str
    base_config: Any
    reading: Reading
    experts: Mapping[str, str]
    own: Mapping[str, str]
    fusions: Mapping[str, str]
    wanted: list[str]
    left_out: dict[str, str]
    empty: nn.Module
    candidates: dict[str, Candidate]
    planned: dict[str, Planned]
    out: Path
    directory: Path
    clusters: Mapping[str, int] | None
    others: Sequence[Other]


def compare(
    base: str,
    experts: Mapping[str, str],
    tasks: Mapping[str, str],
    output: str,
    reading: Reading,
    *,
    own: Mapping[str, str],
    fusions: Mapping[str, str],
    strategies: Collection[str],
    trained: bool,
    training: Training,
    cache: str | None,
    besides: Mapping[str, str],
    metric: str | None,
    lm_eval: Sequence[str],
    completions_only: bool,
    max_samples: int | None,
    batch_size: int,
    seed: int,
) -> Comparison:
    """Measures every fusion and writes the report to `output`, whole or not at all.

    What it measures is kept in `cache`, and is not measured again. `UserError` for what cannot be
    compared, before anything is measured.
    """
    check_launch(splits=False)
    silence(reading)
    wanted, left_out = _check_strategies(strategies, trained, training)
    asked = _checked(
        base, experts, own, output, reading, fusions, wanted, left_out, training, cache, besides
    )
    if metric is not None:
        _check_metric(metric, asked.base_config, completions_only)
    headers = check_model(base, asked.base_config, reading)
    tokenizer = load_tokenizer(base, reading)
    state = processes()
    with state.main_process_first():
        texts = read_tasks(
            tasks,
            tokenizer,
            asked.base_config,
            reading,
            completions_only=completions_only,
            max_samples=max_samples,
            seed=seed,
        )
        harness = harness_tasks(lm_eval, tokenizer, limit=max_samples, quiet=reading.quiet)
    questions = []
    if metric is not None:
        questions = _questions(texts["test"], tokenizer, asked)
    model = model_fingerprint(base)
    check_others(asked.others, model, texts_by_task(texts["test"]))
    store = Cache(asked.directory, model)
    setting = Setting(base, experts, asked.empty, tasks, texts, asked.directory, reading, training)
    _make_adapters(asked, setting, state, seed)
    pad_token_id = padding_token(tokenizer, vocabulary_of(asked.base_config))

    def load_base() -> Any:
        return load_model(base, asked.base_config, reading, headers=headers, dtype="auto")

    tables, rows = _by_loss(asked, store, texts, load_base, pad_token_id, batch_size)
    if metric is not None:
        rows = scored(
            rows,
            metric,
            questions,
            store,
            experts,
            asked.candidates,
            load_base,
            tokenizer,
            pad_token_id,
            batch_size=batch_size,
            quiet=reading.quiet,
        )
    rows = with_harness(
        rows,
        harness,
        store,
        experts,
        asked.candidates,
        load_base,
        tokenizer,
        batch_size=batch_size,
        quiet=reading.quiet,
    )
    comparison = _compared(asked, tables, rows, metric, texts_by_task(texts["test"]), model)
    is_main = state.is_main_process
    state.destroy_process_group()  # what is left to do, only the main process does
    if is_main:
        _write(comparison, asked)
    return comparison


def _checked(
    base: str,
    experts: Mapping[str, str],
    own: Mapping[str, str],
    output: str,
    reading: Reading,
    fusions: Mapping[str, str],
    wanted: list[str],
    left_out: dict[str, str],
    training: Training,
    cache: str | None,
    besides: Mapping[str, str],
) -> _Asked:
    """What is to be compared. `UserError` where something is wrong with it."""
    out = check_output(output)
    others = read_others(besides)
    directory = Path(cache).expanduser().resolve() if cache else out.with_name(f"{out.name}.cache")
    if directory.is_relative_to(out):
        raise UserError(f"the cache {cache} lies in the output {output}; name another directory")
    for name in ("config.json", "adapter_config.json"):
        if (directory / name).exists():
            # A reader of that checkpoint would take the files of the cache for its weights.
            raise UserError(f"the cache {cache} holds a {name}; name a directory of its own")
    base_config = load_config(base, reading)
    empty = empty_model(base_config, reading)
    _check_experts(experts, empty)
    candidates = candidates_of(experts, fusions, wanted, empty, left_out)
    planned = planned_of(wanted, experts, empty, training, left_out)
    return _Asked(
        base=base,
        base_config=base_config,
        reading=reading,
        experts=experts,
        own=own,
        fusions=fusions,
        wanted=wanted,
        left_out=left_out,
        empty=empty,
        candidates=candidates,
        planned=planned,
        out=out,
        directory=directory,
        clusters=training.clusters,
        others=others,
    )


def _check_metric(metric: str, base_config: Any, completions_only: bool) -> None:
    """`UserError` for a metric that there is not, and for texts without prompts and answers."""
    metric_of(metric)
    if not (completions_only or base_config.is_encoder_decoder):
        raise UserError(
            "--metric measures answers, and whole texts have none: give --completions-only, and "
            "tasks with inputs and targets, or chats"
        )


def _questions(texts: Sequence[Texts], tokenizer: Any, asked: _Asked) -> list[Questions]:
    """The prompts and right answers of each task."""
    questions = []
    for each in texts:
        questions.append(
            Questions.of(
                each,
                tokenizer,
                is_encoder_decoder=asked.base_config.is_encoder_decoder,
                max_length=asked.reading.max_length,
            )
        )
    return questions


def _make_adapters(asked: _Asked, setting: Setting, state: PartialState, seed: int) -> None:
    """Adds the merges and the trained routers to the candidates, made where they are not in the
    cache's directory yet.
    """
    with state.main_process_first():
        add_merges(
            asked.candidates,
            asked.wanted,
            asked.experts,
            asked.empty,
            asked.base,
            asked.directory,
            state.device,
            seed,
            asked.left_out,
        )
    add_trained(asked.candidates, asked.planned, setting, state)


def _by_loss(
    asked: _Asked,
    store: Cache,
    texts: Mapping[str, Sequence[Texts]],
    load_base: Callable[[], Any],
    pad_token_id: int,
    batch_size: int,
) -> tuple[Tables, list[Row]]:
    """The tables of log-probabilities and the rows of all fusions, by what lies in the cache after
    the rest was measured.
    """
    columns = [one_expert(name, path) for name, path in asked.experts.items()] + [base_alone()]
    not_train = [*texts["validation"], *texts["test"]]
    everything = [*texts["train"], *not_train]
    work: list[tuple[Subject, Sequence[Texts]]] = [(subject, everything) for subject in columns]
    work += [(candidate.subject, not_train) for candidate in asked.candidates.values()]
    fill(store, work, load_base, pad_token_id, batch_size=batch_size, quiet=asked.reading.quiet)
    names = list(asked.experts)
    tables = Tables(
        train=table_of(store, names, columns, texts["train"]),
        validation=table_of(store, names, columns, texts["validation"]),
        test=table_of(store, names, columns, texts["test"]),
        own=asked.own,
        clusters=asked.clusters,
    )
    sizes = [size_of(path, name) for name, path in asked.experts.items()]
    costs = costs_of(store, columns, texts["test"])
    rows = rows_of_tables(tables, asked.wanted, costs, sizes, asked.left_out)
    rows += rows_of_candidates(asked.candidates, store, texts, tables)
    return tables, rows


def _compared(
    asked: _Asked,
    tables: Tables,
    rows: list[Row],
    metric: str | None,
    texts: dict[str, str],
    model: str,
) -> Comparison:
    """The comparison of the rows. `texts` has the sha256 of each task's test."""
    contenders = [row for row in rows if row.kind != BY_TASK]
    losses = {row.name: row.test for row in rows}
    return Comparison(
        base=asked.base,
        model=model,
        texts=texts,
        experts=dict(asked.experts),
        rows=rows,
        best=min(contenders, key=lambda row: row.validation_loss).name,
        sentences=report.budget_sentences(rows, metric),
        left_out=asked.left_out,
        selected=_selected(tables),
        not_first=not_first(tables.validation, tables.test, own_experts(tables.test, asked.own)),
        calibration=_calibration(rows, [*asked.planned, *asked.fusions]),
        tables=tables,
        beside=beside(losses, tables.test.tasks, asked.others),
        metric=metric,
    )


def _check_strategies(
    strategies: Collection[str], trained: bool, training: Training
) -> tuple[list[str], dict[str, str]]:
    """The strategies in the order of the table, and why one of them cannot be compared.

    They are those that are named and the base, or all that need no training; with `trained`
    those that do as well. What needs scipy or clusters is left out where these are lacking.
    `UserError` where it is named, for a name that is no strategy, and for clusters of no use.
    """
    for name in strategies:
        if name not in STRATEGIES:
            raise UserError(f"there is no strategy {name!r}; there are {', '.join(STRATEGIES)}")
    for name in OF_CLUSTERS:
        if name in strategies and training.clusters is None:
            raise UserError(f"the strategy {name}: {NEEDS_CLUSTERS}")
    wanted = _wanted(strategies, trained, has_clusters=training.clusters is not None)
    if training.clusters is not None and not set(OF_CLUSTERS) & set(wanted):
        raise UserError(
            f"--clusters-from is for --strategy with one of {', '.join(OF_CLUSTERS)}, and for "
            "--trained"
        )
    if not training.is_usual and not any(name in wanted for name in TRAINED):
        raise UserError(
            "--learning-rate, --num-train-epochs and --max-steps are for routers that are trained: "
            f"give --trained, or --strategy with one of {', '.join(TRAINED)}"
        )
    left_out: dict[str, str] = {}
    if _NEEDS_SCIPY in wanted:
        try:
            check_scipy(PROGRAM_NEEDS_SCIPY)
        except UserError as error:
            if strategies:
                raise
            wanted.remove(_NEEDS_SCIPY)
            left_out[_NEEDS_SCIPY] = error.message
    return wanted, left_out


def _wanted(strategies: Collection[str], trained: bool, *, has_clusters: bool) -> list[str]:
    """The strategies to compare, in the order of the table."""
    chosen = {"base", *strategies}
    if not strategies:
        for name in STRATEGIES:
            lacks_clusters = name in OF_CLUSTERS and not has_clusters
            if name not in TRAINED and not lacks_clusters:
                chosen.add(name)
    if trained:
        chosen.update(TRAINED)
    return [name for name in STRATEGIES if name in chosen]


def _check_experts(experts: Mapping[str, str], empty: nn.Module) -> None:
    """`UserError` where an adapter cannot be read, is not of a language model, or does not fit.

    One adapter at a time is in memory.
    """
    if len(experts) < 2:
        raise UserError("name at least two adapters to compare: --expert or --experts-from")
    for name, path in experts.items():
        where = f"expert {name!r} ({path})"
        try:
            task_type = read_config(path, where).get("task_type")
            if task_type in CLASSES:
                raise UserError(
                    f"{where} is for classifying or features ({task_type}), and texts are compared "
                    "by the probabilities of their tokens"
                )
            check_experts([read_expert(name, path, empty)], empty)
        except FileNotFoundError as error:
            raise UserError(str(error)) from error


def _selected(tables: Tables) -> Selected:
    """The greedy selection on validation, and its curves."""
    losses = tables.validation.losses
    selection = greedy(losses)
    own = own_experts(tables.validation, tables.own)
    reaches = None
    if None not in own:
        of_own = losses.gather(1, torch.tensor(own)[:, None]).mean().item()
        reaches = least_that_reaches(selection.curve, of_own)
    return Selected(
        [tables.test.experts[index] for index in selection.order],
        selection.curve,
        curve_on(selection.order, losses, tables.test.losses),
        random_curves(losses).mean(dim=0).tolist(),
        selection.elbow,
        reaches,
    )


def _calibration(rows: Sequence[Row], adapters: Collection[str]) -> list[Calibration]:
    """The gap of each router between one expert and more, where both were measured (B.4)."""
    by_name = {row.name: row for row in rows}
    pairs = [["arrow_top1", "arrow_top4" if "arrow_top4" in by_name else "arrow_all"]]
    for adapter in adapters:
        pairs.append([name for name in by_name if name.startswith(f"{adapter}{TOP}")])
    gaps = []
    for pair in pairs:
        if len(pair) == 2 and all(name in by_name for name in pair):
            one, many = pair
            gap, error = by_name[one].difference(by_name[many])
            gaps.append(Calibration(one, many, gap, error))
    return gaps


def _write(comparison: Comparison, asked: _Asked) -> None:
    row = comparison.row(comparison.best)
    candidate = asked.candidates.get(row.name)
    directory = candidate.directory if candidate is not None else ""
    with staged(asked.out) as out:
        comparison.write(out)
        write_recommended(row, asked.experts, directory, asked.empty, out / "recommended")
        try:
            report.draw(comparison, out)
        except UserError as error:  # there is no matplotlib
            LOG.warning("no figures are drawn: %s", error.message)
