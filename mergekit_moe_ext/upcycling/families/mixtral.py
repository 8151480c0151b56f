"""Llama and Mistral to Mixtral."""

from transformers import MixtralConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling, moe_config

_NO_BIASES = ("attention_bias", "mlp_bias")
_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
_FFN = "model.layers.{layer}.mlp"


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    return moe_config(
        MixtralConfig,
        dense,
        drop=_NO_BIASES,
        architectures=["MixtralForCausalLM"],
        num_local_experts=num_experts,
        num_experts_per_tok=experts_per_token,
    )


def _refuse(dense: PretrainedConfig) -> str | None:
    for key in _NO_BIASES:
        if getattr(dense, key, False):
            return f"`{key}: true` has no place in Mixtral, whose layers have no biases"
    return None


MIXTRAL = Upcycling(
    dense={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    moe="MixtralForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            experts={
                f"{_FFN}.gate_proj.weight": f"{_EXPERT}.w1.weight",
                f"{_FFN}.down_proj.weight": f"{_EXPERT}.w2.weight",
                f"{_FFN}.up_proj.weight": f"{_EXPERT}.w3.weight",
            },
            gate="model.layers.{layer}.block_sparse_moe.gate.weight",
        ),
    ),
    output_config=_output_config,
    refuse=_refuse,
)
