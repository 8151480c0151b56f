"""T5 to Switch Transformers: an initialisation for training, not the same function.

Switch sends a token to one expert and multiplies its output by the gate's probability for it, so
that even with equal sources the FFNs count for less than in T5. And an expert takes at most
`expert_capacity` tokens of a sequence; later tokens skip the layer.
"""

from transformers import PretrainedConfig, SwitchTransformersConfig

from mergekit_moe_ext.upcycling.families.declaration import Stack, Upcycling, moe_config

_DENSE_ONLY = ("classifier_dropout", "feed_forward_proj", "is_gated_act", "scale_decoder_outputs")


def _output_config(
    dense: PretrainedConfig, num_experts: int, experts_per_token: int, **options: int
) -> PretrainedConfig:
    return moe_config(
        SwitchTransformersConfig,
        dense,
        drop=_DENSE_ONLY,
        architectures=["SwitchTransformersForConditionalGeneration"],
        num_experts=num_experts,
        num_sparse_encoder_layers=dense.num_layers,
        num_sparse_decoder_layers=dense.num_decoder_layers,
        # T5's default; without this key the decoder's inputs cannot be made from labels.
        decoder_start_token_id=getattr(dense, "decoder_start_token_id", dense.pad_token_id),
        **options,
    )


def _refuse(dense: PretrainedConfig) -> str | None:
    if dense.is_gated_act:
        return (
            f"`feed_forward_proj: {dense.feed_forward_proj}` (T5 v1.1, Flan-T5) is a gated FFN, "
            "which has no place in Switch Transformers; T5 v1.0 fits"
        )
    if not dense.scale_decoder_outputs:
        return (
            "its head is not tied to its embedding (T5 v1.1); Switch Transformers scales and "
            "ties it, as T5 v1.0"
        )
    return None


def _stack(name: str, layers: str, position: int) -> Stack:
    ffn = f"{name}.block.{{layer}}.layer.{position}"
    dense = f"{ffn}.DenseReluDense"
    expert = f"{ffn}.mlp.experts.expert_{{expert}}"
    return Stack(
        ffn=dense,
        experts={f"{dense}.{part}.weight": f"{expert}.{part}.weight" for part in ("wi", "wo")},
        gate=f"{ffn}.mlp.router.classifier.weight",
        layers=layers,
    )


SWITCH = Upcycling(
    dense={"t5": "T5ForConditionalGeneration"},
    moe="SwitchTransformersForConditionalGeneration",
    stacks=(_stack("encoder", "num_layers", 1), _stack("decoder", "num_decoder_layers", 2)),
    output_config=_output_config,
    refuse=_refuse,
    experts_per_token=1,
    options=frozenset({"expert_capacity"}),
)
