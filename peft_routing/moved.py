"""Names of modules that transformers has moved since an adapter was trained, as in models of images
and texts, whose decoder was `language_model.model` and is `model.language_model`.
"""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

PATTERNS = ("rank_pattern", "alpha_pattern")  # of a configuration, by names of modules
PREFIX = "base_model.model."


def in_names_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The tensors of an adapter, their keys with the names that the modules have in a model, and
    whether transformers alone knew any of these names.

    Keys whose modules are not there are left as they are.
    """
    converted = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), dict(tensors))
    # PEFT converts where the renaming is registered for the model's type. For some, Qwen2-VL among
    # them, it is registered for the class.
    modules = {name.replace(".base_layer", "") for name, _ in model.named_modules()}
    renamed = {}
    is_unknown_to_peft = False
    for key, tensor in converted.items():
        module, factor, rest = key.removeprefix(PREFIX).partition(".lora_")
        if factor and module not in modules:
            moved = name_in(model, f"{module}.weight").removesuffix(".weight")
            if moved in modules:
                key = f"{PREFIX}{moved}{factor}{rest}"
                is_unknown_to_peft = True
        renamed[key] = tensor
    return renamed, is_unknown_to_peft


def patterns_in(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose patterns of ranks and alphas have the names of a model's modules.

    PEFT renames no pattern, so this is for adapters whose factors it would not rename either.
    """
    renamed = dict(config)
    for name in PATTERNS:
        pattern = {}
        for key, value in (config.get(name) or {}).items():
            # A key is a regular expression, of which most are plain names, some of them escaped.
            plain = key.removeprefix("^").replace("\\.", ".")
            moved = name_in(model, f"{plain}.weight").removesuffix(".weight")
            pattern[key if moved == plain else moved] = value
        renamed[name] = pattern
    return renamed


def name_in(model: Any, name: str) -> str:
    """The name that transformers gives a tensor of a checkpoint when it loads it into a model."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return name
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    return rename_source_key(name, renamings, [])[0]
