"""OLMo 2 to FlexOlmo. The norm stands after the FFN there, so the gate reads the residual stream itself."""

from transformers import FlexOlmoConfig, PretrainedConfig

from mergekit_moe_ext.families import Stack, Upcycling, moe_config
from mergekit_moe_ext.families.qwen import EXPERTS, GATE


def _output_config(dense: PretrainedConfig, num_experts: int, experts_per_token: int) -> PretrainedConfig:
    return moe_config(
        FlexOlmoConfig,
        dense,
        architectures=["FlexOlmoForCausalLM"],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=True,
    )


FLEX_OLMO = Upcycling(
    dense={"olmo2": "Olmo2ForCausalLM"},
    moe="FlexOlmoForCausalLM",
    stacks=(Stack(ffn="model.layers.{layer}.mlp", experts=EXPERTS, gate=GATE),),
    output_config=_output_config,
    refuse=lambda dense: None,
)
