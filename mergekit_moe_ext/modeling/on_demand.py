"""transformers' Auto classes load `WEMoE<X>` without `trust_remote_code`, for every X, once this is installed.

There is one such class for every class of transformers, so they are not registered one by one: where an Auto class
looks for what others have registered, it finds a mapping that makes them when asked. Iterating over it gives what was
made.
"""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from mergekit_moe_ext.modeling import configuration_wemoe, modeling_wemoe

_PREFIX = "wemoe_"


def install() -> None:
    """Once for all; what others have registered or will register stays."""
    if isinstance(CONFIG_MAPPING._extra_content, _Configs):
        return
    CONFIG_MAPPING._extra_content = _Configs(CONFIG_MAPPING._extra_content)
    for name in modeling_wemoe.AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        mapping._extra_content = _Models(mapping._extra_content, mapping.get)


class _Configs(dict[str, type[PretrainedConfig]]):
    """By model type."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or (
            isinstance(model_type, str)
            and model_type.startswith(_PREFIX)
            and model_type.removeprefix(_PREFIX) in CONFIG_MAPPING._mapping
        )

    def __missing__(self, model_type: str) -> type[PretrainedConfig]:
        self[model_type] = configuration_wemoe.config_class(CONFIG_MAPPING[model_type.removeprefix(_PREFIX)])
        return self[model_type]


class _Models(dict[type[PretrainedConfig], Any]):
    """Of one Auto class, by the class of the configuration."""

    def __init__(self, registered: dict[type[PretrainedConfig], Any], stock: Callable[..., Any]) -> None:
        super().__init__(registered)
        self._stock = stock

    def __contains__(self, config_type: object) -> bool:
        ours = getattr(config_type, "__module__", None) == configuration_wemoe.__name__
        return super().__contains__(config_type) or ours

    def __missing__(self, config_type: type[PretrainedConfig]) -> Any:
        found = self._stock(config_type.__base__, None) or ()
        several = isinstance(found, list | tuple)
        made = tuple(modeling_wemoe.model_class(each) for each in (found if several else [found]))
        self[config_type] = (made if several else made[0]) if made else _Unsuited
        return self[config_type]


class _Unsuited:
    """In place of a model, where the Auto class has none for the base."""

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any, **kwargs: Any) -> None:
        cls._from_config(config)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> None:
        modeling_wemoe.check_architecture(cls, config)
