"""Architectures that transformers does not have; each a pair of files that a merge copies into its output."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mergekit_moe_ext.modeling import modeling_sequence_moe
from mergekit_moe_ext.modeling.configuration_sequence_moe import SequenceMoEConfig
from mergekit_moe_ext.modeling.modeling_sequence_moe import SequenceMoEForCausalLM

ARCHITECTURES: dict[str, type[PreTrainedModel]] = {"SequenceMoEForCausalLM": SequenceMoEForCausalLM}

AutoConfig.register(SequenceMoEConfig.model_type, SequenceMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(SequenceMoEConfig, SequenceMoEForCausalLM, exist_ok=True)


def modeling_file(architecture: str) -> Path | None:
    """The file that transformers needs beside the weights, where the architecture is one of ours."""
    if architecture not in ARCHITECTURES:
        return None
    assert modeling_sequence_moe.__file__ is not None
    return Path(modeling_sequence_moe.__file__)
