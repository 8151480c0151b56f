"""HunYuan dense to HunYuan MoE, whose shared expert stays silent until it is trained."""

from transformers import HunYuanMoEV1Config, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import (
    Stack,
    Upcycling,
    moe_config,
    shared_expert,
)
from mergekit_moe_ext.upcycling.families.qwen import EXPERTS

_FFN = "model.layers.{layer}.mlp"


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    return moe_config(
        HunYuanMoEV1Config,
        dense,
        architectures=["HunYuanMoEV1ForCausalLM"],
        num_experts=num_experts,
        moe_topk=experts_per_token,
    )


HUNYUAN_MOE = Upcycling(
    dense={"hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM"},
    moe="HunYuanMoEV1ForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            experts=EXPERTS,
            gate=f"{_FFN}.gate.wg.weight",
            # With a zero `down_proj` the shared expert adds nothing, and still gets a gradient.
            merged={
                f"{_FFN}.shared_mlp.gate_proj.weight": f"{_FFN}.gate_proj.weight",
                f"{_FFN}.shared_mlp.up_proj.weight": f"{_FFN}.up_proj.weight",
            },
            zeros=(f"{_FFN}.shared_mlp.down_proj.weight",),
            shared_expert=shared_expert(_FFN, f"{_FFN}.shared_mlp"),
        ),
    ),
    output_config=_output_config,
    refuse=lambda dense: None,
)
