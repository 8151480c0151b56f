"""Architectures that transformers does not have, each a few files that a merge copies into its
output.

They are imported when they are first used: importing this package alone imports nothing of
transformers.
"""

import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mergekit_moe_ext.modeling.configuration_sequence_moe import SequenceMoEConfig
    from mergekit_moe_ext.modeling.modeling_clip_heads import WEMoECLIPVisionForImageClassification
    from mergekit_moe_ext.modeling.modeling_sequence_moe import SequenceMoEForCausalLM

__all__ = [
    "SequenceMoEConfig",
    "SequenceMoEForCausalLM",
    "WEMoECLIPVisionForImageClassification",
    "find_architecture",
    "modeling_files",
]
_MODULES = {
    "SequenceMoEConfig": "configuration_sequence_moe",
    "SequenceMoEForCausalLM": "modeling_sequence_moe",
    "WEMoECLIPVisionForImageClassification": "modeling_clip_heads",
}
_WITH_MODELS = (
    "modeling_sequence_moe",
    "modeling_wemoe",
    "modeling_clip_heads",
    "modeling_upcycled_moe",
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def find_architecture(name: str) -> "type[PreTrainedModel] | None":
    """The class of one of our architectures; None for any other name."""
    for module_name in _WITH_MODELS:
        module = importlib.import_module(f"{__name__}.{module_name}")
        architecture = getattr(module, name, None)
        if architecture is not None and architecture.__module__ == module.__name__:
            return architecture
    return None


def modeling_files(name: str) -> list[Path]:
    """The files that transformers needs beside the weights of an architecture of ours; none for any
    other.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    architecture = find_architecture(name)
    if architecture is None:
        return []
    first = inspect.getfile(architecture)
    return [Path(first), *map(Path, get_relative_import_files(first))]
