"""Llama and Mistral to Mixtral. Exact: with equal sources the output's logits are the dense model's."""

from transformers import MixtralConfig, PretrainedConfig

from mergekit_moe_ext.families import Upcycling

# Of the dense model only. `model_type` in particular: passed on it stays "mistral" in memory, and
# transformers then silently skips the weight conversion.
_DENSE_ONLY = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "attention_bias",
    "mlp_bias",
    "model_type",
    "pretraining_tp",
    "transformers_version",
}


def _output_config(dense: PretrainedConfig, num_experts: int, experts_per_token: int) -> PretrainedConfig:
    kept = {key: value for key, value in dense.to_dict().items() if key not in _DENSE_ONLY}
    return MixtralConfig(
        **kept,
        architectures=["MixtralForCausalLM"],
        num_local_experts=num_experts,
        num_experts_per_tok=experts_per_token,
    )


def _refuse(dense: PretrainedConfig) -> str | None:
    for key in ("attention_bias", "mlp_bias"):
        if getattr(dense, key, False):
            return f"`{key}: true` has no place in Mixtral, whose layers have no biases"
    return None


MIXTRAL = Upcycling(
    dense={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    moe="MixtralForCausalLM",
    ffn={
        f"model.layers.{{layer}}.mlp.{dense}.weight": (
            f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{moe}.weight"
        )
        for dense, moe in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
    },
    gate="model.layers.{layer}.block_sparse_moe.gate.weight",
    output_config=_output_config,
    refuse=_refuse,
)
