"""Llama and Mistral to Mixtral, and the models that are one of them but for how their tensors are
stored: Phi-3 and Phi-4, Gemma 1, and a Qwen2 without biases.
"""

from transformers import MixtralConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families.declaration import (
    Rewriting,
    Stack,
    Upcycling,
    moe_config,
)
from mergekit_moe_ext.upcycling.families.rewritings import (
    halves,
    head_size,
    one_plus,
    queries_keys_values,
    scaled_embedding_and_head,
)

_NO_BIASES = ("attention_bias", "mlp_bias")
# What has no meaning in Mixtral, once `_refuse` has seen it.
_DENSE_ONLY = (
    *_NO_BIASES,
    "embd_pdrop",
    "layer_types",
    "max_window_layers",
    "original_max_position_embeddings",  # it stands in the rotary embeddings' parameters as well
    "resid_pdrop",
    "use_bidirectional_attention",
    "use_sliding_window",
)
_LAYER = "model.layers.{layer}"
_EXPERT = f"{_LAYER}.block_sparse_moe.experts.{{expert}}"
_FFN = f"{_LAYER}.mlp"
_ATTENTION = f"{_LAYER}.self_attn"


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int
) -> PretrainedConfig:
    changes: dict[str, object] = {}
    if dense.model_type == "gemma":
        changes["tie_word_embeddings"] = False
    if dense.model_type == "phi3":
        rope = {**dense.rope_parameters}
        rope.pop("partial_rotary_factor", None)  # it is 1, or `_refuse` has complained
        changes["rope_parameters"] = rope
    return moe_config(
        MixtralConfig,
        dense,
        drop=_DENSE_ONLY,
        architectures=["MixtralForCausalLM"],
        num_local_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        head_dim=head_size(dense),
        **changes,
    )


def turns_a_part(dense: PretrainedConfig) -> bool:
    """Whether the rotary embeddings of a Phi-3 leave a part of each head as it is."""
    return dense.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0


def _refuse(dense: PretrainedConfig) -> str | None:
    for key in _NO_BIASES:
        if getattr(dense, key, False):
            return f"`{key}: true` has no place in Mixtral, whose layers have no biases"
    if dense.model_type == "phi3" and turns_a_part(dense):
        return "its rotary embeddings turn only a part of each head, and Mixtral's turn all of it"
    if getattr(dense, "use_bidirectional_attention", None):
        return "`use_bidirectional_attention` has no place in Mixtral"
    if dense.model_type == "qwen2" and "sliding_attention" in (dense.layer_types or ()):
        return "some of its layers have a sliding window, and in Mixtral all have it or none"
    return None


FUSED_PROJECTIONS = (
    Rewriting(
        f"{_ATTENTION}.qkv_proj.weight",
        tuple(f"{_ATTENTION}.{part}_proj.weight" for part in "qkv"),
        queries_keys_values,
    ),
    Rewriting(
        f"{_FFN}.gate_up_proj.weight",
        (f"{_FFN}.gate_proj.weight", f"{_FFN}.up_proj.weight"),
        halves,
    ),
)
_GEMMA = (
    Rewriting(
        "model.embed_tokens.weight",
        ("model.embed_tokens.weight", "lm_head.weight"),
        scaled_embedding_and_head,
    ),
    *(
        Rewriting(name, (name,), one_plus)
        for name in (
            f"{_LAYER}.input_layernorm.weight",
            f"{_LAYER}.post_attention_layernorm.weight",
            "model.norm.weight",
        )
    ),
)
MIXTRAL = Upcycling(
    dense={
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "phi3": "Phi3ForCausalLM",
        "gemma": "GemmaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    },
    moe="MixtralForCausalLM",
    stacks=(
        Stack(
            ffn=_FFN,
            experts={
                f"{_FFN}.gate_proj.weight": f"{_EXPERT}.w1.weight",
                f"{_FFN}.down_proj.weight": f"{_EXPERT}.w2.weight",
                f"{_FFN}.up_proj.weight": f"{_EXPERT}.w3.weight",
            },
            gate=f"{_LAYER}.block_sparse_moe.gate.weight",
        ),
    ),
    output_config=_output_config,
    refuse=_refuse,
    rewritings={
        "phi3": FUSED_PROJECTIONS,
        "gemma": _GEMMA,
        "qwen2": tuple(Rewriting(f"{_ATTENTION}.{part}_proj.bias") for part in "qkv"),
    },
)
