"""The adapter type's name, as PEFT's own enum would hold it."""

from enum import Enum


class PeftType(str, Enum):
    """PEFT compares, hashes and saves adapter types as strings, and asks for their `.value`."""

    ROUTED_LORA = "ROUTED_LORA"
