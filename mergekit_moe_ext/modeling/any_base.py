"""What architectures share that are made of a class of transformers when they are asked for."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModel",
)


def auto_class_of(name: str) -> str:
    """The name of the one of transformers' Auto classes that loads this architecture.

    `ValueError` where none does, as for a part that is loaded within another model alone.
    """
    try:
        own_type = getattr(transformers, name).config_class.model_type
    except (AttributeError, ImportError):  # of elsewhere, or for want of a library
        own_type = None
    for auto in AUTO_CLASSES:
        for model_type, known in getattr(transformers, auto)._model_mapping._model_mapping.items():
            names = [known] if isinstance(known, str) else known
            # Decoders like Mllama's are named for the type of the whole, whose config they do not
            # take.
            if name in names and own_type in (None, model_type):
                return auto
    raise ValueError(f"none of {', '.join(AUTO_CLASSES)} loads a {name}")


def check_architecture(asked: type, config: Any) -> None:
    """`ValueError` where the checkpoint of this configuration is one of another class.

    A checkpoint of the trunk alone will do, as everywhere: transformers names what it lacks.
    """
    architectures = getattr(config, "architectures", None) or []
    known = [each.__name__ for each in asked.__mro__]
    trunk = transformers.MODEL_MAPPING.get(type(config).__base__, None)
    if trunk is not None:
        known.append(trunk.__name__)
    if architectures and not set(known) & set(architectures):
        auto_map = getattr(config, "auto_map", None) or {}
        auto = next((name for name in auto_map if name != "AutoConfig"), "its class")
        raise ValueError(f"this is a {architectures[0]}, which {auto} loads")


@contextmanager
def as_config_of_base(config: Any) -> Iterator[None]:
    """A context in which a configuration of ours is one of the base's class.

    Some classes ask AutoModel for their trunk, which does not know our configuration.
    """
    kind = type(config)
    config.__class__ = kind.__base__
    try:
        yield
    finally:
        config.__class__ = kind


def keep_own_config(model: Any, config: Any) -> None:
    """Give a model that was made within `as_config_of_base` the configuration that is to be saved.

    `ValueError` for a model that keeps another one than it was given, such as a part of it.
    """
    if model.config is config:
        return
    if type(model.config) is not type(config).__base__:
        raise ValueError(
            f"{type(model).__name__} keeps a {type(model.config).__name__}, not the configuration "
            "that it is made by"
        )
    model.config.__class__ = type(config)  # a copy, as some decoders make one for themselves


def with_own_arguments(signature: inspect.Signature, *names: str) -> inspect.Signature:
    """A `forward`'s signature with keywords of ours besides, None by default, before its
    **kwargs."""
    own = []
    for name in names:
        if name not in signature.parameters:
            own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
    *first, last = signature.parameters.values()
    has_kwargs = last.kind is inspect.Parameter.VAR_KEYWORD
    ending = [*own, last] if has_kwargs else [last, *own]
    return signature.replace(parameters=[*first, *ending])


def subclass_of(
    base: type[PreTrainedModel], prefix: str, own: type, module: str, members: dict[str, Any]
) -> type[PreTrainedModel]:
    """The class `<prefix><X>` for `<X>`, derived from `own` and then from `<X>`.

    `module` is the name of the module that makes it, and holds it wherever the base is
    transformers' own.
    """
    # Checkpoints have the names that the base's have, which transformers looks up by class or by
    # model type.
    names = get_checkpoint_conversion_mapping(base.__name__)
    names = names or get_checkpoint_conversion_mapping(base.config_class.model_type)
    if names:
        register_checkpoint_conversion_mapping(prefix + base.__name__, names, overwrite=True)
    is_stock = base.__module__.startswith("transformers.")
    members = {
        "_auto_class": base._auto_class or auto_class_of(base.__name__),
        "__module__": module if is_stock else base.__module__,
        **members,
    }
    return type(prefix + base.__name__, (own, base), members)


def config_subclass_of(
    base: type[PretrainedConfig], prefix: str, kind: str, module: str, members: dict[str, Any]
) -> type[PretrainedConfig]:
    """The class `<prefix><X>Config` for `<X>Config`, whose model type is `<kind>_<x>`.

    `members` are its own keys, with their defaults; `module` is the name of the module that holds
    it.
    """
    members = {
        "model_type": f"{kind}_{base.model_type}",
        **members,
        "__module__": module,
        "_auto_class": "AutoConfig",
    }
    return type(prefix + base.__name__, (base,), members)


def made_on_demand(module: str, prefix: str, make: Callable[[Any], Any]) -> Callable[[str], Any]:
    """The `__getattr__` of a module in which `<prefix><X>` is what `make` gives for transformers'
    `<X>`.
    """

    def getattr_of_module(name: str) -> Any:
        base = None
        if name.startswith(prefix):
            base = getattr(transformers, name.removeprefix(prefix), None)
        if base is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return make(base)

    return getattr_of_module
