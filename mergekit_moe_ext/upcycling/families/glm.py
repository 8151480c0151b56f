"""GLM, and a Phi-4 whose rotary embeddings turn a part of each head, to GLM4-MoE.

Its gate takes sigmoids, which sum to one once they are normalised. Its shared expert stays silent
until it is trained.
"""

from transformers import Glm4MoeConfig, PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.upcycling.families.declaration import (
    Rewriting,
    Stack,
    Upcycling,
    moe_config,
    shared_expert,
)
from mergekit_moe_ext.upcycling.families.mixtral import FUSED_PROJECTIONS
from mergekit_moe_ext.upcycling.families.qwen import EXPERTS, GATE
from mergekit_moe_ext.upcycling.families.rewritings import (
    halves,
    head_size,
    heads_from_interleaved,
)

_FFN = "model.layers.{layer}.mlp"
_ATTENTION = "model.layers.{layer}.self_attn"


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    if num_experts < 2:
        raise UserError("GLM4-MoE chooses by the best two experts: list the model twice")
    return moe_config(
        Glm4MoeConfig,
        dense,
        drop=("embd_pdrop", "resid_pdrop", "sliding_window"),
        architectures=["Glm4MoeForCausalLM"],
        head_dim=head_size(dense),
        n_routed_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        n_shared_experts=1,
        moe_intermediate_size=dense.intermediate_size,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        use_qk_norm=False,
        num_mtp_layers=0,
        attention_bias=getattr(dense, "attention_bias", False),
    )


def _refuse(dense: PretrainedConfig) -> str | None:
    window = getattr(dense, "sliding_window", None)
    if window and window < dense.max_position_embeddings:
        return f"`sliding_window: {window}` has no place in GLM4-MoE"
    return None


GLM4_MOE = Upcycling(
    dense={"glm": "GlmForCausalLM", "phi3": "Phi3ForCausalLM"},
    moe="Glm4MoeForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            experts=EXPERTS,
            gate=GATE,
            # With a zero `down_proj` the shared expert adds nothing, and still gets a gradient.
            merged={
                f"{_FFN}.shared_experts.gate_proj.weight": f"{_FFN}.gate_proj.weight",
                f"{_FFN}.shared_experts.up_proj.weight": f"{_FFN}.up_proj.weight",
            },
            zeros=(
                f"{_FFN}.shared_experts.down_proj.weight",
                f"{_FFN}.gate.e_score_correction_bias",
            ),
            shared_expert=shared_expert(_FFN, f"{_FFN}.shared_experts"),
        ),
    ),
    output_config=_output_config,
    refuse=_refuse,
    rewritings={
        "phi3": FUSED_PROJECTIONS,
        "glm": (
            Rewriting(
                f"{_FFN}.gate_up_proj.weight",
                (f"{_FFN}.gate_proj.weight", f"{_FFN}.up_proj.weight"),
                halves,
            ),
            *(
                Rewriting(name, (name,), heads_from_interleaved)
                for part in ("q_proj", "k_proj")
                for name in (f"{_ATTENTION}.{part}.weight", f"{_ATTENTION}.{part}.bias")
            ),
        ),
    },
)
