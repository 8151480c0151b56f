"""PEFT's tables of adapter types, in which ours is entered."""

from typing import Any


def register(peft: Any) -> None:
    """Makes the adapter type `ROUTED_LORA` known to PEFT. Calling it again changes nothing."""
    from peft_routing.config import RoutedLoraConfig
    from peft_routing.model import RoutedLoraModel
    from peft_routing.types import PeftType

    # `register_peft_method` takes only the names in PEFT's own enum.
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROUTED_LORA] = RoutedLoraConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ROUTED_LORA] = RoutedLoraModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.ROUTED_LORA] = RoutedLoraModel.prefix
