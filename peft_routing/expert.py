"""Ordinary LoRA adapters as experts: how they are read, and whether they fit a model."""

import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from _mergekit_moe_ext_common.checkpoints import check_finite, damage
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import explained

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_CANNOT_BE_ROUTED = {
    "use_dora": "DoRA divides by the norm of the merged weight, so its updates do not add up",
    "modules_to_save": "whole modules cannot be mixed",
    "lora_bias": "biases are not routed",
    "target_parameters": "its updates are of parameters, not of linear modules",
    "layer_replication": "its layers are not those of the base model",
    "trainable_token_indices": "embeddings have no hidden state to route by",
    "alora_invocation_tokens": "aLoRA is off before its invocation tokens",
    "arrow_config": "it is a router already",
    "use_qalora": "QA-LoRA pools its input",
    "lora_ga_config": "LoRA-GA changes the base model's weights",
    "kasa_config": "KaSA changes the base model's weights",
    "monteclora_config": "MonteCLoRA draws its updates at random",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Expert:
    """A LoRA adapter: A (rank, in), B (out, rank) and the scaling of B A, by module."""

    name: str
    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]
    scalings: dict[str, float]

    def rank(self, module: str) -> int:
        """The rank of the update at a module, 0 where there is none."""
        return self.factors[module][0].shape[0] if module in self.factors else 0


def read_expert(name: str, path: str) -> Expert:
    """The expert in a directory, or in `owner/name[/subfolder]` on the Hub.

    Weights are read from safetensors only: nothing is unpickled. `UserError` for what cannot be
    routed, `FileNotFoundError` for what is not there.
    """
    where = f"expert {name!r} ({path})"
    config_file = _file(path, CONFIG_NAME, where)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{where}: {damage(config_file, error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{where}: {config_file} holds no names with values")
    _check_config(config, where)
    weights = _file(path, SAFETENSORS_WEIGHTS_NAME, where)
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{where}: {damage(weights, error)}") from error
    check_finite(tensors, f"{where}, in {weights.name},")
    factors = _pairs(tensors, where)
    with explained(f"{where}: {config_file} cannot be used", path):
        scalings = {
            module: _scaling(config, module, a.shape[0], where)
            for module, (a, _) in factors.items()
        }
    stated = {key: value for key, value in config.items() if value not in (None, {}, [])}
    return Expert(name, stated, factors, scalings)


def _file(path: str, name: str, where: str) -> Path:
    """A file of an adapter, downloaded where it is on the Hub."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        if not (directory / name).is_file():
            hint = ""
            if name == SAFETENSORS_WEIGHTS_NAME and (directory / "adapter_model.bin").exists():
                hint = (
                    "; adapter_model.bin is a pickle: load it with PEFT once and save it as "
                    "safetensors"
                )
            raise FileNotFoundError(f"{where}: {directory} has no {name}{hint}")
        return directory / name
    owner, _, rest = path.partition("/")
    repository, _, subfolder = rest.partition("/")
    if path.startswith((".", "/", "~")) or not repository:
        raise FileNotFoundError(f"{where}: there is no such directory")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", name, subfolder=subfolder or None))
    except (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise FileNotFoundError(
            f"{where}: no such directory, and no {name} on the Hub: {str(error).splitlines()[0]}"
        ) from error


def _check_config(config: dict[str, Any], where: str) -> None:
    """`UserError` for an adapter whose update is not a sum of B A at linear modules."""
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: its peft_type is {config.get('peft_type')}; only LORA adapters are routed"
        )
    for key, reason in _CANNOT_BE_ROUTED.items():
        if config.get(key):
            raise UserError(f"{where} cannot be routed: {key} is {config[key]}; {reason}")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{where} cannot be routed: bias is {config['bias']!r}; biases are not routed"
        )
    if str(config.get("init_lora_weights", "")).startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{where} cannot be routed: init_lora_weights is {config['init_lora_weights']!r}, "
            "which changes the base model; save it with path_initial_model_for_weight_conversion "
            "first"
        )


def _pairs(tensors: dict[str, Tensor], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and B (out, rank) of each module. `UserError` for any other tensor."""
    halves: dict[str, dict[str, Tensor]] = {}
    # Embeddings come first: beside their factors a file may hold the base model's own embedding,
    # and the reason for the factors says more.
    for key in tensors:
        if "lora_embedding" in key:
            reason = "embeddings have no hidden state to route by"
            raise UserError(f"{where} cannot be routed: {key}: {reason}")
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            reason = "it is not a LoRA factor"
            if ".base_layer." in key:
                reason = (
                    "it is the base model's own; save the adapter with save_embedding_layers=False"
                )
            raise UserError(f"{where} cannot be routed: {key}: {reason}")
        if tensor.ndim != 2:
            raise UserError(
                f"{where} cannot be routed: {key} has {tensor.ndim} dimensions; only linear "
                "modules are"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise UserError(f"{where}: {SAFETENSORS_WEIGHTS_NAME} is empty")
    for module, pair in halves.items():
        if len(pair) == 1:
            raise UserError(f"{where}: {module} has lora_{min(pair)} but not the other factor")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(
                f"{where}: {module}: A is {tuple(pair['A'].shape)} and B is "
                f"{tuple(pair['B'].shape)}"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _scaling(config: dict[str, Any], module: str, rank: int, where: str) -> float:
    """The scaling of a module's update: alpha / r, or alpha / sqrt(r) for rsLoRA.

    `rank_pattern` and `alpha_pattern` hold for the modules that PEFT takes them for. `UserError`
    where the stored rank is not the stated one.
    """

    def value(name: str, pattern: str) -> Any:
        patterns = config.get(pattern) or {}
        default = config.get(name, getattr(LoraConfig, name))
        return patterns.get(get_pattern_key(patterns.keys(), module), default)

    if rank != value("r", "rank_pattern"):
        raise UserError(
            f"{where}: {module} has rank {rank}, and {CONFIG_NAME} says "
            f"{value('r', 'rank_pattern')}"
        )
    alpha = value("lora_alpha", "alpha_pattern")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_experts(experts: Sequence[Expert], model: nn.Module) -> None:
    """Checks that the experts fit the model.

    `UserError` where they do not; a warning where they were trained on a base model of another
    name.
    """
    # Where other adapters are on the model, PEFT has wrapped its modules; experts name the modules
    # as they were before.
    modules = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    for expert in experts:
        for name, (a, b) in expert.factors.items():
            where = f"expert {expert.name!r}: {name}"
            if name not in modules:
                last = name.rpartition(".")[2]
                alike = next((other for other in modules if other.endswith(last)), None)
                hint = f", which has {alike}" if alike else ""
                raise UserError(f"{where} is not in the base model{hint}")
            base = modules[name]
            if isinstance(base, BaseTunerLayer):
                base = base.get_base_layer()
            if not _is_linear(base):
                raise UserError(
                    f"{where} is a {type(base).__name__}; only linear modules are routed"
                )
            in_features, out_features = _get_in_out_features(base)
            if (a.shape[1], b.shape[0]) != (in_features, out_features):
                raise UserError(
                    f"{where} maps {a.shape[1]} to {b.shape[0]}, and {in_features} to "
                    f"{out_features} in the base model"
                )
    _warn_of_other_bases(experts, model.__dict__.get("name_or_path"))


def _warn_of_other_bases(experts: Sequence[Expert], base_name: str | None) -> None:
    """A warning where experts name another base model than this one."""
    others = {}
    for expert in experts:
        trained_on = expert.config.get("base_model_name_or_path")
        if base_name and trained_on and trained_on != base_name:
            others[expert.name] = trained_on
    if others:
        first = next(iter(others))
        warnings.warn(
            f"the base model is {base_name}, but {len(others)} of {len(experts)} experts were "
            f"trained on another: {first!r} on {others[first]}",
            stacklevel=3,
        )


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is linear, quantised or not.

    Some libraries keep `nn.Linear` for a quantised module. The classes of others (GPTQ, AWQ, HQQ)
    have the names of its two sizes, which convolutions and embeddings do not have.
    """
    return isinstance(module, nn.Linear | Conv1D) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def layout(experts: Sequence[Expert], model: nn.Module) -> list[dict[str, Any]]:
    """The modules that any expert changes, in the model's order, grouped by the experts' ranks and
    scalings there, as a configuration saves them.
    """
    touched: set[str] = set()
    for expert in experts:
        touched.update(expert.factors)
    groups: dict[tuple[Any, Any], list[str]] = {}
    for name, _ in model.named_modules():
        if name in touched:
            ranks = tuple(expert.rank(name) for expert in experts)
            scalings = tuple(float(expert.scalings.get(name, 0.0)) for expert in experts)
            groups.setdefault((ranks, scalings), []).append(name)
    return [
        {"modules": modules, "ranks": list(ranks), "scalings": list(scalings)}
        for (ranks, scalings), modules in groups.items()
    ]
