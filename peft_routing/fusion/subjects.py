"""What is put on the base model to be measured: nothing, one adapter, or many fused."""

import hashlib
import json
from typing import Any

from peft import get_peft_model

from peft_routing.adapter_files import fingerprint
from peft_routing.config import RoutedLoraConfig
from peft_routing.fusion.cache import Subject


def base_alone() -> Subject:
    """The base model as it is."""
    return Subject("base model", "", lambda base: base)


def one_expert(name: str, path: str) -> Subject:
    """One adapter, as an expert that has the coefficient 1 everywhere.

    `UserError` and `FileNotFoundError` where its files cannot be read.
    """
    own = fingerprint(path, f"expert {name!r} ({path})")
    return Subject(
        f"expert {name!r}",
        _digest("expert", own),
        lambda base: get_peft_model(base, alone({name: path})),
    )


def alone(experts: dict[str, str]) -> RoutedLoraConfig:
    """Experts that are all weighed alike, their updates mixed: one of them is mixed with none."""
    return RoutedLoraConfig(experts=dict(experts), router="uniform", mixing="full")


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
