"""Architectures that transformers does not have; a merge copies their files into its output."""

import inspect
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_relative_import_files

from mergekit_moe_ext.modeling import (
    modeling_clip_heads,
    modeling_sequence_moe,
    modeling_wemoe,
    on_demand,
)
from mergekit_moe_ext.modeling.configuration_sequence_moe import SequenceMoEConfig
from mergekit_moe_ext.modeling.modeling_clip_heads import WEMoECLIPVisionForImageClassification
from mergekit_moe_ext.modeling.modeling_sequence_moe import SequenceMoEForCausalLM

AutoConfig.register(SequenceMoEConfig.model_type, SequenceMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(SequenceMoEConfig, SequenceMoEForCausalLM, exist_ok=True)
on_demand.install()
# It is made of a class that transformers does not have, so that nothing makes it on demand.
AutoModelForImageClassification.register(
    WEMoECLIPVisionForImageClassification.config_class,
    WEMoECLIPVisionForImageClassification,
    exist_ok=True,
)


def find_architecture(name: str) -> type[PreTrainedModel] | None:
    """The class of one of our architectures; None for any other name."""
    for module in (modeling_sequence_moe, modeling_wemoe, modeling_clip_heads):
        architecture = getattr(module, name, None)
        if architecture is not None and architecture.__module__ == module.__name__:
            return architecture
    return None


def modeling_files(name: str) -> list[Path]:
    """The files that transformers needs beside the weights; none for any other architecture."""
    architecture = find_architecture(name)
    if architecture is None:
        return []
    first = inspect.getfile(architecture)
    return [Path(first), *map(Path, get_relative_import_files(first))]
