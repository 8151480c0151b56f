"""Qwen2 to Qwen2-MoE and Qwen3 to Qwen3-MoE.

transformers does not normalise the weights of the chosen experts by default; an upcycled model needs it to.
"""

from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from mergekit_moe_ext.families import Stack, Upcycling, moe_config

_FFN = "model.layers.{layer}.mlp"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERTS = {f"{_FFN}.{name}.weight": f"{_FFN}.experts.{{expert}}.{name}.weight" for name in PROJECTIONS}
GATE = f"{_FFN}.gate.weight"


def _qwen2_config(dense: PretrainedConfig, num_experts: int, experts_per_token: int) -> PretrainedConfig:
    return moe_config(
        Qwen2MoeConfig,
        dense,
        architectures=["Qwen2MoeForCausalLM"],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        shared_expert_intermediate_size=dense.intermediate_size,
        norm_topk_prob=True,
        qkv_bias=True,
    )


def _qwen3_config(dense: PretrainedConfig, num_experts: int, experts_per_token: int) -> PretrainedConfig:
    return moe_config(
        Qwen3MoeConfig,
        dense,
        drop=("max_window_layers", "layer_types"),
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        norm_topk_prob=True,
    )


def _refuse_mixed_windows(dense: PretrainedConfig) -> str | None:
    if len(set(dense.layer_types)) > 1:
        return (
            "`use_sliding_window: true` gives only some of its layers a window (see `max_window_layers`), "
            "but Qwen3-MoE has it in all layers or in none"
        )
    return None


QWEN2_MOE = Upcycling(
    dense={"qwen2": "Qwen2ForCausalLM"},
    moe="Qwen2MoeForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            experts=EXPERTS,
            gate=GATE,
            # The architecture has a shared expert that every token passes. Its own gate has no bias, so it cannot be
            # shut; a zero `down_proj` keeps it silent, and still gets a gradient as soon as it is trained.
            merged={
                f"{_FFN}.shared_expert.{name}.weight": f"{_FFN}.{name}.weight" for name in ("gate_proj", "up_proj")
            },
            zeros=(f"{_FFN}.shared_expert.down_proj.weight", f"{_FFN}.shared_expert_gate.weight"),
        ),
    ),
    output_config=_qwen2_config,
    refuse=lambda dense: None,
)

QWEN3_MOE = Upcycling(
    dense={"qwen3": "Qwen3ForCausalLM"},
    moe="Qwen3MoeForCausalLM",
    stacks=(Stack(ffn=_FFN, experts=EXPERTS, gate=GATE),),
    output_config=_qwen3_config,
    refuse=_refuse_mixed_windows,
)
