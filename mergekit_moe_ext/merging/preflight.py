"""Finds a user's mistakes before any work starts, and says what would be right.

mergekit drops the keys that it does not know, so the raw YAML is looked at here. Our own options
are read and checked by pydantic; what is left under `parameters:` must be the shared method's.
"""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from mergekit.config import ConditionalParameter, InputModelDefinition, MergeConfiguration
from mergekit.merge_methods import MergeMethod, registered_methods
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import TokenizerConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.method import Job, StructuralMethod
from mergekit_moe_ext.merging.planner import NEUTRAL_PARAMETERS, merged_models
from mergekit_moe_ext.merging.sources import lacks_tokenizer

Options = TypeVar("Options", bound=pydantic.BaseModel)


def check_document(document: Any) -> None:
    """Every key of a raw merge configuration, outside `parameters:`, must be one that mergekit
    reads.
    """
    if not isinstance(document, Mapping):
        raise UserError("the configuration is not a mapping of keys to values")
    # `name` is what mergekit-multi reads, and stands in many a configuration for a single merge
    _check_keys(document, [*MergeConfiguration.model_fields, "name"], "the configuration")
    for index, entry in enumerate(document.get("models") or []):
        if isinstance(entry, Mapping):
            _check_keys(entry, InputModelDefinition.model_fields, f"models[{index}]")
    if isinstance(document.get("tokenizer"), Mapping):
        _check_keys(document["tokenizer"], TokenizerConfig.model_fields, "tokenizer")


def read_job(
    config: MergeConfiguration, merge_options: MergeOptions, method: StructuralMethod
) -> Job:
    """Everything under `parameters:`, checked. `UserError` for what is wrong."""
    if not config.models:
        raise UserError(f"{method.spec.name} takes `models:`, not slices or modules")
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if name and name.removeprefix("torch.") not in (
            "float64",
            "float32",
            "bfloat16",
            "float16",
        ):
            raise UserError(f"{key}: {name!r} is none of float32, bfloat16, float16 and float64")
    given = config.parameters or {}
    options: Any = _read_options(method.options_type, given, "`parameters:`")
    shared = _shared_method(method.shared_method_name(options))

    shared_names = [parameter.name for parameter in shared.spec.parameters]
    shared_per_model = [parameter.name for parameter in shared.spec.input_parameters]
    per_model_names = [*method.model_options_type.model_fields, *shared_per_model]
    where = f"parameters ({method.spec.name} with shared method {shared.spec.name})"
    for key in given:
        if key in method.model_options_type.model_fields:
            raise UserError(f"`{key}` belongs under the `parameters:` of a model")
    _check_keys(given, [*method.options_type.model_fields, *shared_names], where)
    model_options = []
    for index, entry in enumerate(config.models):
        for key in entry.parameters or {}:
            if key not in per_model_names and key in (
                *method.options_type.model_fields,
                *shared_names,
            ):
                raise UserError(
                    f"`{key}` under models[{index}] belongs under the merge's `parameters:`"
                )
        _check_keys(entry.parameters or {}, per_model_names, f"models[{index}].parameters")
        where = f"models[{index}].parameters"
        model_options.append(
            _read_options(method.model_options_type, entry.parameters or {}, where)
        )
    job = Job(config, merge_options, method, options, model_options, shared)
    _check_duplicates(config, shared_per_model)
    _check_tokenizers(job)
    _check_shared_inputs(job)
    return job


def _read_options(options_type: type[Options], given: Mapping[str, Any], where: str) -> Options:
    try:
        return options_type.model_validate(
            {key: given[key] for key in options_type.model_fields if key in given}
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        value = first["input"]
        several = isinstance(value, (list, ConditionalParameter)) and "list" not in first["msg"]
        raise UserError(
            f"`{first['loc'][0]}` under {where} "
            + (
                "takes one value, no list, gradient or filter"
                if several
                else f"is {value!r}: {first['msg']}"
            )
        ) from error


def _shared_method(name: str) -> MergeMethod:
    methods = {method.spec.name: method for method in registered_methods()}
    tensor_methods = [
        key for key, method in methods.items() if not isinstance(method, StructuralMethod)
    ]
    if name not in tensor_methods:
        known = "is no tensor method" if name in methods else "is not a merge method"
        raise UserError(f"shared: {name!r} {known}{_nearest(name, tensor_methods)}")
    return methods[name]


def _check_duplicates(config: MergeConfiguration, shared_per_model: Collection[str]) -> None:
    """A model listed twice is two experts, but the shared method sees it once, with one set of
    parameters.
    """
    seen: dict[Any, Any] = {}
    for entry in config.models or []:
        parameters = {
            key: value for key, value in (entry.parameters or {}).items() if key in shared_per_model
        }
        if seen.setdefault(entry.model, parameters) != parameters:
            raise UserError(
                f"{entry.model} is listed more than once with different parameters; "
                "its shared parameters are merged once, so they must agree"
            )


def _check_tokenizers(job: Job) -> None:
    """Where tokenizers are aligned, every local model must have one, and the source must exist."""
    source = job.config.tokenizer.source if job.config.tokenizer else job.config.tokenizer_source
    if source is None:
        return
    if not isinstance(source, str) and difflib.get_close_matches(
        str(source), ("base", "union"), n=1
    ):
        nearest = _nearest(str(source), ("base", "union"))
        raise UserError(f"tokenizer source: {str(source)!r} is unknown{nearest}")
    for model in [*job.sources, *([] if isinstance(source, str) else [source])]:
        directory = Path(model.model.path)
        if lacks_tokenizer(model):
            raise UserError(
                f"{model} has no tokenizer, and aligning vocabularies takes one of every model"
            )
        if not directory.exists() and model.model.path.startswith((".", "/")):
            raise UserError(f"{directory} does not exist (named as a tokenizer's source)")


def _check_shared_inputs(job: Job) -> None:
    """The shared method must accept these models, and have every parameter that it requires."""
    models, base = merged_models(job)
    try:
        job.shared.validate_inputs(models, base)
    except ValueError as error:
        hint = (
            " (name the model that the others were fine-tuned from as `base_model:`)"
            if not base
            else ""
        )
        raise UserError(f"{job.shared.spec.name}: {error}{hint}") from error
    given = [
        job.config.parameters or {},
        *(entry.parameters or {} for entry in job.config.models or []),
    ]
    for parameter in job.shared.spec.parameters:
        supplied = any(parameter.name in parameters for parameters in given)
        if parameter.required and not supplied and parameter.name not in NEUTRAL_PARAMETERS:
            raise UserError(f"{job.shared.spec.name} needs `{parameter.name}` under `parameters:`")


def _check_keys(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"unknown key `{key}` in {where}{_nearest(key, known)}")


def _nearest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=2)
    if close:
        return f"; did you mean {' or '.join(f'`{name}`' for name in close)}?"
    return f"; known here: {', '.join(known)}" if known else "; none is known here"
