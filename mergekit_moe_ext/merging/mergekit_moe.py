"""Configurations in the form of mergekit's other command, `mergekit-moe`, in the form of this
package.

In that form `base_model` gives all but the FFNs. Here that is a merge of the shared parameters by
`task_arithmetic` in which no task vector has any weight.
"""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pydantic
import yaml

from _mergekit_moe_ext_common.errors import UserError

if TYPE_CHECKING:  # every merge imports this file, and few need that one
    from mergekit.moe.config import Expert, MoEMergeConfig

# Architectures that mergekit-moe writes, by the beginnings of their names there.
_ARCHITECTURES = ("mixtral", "qwen moe", "qwen3 moe", "deepseek moe")
# What differs from mergekit-moe, by the gate mode (`hidden` is for all that begin so).
_UNLIKE = {
    "random": "its gates are drawn with the standard deviation of the architecture's "
    "initializer_range; those of mergekit-moe with 1",
    "uniform_random": "its gates have the standard deviation of the architecture's "
    "initializer_range; those of mergekit-moe are bounded by 1 / sqrt(hidden_size)",
    "hidden": "its gates are made of the states after the norm, which a gate receives; "
    "mergekit-moe takes them before the norm",
}


def is_mergekit_moe(document: Any) -> bool:
    """Whether a configuration has the form of `mergekit-moe`."""
    if not isinstance(document, Mapping) or "merge_method" in document:
        return False
    experts = document.get("experts")
    return isinstance(experts, list) and any(
        isinstance(expert, Mapping) and "source_model" in expert for expert in experts
    )


def converted(document: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The same merge in this package's form, and its YAML with a comment on what differs.

    `UserError` for a configuration that mergekit-moe itself would not take, and for what has no
    like here.
    """
    from mergekit.moe.config import MoEMergeConfig

    _check_keys(document)
    try:
        config = MoEMergeConfig.model_validate(document)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{place}: {first['msg']} (in the form of mergekit-moe)") from error
    mode = config.gate_mode
    models = [_model(index, expert, mode) for index, expert in enumerate(config.experts)]
    parameters: dict[str, Any] = {"gate_mode": mode, "experts_per_token": config.experts_per_token}
    sources = {expert.source_model for expert in config.experts}
    if sources != {config.base_model}:
        parameters |= {"shared": "task_arithmetic", "weight": 0.0}
    comments = ["Converted from the form of mergekit-moe."]
    if mode.startswith("hidden"):
        comments.append(_UNLIKE["hidden"])
    elif mode in _UNLIKE:
        comments.append(_UNLIKE[mode])
    if config.architecture:
        comments.append(
            f"architecture: {config.architecture} was left out: the models get the mixture of "
            "their own family"
        )
    shared = _shared_expert(config)
    if shared is not None:
        parameters["shared_expert"] = shared
        if any(expert.positive_prompts for expert in config.shared_experts or ()):
            comments.append("the gate of the shared expert starts at zero, not from its prompts")
    result: dict[str, Any] = {
        "merge_method": "moe",
        "base_model": str(config.base_model),
        "models": models,
        "parameters": parameters,
    }
    if config.dtype:
        result["dtype"] = config.dtype
    lines = [f"# {comment}" for comment in comments]
    body = yaml.safe_dump(result, sort_keys=False, allow_unicode=True)
    return result, "\n".join([*lines, body])


def _check_keys(document: Mapping[str, Any]) -> None:
    """`UserError` for a key that mergekit-moe would drop, and for an architecture that it has
    not.
    """
    from mergekit.moe.config import Expert, MoEMergeConfig

    places: list[tuple[str, Any, Any]] = [
        ("the configuration", document, MoEMergeConfig.model_fields)
    ]
    for key in ("experts", "shared_experts"):
        listed = document.get(key) or []
        if not isinstance(listed, list):
            raise UserError(f"`{key}` is not a list of experts")
        for index, expert in enumerate(listed):
            places.append((f"{key}[{index}]", expert, Expert.model_fields))
    for where, values, known in places:
        if not isinstance(values, Mapping):
            raise UserError(f"{where} is not a mapping of keys to values")
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"
                raise UserError(f"unknown key `{name}` in {where}{hint}")
    architecture = document.get("architecture")
    if architecture is not None and not isinstance(architecture, str):
        raise UserError(f"architecture: {architecture!r} is not a name")
    if architecture and not any(name.startswith(architecture.lower()) for name in _ARCHITECTURES):
        raise UserError(
            f"architecture: mergekit-moe has no {architecture!r}; leave the key out, and the "
            "models get the mixture of their own family"
        )
    if architecture and architecture.lower().startswith("deepseek"):
        raise UserError(
            "architecture: the DeepSeek that mergekit-moe writes is not one of transformers; leave "
            "the key out, and the models get the mixture of their own family"
        )


def _model(index: int, expert: "Expert", mode: str) -> dict[str, Any]:
    """An expert as an entry of `models:`."""
    for key in ("noise_scale", "residual_scale"):
        if getattr(expert, key) is not None:
            raise UserError(
                f"experts[{index}]: `{key}` has no like here, where experts are taken unchanged; "
                "leave it out"
            )
    parameters: dict[str, Any] = {}
    if mode not in ("random", "uniform_random"):
        for key in ("positive_prompts", "negative_prompts"):
            if getattr(expert, key):
                parameters[key] = getattr(expert, key)
    entry: dict[str, Any] = {"model": str(expert.source_model)}
    if parameters:
        entry["parameters"] = parameters
    return entry


def _shared_expert(config: "MoEMergeConfig") -> str | None:
    """The model whose FFNs every token goes through, if there is one."""
    shared = config.shared_experts or []
    if not shared:
        return None
    if len(shared) > 1:
        raise UserError(f"shared_experts names {len(shared)} models; there can be one")
    for key in ("noise_scale", "residual_scale"):
        if getattr(shared[0], key) is not None:
            raise UserError(f"shared_experts[0]: `{key}` has no like here; leave it out")
    return str(shared[0].source_model)
