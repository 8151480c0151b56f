"""Finding a routed adapter's configuration and its base model, with errors for people."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import load_config, load_model
from _mergekit_moe_ext_common.options import Reading
from peft_routing.config import RoutedLoraConfig


def load_adapter_config(adapter: str) -> RoutedLoraConfig:
    """Of a routed adapter in a directory. `UserError` if it is none."""
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (Path(adapter) / name).is_file():
            raise UserError(f"{adapter} has no {name}: name a directory that `compose` wrote")
    try:
        config = RoutedLoraConfig.from_pretrained(adapter)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{adapter}: {error}") from error
    if not isinstance(config, RoutedLoraConfig) or not config.is_composed:
        raise UserError(f"{adapter} holds no routed adapter; `peft-route compose` makes one")
    return config


def base_of(base: str | None, config: RoutedLoraConfig, reading: Reading) -> tuple[str, Any]:
    """The name and configuration of `base`, or of the base model that the adapter names."""
    name = base or config.base_model_name_or_path
    if not name:
        raise UserError("the adapter does not say what its base model is: give --base")
    return name, load_config(name, reading)


def load_routed(
    adapter: str,
    config: RoutedLoraConfig,
    base: str,
    base_config: Any,
    reading: Reading,
    *,
    is_trainable: bool = False,
) -> Any:
    """The base model with the adapter on it. `UserError` where they do not fit."""
    return _put_on(
        load_model(base, base_config, reading, dtype="auto"), adapter, config, base, is_trainable
    )


def load_on_empty(
    adapter: str, config: RoutedLoraConfig, base: str, base_config: Any, reading: Reading
) -> Any:
    """The adapter on its base model's architecture, without its weights. `UserError` as above."""
    return _put_on(empty_model(base_config, reading), adapter, config, base, is_trainable=False)


def _put_on(
    model: nn.Module, adapter: str, config: RoutedLoraConfig, base: str, is_trainable: bool
) -> Any:
    try:
        return PeftModel.from_pretrained(model, adapter, config=config, is_trainable=is_trainable)
    except (ValueError, RuntimeError, SafetensorError) as error:
        first, *more = str(error).splitlines()
        reason = " ".join([first, *more[:1]])
        raise UserError(
            f"{adapter} does not fit {base}, a {type(model).__name__}: {reason}"
        ) from error


def empty_model(config: Any, reading: Reading) -> nn.Module:
    """The architecture on the meta device: names and shapes without weights."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return architecture(config)
        auto = transformers.AutoModelForCausalLM
        return auto.from_config(config, trust_remote_code=reading.trust_remote_code)
