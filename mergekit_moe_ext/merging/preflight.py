"""Checks that find a user's mistakes before any work starts, and say what would be right.

mergekit drops the keys that it does not know, so the raw YAML is looked at here. Our own options
are read and checked by pydantic; all other keys under `parameters:` must be the shared method's.
"""

import difflib
import importlib.resources
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import pydantic
from mergekit import multigpu_executor
from mergekit._data import chat_templates
from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    MergeConfiguration,
    OutputSliceDefinition,
)
from mergekit.merge_methods import MergeMethod, registered_methods
from mergekit.merge_methods.base import BasePolicy
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import (
    ModelTokenEmbedding,
    TokenEmbeddingConfig,
    TokenizerConfig,
    ZeroEmbedding,
)
from transformers.utils.chat_template_utils import render_jinja_template

from _mergekit_moe_ext_common.cards import is_on_hub
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import NoTokenizerError, check_device, vocabulary_of
from mergekit_moe_ext.merging.method import Job, StructuralMethod, TensorMethod
from mergekit_moe_ext.merging.planner import NEUTRAL_PARAMETERS, merged_models
from mergekit_moe_ext.merging.sources import (
    DTYPES,
    check_source,
    config_of,
    tokenizer_of,
)
from mergekit_moe_ext.merging.wrappers import language_config

LOG = logging.getLogger(__name__)
Options = TypeVar("Options", bound=pydantic.BaseModel)


def check_document(document: Any) -> None:
    """Check that every key of a raw merge configuration, outside `parameters:`, is one that
    mergekit reads.
    """
    if not isinstance(document, Mapping):
        raise UserError("the configuration is not a mapping of keys to values")
    # mergekit-multi reads `name`, which many configurations of single merges have, too.
    _check_keys(document, [*MergeConfiguration.model_fields, "name"], "the configuration")
    models = document.get("models")
    for index, entry in enumerate(models if isinstance(models, list) else []):
        if isinstance(entry, Mapping):
            _check_keys(entry, InputModelDefinition.model_fields, f"models[{index}]")
    if isinstance(document.get("tokenizer"), Mapping):
        _check_keys(document["tokenizer"], TokenizerConfig.model_fields, "tokenizer")
        tokens = document["tokenizer"].get("tokens")
        for token, entry in tokens.items() if isinstance(tokens, Mapping) else ():
            if isinstance(entry, Mapping):
                _check_token(entry, f"tokenizer: tokens: {token!r}")


def _check_token(entry: Mapping[str, Any], where: str) -> None:
    """Check the keys of what a raw configuration says of a token: mergekit reads a source that it
    does not understand as a model, where it names one.
    """
    _check_keys(entry, TokenEmbeddingConfig.model_fields, where)
    source = entry.get("source")
    if not isinstance(source, Mapping):
        return
    where = f"{where}: source"
    kind = source.get("kind")
    if kind is None:
        _check_keys(source, [*ModelReference.model_fields, "kind"], where)
    elif kind == "zero":
        _check_keys(source, ZeroEmbedding.model_fields, where)
    elif kind == "model_token":
        _check_keys(source, ModelTokenEmbedding.model_fields, where)
        if (source.get("token") is None) == (source.get("token_id") is None):
            raise UserError(f"{where} takes one of `token` and `token_id`")
    else:
        nearest = _nearest(str(kind), ("model_token", "zero"))
        raise UserError(f"{where}: kind: {kind!r} is unknown{nearest}")


def tensor_method(name: str) -> TensorMethod | None:
    """The tensor method of ours of this name; None if it is one of somebody else.

    `UserError` where nobody has a method of this name.
    """
    methods = {method.spec.name: method for method in registered_methods()}
    if name not in methods:
        raise UserError(f"merge_method: {name!r} is not a merge method{_nearest(name, methods)}")
    method = methods[name]
    return method if isinstance(method, TensorMethod) else None


def check_tensor_merge(
    config: MergeConfiguration, merge_options: MergeOptions, method: TensorMethod
) -> None:
    """Check the options, the parameters and the models of a merge by a tensor method of ours."""
    if config.base_model is None and method.spec.contract.base is BasePolicy.REQUIRED:
        raise UserError(f"{method.spec.name} requires a base: name it as `base_model:`")
    _check_devices(merge_options)
    _check_dtypes(config)
    _check_chat_template(config)
    stated: set[str] = set()
    names = [parameter.name for parameter in method.spec.parameters]
    for where, parameters in _all_parameters(config):
        keys = [*names, "allow_nonfinite"] if where == "parameters" else names
        _check_keys(parameters, keys, f"{where} ({method.spec.name})")
        stated |= set(parameters)
    _check_required(method, stated)
    _check_values(method, config)
    allow_nonfinite = (config.parameters or {}).get("allow_nonfinite", False)
    if not isinstance(allow_nonfinite, bool):
        raise UserError(f"`allow_nonfinite` is {allow_nonfinite!r}, neither true nor false")
    models = sorted(config.referenced_models(), key=str)
    for model in models:
        check_source(model, merge_options)
        check_head(model, model, config, merge_options)
    _check_tokenizers(config, models, models, merge_options)


def check_head(
    model: ModelReference, stored: ModelReference, config: MergeConfiguration, options: MergeOptions
) -> None:
    """`UserError` for a model with a head of its own, where the output, which gets the config of
    the base, has none. `stored` is where the model's files are.
    """
    base = config.base_model
    if base is None:
        return
    is_tied = getattr(base.config(options.trust_remote_code), "tie_word_embeddings", False)
    stored_config = stored.config(options.trust_remote_code)
    if is_tied and not getattr(stored_config, "tie_word_embeddings", False):
        raise UserError(
            f"{model} has a head of its own, and the output gets the config of {base}, which ties "
            "its head to its embedding: name a base_model that is untied "
            "(`tie_word_embeddings: false`, and a head in its files)"
        )


def _all_parameters(config: MergeConfiguration) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every `parameters:` of a configuration, after words for where it stands."""
    yield "parameters", config.parameters or {}
    yield from _parameters_of_models(config.models or [], "")
    yield from _parameters_of_slices(config.slices or [], "")
    for name, module in (config.modules or {}).items():
        yield f"modules.{name}.parameters", module.parameters or {}
        yield from _parameters_of_models(module.models or [], f"modules.{name}.")
        yield from _parameters_of_slices(module.slices or [], f"modules.{name}.")


def _parameters_of_models(
    models: Sequence[InputModelDefinition], prefix: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, entry in enumerate(models):
        yield f"{prefix}models[{index}].parameters", entry.parameters or {}


def _parameters_of_slices(
    slices: Sequence[OutputSliceDefinition], prefix: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, entry in enumerate(slices):
        where = f"{prefix}slices[{index}]"
        yield f"{where}.parameters", entry.parameters or {}
        for number, source in enumerate(entry.sources):
            yield f"{where}.sources[{number}].parameters", source.parameters or {}


def _check_devices(options: MergeOptions) -> None:
    """Check that this machine has the devices that the options ask for."""
    option = f"--device {options.device}"
    if options.gpu_rich:
        option = "--gpu-rich"
    elif options.multi_gpu:
        option = "--multi-gpu"
    elif options.cuda:
        option = "--cuda"
    if options.multi_gpu:
        try:
            number = multigpu_executor.get_torch_accelerator_count()
        except AttributeError:  # what mergekit makes of none
            number = 0
        if number == 0:
            raise UserError(f"torch finds no GPU here: leave {option} out")
    check_device(options.device or "cpu", f"leave {option} out")


def _check_dtypes(config: MergeConfiguration) -> None:
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if name and name.removeprefix("torch.") not in DTYPES.values():
            raise UserError(f"{key}: {name!r} is none of float32, bfloat16, float16 and float64")


def _check_chat_template(config: MergeConfiguration) -> None:
    """Check that the chat template is one that mergekit takes, which it finds out at the end, and
    that transformers can read it, which nobody would find out before the first chat.
    """
    value = config.chat_template
    if not value or value == "auto":
        return
    templates = []
    for file in importlib.resources.files(chat_templates).iterdir():
        if file.name.endswith(".jinja"):
            templates.append(file.name.removesuffix(".jinja"))
    # mergekit takes whatever is as long as this, and has a brace, for a template.
    is_literal = len(value) >= 20 and "{" in value
    if value not in templates and not is_literal:
        raise UserError(
            f"chat_template: {value!r} is neither a template of mergekit's nor one in Jinja of at "
            f"least 20 characters{_nearest(value, ['auto', *sorted(templates)])}"
        )
    if value in templates:
        return
    try:
        render_jinja_template(conversations=[], chat_template=value)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"chat_template: line {error.lineno} of the template is not Jinja: {error.message}"
        ) from error


def read_job(
    config: MergeConfiguration, merge_options: MergeOptions, method: StructuralMethod
) -> Job:
    """The merge, with all keys and values under `parameters:` checked and read.

    `UserError` for a device that is not there, for a key that is unknown or in the wrong place, and
    for a value that does not fit.
    """
    _check_devices(merge_options)
    if not config.models:
        raise UserError(f"{method.spec.name} takes `models:`, not slices or modules")
    _check_dtypes(config)
    _check_chat_template(config)
    parameters = config.parameters or {}
    options: Any = _read_options(method.options_type, parameters, "`parameters:`")
    config = method.completed(config, options)
    shared = _shared_method(method.shared_method_name(options))

    merge_keys = [
        *method.options_type.model_fields,
        *(parameter.name for parameter in shared.spec.parameters),
    ]
    for key in parameters:
        if key in method.model_options_type.model_fields and key not in merge_keys:
            raise UserError(f"`{key}` belongs under the `parameters:` of a model")
    where = f"parameters ({method.spec.name} with shared method {shared.spec.name})"
    _check_keys(parameters, merge_keys, where)
    shared_per_model = [parameter.name for parameter in shared.spec.input_parameters]
    per_model_keys = [*method.model_options_type.model_fields, *shared_per_model]
    model_options = _read_model_options(config, method, shared, per_model_keys, merge_keys)
    job = Job(config, merge_options, method, options, model_options, shared)
    _check_duplicates(config, shared_per_model)
    merged, _ = merged_models(job)
    _check_tokenizers(config, job.sources, merged, merge_options)
    _check_shared_inputs(job)
    return job


def _read_model_options(
    config: MergeConfiguration,
    method: StructuralMethod,
    shared: MergeMethod,
    per_model_keys: Sequence[str],
    merge_keys: Collection[str],
) -> list[Any]:
    """The method's options of each entry of `models:`; all keys there are checked.

    per_model_keys, merge_keys: those that belong there, and those that belong to the merge.
    """
    model_options = []
    for index, entry in enumerate(config.models or []):
        model_parameters = entry.parameters or {}
        for key in model_parameters:
            if key not in per_model_keys and key in merge_keys:
                raise UserError(
                    f"`{key}` under models[{index}] belongs under the merge's `parameters:`"
                )
        where = f"models[{index}].parameters"
        known = list(per_model_keys)
        if "weight" in model_parameters and "weight" not in known:
            # mergekit drops it as well, and configurations have it when their method is changed.
            LOG.warning("%s has no `weight`: that of %s counts nothing", shared.spec.name, where)
            known.append("weight")
        _check_keys(model_parameters, known, where)
        model_options.append(_read_options(method.model_options_type, model_parameters, where))
    return model_options


def _read_options(
    options_type: type[Options], parameters: Mapping[str, Any], where: str
) -> Options:
    """The options of this type among the parameters, as pydantic reads them."""
    values = {key: parameters[key] for key in options_type.model_fields if key in parameters}
    try:
        return options_type.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        value = first["input"]
        complaint = f"is {value!r}: {first['msg']}"
        if isinstance(value, (list, ConditionalParameter)) and "list" not in first["msg"]:
            complaint = "takes one value, not a list, gradient or filter"
        raise UserError(f"`{first['loc'][0]}` under {where} {complaint}") from error


def _shared_method(name: str) -> MergeMethod:
    methods = {method.spec.name: method for method in registered_methods()}
    tensor_methods = []
    for key, method in methods.items():
        if not isinstance(method, StructuralMethod):
            tensor_methods.append(key)
    if name not in tensor_methods:
        complaint = "is not a tensor method" if name in methods else "is not a merge method"
        raise UserError(f"shared: {name!r} {complaint}{_nearest(name, tensor_methods)}")
    return methods[name]


def _check_duplicates(config: MergeConfiguration, shared_per_model: Collection[str]) -> None:
    """Check that a model listed twice has one set of parameters for the shared method.

    It is two experts, but the shared method sees it once.
    """
    by_model: dict[Any, Any] = {}
    for entry in config.models or []:
        parameters = {}
        for key, value in (entry.parameters or {}).items():
            if key in shared_per_model:
                parameters[key] = value
        if by_model.setdefault(entry.model, parameters) != parameters:
            raise UserError(
                f"{entry.model} is listed more than once with different parameters; "
                "its shared parameters are merged once, so they must agree"
            )


def _check_tokenizers(
    config: MergeConfiguration,
    models: Sequence[ModelReference],
    merged: Sequence[ModelReference],
    options: MergeOptions,
) -> None:
    """Check what a configuration says of tokenizers, and where it aligns tokens, that every one of
    its models has a tokenizer, and one that mergekit can align.

    merged: those of the models whose embeddings are merged.
    """
    aligned = config.tokenizer
    source = aligned.source if aligned else config.tokenizer_source
    if source is None:
        return
    key = "tokenizer: source" if aligned else "tokenizer_source"
    foreign = _foreign_tokenizer(source, key, models, options)
    tokens = aligned.tokens or {} if aligned else {}
    _check_models_of_tokens(tokens, merged)
    multiple = aligned.pad_to_multiple_of if aligned else None
    if multiple is not None and multiple < 1:
        raise UserError(f"tokenizer: pad_to_multiple_of: {multiple} is below 1")
    tokenizers = {}
    for model in models:
        try:
            tokenizers[model] = tokenizer_of(model, options)
        except NoTokenizerError as error:
            raise UserError(
                f"{error.message}, and aligning vocabularies takes one of every model"
            ) from error
    base = config.base_model or models[0]
    _check_tokenizer_of_base(base, tokenizers[base], options, is_union=source == "union")
    vocabularies = {model: tokenizer.get_vocab() for model, tokenizer in tokenizers.items()}
    _check_tokens(tokens, vocabularies, options)
    if foreign is not None:
        vocabularies[source] = foreign.get_vocab()
    _check_embeddings_per_layer(models, vocabularies, options)


def _check_tokenizer_of_base(
    base: ModelReference, tokenizer: Any, options: MergeOptions, *, is_union: bool
) -> None:
    """Check that mergekit can change the tokenizer of the base as it does where tokens are aligned:
    for a union it adds tokens, and it takes those away that the model has no rows for.
    """
    kind = type(tokenizer).__name__
    is_fast = getattr(tokenizer, "is_fast", False)
    if is_union and not is_fast:
        raise UserError(
            f"{base}: its tokenizer, a {kind}, is not a fast one, and mergekit makes unions of "
            "fast tokenizers only: take `base`, or the path of a model"
        )
    rows = vocabulary_of(config_of(base, options))
    last = max(tokenizer.get_vocab().values(), default=0)
    if rows is None or last < rows:
        return
    if not is_fast or type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        raise UserError(
            f"{base}: its tokenizer, a {kind}, has the token {last}, and the model only {rows} "
            "rows; mergekit takes tokens away from fast BPE tokenizers only: resize the model's "
            "embeddings, or take the tokens away"
        )


def _check_embeddings_per_layer(
    models: Sequence[ModelReference],
    vocabularies: Mapping[ModelReference, Mapping[str, int]],
    options: MergeOptions,
) -> None:
    """`UserError` where different vocabularies would be aligned, and a model has embeddings per
    layer, as Gemma 3n has: mergekit aligns those at the two ends alone.
    """
    first, *others = vocabularies.values()
    if all(vocabulary == first for vocabulary in others):
        return
    for model in models:
        inner = language_config(model.config(options.trust_remote_code))
        if getattr(inner, "hidden_size_per_layer_input", 0):
            raise UserError(
                f"{model} has embeddings per layer, which cannot be aligned with other tokens: all "
                "sources have to have one tokenizer"
            )


def _foreign_tokenizer(
    source: Any, key: str, models: Sequence[ModelReference], options: MergeOptions
) -> Any:
    """The tokenizer of its source, where that is none of the models; else None. `UserError` where
    it cannot be read: mergekit takes any text but base and union for the path of a model.
    """
    if isinstance(source, str) or source in models:
        return None
    path = source.model.path
    try:
        return tokenizer_of(source, options)
    except UserError as error:
        if Path(path).is_dir():
            raise UserError(f"{key}: {error.message}") from error
        # Of other names the Hub's own words say little.
        reason = f" ({error.message})" if is_on_hub(path) else ""
        names = ["union", "base", *map(str, models)]
        raise UserError(
            f"{key}: {str(source)!r} is neither union, base nor a model whose tokenizer can be "
            f"read{_nearest(str(source), names)}{reason}"
        ) from error


def _model_of_token(entry: TokenEmbeddingConfig) -> ModelReference | None:
    """The model that a token's embedding comes from, if one is named."""
    source = entry.source
    if isinstance(source, ModelTokenEmbedding):
        return source.model
    return source if isinstance(source, ModelReference) else None


def _check_models_of_tokens(
    tokens: Mapping[str, TokenEmbeddingConfig], merged: Sequence[ModelReference]
) -> None:
    """Check that the models which tokens' embeddings are to come from are among the merged ones."""
    for token, entry in tokens.items():
        model = _model_of_token(entry)
        if model is not None and model not in merged:
            raise UserError(
                f"tokenizer: tokens: {token!r}: source: {str(model)!r} is none of the models that "
                f"are merged{_nearest(str(model), [str(each) for each in merged])}"
            )


def _check_tokens(
    tokens: Mapping[str, TokenEmbeddingConfig],
    vocabularies: Mapping[ModelReference, Mapping[str, int]],
    options: MergeOptions,
) -> None:
    """Check that the embedding of every one of these tokens can be taken from where the
    configuration says.
    """
    for token, entry in tokens.items():
        where = f"tokenizer: tokens: {token!r}"
        source = entry.source
        model = _model_of_token(entry)
        if source is None:
            is_needed = any(token not in vocabulary for vocabulary in vocabularies.values())
            if entry.force or is_needed:
                raise UserError(f"{where} needs a `source:`, a model or {{kind: zero}}")
        elif isinstance(source, ModelTokenEmbedding) and source.token_id is not None:
            size = vocabulary_of(config_of(source.model, options))
            if source.token_id < 0 or (size is not None and source.token_id >= size):
                raise UserError(
                    f"{where}: source: {model} has {size} tokens, and none {source.token_id}"
                )
        elif model is not None:
            wanted = source.token if isinstance(source, ModelTokenEmbedding) else token
            if wanted not in vocabularies[model]:
                raise UserError(f"{where}: source: {model} has no token {wanted!r}")


def _check_shared_inputs(job: Job) -> None:
    """Check that the shared method accepts these models and gets every parameter that it
    requires."""
    models, base = merged_models(job)
    try:
        job.shared_method.validate_inputs(models, base)
    except ValueError as error:
        hint = ""
        if not base:
            hint = " (name the model that the others were fine-tuned from as `base_model:`)"
        raise UserError(f"{job.shared_method.spec.name}: {error}{hint}") from error
    stated: set[str] = set(job.config.parameters or {})
    for entry in job.config.models or []:
        stated |= set(entry.parameters or {})
    _check_required(job.shared_method, stated | NEUTRAL_PARAMETERS.keys())
    _check_values(job.shared_method, job.config)


def _check_values(method: MergeMethod, config: MergeConfiguration) -> None:
    """Check the values of a method's parameters wherever they stand: alone, in a gradient or under
    a filter.
    """
    parameters = {parameter.name: parameter for parameter in method.spec.parameters}
    for where, stated in _all_parameters(config):
        for key in stated.keys() & parameters.keys():
            for value in _single_values(stated[key]):
                try:
                    parameters[key].validate(value)
                except pydantic.ValidationError as error:
                    raise UserError(
                        f"{method.spec.name} cannot merge with `{key}: {value}` under {where}: "
                        f"{error.errors()[0]['msg']}"
                    ) from error


def _single_values(value: Any) -> Iterator[Any]:
    """What is stated for a parameter, without gradients and filters."""
    if isinstance(value, ConditionalParameter):
        yield from _single_values(value.value)
    elif isinstance(value, list):
        for each in value:
            yield from _single_values(each)
    elif value is not None:
        yield value


def _check_required(method: MergeMethod, stated: Collection[str]) -> None:
    """Check that every parameter that the method requires is stated somewhere."""
    for parameter in method.spec.parameters:
        if parameter.required and parameter.name not in stated:
            raise UserError(f"{method.spec.name} needs `{parameter.name}` under `parameters:`")


def _check_keys(values: Mapping[str, Any], keys: Collection[str], where: str) -> None:
    for key in values:
        if key not in keys:
            raise UserError(f"unknown key `{key}` in {where}{_nearest(key, keys)}")


def _nearest(word: str, keys: Collection[str]) -> str:
    """The end of a sentence that names the keys that are most like the word, or all of them."""
    close = [f"`{key}`" for key in difflib.get_close_matches(str(word), keys, n=2)]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known here: {', '.join(keys)}" if keys else "; none is known here"
