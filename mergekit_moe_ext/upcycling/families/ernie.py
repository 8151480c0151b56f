"""Ernie 4.5 to Ernie 4.5 MoE."""

from transformers import Ernie4_5_MoeConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import (
    Stack,
    Upcycling,
    moe_config,
    shared_expert,
)
from mergekit_moe_ext.upcycling.families.qwen import EXPERTS, GATE


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    return moe_config(
        Ernie4_5_MoeConfig,
        dense,
        architectures=["Ernie4_5_MoeForCausalLM"],
        moe_num_experts=num_experts,
        moe_k=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        moe_num_shared_experts=0,
        moe_layer_start_index=0,
    )


def _refuse(dense: PretrainedConfig) -> str | None:
    if dense.use_bias:
        return "`use_bias: true` has no place in Ernie 4.5 MoE, whose experts have no biases"
    return None


ERNIE_MOE = Upcycling(
    dense={"ernie4_5": "Ernie4_5ForCausalLM"},
    moe="Ernie4_5_MoeForCausalLM",
    stacks=(
        Stack(
            ffn="model.layers.{layer}.mlp",
            experts=EXPERTS,
            gate=GATE,
            zeros=("model.layers.{layer}.mlp.moe_statics.e_score_correction_bias",),
            shared_expert=shared_expert(
                "model.layers.{layer}.mlp", "model.layers.{layer}.mlp.shared_experts"
            ),
        ),
    ),
    output_config=_output_config,
    refuse=_refuse,
    with_shared_expert={"moe_num_shared_experts": 1},
)
