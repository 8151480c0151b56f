"""`compare`: every fusion of a set of adapters on the same texts (Trade-offs, figure 2)."""

import copy
import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
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
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.sharding import check_launch
from _mergekit_moe_ext_common.staging import check_output, staged
from peft_routing.adapter_files import read_config, weights_file
from peft_routing.expert import check_experts, read_expert
from peft_routing.fusion import report
from peft_routing.fusion.cache import (
    Cache,
    Measured,
    Subject,
    Texts,
    fill,
    milliseconds_per_token,
    processes,
)
from peft_routing.fusion.merges import MERGES, error_of, merge_name, write_merge
from peft_routing.fusion.report import Comparison, Row, Selected
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
    CACHED,
    PLAIN,
    ROUTED,
    STRATEGIES,
    Outcome,
    Tables,
    composed_of,
)
from peft_routing.fusion.subjects import any_adapter, base_alone, composed, fused, one_expert
from peft_routing.fusion.tables import Table, joined
from peft_routing.fusion.tasks import SPLITS, read_tasks
from peft_routing.fusion.worst_case import PROGRAM_NEEDS_SCIPY, check_scipy
from peft_routing.loading import CLASSES, empty_model

LOG = logging.getLogger(__name__)
_NEEDS_SCIPY = "program_ensemble"


@dataclass(frozen=True)
class _Candidate:
    """An adapter that is put on the base model and measured: its kind, its size in bytes, and what
    is to be said of it.
    """

    subject: Subject
    kind: str
    size: int
    note: str = ""


def compare(
    base: str,
    experts: Mapping[str, str],
    tasks: Mapping[str, str],
    output: str,
    reading: Reading,
    *,
    fusions: Mapping[str, str],
    strategies: Collection[str],
    cache: str | None,
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
    out = check_output(output)
    directory = Path(cache).expanduser().resolve() if cache else out.with_name(f"{out.name}.cache")
    if directory.is_relative_to(out):
        raise UserError(f"the cache {cache} lies in the output {output}; name another directory")
    left_out: dict[str, str] = {}
    wanted = _check_strategies(strategies, left_out)
    base_config = load_config(base, reading)
    empty = empty_model(base_config, reading)
    _check_experts(experts, empty)
    candidates = _candidates(experts, fusions, wanted, empty, left_out)
    headers = check_model(base, base_config, reading)
    tokenizer = load_tokenizer(base, reading)
    state = processes()
    with state.main_process_first():
        texts = read_tasks(
            tasks,
            tokenizer,
            base_config,
            reading,
            completions_only=completions_only,
            max_samples=max_samples,
            seed=seed,
        )
    store = Cache(directory, model_fingerprint(base))
    with state.main_process_first():
        for name in [each for each in wanted if each in MERGES]:
            try:
                candidates[name] = _merge(name, experts, empty, base, directory, state.device, seed)
            except UserError as error:
                left_out[name] = error.message

    columns = [one_expert(name, path) for name, path in experts.items()] + [base_alone()]
    everything = [each for split in SPLITS for each in texts[split]]
    not_train = texts["validation"] + texts["test"]
    fill(
        store,
        [
            *[(subject, everything) for subject in columns],
            *[(candidate.subject, not_train) for candidate in candidates.values()],
        ],
        lambda: load_model(base, base_config, reading, headers=headers, dtype="auto"),
        padding_token(tokenizer, vocabulary_of(base_config)),
        batch_size=batch_size,
        quiet=reading.quiet,
    )
    names = list(experts)
    tables = Tables(
        train=_table(store, names, columns, texts["train"]),
        validation=_table(store, names, columns, texts["validation"]),
        test=_table(store, names, columns, texts["test"]),
    )
    sizes = [_size(path, name) for name, path in experts.items()]
    rows = _rows_of_tables(tables, wanted, _costs(store, columns, texts["test"]), sizes, left_out)
    rows += _rows_of_candidates(candidates, store, texts, tables)
    contenders = [row for row in rows if row.kind != BY_TASK]
    comparison = Comparison(
        base=base,
        experts=dict(experts),
        rows=rows,
        best=min(contenders, key=lambda row: row.validation_loss).name,
        sentences=report.budget_sentences(rows),
        left_out=left_out,
        selected=_selected(tables),
        not_first=not_first(tables.validation, tables.test, own_experts(tables.test)),
        tables=tables,
    )
    is_main = state.is_main_process
    state.destroy_process_group()  # what is left to do, only the main process does
    if is_main:
        _write(comparison, out)
    return comparison


def _check_strategies(strategies: Collection[str], left_out: dict[str, str]) -> list[str]:
    """The strategies in the order of the table: those that are named and the base, or all.

    What needs scipy goes into `left_out` where that is lacking. `UserError` where it is named,
    and for a name that is no strategy.
    """
    for name in strategies:
        if name not in STRATEGIES:
            raise UserError(f"there is no strategy {name!r}; there are {', '.join(STRATEGIES)}")
    wanted = [name for name in STRATEGIES if not strategies or name in (*strategies, "base")]
    if _NEEDS_SCIPY in wanted:
        try:
            check_scipy(PROGRAM_NEEDS_SCIPY)
        except UserError as error:
            if strategies:
                raise
            wanted.remove(_NEEDS_SCIPY)
            left_out[_NEEDS_SCIPY] = error.message
    return wanted


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
                    f"{where} is for classifying ({task_type}), and texts are compared by the "
                    "probabilities of their tokens"
                )
            check_experts([read_expert(name, path, empty)], empty)
        except FileNotFoundError as error:
            raise UserError(str(error)) from error


def _candidates(
    experts: Mapping[str, str],
    fusions: Mapping[str, str],
    wanted: Collection[str],
    empty: nn.Module,
    left_out: dict[str, str],
) -> dict[str, _Candidate]:
    """What is put on the base model and measured, by the name of its row.

    Why a strategy cannot be composed of these experts goes into `left_out`. `UserError` for a
    fusion of the user's that cannot be read or has a strategy's name.
    """
    sizes = [_size(path, name) for name, path in experts.items()]
    candidates = {}
    composable = composed_of(len(experts))
    for name in wanted:
        if name in CACHED or name in MERGES:
            continue
        if name not in composable:
            left_out[name] = f"of {len(experts)} adapters it takes all, as arrow_all does"
            continue
        kind, options = composable[name]
        try:
            get_peft_model(empty, composed(experts, **options)).unload()
        except ValueError as error:  # a UserError is one
            left_out[name] = str(error)
            continue
        # Low-rank mixing of experts of one rank is an adapter of that rank.
        size = max(sizes) if options.get("mixing") == "low_rank" else sum(sizes)
        candidates[name] = _Candidate(fused(name, experts, options), kind, size)
    for name, path in fusions.items():
        if name in STRATEGIES:
            raise UserError(f"--fusion {name}={path}: a strategy has that name; give another")
        subject = any_adapter(name, path)
        with warnings.catch_warnings():
            # torch warns that nothing is copied into a model without memory.
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
            subject.put_on(copy.deepcopy(empty))  # says now what does not fit
        kind = PLAIN if read_config(path, name).get("peft_type") == "LORA" else ROUTED
        candidates[name] = _Candidate(subject, kind, _size(path, name))
    return candidates


def _merge(
    strategy: str,
    experts: Mapping[str, str],
    empty: nn.Module,
    base: str,
    directory: Path,
    device: torch.device,
    seed: int,
) -> _Candidate:
    """The merge of all adapters as one LoRA, which is made in the cache where it is not there yet.

    `UserError` where they cannot be merged.
    """
    merged = directory / merge_name(strategy, base, experts, seed)
    if not merged.exists():
        write_merge(strategy, experts, empty, base, merged, device=device, seed=seed)
    return _Candidate(
        one_expert(strategy, str(merged)),
        PLAIN,
        _size(str(merged), strategy),
        f"the limited rank loses {error_of(merged):.0%} of the merged update's norm",
    )


def _size(path: str, name: str) -> int:
    return weights_file(path, f"expert {name!r} ({path})").stat().st_size


def _table(
    cache: Cache, experts: Sequence[str], columns: Sequence[Subject], texts: Sequence[Texts]
) -> Table:
    """The table of one split, from the cache."""
    values = []
    for each in texts:
        values.append([cache.read(subject, each).log_probabilities for subject in columns])
    return joined(experts, [each.task for each in texts], values, [each.counts for each in texts])


def _costs(cache: Cache, columns: Sequence[Subject], texts: Sequence[Texts]) -> list[float]:
    """The milliseconds per token of each column's passes."""
    return [
        milliseconds_per_token([cache.read(subject, each) for each in texts]) for subject in columns
    ]


def _rows_of_tables(
    tables: Tables,
    wanted: Collection[str],
    costs: Sequence[float],
    sizes: Sequence[int],
    left_out: dict[str, str],
) -> list[Row]:
    """The rows of the strategies that take no passes but the experts' own."""
    rows = []
    for name, strategy in CACHED.items():
        if name not in wanted:
            continue
        outcome = strategy(tables)
        if isinstance(outcome, str):
            left_out[name] = outcome
            continue
        used = {column for of_task in outcome.used for column in of_task}
        size = sum(sizes[column] for column in used if column < len(sizes))
        count = len(outcome.used)
        passes = sum(len(of_task) for of_task in outcome.used) / count
        cost = sum(costs[column] for of_task in outcome.used for column in of_task) / count
        rows.append(_row(name, outcome, tables, passes, cost, size))
    return rows


def _rows_of_candidates(
    candidates: Mapping[str, _Candidate],
    cache: Cache,
    texts: Mapping[str, Sequence[Texts]],
    tables: Tables,
) -> list[Row]:
    """The rows of what was put on the base model and measured."""
    rows = []
    for name, candidate in candidates.items():
        measured: dict[str, list[Measured]] = {}
        for split in ("validation", "test"):
            measured[split] = [cache.read(candidate.subject, each) for each in texts[split]]
        outcome = Outcome(
            candidate.kind,
            torch.cat([each.log_probabilities for each in measured["validation"]]),
            torch.cat([each.log_probabilities for each in measured["test"]]),
            used=[],
            note=candidate.note,
        )
        cost = milliseconds_per_token(measured["test"])
        rows.append(_row(name, outcome, tables, 1, cost, candidate.size))
    return rows


def _row(name: str, outcome: Outcome, tables: Tables, passes: float, cost: float, size: int) -> Row:
    return Row(
        name,
        outcome.kind,
        tables.validation.task_losses(outcome.validation).tolist(),
        tables.test.task_losses(outcome.test).tolist(),
        passes,
        cost,
        size / 1e6,
        outcome.parameters,
        outcome.note,
        outcome.values,
    )


def _selected(tables: Tables) -> Selected:
    """The greedy selection on validation, and its curves."""
    losses = tables.validation.losses
    selection = greedy(losses)
    own = own_experts(tables.validation)
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


def _write(comparison: Comparison, out: Path) -> None:
    with staged(out) as directory:
        comparison.write(directory)
        try:
            report.draw(comparison, directory)
        except UserError as error:  # there is no matplotlib
            LOG.warning("no figures are drawn: %s", error.message)
