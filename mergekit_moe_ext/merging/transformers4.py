"""What transformers 4, and the servers built on it, look for under names that transformers 5 left.

transformers 5 writes the base of rotary embeddings below `rope_parameters` and some numbers of
experts under another name; transformers 4 looks in the old place, finds nothing, and silently takes
a default. An old key is written where both read the same model with it. It is tried here: with the
key, this transformers must read the very configuration that it reads without.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

# Where transformers 4 looks for the base of the embeddings of one type of layers.
_BASES_BY_LAYER_TYPE = {
    "full_attention": ("rope_theta", "global_rope_theta"),
    "sliding_attention": ("rope_local_base_freq", "local_rope_theta"),
}


def add_old_keys(directory: Path, config: PretrainedConfig) -> None:
    """Adds the old keys to the configurations of model and tokenizer that lie in a directory."""
    path = directory / CONFIG_NAME
    stored = json.loads(path.read_text(encoding="utf-8"))
    complete = _with_old_keys(config, stored)
    if complete != stored:
        path.write_text(json.dumps(complete, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = directory / TOKENIZER_CONFIG_FILE
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        complete = _tokenizer_with_old_names(stored)
        if complete != stored:
            text = json.dumps(complete, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def _with_old_keys(config: PretrainedConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    complete = dict(stored)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(stored.get(name), dict):
            complete[name] = _with_old_keys(part, stored[name])
    reading = _as_read(config, complete)
    for key, value in _old_keys(config, stored):
        if key in complete:
            continue
        attempt = {**complete, key: value}
        try:
            is_alike = _as_read(config, attempt) == reading
        except (KeyError, TypeError, ValueError):  # with this key it cannot be read at all
            is_alike = False
        if is_alike:
            complete = attempt
    return complete


def _as_read(config: PretrainedConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no infinity, and transformers writes it in a way of its own.
    values = type(config)._decode_special_floats(copy.deepcopy(dict(stored)))
    return type(config).from_dict(values).to_dict()


def _old_keys(config: PretrainedConfig, stored: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The old keys and their values, in an order in which each can be added alone.

    `rope_scaling` follows the other keys, since reading it replaces what was not set before.
    """
    rope = stored.get("rope_parameters") or {}
    if "rope_type" in rope:
        yield "rope_theta", rope.get("rope_theta")
        if "partial_rotary_factor" in rope:
            yield "partial_rotary_factor", rope["partial_rotary_factor"]
        yield "rope_scaling", _scaling(rope)
    for layer_type, names in _BASES_BY_LAYER_TYPE.items():
        of_layers = rope.get(layer_type)
        if isinstance(of_layers, dict):
            for name in names:
                yield name, of_layers.get("rope_theta")
    if isinstance(rope.get("full_attention"), dict):
        yield "rope_scaling", _scaling(rope["full_attention"])
    # What the class calls by one name and writes by another, as Qwen3-MoE its number of experts.
    own_names = {field.name for field in fields(config)}
    for own_name, written_name in config.attribute_map.items():
        if own_name in own_names and written_name in stored:
            yield own_name, stored[written_name]


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` as transformers 4 has it: None for embeddings that are not scaled."""
    elsewhere = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in elsewhere}
    return None if scaling == {"rope_type": "default"} else scaling


def _tokenizer_with_old_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings under names that both versions know."""
    complete = dict(stored)
    if stored.get("tokenizer_class") == "TokenizersBackend":
        complete["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 takes only a mapping under the new name, 5 takes a list under either.
    extra = stored.get("extra_special_tokens")
    if isinstance(extra, list):
        del complete["extra_special_tokens"]
        complete.setdefault("additional_special_tokens", extra)
    return complete
