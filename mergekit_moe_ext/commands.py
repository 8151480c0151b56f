"""The commands of `mergekit-moe-ext` as functions: a command parses, calls one of these, and
prints.

Hosts are imported inside the functions, so that importing this file costs nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.recipes import Adaptation, Counted, Part, Recipe

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions
    from transformers import PreTrainedModel

    from mergekit_moe_ext.mixtures.usage import Usage

# By source: the held-out loss before and after.
Losses = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class PlannedMerge:
    """The result that a structural merge would have. As a string it is the output of
    `mergekit-moe-ext plan`.

    bytes: the size of the weights.
    mixture: the number of experts and how many of them are chosen, in words.
    shared: the number of tensors that the shared method merges, from `shared_models` and `base`.
    shared_defaults: the shared method's parameters that the configuration does not state, in words,
        where they are other than that method's own.
    copied: the number of tensors that are copied from single sources.
    computed: the number of tensors that are made anew.
    untrained: what of the result must be trained before it is used, with the command, in words.
    donor: the model that config and tokenizer come from.
    notes: what the method decided from data, in Markdown.
    converted: the configuration that is run, where it was given in the form of mergekit-moe.
    """

    method: str
    architecture: str
    dtype: str
    bytes: int
    mixture: str
    layers: int
    experts: tuple[str, ...]
    shared: int
    shared_method: str
    shared_models: tuple[str, ...]
    base: str | None
    shared_defaults: str
    copied: int
    computed: int
    seed: int
    donor: str
    notes: str
    untrained: str = ""
    converted: str = ""
    figure: Callable[[Path], None] | None = field(default=None, repr=False, compare=False)

    def draw(self, path: str | Path) -> None:
        """Draw what the method decided (for caem, the allocation) into a file.

        `UserError` where there is nothing to draw.
        """
        if self.figure is None:
            raise UserError(f"{self.method} has nothing to draw")
        self.figure(Path(path))

    def __str__(self) -> str:
        lines = [
            f"output    {self.architecture}, {self.dtype}, {self.bytes / 1e9:.3f} GB",
            f"mixture   {self.mixture}, {self.layers} layers, from",
        ]
        for index, model in enumerate(self.experts):
            lines.append(f"          {index}. {model}")
        if self.shared:
            base = f" (base: {self.base})" if self.base else ""
            models = ", ".join(self.shared_models)
            lines.append(
                f"shared    {self.shared} tensors by {self.shared_method} from {models}{base}"
            )
            if self.shared_defaults:
                lines.append(f"          by default: {self.shared_defaults}")
        lines.append(f"copied    {self.copied} tensors")
        lines.append(f"computed  {self.computed} tensors, seed {self.seed}")
        if self.untrained:
            lines.append(f"untrained {self.untrained}")
        lines.append(f"config and tokenizer from {self.donor}")
        if self.notes:
            lines.append(f"\n{self.notes}")
        if self.converted:
            lines.append(f"\n{self.converted.rstrip()}")
        return "\n".join(lines)


def plan(
    config: str | Path | Mapping[str, Any], options: "MergeOptions | None" = None
) -> PlannedMerge:
    """Check a configuration and its models, and describe the merge's result, without merging.

    Args:
        config: the path of a YAML file, or its content.
        options: mergekit's own options; its defaults if None.

    Returns the planned merge, which `mergekit-moe-ext plan` prints.

    Raises `UserError` for a configuration or a model that cannot be merged, and for a method that
    is not one of this package's structural ones.

    >>> planned = plan({
    ...     "merge_method": "moe",
    ...     "base_model": "base",
    ...     "models": [{"model": "math"}, {"model": "code"}],
    ... })
    >>> planned.experts
    ('math', 'code')
    """
    from mergekit.options import MergeOptions

    from mergekit_moe_ext.merging.card import (
        defaults_in_words,
        experts_in_words,
        untrained_in_words,
    )
    from mergekit_moe_ext.merging.method import StructuralMethod
    from mergekit_moe_ext.merging.planner import (
        layers_of,
        merged_models,
        prepare,
        structural_method,
    )
    from mergekit_moe_ext.merging.preflight import read_job, tensor_method
    from mergekit_moe_ext.methods import METHODS

    merge_config, source, is_converted = read_configuration(config)
    method = structural_method(merge_config.merge_method)
    if method is None:
        tensor_method(merge_config.merge_method)  # complains where there is none of this name
        names = ", ".join(each.spec.name for each in METHODS if isinstance(each, StructuralMethod))
        raise UserError(
            f"{merge_config.merge_method} leaves the architecture as it is, and there is nothing "
            f"to plan: run it with mergekit-yaml. plan describes merges by {names}"
        )
    job = read_job(merge_config, options or MergeOptions(), method)
    planned = prepare(job).plan
    models, base = merged_models(job)
    untrained, command = untrained_in_words(planned, "out")
    if command:
        untrained = f"{untrained}: {command}"
    return PlannedMerge(
        method=merge_config.merge_method,
        architecture=planned.config.architectures[0],
        dtype=str(planned.dtype).removeprefix("torch."),
        bytes=planned.bytes,
        mixture=experts_in_words(planned),
        layers=layers_of(planned),
        experts=tuple(map(str, job.experts)),
        shared=len(planned.shared),
        shared_method=job.shared_method.spec.name,
        shared_models=tuple(map(str, models)),
        base=str(base) if base else None,
        shared_defaults=defaults_in_words(job, planned),
        copied=len(planned.copies),
        computed=len(planned.computed),
        seed=job.seed,
        donor=str(job.donor),
        notes=planned.notes,
        untrained=untrained,
        converted=source if is_converted else "",
        figure=planned.draw,
    )


def read_configuration(
    config: str | Path | Mapping[str, Any],
) -> "tuple[MergeConfiguration, str, bool]":
    """The configuration in a YAML file or a mapping, its text, and whether it was converted from
    the form of mergekit-moe.

    `UserError` for a configuration that mergekit would not take.
    """
    from mergekit_moe_ext.merging.mergekit_moe import converted, is_mergekit_moe

    name = "the configuration" if isinstance(config, Mapping) else str(config)
    if isinstance(config, Mapping):
        document: Any = dict(config)
        source = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    else:
        try:
            source = Path(config).read_text(encoding="utf-8")
            document = yaml.safe_load(source)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{config}: {error}") from error
    is_foreign = is_mergekit_moe(document)
    if is_foreign:
        document, source = converted(document)
    return _validated(document, name), source, is_foreign


def _validated(document: Any, name: str) -> "MergeConfiguration":
    import pydantic
    from mergekit.config import MergeConfiguration

    from mergekit_moe_ext.merging.preflight import check_document

    try:
        check_document(document)
        return MergeConfiguration.model_validate(document)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{name}: {place}: {first['msg']}") from error
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{name}: {error}") from error


def add_expert(
    model: str,
    experts: Sequence[str],
    output: str,
    *,
    names: Sequence[str] = (),
    gate_init: Literal["mean", "prompts", "zeros"] = "mean",
    margin: float | None = None,
    positive_prompts: Sequence[str | Sequence[str]] = (),
    negative_prompts: Sequence[str | Sequence[str]] = (),
    options: "MergeOptions | None" = None,
) -> None:
    """Add experts to every layer of a mixture of experts, and leave all else of it as it is.

    Args:
        model: the mixture, a directory or a name on the Hub. It is left as it is.
        experts: dense models, or `base+lora`, whose FFNs become an expert each.
        output: the directory of the grown mixture.
        names: names of the new experts, one each, or none.
        gate_init: the initial rows of the gates for the new experts.
        margin: the difference of a new expert's mean logit from the mean of the others'; 5 if None.
        positive_prompts: for `gate_init="prompts"`, per expert a text file with a prompt per line,
            or the prompts: texts that it is for.
        negative_prompts: the same for texts that it is not for, or none.
        options: mergekit's own options; its defaults if None.

    Raises `UserError` for a dense model that does not fit the mixture, and for an output that
    exists.

    >>> add_expert("mixture", ["math"], "grown", names=["math"])
    """
    per_expert = {
        "name": names,
        "positive_prompts": positive_prompts,
        "negative_prompts": negative_prompts,
    }
    for key, values in per_expert.items():
        if values and len(values) != len(experts):
            raise UserError(
                f"{len(values)} {key} for {len(experts)} expert(s): give one for each, or none"
            )
    models = []
    for index, expert in enumerate(experts):
        parameters = {}
        for key, values in per_expert.items():
            if values:
                value = values[index]
                parameters[key] = value if isinstance(value, str) else list(value)
        entry: dict[str, Any] = {"model": expert}
        if parameters:
            entry["parameters"] = parameters
        models.append(entry)
    settings: dict[str, Any] = {"into": model, "gate_init": gate_init}
    if margin is not None:
        settings["margin"] = float(margin)
    document = {"merge_method": "moe", "models": models, "parameters": settings}
    _run_merge(document, output, options)


def remove_expert(
    model: str,
    experts: Sequence[str | int],
    output: str,
    *,
    options: "MergeOptions | None" = None,
) -> None:
    """Remove experts from every layer of a mixture of experts, and leave all else of it as it is.

    Args:
        model: the mixture, a directory or a name on the Hub. It is left as it is.
        experts: the experts, by number from 0 on, or by name.
        output: the directory of the smaller mixture.
        options: mergekit's own options; its defaults if None.

    Raises `UserError` for an expert that is not there, where too few experts are left, and for an
    output that exists.

    >>> remove_expert("grown", ["math"], "smaller")
    """
    document = {
        "merge_method": "remove_experts",
        "models": [{"model": model}],
        "parameters": {"experts": list(experts)},
    }
    _run_merge(document, output, options)


def _run_merge(document: Mapping[str, Any], output: str, options: "MergeOptions | None") -> None:
    """Run the merge of a configuration."""
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config, source, _is_converted = read_configuration(document)
    run_merge(config, output, options=options or MergeOptions(), config_source=source)


def count_usage(
    model: str,
    data: Sequence[str],
    *,
    reading: Reading | None = None,
    max_samples: int | None = None,
    count: Counted = "chosen",
    batch_size: int = 8,
    device: str = "auto",
    html: str | Path | None = None,
) -> "Usage | None":
    """Count how often each expert of a mixture is chosen on texts, per source.

    Args:
        model: a directory, or a name on the Hub.
        data: `[TASK=]SOURCE[:SPLIT]`, each a file, a directory or a dataset on the Hub.
        reading: how texts are read; `Reading()` if None.
        max_samples: the number of rows of each source that are read, from the first on; all if
            None.
        count: of routers with an expert capacity (Switch Transformers), whether all that they chose
            is counted or only what was dispatched to an expert that had room. How much was dropped
            is counted either way.
        batch_size: the number of rows at a time.
        device: `cpu`, `cuda`, `cuda:1` …; `auto` spreads the model over all GPUs.
        html: a page that shows the expert of each token, and needs no network. Of several
            processes, it shows texts of the main one.

    Returns the usage, whose `write` makes the file that `caem` reads; None in all but the main
    process. Where there are several processes, their process group is destroyed afterwards.

    Raises `UserError` for a model that is not a mixture, and for data that cannot be read.

    >>> usage = count_usage("mixture", ["news=news.jsonl"], reading=Reading(quiet=True))
    >>> list(usage.tasks)
    ['news']
    """
    from _mergekit_moe_ext_common.loading import check_device
    from _mergekit_moe_ext_common.token_page import ShownTexts, check_new_page
    from mergekit_moe_ext.mixtures import usage

    check_device(device)
    if html:
        check_new_page(Path(html))
    reading = reading or Reading()
    texts = usage.read_texts(model, data, reading, max_samples)
    shown = ShownTexts(texts.tokenizer) if html else None
    counted = usage.count_usage(
        model, texts, reading, count=count, batch_size=batch_size, device=device, shown=shown
    )
    if counted and shown and html:
        from mergekit_moe_ext.mixtures.plots import write_usage_page

        write_usage_page(counted, shown, Path(html))
    return counted


def train(
    model: str,
    data: Sequence[str],
    part: Part | Sequence[Part],
    *,
    output: str | None = None,
    recipe: Recipe | None = None,
    reading: Reading | None = None,
    weights: Mapping[str, float] | None = None,
    eval_data: Sequence[str] = (),
    resume: bool = False,
    only_experts: Sequence[str] = (),
    device_map: Literal["auto"] | None = None,
    tasks: str | Path | None = None,
) -> Losses | dict[str, Losses] | None:
    """Train the router of a mixture of experts, its projectors, or all of it, on texts.

    Args:
        model: a directory, or a name on the Hub. It is left as it is.
        data: `[NAME=]SOURCE[:SPLIT]`, each a file, a directory or a dataset on the Hub.
        part: the parameters that are trained: `router`, which may be called `gates`, `projectors`
            of a sequence MoE, a list of both, or `all`.
        output: the directory of the trained model; `<model>-trained` if None.
        recipe: how it is trained; `Recipe()` if None.
        reading: how texts are read; `Reading()` if None.
        weights: a source's relative likelihood to be drawn, 1 for those not named; without any, all
            rows are read.
        eval_data: texts to measure on, in place of the held-out rows of the source of that name.
        resume: whether to go on after the last checkpoint of an interrupted training.
        only_experts: with `"gates"`, the experts, by name or number, whose rows of the gates are
            trained, while the other rows stay as they are; all if there are none.
        device_map: `"auto"` has one process spread the model over all GPUs and main memory, for
            all parts but `all`; one device holds it if None.
        tasks: a YAML file of tasks, in place of `data` and `eval_data`, which are empty then.

    Returns the held-out loss of every source before and after; with `tasks`, by task, what was
    measured of it before and after, by name. None in all but the main process.

    Raises `UserError` for a model that cannot be trained, for data that cannot be read, and for an
    output that exists.

    >>> recipe = Recipe(max_steps=1, held_out=4)
    >>> quiet = Reading(quiet=True)
    >>> losses = train("mixture", ["news=news.jsonl"], "gates", recipe=recipe, reading=quiet)
    >>> list(losses)
    ['news']
    """
    if tasks and (data or eval_data):
        raise UserError("--tasks names the data: leave out --data and --eval-data")
    if not (tasks or data):
        raise UserError("name texts to train on, by --data or --tasks")
    from mergekit_moe_ext.mixtures.tasks import read_tasks
    from mergekit_moe_ext.mixtures.training import train as run

    return run(
        model,
        output,
        part,
        data,
        reading or Reading(),
        recipe or Recipe(),
        weights=weights,
        eval_data=eval_data,
        resume=resume,
        only_experts=only_experts,
        device_map=device_map,
        tasks=read_tasks(Path(tasks)) if tasks else None,
    )


def adapt(
    model: str,
    data: Sequence[str],
    *,
    output: str | None = None,
    adaptation: Adaptation | None = None,
    reading: Reading | None = None,
    eval_data: Sequence[str] = (),
    resume: bool = False,
) -> dict[str, dict[str, tuple[float, float]]] | None:
    """Adapt the routers of a weight-ensembling model (wemoe, ewemoe) to inputs without labels.

    Args:
        model: a directory. It is left as it is.
        data: `TASK=SOURCE[:SPLIT]`, texts or images; TASK names a head where the model has several.
        output: the directory of the adapted model; `<model>-adapted` if None.
        adaptation: how it is adapted; `Adaptation()` if None.
        reading: how inputs are read; `Reading()` if None.
        eval_data: inputs to measure on, in place of the held-out rows of the task.
        resume: whether to go on after the last checkpoint of an interrupted adaptation.

    Returns, per task and measure (entropy; accuracy, or the loss of tokens), the value before and
    after; None in all but the main process.

    Raises `UserError` for a model that cannot be adapted, for data that cannot be read, and for an
    output that exists.

    >>> quick = Adaptation(steps=1, per_device_train_batch_size=2)
    >>> quiet = Reading(quiet=True)
    >>> measures = adapt("ensemble", ["math=math.jsonl"], adaptation=quick, reading=quiet)
    >>> list(measures)
    ['math']
    """
    from mergekit_moe_ext.wemoe.adaptation import adapt as run

    return run(
        model,
        output,
        data,
        reading or Reading(),
        adaptation or Adaptation(),
        eval_data=eval_data,
        resume=resume,
    )


def unload(model: str, output: str, *, task: str | None = None) -> "type[PreTrainedModel]":
    """Write a weight-ensembling model whose coefficients are constants (router_layers: 0) as a
    stock model.

    Args:
        model: a directory. It is left as it is.
        output: the directory of the stock model.
        task: the task whose head it gets, where the model has several.

    Returns the class of the stock model.

    Raises `UserError` where the coefficients depend on the input, where a head must be chosen, and
    for an output that exists.

    >>> unload("constant", "stock").__name__
    'LlamaForCausalLM'
    """
    from mergekit_moe_ext.wemoe.unloading import unload as run

    return run(model, output, task)
