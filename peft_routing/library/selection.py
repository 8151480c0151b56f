"""Few adapters of a library for given tasks, by greedy selection (Trade-offs 5.1, B.6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from _mergekit_moe_ext_common.checkpoints import model_fingerprint
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
from peft_routing.fusion.cache import Cache, fill
from peft_routing.fusion.rows import table_of
from peft_routing.fusion.selection import curve_on, greedy
from peft_routing.fusion.subjects import base_alone, one_expert
from peft_routing.fusion.tables import Table
from peft_routing.fusion.tasks import read_tasks
from peft_routing.library.catalogue import Library, locked


@dataclass(frozen=True)
class Chosen:
    """Adapters in the order in which they were selected, and the losses with the first of them.

    validation, test: the mean loss over tasks with the first 0, 1, 2 … adapters, in nats per token.
    Which of them a task gets, or the base model, is chosen on validation.
    """

    names: list[str]
    validation: list[float]
    test: list[float]


def select(
    directory: str,
    tasks: Mapping[str, str],
    k: int,
    reading: Reading,
    *,
    only: Sequence[str] = (),
    completions_only: bool = False,
    max_samples: int | None = None,
    batch_size: int = 8,
    seed: int = 42,
) -> Chosen:
    """Selects k adapters of a library for tasks, and keeps each adapter's losses as its scores.

    Args:
        directory: the library's.
        tasks: by name, as `compare` takes them.
        k: the number of adapters; fewer are selected where there are fewer.
        only: the adapters to select from; all if there is none.

    What is measured lies in the library's cache and is not measured again. `UserError` for what
    cannot be read.
    """
    library = Library.open(directory)
    experts = library.experts(tuple(only))
    if not experts:
        raise UserError(f"{directory} has no adapter")
    config = load_config(library.base, reading)
    headers = check_model(library.base, config, reading)
    tokenizer = load_tokenizer(library.base, reading)
    texts = read_tasks(
        tasks,
        tokenizer,
        config,
        reading,
        completions_only=completions_only,
        max_samples=max_samples,
        seed=seed,
    )
    store = Cache(library.cache, model_fingerprint(library.base))
    subjects = [one_expert(name, path) for name, path in experts.items()] + [base_alone()]
    not_train = texts["validation"] + texts["test"]
    fill(
        store,
        [(subject, not_train) for subject in subjects],
        lambda: load_model(library.base, config, reading, headers=headers, dtype="auto"),
        padding_token(tokenizer, vocabulary_of(config)),
        batch_size=batch_size,
        quiet=reading.quiet,
    )

    tables: dict[str, Table] = {}
    for split in ("validation", "test"):
        tables[split] = table_of(store, list(experts), subjects, texts[split])
    losses = tables["validation"].losses
    selection = greedy(losses)
    order = selection.order[:k]
    _keep_scores(directory, list(experts), list(tasks), losses.tolist())
    return Chosen(
        [list(experts)[number] for number in order],
        selection.curve[: len(order) + 1],
        curve_on(order, losses, tables["test"].losses),
    )


def _keep_scores(
    directory: str, names: Sequence[str], tasks: Sequence[str], losses: Sequence[Sequence[float]]
) -> None:
    """Writes the losses of each adapter (tasks, adapters + 1) into the library."""
    with locked(directory):
        library = Library.open(directory)  # again: another command may have changed it
        for number, name in enumerate(names):
            if name not in library.entries:
                continue
            entry = library.entries[name]
            new = {task: losses[place][number] for place, task in enumerate(tasks)}
            library.entries[name] = replace(entry, scores={**entry.scores, **new})
        library.write()
