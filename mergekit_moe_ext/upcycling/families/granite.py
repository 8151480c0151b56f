"""Granite to GraniteMoe, which keeps all experts of a layer in two tensors."""

from transformers import GraniteMoeConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling, moe_config

_FFN = "model.layers.{layer}.mlp"
_MOE = "model.layers.{layer}.block_sparse_moe"


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    return moe_config(
        GraniteMoeConfig,
        dense,
        drop=("mlp_bias",),
        architectures=["GraniteMoeForCausalLM"],
        num_local_experts=num_experts,
        num_experts_per_tok=experts_per_token,
    )


def _refuse(dense: PretrainedConfig) -> str | None:
    if dense.mlp_bias:
        return "`mlp_bias: true` has no place in GraniteMoe, whose experts have no biases"
    return None


GRANITE_MOE = Upcycling(
    dense={"granite": "GraniteForCausalLM"},
    moe="GraniteMoeForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            gate=f"{_MOE}.router.layer.weight",
            stacked={
                f"{_MOE}.input_linear.weight": (
                    f"{_FFN}.gate_proj.weight",
                    f"{_FFN}.up_proj.weight",
                ),
                f"{_MOE}.output_linear.weight": (f"{_FFN}.down_proj.weight",),
            },
        ),
    ),
    output_config=_output_config,
    refuse=_refuse,
)
