"""Architectures that transformers does not have; each a pair of files that a merge copies into its output."""

import inspect
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mergekit_moe_ext.modeling import modeling_sequence_moe, modeling_wemoe, on_demand
from mergekit_moe_ext.modeling.configuration_sequence_moe import SequenceMoEConfig
from mergekit_moe_ext.modeling.modeling_sequence_moe import SequenceMoEForCausalLM

AutoConfig.register(SequenceMoEConfig.model_type, SequenceMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(SequenceMoEConfig, SequenceMoEForCausalLM, exist_ok=True)
on_demand.install()


def find_architecture(name: str) -> type[PreTrainedModel] | None:
    """The class of one of our architectures; None for any other name."""
    for module in (modeling_sequence_moe, modeling_wemoe):
        if (found := getattr(module, name, None)) is not None and found.__module__ == module.__name__:
            return found
    return None


def modeling_file(name: str) -> Path | None:
    """The file that transformers needs beside the weights, where the architecture is one of ours."""
    found = find_architecture(name)
    return None if found is None else Path(inspect.getfile(found))
