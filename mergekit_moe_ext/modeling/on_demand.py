"""Mappings by which transformers' Auto classes load our architectures without
`trust_remote_code`.

There are a `WEMoE<X>` and an `UpcycledMoe<X>` for every class X of transformers, so they are not
registered one by one.
Instead the mapping in which an Auto class looks for registered classes becomes one that makes them
on demand; configurations are entered when the autoload's table is asked for one. The code that
makes them is imported only then, so that extending costs nothing. Iterating over such a mapping
gives the classes that were made so far.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What is made of a class of transformers: by how its model types begin, how its files end.
_OF_ANY_BASE = {"wemoe_": "wemoe", "upcycled_moe_": "upcycled_moe"}
_SEQUENCE = "sequence_moe"
_HERE = __name__.rpartition(".")[0]
_OF_SEQUENCES = f"{_HERE}.configuration_sequence_moe"
# Models that are not made of a class of transformers: by Auto class and configuration.
_WRITTEN_OUT = {
    ("AutoModelForCausalLM", "SequenceMoEConfig"): (
        "modeling_sequence_moe",
        "SequenceMoEForCausalLM",
    ),
    ("AutoModelForImageClassification", "WEMoECLIPVisionConfig"): (
        "modeling_clip_heads",
        "WEMoECLIPVisionForImageClassification",
    ),
}


def add_configuration(auto: Any, model_type: str) -> None:
    """Enter one of our model types in `transformers.models.auto.configuration_auto`.

    Nothing is entered for a type that is not ours, or that transformers has by itself.
    """
    mapping = auto.CONFIG_MAPPING
    if model_type in mapping._mapping:
        return
    if model_type == _SEQUENCE:
        mapping._extra_content[model_type] = _ours("configuration_sequence_moe").SequenceMoEConfig
    for prefix, ending in _OF_ANY_BASE.items():
        base = model_type.removeprefix(prefix)
        if model_type.startswith(prefix) and base in mapping._mapping:
            config_class = _ours(f"configuration_{ending}").config_class
            mapping._extra_content[model_type] = config_class(mapping[base])


def extend_models(auto: ModuleType) -> None:
    """Add our models to the Auto classes of `transformers.models.auto.modeling_auto`. Classes that
    others have registered stay.
    """
    for name, auto_class in list(vars(auto).items()):
        mapping = getattr(auto_class, "_model_mapping", None)
        if (
            isinstance(auto_class, type)
            and mapping is not None
            and not isinstance(mapping._extra_content, _Models)
        ):
            mapping._extra_content = _Models(name, mapping)


def _ours(module: str) -> Any:
    return importlib.import_module(f"{_HERE}.{module}")


def _ending_of(config_type: object) -> str | None:
    """How the files end that have a configuration of any base; None for any other."""
    module = getattr(config_type, "__module__", None)
    for ending in _OF_ANY_BASE.values():
        if module == f"{_HERE}.configuration_{ending}":
            return ending
    return None


class _Models(dict["type[PretrainedConfig]", Any]):
    """Models of one Auto class, by the classes of their configurations. `stock` is transformers'
    mapping of that Auto class.
    """

    def __init__(self, auto: str, stock: Any) -> None:
        super().__init__(stock._extra_content)
        self._auto = auto
        self._stock = stock

    def __contains__(self, config_type: object) -> bool:
        if super().__contains__(config_type):
            return True
        if _ending_of(config_type):
            return self._auto in _ours("any_base").AUTO_CLASSES
        module = getattr(config_type, "__module__", None)
        name = getattr(config_type, "__name__", "")
        return module == _OF_SEQUENCES and (self._auto, name) in _WRITTEN_OUT

    def __missing__(self, config_type: "type[PretrainedConfig]") -> Any:
        self[config_type] = self._make(config_type)
        return self[config_type]

    def _make(self, config_type: "type[PretrainedConfig]") -> Any:
        written_out = _WRITTEN_OUT.get((self._auto, config_type.__name__))
        if written_out is not None:
            module, name = written_out
            return getattr(_ours(module), name)
        model_class = _ours(f"modeling_{_ending_of(config_type)}").model_class
        # One class, or several among which the configuration chooses.
        stock_class = self._stock.get(config_type.__base__, None)
        if stock_class is None:
            return _Unsuited
        if isinstance(stock_class, list | tuple):
            return tuple(model_class(each) for each in stock_class)
        return model_class(stock_class)


class _Unsuited:
    """A stand-in for the model where an Auto class has none for the base; loading it is an error
    that says so.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any, **kwargs: Any) -> None:
        cls._from_config(config)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> None:
        _ours("any_base").check_architecture(cls, config)
        raise ValueError(f"this Auto class has no model for a {config.model_type}")
