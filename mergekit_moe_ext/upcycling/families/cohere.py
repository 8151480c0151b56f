"""Cohere2 (Command R7B, Command A), and Cohere (Command R) without norms of queries and keys, to
Cohere2-MoE.
"""

from transformers import Cohere2MoeConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling, moe_config
from mergekit_moe_ext.upcycling.families.qwen import EXPERTS, GATE


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    changes: dict[str, object] = {}
    if dense.model_type == "cohere":
        # Cohere2-MoE has rotary embeddings in layers with a window alone. One that is as long as a
        # text may be hides nothing.
        changes["layer_types"] = ["sliding_attention"] * dense.num_hidden_layers
        changes["sliding_window"] = dense.max_position_embeddings
    return moe_config(
        Cohere2MoeConfig,
        dense,
        # Cohere2 does not use `rms_norm_eps`, and in Cohere2-MoE it would change the norms.
        drop=("rms_norm_eps", "use_qk_norm"),
        architectures=["Cohere2MoeForCausalLM"],
        # Cohere2 may leave it out, and Cohere2-MoE has another default.
        head_dim=getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        num_shared_experts=0,
        expert_selection_fn="softmax",
        norm_topk_prob=True,
        mlp_layer_types=["sparse"] * dense.num_hidden_layers,
        **changes,
    )


def _refuse(dense: PretrainedConfig) -> str | None:
    if getattr(dense, "use_qk_norm", False):
        return "`use_qk_norm: true` (Command R+) has no place in Cohere2-MoE"
    return None


COHERE2_MOE = Upcycling(
    dense={"cohere2": "Cohere2ForCausalLM", "cohere": "CohereForCausalLM"},
    moe="Cohere2MoeForCausalLM",
    stacks=(Stack(ffn="model.layers.{layer}.mlp", experts=EXPERTS, gate=GATE),),
    output_config=_output_config,
    refuse=_refuse,
)
