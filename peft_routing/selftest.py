"""The self-test of a routed adapter; `mergekit-moe-ext doctor` runs it."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from _mergekit_moe_ext_common.selftest import PROMPT, VOCABULARY, main
from peft_routing import RoutedLoraConfig


def routed_adapter() -> Any:
    """Two random LoRA adapters on a random Llama, weighed by the prompt."""
    experts = {}
    with tempfile.TemporaryDirectory() as directory:
        for seed, name in enumerate(("one", "two"), start=1):
            lora = get_peft_model(_base(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in lora.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator))
            experts[name] = str(Path(directory) / name)
            lora.save_pretrained(experts[name])
        config = RoutedLoraConfig(
            experts=experts, router="arrow", top_k=1, granularity="sequence", routing_tokens=PROMPT
        )
        return get_peft_model(_base(), config).eval()


def _base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
        )
    )


if __name__ == "__main__":
    main({"a routed adapter": routed_adapter})
