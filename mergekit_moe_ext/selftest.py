"""The self-test of the architectures that this package adds to transformers;
`mergekit-moe-ext doctor` runs it.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from _mergekit_moe_ext_common.selftest import PROMPT, VOCABULARY, main
from mergekit_moe_ext.modeling import SequenceMoEConfig, SequenceMoEForCausalLM
from mergekit_moe_ext.modeling.configuration_wemoe import config_class
from mergekit_moe_ext.modeling.modeling_wemoe import model_class

_TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def sequence_mixture() -> Any:
    """Two random Llamas, of which each prompt chooses one by its perplexity."""
    expert = {**_TINY, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config = SequenceMoEConfig(
        experts=[expert, expert],
        hidden_size=_TINY["hidden_size"],
        vocab_size=VOCABULARY,
        embedding="separate",
        routing="perplexity",
        routing_tokens=PROMPT,
        experts_per_sequence=1,
        logit_softcaps=[None, None],
        tie_word_embeddings=False,
    )
    return _at_random(SequenceMoEForCausalLM(config))


def weight_ensembling_model() -> Any:
    """A random Llama whose MLPs weigh two random task vectors by the prompt."""
    linears = ("gate_proj", "up_proj", "down_proj")
    groups = {}
    for layer in range(_TINY["num_hidden_layers"]):
        mlp = f"model.layers.{layer}.mlp"
        groups[mlp] = [f"{mlp}.{linear}" for linear in linears]
    ensembling = {"experts": ["one", "two"], "groups": groups, "kept": {}, "routing_tokens": PROMPT}
    config = config_class(LlamaConfig)(**_TINY, ensembling=ensembling)
    return _at_random(model_class(LlamaForCausalLM)(config))


def _at_random(model: Any) -> Any:
    """The model with random parameters and task vectors, so large that another choice of experts
    would show.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim > 1:
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


if __name__ == "__main__":
    main(
        {
            "a sequence mixture": sequence_mixture,
            "a weight-ensembling model": weight_ensembling_model,
        }
    )
