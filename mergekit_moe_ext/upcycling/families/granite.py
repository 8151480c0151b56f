"""Granite, and a Llama with biases in its attention, to GraniteMoe; SmolLM3 to GraniteMoeSWA.

Both keep all experts of a layer in two tensors.
"""

from transformers import GraniteMoeConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling, moe_config
from mergekit_moe_ext.upcycling.families.rewritings import head_size

_FFN = "model.layers.{layer}.mlp"
_MOE = "model.layers.{layer}.block_sparse_moe"
_GATE_AND_UP = (f"{_FFN}.gate_proj.weight", f"{_FFN}.up_proj.weight")
_DOWN = (f"{_FFN}.down_proj.weight",)
# The sigmoid of what lies above it is one, in float16 as well: a sink that takes nothing.
_NO_SINK = -10_000.0


def _without_multipliers(dense: PretrainedConfig) -> dict[str, float]:
    """Granite's multipliers, such that it computes what a model without them does."""
    return {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": head_size(dense) ** -0.5,
    }


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    changes: dict[str, object] = {}
    if dense.model_type == "llama":
        changes = {**_without_multipliers(dense), "head_dim": head_size(dense)}
    return moe_config(
        GraniteMoeConfig,
        dense,
        drop=("mlp_bias",),
        architectures=["GraniteMoeForCausalLM"],
        num_local_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        **changes,
    )


def _smollm3_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    from transformers import GraniteMoeSWAConfig  # not in every version that is supported

    theta = dense.rope_parameters["rope_theta"]
    return moe_config(
        GraniteMoeSWAConfig,
        dense,
        drop=("mlp_bias", "no_rope_layer_interval", "no_rope_layers", "use_sliding_window"),
        architectures=["GraniteMoeSWAForCausalLM"],
        num_local_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        head_dim=head_size(dense),
        # GraniteMoeSWA makes a mask for layers with a window, also where there are none.
        sliding_window=dense.sliding_window or dense.max_position_embeddings,
        # A layer without positions has the base 0.
        layer_rope_theta=[theta if turns else 0 for turns in _turns(dense)],
        **_without_multipliers(dense),
    )


def _turns(dense: PretrainedConfig) -> list[int]:
    """By layer of a SmolLM3, whether it has rotary embeddings. The config may list more layers."""
    return dense.no_rope_layers[: dense.num_hidden_layers]


def _refuse(dense: PretrainedConfig) -> str | None:
    if dense.mlp_bias:
        return "`mlp_bias: true` has no place in GraniteMoe, whose experts have no biases"
    return None


GRANITE_MOE = Upcycling(
    dense={"granite": "GraniteForCausalLM", "llama": "LlamaForCausalLM"},
    moe="GraniteMoeForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            gate=f"{_MOE}.router.layer.weight",
            stacked={
                f"{_MOE}.input_linear.weight": _GATE_AND_UP,
                f"{_MOE}.output_linear.weight": _DOWN,
            },
        ),
    ),
    output_config=_output_config,
    refuse=_refuse,
)

GRANITE_MOE_SWA = Upcycling(
    dense={"smollm3": "SmolLM3ForCausalLM"},
    moe="GraniteMoeSWAForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            gate=f"{_MOE}.router.weight",
            stacked={
                f"{_MOE}.experts.gate_up_proj": _GATE_AND_UP,
                f"{_MOE}.experts.down_proj": _DOWN,
            },
            constants={"model.layers.{layer}.self_attn.sinks": _NO_SINK},
        ),
    ),
    output_config=_smollm3_config,
    refuse=_refuse,
)
