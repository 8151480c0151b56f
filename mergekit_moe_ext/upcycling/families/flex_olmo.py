"""OLMo 2, and OLMo 3 where no layer has a window, to FlexOlmo.

In these models the norm comes after the FFN, so the gate reads the residual stream itself.
"""

from transformers import FlexOlmoConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling, moe_config
from mergekit_moe_ext.upcycling.families.qwen import EXPERTS, GATE


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    changes = {}
    if dense.model_type == "olmo3":  # which has one set per kind of layer
        rope = dense.rope_parameters
        changes["rope_parameters"] = rope.get("full_attention", rope)
    return moe_config(
        FlexOlmoConfig,
        dense,
        drop=("layer_types", "sliding_window"),
        architectures=["FlexOlmoForCausalLM"],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=True,
        **changes,
    )


def _refuse_windows(dense: PretrainedConfig) -> str | None:
    if "sliding_attention" in (getattr(dense, "layer_types", None) or ()):
        return "some of its layers have a sliding window, which FlexOlmo does not have"
    return None


FLEX_OLMO = Upcycling(
    dense={"olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM"},
    moe="FlexOlmoForCausalLM",
    stacks=(Stack(ffn="model.layers.{layer}.mlp", experts=EXPERTS, gate=GATE),),
    output_config=_output_config,
    refuse=_refuse_windows,
)
