"""Ordinary LoRA adapters of a tiny model, as PEFT saves them, and routed adapters made of them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_routing import RoutedLoraConfig
from tests.conftest import SPECIAL_TOKENS, TINY

NAMES = ("math", "code", "law")
TARGETS = ["q_proj", "v_proj", "down_proj"]
# Routers whose choice depends on the input, for experts of these names.
ROUTERS: dict[str, dict[str, Any]] = {
    "arrow": {"top_k": 2},
    "linear": {"init": "arrow"},
    "hierarchical": {"init": "arrow", "clusters": {"math": 0, "code": 0, "law": 1}},
    "mlp": {"top_k": 2},
}


def has_native_adapters() -> bool:
    """True if all of transformers' own methods for adapters work, some of which ask for a PEFT that
    is new enough.
    """
    return Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


def skip_without_native_adapters() -> None:
    """Skips the test where some of transformers' own methods for adapters raise."""
    if not has_native_adapters():
        pytest.skip(f"transformers needs PEFT {MIN_PEFT_VERSION} for adapters of its own")


def make_base(family: str = "llama", dtype: Any = torch.float32, **config: Any) -> Any:
    """The same random model each time, in evaluation mode."""
    torch.manual_seed(0)
    made = AutoConfig.for_model(family, **{**TINY, **SPECIAL_TOKENS, **config})
    return AutoModelForCausalLM.from_config(made).to(dtype).eval()


def save_lora(
    path: Path, seed: int, base: Any = None, *, a_seed: int | None = None, **config: Any
) -> Path:
    """A LoRA adapter with random factors, both of them. Adapters of one `a_seed` share their A."""
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
        **config,
    }
    model = get_peft_model(make_base() if base is None else base, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    of_a = generator if a_seed is None else torch.Generator().manual_seed(a_seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                drawn_from = of_a if ".lora_A" in name else generator
                parameter.copy_(torch.randn(parameter.shape, generator=drawn_from) * 0.2)
    model.save_pretrained(path)
    return path


def save_experts(root: Path, names: tuple[str, ...] = NAMES, **config: Any) -> dict[str, str]:
    """The paths of the adapters, one per name, with a seed each."""
    return {name: str(save_lora(root / name, seed, **config)) for seed, name in enumerate(names, 1)}


def make_routed(experts: dict[str, str], router: str, **changes: Any) -> Any:
    """A routed model with one of `ROUTERS`, in evaluation mode. Its choices differ visibly between
    sequences.
    """
    torch.manual_seed(1)
    config = RoutedLoraConfig(experts=experts, router=router, **{**ROUTERS[router], **changes})
    model = get_peft_model(make_base(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "routed_lora_router" in name and parameter.ndim == 2:
                parameter.mul_(4)
    return model
