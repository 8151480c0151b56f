"""The adapter type's name, as PEFT's own enum would hold it."""

from enum import Enum


class PeftType(str, Enum):  # noqa: UP042  (as the type of PEFT itself)
    """The adapter type as PEFT needs it: a string to compare, hash and save, with a `.value`."""

    ROUTED_LORA = "ROUTED_LORA"
