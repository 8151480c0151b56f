"""Routed adapters for PEFT: many LoRA experts on one base model, mixed per input by a router.

Importing this package is what makes PEFT know the adapter type `ROUTED_LORA`.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from _mergekit_moe_ext_common.versions import warn_of_newer_hosts
from peft_routing.config import RoutedLoraConfig
from peft_routing.given import given_coefficients
from peft_routing.model import RoutedLoraModel
from peft_routing.routers import Router
from peft_routing.types import PeftType

__all__ = ["PeftType", "RoutedLoraConfig", "RoutedLoraModel", "Router", "given_coefficients"]

warn_of_newer_hosts()
# `register_peft_method` takes only the names in PEFT's own enum.
PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROUTED_LORA] = RoutedLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ROUTED_LORA] = RoutedLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.ROUTED_LORA] = RoutedLoraModel.prefix
