"""transformers' Auto classes load `WEMoE<X>` without `trust_remote_code`, for every X.

There is one such class for every class of transformers, so they are not registered one by one:
where an Auto class looks for what others have registered, it finds a mapping that makes them when
asked. Iterating over it gives what was made.
"""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from mergekit_moe_ext.modeling import configuration_wemoe, modeling_wemoe

_PREFIX = "wemoe_"


def install() -> None:
    """Put the mappings in place, once for all; what others register stays."""
    if isinstance(CONFIG_MAPPING._extra_content, _Configs):
        return
    CONFIG_MAPPING._extra_content = _Configs(CONFIG_MAPPING._extra_content)
    for name in modeling_wemoe.AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        mapping._extra_content = _Models(mapping._extra_content, mapping.get)


class _Configs(dict[str, type[PretrainedConfig]]):
    """Configuration classes by model type."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or (
            isinstance(model_type, str)
            and model_type.startswith(_PREFIX)
            and model_type.removeprefix(_PREFIX) in CONFIG_MAPPING._mapping
        )

    def __missing__(self, model_type: str) -> type[PretrainedConfig]:
        stock = CONFIG_MAPPING[model_type.removeprefix(_PREFIX)]
        self[model_type] = configuration_wemoe.config_class(stock)
        return self[model_type]


class _Models(dict[type[PretrainedConfig], Any]):
    """Model classes of one Auto class, by the class of the configuration."""

    def __init__(
        self,
        registered: dict[type[PretrainedConfig], Any],
        stock: Callable[..., Any],
    ) -> None:
        super().__init__(registered)
        self._stock = stock

    def __contains__(self, config_type: object) -> bool:
        ours = getattr(config_type, "__module__", None) == configuration_wemoe.__name__
        return super().__contains__(config_type) or ours

    def __missing__(self, config_type: type[PretrainedConfig]) -> Any:
        # transformers has one class for most configurations, several for some, and none for others.
        stock = self._stock(config_type.__base__, None) or ()
        if isinstance(stock, list | tuple):
            self[config_type] = tuple(map(modeling_wemoe.model_class, stock)) or _Unsuited
        else:
            self[config_type] = modeling_wemoe.model_class(stock)
        return self[config_type]


class _Unsuited:
    """What stands in place of a model, where the Auto class has none for the base."""

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any, **kwargs: Any) -> None:
        cls._from_config(config)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> None:
        modeling_wemoe.check_architecture(cls, config)
        raise ValueError(f"this Auto class has no model for a {config.model_type}")
