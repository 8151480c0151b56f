"""A family of one's own, in one file: LFM2 to LFM2-MoE, for the merge method `moe`.

Importing this file registers the family. Run as a script, it is `mergekit-yaml` with that family:

    python examples/extending_family.py config.yml out
"""

from mergekit.scripts.run_yaml import main
from transformers import Lfm2Config, Lfm2MoeConfig, PretrainedConfig

from mergekit_moe_ext.upcycling.families import Stack, Upcycling, moe_config, register_family

FFN = "model.layers.{layer}.feed_forward"


def ffn_width(dense: Lfm2Config) -> int:
    """The width of the FFNs: LFM2's config states a number that its model may adjust."""
    width = dense.intermediate_size
    if not dense.block_auto_adjust_ff_dim:
        return width
    width = int(dense.block_ffn_dim_multiplier * int(2 * width / 3))
    multiple = dense.block_multiple_of
    return multiple * ((width + multiple - 1) // multiple)


def output_config(dense: Lfm2Config, num_experts: int, experts_per_token: int) -> PretrainedConfig:
    """The output's config: the dense one, without what LFM2-MoE does not know, and the experts."""
    return moe_config(
        Lfm2MoeConfig,
        dense,
        drop=(
            "block_auto_adjust_ff_dim",
            "block_ffn_dim_multiplier",
            "block_multiple_of",
            "full_attn_idxs",
        ),
        architectures=["Lfm2MoeForCausalLM"],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=ffn_width(dense),
        num_dense_layers=0,
        # Without this the weights of the chosen experts do not sum to one, and equal experts would
        # not compute what the dense model does.
        norm_topk_prob=True,
        use_expert_bias=False,
    )


def refuse(dense: Lfm2Config) -> str | None:
    """Everything that an LFM2 may be has its place in LFM2-MoE."""
    return None


LFM2_MOE = Upcycling(
    dense={"lfm2": "Lfm2ForCausalLM"},
    moe="Lfm2MoeForCausalLM",
    stacks=(
        Stack(
            ffn=FFN,
            experts={
                f"{FFN}.{name}.weight": f"{FFN}.experts.{{expert}}.{name}.weight"
                for name in ("w1", "w2", "w3")
            },
            gate=f"{FFN}.gate.weight",
        ),
    ),
    output_config=output_config,
    refuse=refuse,
)

register_family(LFM2_MOE)

if __name__ == "__main__":
    main()
