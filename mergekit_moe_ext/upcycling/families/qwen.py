"""Qwen2, Seed-OSS and Ministral to Qwen2-MoE, and Qwen3 to Qwen3-MoE or, where some of its layers
have a sliding window, to Mellum.

By default transformers does not normalise the weights of the chosen experts, which an upcycled
model needs.
"""

from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from mergekit_moe_ext.upcycling.families.declaration import (
    Stack,
    Upcycling,
    moe_config,
    shared_expert,
)

_FFN = "model.layers.{layer}.mlp"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERTS = {
    f"{_FFN}.{name}.weight": f"{_FFN}.experts.{{expert}}.{name}.weight" for name in PROJECTIONS
}
GATE = f"{_FFN}.gate.weight"


def _qwen2_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    layer_types = getattr(dense, "layer_types", None)
    if not layer_types:
        layer_types = ["full_attention"] * dense.num_hidden_layers
    return moe_config(
        Qwen2MoeConfig,
        dense,
        drop=("attention_bias", "attention_out_bias", "mlp_bias", "residual_dropout"),
        architectures=["Qwen2MoeForCausalLM"],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        shared_expert_intermediate_size=dense.intermediate_size,
        norm_topk_prob=True,
        # Qwen2 has these biases, but no key that says so.
        qkv_bias=dense.model_type == "qwen2" or getattr(dense, "attention_bias", False),
        # As the dense model resolved them: Qwen2-MoE has another rule for which layers have a
        # window.
        layer_types=layer_types,
        use_sliding_window="sliding_attention" in layer_types,
    )


def _refuse_other_biases(dense: PretrainedConfig) -> str | None:
    for key in ("attention_out_bias", "mlp_bias"):
        if getattr(dense, key, False):
            return (
                f"`{key}: true` has no place in Qwen2-MoE, which has biases on queries, keys "
                "and values only"
            )
    if dense.model_type in ("cwm", "ministral") and getattr(dense, "attention_bias", False):
        return (
            "`attention_bias: true` puts a bias on the attention's output, which has no place "
            "in Qwen2-MoE"
        )
    return None


def _qwen3_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    return moe_config(
        Qwen3MoeConfig,
        dense,
        drop=("max_window_layers", "layer_types"),
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        norm_topk_prob=True,
        # Qwen3-MoE reads no layer types: with a window, all layers have it.
        use_sliding_window=dense.layer_types[0] == "sliding_attention",
    )


def _mellum_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    from transformers import MellumConfig  # not in every version that is supported

    return moe_config(
        MellumConfig,
        dense,
        drop=("max_window_layers", "use_sliding_window"),
        architectures=["MellumForCausalLM"],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        norm_topk_prob=True,
        # Mellum has one set of them for each type of layers.
        rope_parameters=dict.fromkeys(sorted(set(dense.layer_types)), dense.rope_parameters),
    )


def _refuse_mixed_windows(dense: PretrainedConfig) -> str | None:
    if len(set(dense.layer_types)) > 1:
        return (
            "`use_sliding_window: true` gives only some of its layers a window (see "
            "`max_window_layers`), but Qwen3-MoE has it in all layers or in none"
        )
    return None


QWEN2_MOE = Upcycling(
    dense={
        "qwen2": "Qwen2ForCausalLM",
        "seed_oss": "SeedOssForCausalLM",
        "ministral": "MinistralForCausalLM",
        "cwm": "CwmForCausalLM",
    },
    moe="Qwen2MoeForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            experts=EXPERTS,
            gate=GATE,
            # The architecture has a shared expert, which every token goes through. Its own gate has
            # no bias, so it cannot be shut; a zero `down_proj` keeps it silent, and still gets a
            # gradient as soon as it is trained.
            merged={
                f"{_FFN}.shared_expert.gate_proj.weight": f"{_FFN}.gate_proj.weight",
                f"{_FFN}.shared_expert.up_proj.weight": f"{_FFN}.up_proj.weight",
            },
            zeros=(f"{_FFN}.shared_expert.down_proj.weight", f"{_FFN}.shared_expert_gate.weight"),
            shared_expert=shared_expert(_FFN, f"{_FFN}.shared_expert"),
        ),
    ),
    output_config=_qwen2_config,
    refuse=_refuse_other_biases,
)

QWEN3_MOE = Upcycling(
    dense={"qwen3": "Qwen3ForCausalLM"},
    moe="Qwen3MoeForCausalLM",
    stacks=(Stack(ffn=_FFN, experts=EXPERTS, gate=GATE),),
    output_config=_qwen3_config,
    refuse=_refuse_mixed_windows,
)

MELLUM = Upcycling(
    dense={"qwen3": "Qwen3ForCausalLM"},
    moe="MellumForCausalLM",
    stacks=QWEN3_MOE.stacks,
    output_config=_mellum_config,
    refuse=lambda dense: None,
)
