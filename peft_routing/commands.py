"""What the commands of `peft-route` do, as functions: a command parses, calls one of these, and
prints.

Hosts are imported inside the functions, so that importing this file costs nothing.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from peft_routing.recipes import LEARNING_RATES, Distilling, Recipe

if TYPE_CHECKING:
    from peft import PeftModel

    from _mergekit_moe_ext_common.runs import Losses
    from peft_routing.config import RoutedLoraConfig
    from peft_routing.fusion.report import Comparison
    from peft_routing.inspection import Inspection
    from peft_routing.training import Result


@dataclass(frozen=True)
class Exported:
    """What was written to `directory`: an adapter per name, or one for all.

    error: the relative error of the updates, where one adapter was written; 0 without a limit on
    its rank.
    """

    directory: Path
    names: tuple[str, ...]
    error: float | None = None


def compose(
    base: str,
    experts: Mapping[str, str] | Sequence[str],
    output: str,
    *,
    router: str = "arrow",
    general_experts: Mapping[str, str] | Sequence[str] = (),
    experts_from: str | None = None,
    library: str | None = None,
    only: Sequence[str] = (),
    clusters_from: str | None = None,
    seed: int = 42,
    trust_remote_code: bool = False,
    **routing: Any,
) -> "RoutedLoraConfig":
    """Put LoRA adapters and a router into one adapter for a base model, of which only the
    configuration is read (with `head="new"` its weights, too).

    Args:
        base: the model, a directory or a name on the Hub.
        experts: LoRA adapters by name, or a list of them, which is named by its directories.
        output: the directory of the routed adapter.
        router: where the coefficients come from.
        general_experts: adapters whose mean update is subtracted from each expert's (GenKnowSub).
        experts_from: a directory, of which every subdirectory that holds an adapter is one more
            expert, by its name and in the order of the names.
        library: a directory that `peft_routing.library.add` wrote, whose adapters are experts, too.
        only: the names of those that are taken of it; all if there is none.
        clusters_from: a file that `peft_routing.library.cluster_library` wrote: the cluster of each
            expert, for the router hierarchical.
        seed: for a router that starts at random.
        trust_remote_code: run code that comes with the base model (danger).
        routing: any other field of `RoutedLoraConfig`: `top_k`, `granularity`, `mixing`, `head` …

    Returns the configuration of the routed adapter: its experts, the modules that they lie at, its
    mixing.

    Raises `UserError` for what cannot be composed, and for an output that exists.

    >>> experts = {"math": "math-lora", "code": "code-lora"}
    >>> config = compose("base", experts, "routed", router="linear")
    >>> config.names
    ['math', 'code']
    """
    from peft import get_peft_model
    from transformers import set_seed

    from _mergekit_moe_ext_common.loading import load_config
    from _mergekit_moe_ext_common.staging import check_output
    from peft_routing.config import RoutedLoraConfig
    from peft_routing.loading import base_for_composing

    reading = Reading(trust_remote_code=trust_remote_code)
    check_output(output)
    experts = named_experts(experts, experts_from=experts_from, library=library, only=only)
    if clusters_from is not None:
        routing["clusters"] = _clusters(clusters_from, experts, routing.get("clusters"))
    try:
        config = RoutedLoraConfig(
            experts=experts, general_experts=general_experts, router=router, **routing
        )
        model = base_for_composing(base, load_config(base, reading), config, reading)
        set_seed(seed)
        head = config.head
        model = get_peft_model(model, config)
        if head is None and model.peft_config["default"].head == "new":
            raise UserError(
                "the experts are of a task whose head PEFT has trained and saved with the router, "
                "and none has one: say head='new' (--head new), so that the base model's is read"
            )
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    save(model, output)
    return model.peft_config["default"]


def named_experts(
    experts: Mapping[str, str] | Sequence[str],
    *,
    experts_from: str | None = None,
    library: str | None = None,
    only: Sequence[str] = (),
) -> dict[str, str]:
    """The directory of each adapter by its name: those of `experts`, of a directory and of a
    library, in this order.

    `UserError` where a name is in two of them, and for an adapter that is not in the library.
    """
    from peft_routing.adapter_files import adapters_in
    from peft_routing.config import experts_by_name

    if only and library is None:
        raise UserError("--only names adapters of a library: give --library")
    named = experts_by_name("experts", experts)
    if experts_from is not None:
        named = _joined(named, adapters_in(experts_from), f"a subdirectory of {experts_from}")
    if library is not None:
        from peft_routing.library import Library

        adapters = Library.open(library).experts(tuple(only))
        named = _joined(named, adapters, f"an adapter of the library {library}")
    return named


def _joined(experts: dict[str, str], more: dict[str, str], what: str) -> dict[str, str]:
    """The experts and more. `UserError` where a name is in both."""
    both = experts.keys() & more.keys()
    if both:
        raise UserError(f"an expert is named {min(both)!r}, and so is {what}: rename one")
    return {**experts, **more}


def _clusters(file: str, experts: Mapping[str, str], stated: Any) -> dict[str, int]:
    """The cluster of each expert by a file, which may have those of more adapters.

    `UserError` where it lacks one, and where clusters are stated besides.
    """
    from peft_routing.library.clusters import read_clusters

    if stated is not None:
        raise UserError("clusters are stated twice: by name (--cluster) and by --clusters-from")
    clusters = read_clusters(Path(file).expanduser())
    lacking = [name for name in experts if name not in clusters]
    if lacking:
        raise UserError(f"{file} has no cluster for the expert {lacking[0]!r}")
    return {name: clusters[name] for name in experts}


def save(model: "PeftModel", output: str, **options: Any) -> None:
    """Save a PEFT model's adapters whole or not at all.

    `model.save_pretrained` is PEFT's own and writes in place: stopped half-way, or on a full disk,
    it leaves part of an adapter. This runs it in a hidden directory beside `output`, which one
    rename then puts into place. `PeftModel.from_pretrained` reads both alike.

    Args:
        model: the PEFT model, with routed adapters or any other.
        output: a directory that does not exist yet, or is empty.
        options: what `save_pretrained` takes, `selected_adapters` for instance.

    Raises `UserError` for an output that exists or cannot be written.

    >>> from peft import PeftModel
    >>> from transformers import AutoModelForCausalLM
    >>> base = AutoModelForCausalLM.from_pretrained("base")
    >>> save(PeftModel.from_pretrained(base, "routed"), "routed-again")
    """
    from _mergekit_moe_ext_common.staging import check_output, staged

    with staged(check_output(output)) as directory:
        model.save_pretrained(str(directory), **options)


def import_mttl(files: Sequence[str], output: str) -> dict[str, float]:
    """Write the experts of a library of mttl as LoRA directories, which `experts_from` takes.

    mttl gives all experts of a library the scaling of the first by name; so do these.

    Args:
        files: NAME.ckpt, with NAME.meta beside each, or directories of these.
        output: the directory to write, with a subdirectory per expert.

    Returns each expert's own scaling by its name; the first one's holds for all.

    Raises `UserError` for what is no library of LoRAs, and for an output that exists.
    """
    from peft_routing.mttl import import_library

    return import_library(files, output)


def train(
    adapter: str,
    data: Sequence[str],
    *,
    output: str | None = None,
    recipe: Recipe | None = None,
    reading: Reading | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    base: str | None = None,
    weights: Mapping[str, float] | None = None,
    eval_data: Sequence[str] = (),
    resume: bool = False,
    device_map: Literal["auto"] | None = None,
) -> "list[Result]":
    """Train the router of a routed adapter on texts; its experts stay as they are.

    Args:
        adapter: the directory of the routed adapter. It is left as it is.
        data: `[NAME=]SOURCE[:SPLIT]`, each a file, a directory or a dataset on the Hub.
        output: the directory of the trained adapter; `<adapter>-trained` if None.
        recipe: how it is trained; its defaults if None.
        reading: how texts are read; `Reading()` if None.
        learning_rates: AdamW's; of several, the one with the lowest held-out loss is kept.
        base: the base model, where it is not the one that the adapter names.
        weights: a source's relative likelihood to be drawn, 1 for those not named; without any, all
            rows are read.
        eval_data: what is measured in place of the held-out rows of the source of that name.
        resume: go on after the last checkpoint of an interrupted training.
        device_map: `"auto"` has one process spread the base model over all GPUs and main memory;
            one device holds it if None.

    Returns what each learning rate gave, the best first: its `losses` are each source's before and
    after.

    Raises `UserError` for what cannot be trained or read, and for an output that exists.

    >>> recipe = Recipe(max_steps=1, held_out=4)
    >>> results = train(
    ...     "routed",
    ...     ["math=math.jsonl"],
    ...     recipe=recipe,
    ...     learning_rates=[1e-3],
    ...     reading=Reading(quiet=True),
    ... )
    >>> list(results[0].losses)
    ['math']
    """
    from peft_routing.training import train as run

    options: Any = recipe or Recipe()
    return run(
        adapter,
        output,
        data,
        reading or Reading(),
        options,
        learning_rates=tuple(dict.fromkeys(learning_rates)),
        base=base,
        weights=weights,
        eval_data=eval_data,
        resume=resume,
        device_map=device_map,
    )


def distil(
    adapter: str,
    data: Sequence[str],
    *,
    output: str | None = None,
    coefficients: Mapping[str, float] | None = None,
    beta: float = 0.0,
    rank: int = 16,
    learning_rate: float = 2e-4,
    recipe: Distilling | None = None,
    reading: Reading | None = None,
    base: str | None = None,
    weights: Mapping[str, float] | None = None,
    eval_data: Sequence[str] = (),
    resume: bool = False,
    on_the_fly: bool = False,
) -> "Losses":
    """Train one plain LoRA to predict what the ensemble of a routed adapter's experts does.

    The ensemble reads every text once; 512 bytes per token are kept of it in memory.

    Args:
        adapter: the directory of the routed adapter, whose router has no part in it.
        data: `[NAME=]SOURCE[:SPLIT]`, each a file, a directory or a dataset on the Hub.
        output: the directory of the LoRA; `<adapter>-distilled` if None.
        coefficients: of each expert, by name; uniform if None.
        beta: above 0 the coefficients follow each text, as of `ensemble`.
        rank: of the LoRA, on the modules that the experts are on.
        learning_rate: AdamW's.
        recipe: how it is trained; its defaults if None.
        reading: how texts are read; `Reading()` if None.
        base: the base model, where it is not the one that the adapter names.
        weights: as of `train`.
        eval_data: as of `train`.
        resume: as of `train`.
        on_the_fly: have the ensemble read the texts of each step in that step, and keep nothing:
            for many texts of few epochs. Then the base model is in memory twice.

    Returns each source's held-out divergence from the ensemble before and after, in nats per token;
    nothing in all but the main process.

    Raises `UserError` for what cannot be trained or read, and for an output that exists.

    >>> recipe = Distilling(max_steps=1, held_out=4)
    >>> losses = distil("routed", ["math=math.jsonl"], recipe=recipe, reading=Reading(quiet=True))
    >>> list(losses)
    ['math']
    """
    from peft_routing.fusion.distillation import distil as run

    return run(
        adapter,
        data,
        output or f"{adapter.rstrip('/')}-distilled",
        reading or Reading(),
        recipe or Distilling(),
        coefficients=coefficients,
        beta=beta,
        rank=rank,
        learning_rate=learning_rate,
        base=base,
        weights=weights,
        eval_data=eval_data,
        resume=resume,
        on_the_fly=on_the_fly,
    )


def inspect(
    adapter: str,
    data: Sequence[str],
    *,
    reading: Reading | None = None,
    base: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 8,
    html: str | Path | None = None,
) -> "Inspection":
    """Run texts through a routed adapter and say who is chosen where.

    Args:
        adapter: the directory of the routed adapter.
        data: `[TASK=]SOURCE[:SPLIT]`, each a file, a directory or a dataset on the Hub.
        reading: how texts are read; `Reading()` if None.
        base: the base model, where it is not the one that the adapter names.
        max_samples: the first so many rows of each source; all if None.
        batch_size: rows at a time.
        html: a page that shows the expert of each token, and needs no network.

    Returns the mean coefficient of each expert, per task and module.

    Raises `UserError` for what cannot be read.

    >>> inspection = inspect("routed", ["math=math.jsonl"], reading=Reading(quiet=True))
    >>> inspection.experts, list(inspection.tasks)
    (['math', 'code'], ['math'])
    """
    from _mergekit_moe_ext_common.token_page import check_new_page
    from peft_routing.inspection import inspect_adapter

    if html:
        check_new_page(Path(html))
    return inspect_adapter(
        adapter,
        data,
        reading or Reading(),
        base=base,
        max_samples=max_samples,
        batch_size=batch_size,
        html=Path(html) if html else None,
    )


def export(
    adapter: str,
    output: str,
    *,
    merged: bool = False,
    rank: int | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write the experts of a routed adapter back as LoRA directories, or their mixture as one
    adapter.

    PEFT reads those without this package. Of the base model only the configuration is read.

    Args:
        adapter: the directory of the routed adapter. It is left as it is.
        output: the directory to write: one adapter, or a directory of them.
        merged: write one adapter, where the router does not depend on the input.
        rank: with `merged`, the closest update of this rank; exact if None.
        base: the base model, where it is not the one that the adapter names.
        trust_remote_code: run code that comes with the base model (danger).

    Returns what was written where, and how exact it is.

    Raises `UserError` where the mixture depends on the input, and for an output that exists.

    >>> export("routed", "experts").names
    ('math', 'code')
    """
    from peft_routing.loading import base_of, load_adapter_config, load_on_empty

    if rank is not None and not merged:
        raise UserError("--rank needs --merged")
    reading = Reading(trust_remote_code=trust_remote_code)
    config = load_adapter_config(adapter)
    model = load_on_empty(adapter, config, *base_of(base, config, reading), reading)
    names = (*config.names, *config.general_experts)
    if not merged:
        model.export_experts(output)
        return Exported(Path(output), names)
    try:
        error = model.to_lora(output, rank=rank)
    except ValueError as complaint:
        raise UserError(str(complaint)) from complaint
    return Exported(Path(output), names, error)


def compare(
    base: str,
    experts: Mapping[str, str] | Sequence[str],
    tasks: Mapping[str, str],
    output: str,
    *,
    experts_from: str | None = None,
    library: str | None = None,
    only: Sequence[str] = (),
    own: Mapping[str, str] | None = None,
    fusions: Mapping[str, str] | None = None,
    strategies: Collection[str] = (),
    trained: bool = False,
    clusters_from: str | None = None,
    num_train_epochs: float = 5.0,
    max_steps: int = -1,
    learning_rates: Sequence[float] = LEARNING_RATES,
    cache: str | None = None,
    beside: Mapping[str, str] | None = None,
    metric: str | None = None,
    lm_eval: Sequence[str] = (),
    reading: Reading | None = None,
    completions_only: bool = False,
    max_samples: int | None = None,
    batch_size: int = 8,
    seed: int = 42,
) -> "Comparison":
    """Compare what can be done with LoRA adapters: serve one, merge, route over or ensemble them.

    Every adapter reads every text once; most of the rest is arithmetic. Coefficients are learned on
    train, choices are made on validation, and figures are of test.

    Args:
        base: the model, a directory or a name on the Hub.
        experts: LoRA adapters by name, or a list of them, which is named by its directories.
        tasks: by name `SOURCE[:SPLIT]`, whose rows are split, or three of these with commas between
            them: train, validation and test. An expert that has a task's name was trained on it.
        output: the directory of the report.
        experts_from: a directory, of which every subdirectory that holds an adapter is one more
            expert, by its name and in the order of the names.
        library: a directory that `peft_routing.library.add` wrote, whose adapters are compared,
            too. It says which task an adapter was trained on.
        only: the names of those that are taken of it; all if there is none.
        own: by task the expert that was trained on it, where neither its name nor the library says
            so. One that was trained on several tasks may be named for each.
        fusions: other adapters to measure beside them, by name: a trained routed adapter, say, or
            one LoRA for all tasks.
        strategies: the fusions to compare, beside the base model; all if none is named, but for
            those that are trained: `global`, `layer`, `linear`, `linear_arrow`, `hierarchical`,
            `hierarchical_arrow`.
        trained: compare those, too.
        clusters_from: a file that `peft_routing.library.cluster_library` wrote: the cluster of each
            expert, for `own_cluster`, `hierarchical` and `hierarchical_arrow`.
        num_train_epochs: how often each reads the train texts of the tasks.
        max_steps: the number of steps of each, in place of epochs.
        learning_rates: AdamW's; of several, the one with the lowest loss on validation is kept.
        cache: the directory that keeps what was measured; the library's or, without one,
            `<output>.cache` if None. What is there already is not measured again.
        beside: directories of earlier reports, by a name for each: of other adapters, on the same
            tasks. What both have is set beside each other.
        metric: what answers to the prompts of the test are measured by, beside the loss:
            `accuracy`, `exact_match`, `rouge_l`, or a function of one's own,
            `package.module:function`. Each fusion generates them, the likeliest token at each step.
            Needs `completions_only`.
        lm_eval: tasks of lm_eval that each fusion is measured on, too, beside the loss: names, or
            YAML files of your own, whose code is run. Not the fusions that go by the task.
        reading: how texts are read; `Reading()` if None.
        completions_only: score answers alone: the last turn of a chat, or a target after its input.
        max_samples: the first so many rows of each source and each task of lm_eval; all if None.
        batch_size: rows at a time, in training, too.
        seed: of the split of a task that has one source, of what a DARE merge drops, and of the
            order of the rows in training.

    Returns the table as `rows`, a sentence per budget, the selection of few experts, and the tables
    of log-probabilities, for `peft_routing.fusion`.

    Raises `UserError` for what cannot be compared, and for an output that exists.

    >>> comparison = compare(
    ...     "base",
    ...     {"math": "math-lora", "code": "code-lora"},
    ...     {"math": "math.jsonl"},
    ...     "report",
    ...     strategies=["base", "best_expert", "learned_ensemble"],
    ...     reading=Reading(quiet=True),
    ... )
    >>> [row.name for row in comparison.rows]
    ['base', 'best_expert', 'learned_ensemble']
    """
    from peft_routing.fusion.comparison import compare as run
    from peft_routing.fusion.trained import Training

    named = named_experts(experts, experts_from=experts_from, library=library, only=only)
    own = own or {}
    _check_own(own, tasks, named)
    of_tasks = {}
    if library is not None:
        of_tasks = _own_experts(library, named)
        cache = str(Path(library) / "cache") if cache is None else cache
    clusters = None if clusters_from is None else _clusters(clusters_from, named, None)
    recipe = Recipe(
        num_train_epochs=num_train_epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        held_out=0,  # what is measured are the validation texts
        eval_steps=0.5,
        completions_only=completions_only,
        seed=seed,
    )
    return run(
        base,
        named,
        tasks,
        output,
        reading or Reading(),
        own={**of_tasks, **own},
        fusions=fusions or {},
        strategies=strategies,
        trained=trained,
        training=Training(recipe, tuple(dict.fromkeys(learning_rates)), clusters),
        cache=cache,
        besides=beside or {},
        metric=metric,
        lm_eval=tuple(dict.fromkeys(lm_eval)),
        completions_only=completions_only,
        max_samples=max_samples,
        batch_size=batch_size,
        seed=seed,
    )


def _check_own(
    own: Mapping[str, str], tasks: Mapping[str, str], experts: Mapping[str, str]
) -> None:
    """`UserError` where a task or an expert that `own` names is not there."""
    for task, name in own.items():
        if task not in tasks:
            raise UserError(f"own {task}={name}: there is no task {task!r}; {_there_are(tasks)}")
        if name not in experts:
            raise UserError(
                f"own {task}={name}: there is no adapter {name!r}; {_there_are(experts)}"
            )


def _there_are(names: Iterable[str]) -> str:
    return f"there are {', '.join(names)}"


def _own_experts(library: str, experts: Mapping[str, str]) -> dict[str, str]:
    """By task the first of a library's adapters that was trained on it, for tasks that no expert
    has the name of.
    """
    from peft_routing.library import Library

    own: dict[str, str] = {}
    for name, entry in Library.open(library).entries.items():
        if name in experts and entry.task not in experts:
            own.setdefault(entry.task, name)
    return own
