"""Llama and Mistral to Mixtral."""

from transformers import MixtralConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling, moe_config

_NO_BIASES = ("attention_bias", "mlp_bias")


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
            ffn="model.layers.{layer}.mlp",
            experts={
                f"model.layers.{{layer}}.mlp.{dense}.weight": (
                    f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{moe}.weight"
                )
                for dense, moe in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
            },
            gate="model.layers.{layer}.block_sparse_moe.gate.weight",
        ),
    ),
    output_config=_output_config,
    refuse=_refuse,
)
