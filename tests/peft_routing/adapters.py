"""Ordinary LoRA adapters of a tiny model, as PEFT itself saves them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from tests.conftest import SPECIAL_TOKENS, TINY

NAMES = ("math", "code", "law")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def has_native_adapters() -> bool:
    """Whether transformers loads adapters itself (`model.load_adapter`), for which it may want a
    newer PEFT.
    """
    return Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


def skip_without_native_adapters() -> None:
    if not has_native_adapters():
        pytest.skip(f"transformers wants peft {MIN_PEFT_VERSION} for adapters that it loads itself")


def make_base(family: str = "llama", dtype: Any = torch.float32, **config: Any) -> Any:
    """The same random model each time, in evaluation mode."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **{**TINY, **SPECIAL_TOKENS, **config})
    return AutoModelForCausalLM.from_config(made).to(dtype).eval()


def save_lora(path: Path, seed: int, base: Any = None, **config: Any) -> Path:
    """A LoRA adapter with random factors, both of them."""
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
        **config,
    }
    model = get_peft_model(make_base() if base is None else base, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(path)
    return path


def save_experts(root: Path, names: tuple[str, ...] = NAMES, **config: Any) -> dict[str, str]:
    """One adapter per name, and where they lie."""
    return {name: str(save_lora(root / name, seed, **config)) for seed, name in enumerate(names, 1)}
