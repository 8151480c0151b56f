"""Every causal, encoder-decoder, vision and image-text architecture of the installed transformers,
at tiny size: what `merge_method: moe` makes of it, and whether `caem` takes it if it is a mixture.

    python -m tests.mergekit_moe_ext.upcycling.architectures docs/upcycling.md docs/caem.md

tries all of them and writes the tables into these pages (`make architectures`).
"""

import copy
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import hub_state
from mergekit_moe_ext.merging.wrappers import language_config
from mergekit_moe_ext.mixtures.experts import experts_per_token, moe_layers
from mergekit_moe_ext.modeling.modeling_upcycled_moe import TokenRouter, model_class
from mergekit_moe_ext.upcycling.generic import read_dense, upcycled_config
from mergekit_moe_ext.upcycling.wrapped import family_of_all

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "vision": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
# By outcome, the heading of its column in the table.
HEADINGS = {
    "exact": "becomes the stock mixture",
    "generic": "becomes a generic mixture",
    "refused": "is refused, because",
    "merged": "can be merged",
    "untried": "was not tried, because",
}
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
MOST_PARAMETERS = 5_000_000
# Sizes by the names that configurations have for them.
NAMES_OF_SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim model_dim "
    "image_size projection_dim",
    64: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner "
    "max_position_embeddings n_positions max_seq_len n_ctx max_source_positions "
    "max_target_positions",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers "
    "num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads depth",
    4: "num_attention_heads num_heads n_head n_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts",
    8: "head_dim d_kv patch_size",
    96: "vocab_size decoder_vocab_size encoder_vocab_size",
    0: "pad_token_id hidden_size_per_layer_input",
    1: "bos_token_id eos_token_id decoder_start_token_id first_k_dense_replace n_group topk_group "
    "encoder_sparse_step decoder_sparse_step",
}
SIZES = {name: size for size, names in NAMES_OF_SIZES.items() for name in names.split()}
# What else some configurations need in order to be tiny.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "swinv2": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "swin": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "donut-swin": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}


@dataclass(frozen=True)
class Result:
    """What became of one architecture.

    outcome: exact, generic or refused by `moe`, merged or refused by `caem`; or untried where no
        tiny model could be built.
    detail: the stock mixture, what is routed, or the reason; yes for what `caem` merges.
    """

    kind: str
    model_type: str
    architecture: str
    outcome: str
    detail: str


def architectures() -> Iterator[tuple[str, str, str]]:
    """Kind, model type and class of each."""
    for kind, mapping in KINDS.items():
        for model_type, names in mapping.items():
            for name in dict.fromkeys([names] if isinstance(names, str) else names):
                yield kind, model_type, name


def tiny_config(config_class: Any) -> Any:
    """A configuration of this class with small numbers, in the parts of it as well."""
    known = {*inspect.signature(config_class).parameters}
    known |= set(getattr(config_class, "__dataclass_fields__", ()))
    fields = getattr(config_class, "__dataclass_fields__", {})
    values: dict[str, Any] = {}
    for name, size in SIZES.items():
        default = getattr(fields.get(name), "default", None)
        if name in known and not isinstance(default, list | tuple):
            values[name] = size
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(config_class(), name, None)
        if part is not None:
            values[name] = tiny_config(type(part)).to_dict()
    values |= SPECIAL.get(config_class.model_type, {})
    return config_class(**values)


def inputs_of(kind: str, config: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(2, 16).reshape(2, 7) * 5 % 90 + 2
    if kind == "vision":
        size = getattr(config, "image_size", 32)
        channels = getattr(config, "num_channels", 3)
        size = size if isinstance(size, int) else size[0]
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(2, channels, size, size, generator=generator)}
    if config.is_encoder_decoder and kind != "causal":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return {"input_ids": ids}


def with_equal_experts(dense: Any, config: Any) -> Any:
    """The upcycled model whose experts are all the FFNs of `dense`, with random routers."""
    mixture = model_class(type(dense))(config)
    generator = torch.Generator().manual_seed(1)
    values = dense.state_dict()
    with torch.no_grad():
        for name, tensor in mixture.state_dict(keep_vars=True).items():
            if name in values:
                tensor.copy_(values[name])  # to all experts, where they are in front
            else:
                tensor.normal_(generator=generator)
    return mixture.eval()


def largest_difference(kind: str, config: Any) -> float:
    """By how much the logits of a dense model and of its mixture of equal experts differ, relative
    to the largest.
    """
    torch.manual_seed(0)
    dense = getattr(transformers, config.architectures[0])(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in dense.parameters():  # some start as zeros
            parameter += 0.05 * torch.randn_like(parameter)
    ffns = read_dense(config).ffns
    mixture = with_equal_experts(dense, upcycled_config(config, ffns, 4, 2))
    inputs = inputs_of(kind, config)
    with torch.no_grad():
        wanted, got = dense(**inputs).logits, mixture(**inputs).logits
    # Else nothing was compared: the routers must have had tokens to send.
    assert any(isinstance(module, TokenRouter) for module in mixture.modules())
    assert torch.isfinite(wanted).all()
    return ((wanted - got).abs().max() / wanted.abs().max()).item()


def tried(kind: str, model_type: str, architecture: str) -> Result:
    """What `moe` makes of an architecture. Any error but `UserError` passes through."""

    def result(outcome: str, detail: str) -> Result:
        return Result(kind, model_type, architecture, outcome, detail)

    try:
        config = tiny_config(CONFIG_MAPPING[model_type])
        config.architectures = [architecture]
        with torch.device("meta"):
            getattr(transformers, architecture)(copy.deepcopy(config))
    except Exception as error:  # of any kind: whatever a configuration checks
        lines = str(error).strip().splitlines() or [type(error).__name__]
        line = lines[0] if isinstance(error, ImportError) else lines[-1]
        return result("untried", line.strip()[:120])
    try:
        family = family_of_all({"it": copy.deepcopy(config)})  # type: ignore[dict-item]
    except UserError:
        pass
    else:
        inner = language_config(family.output_config(config, 4, family.experts_per_token or 2))
        detail = inner.architectures[0]
        return result("exact", detail if detail == family.moe else f"itself around a {detail}")
    try:
        ffns = read_dense(config).ffns
        hub_state(upcycled_config(config, ffns, 4, 2))
    except UserError as error:
        return result("refused", error.message)
    is_pair = {"encoder" in name.split(".") for name in ffns} == {True, False}
    return result("generic", "both stacks are routed" if is_pair else "every FFN is routed")


def tried_in_caem(kind: str, model_type: str, architecture: str) -> Result:
    """What `caem` makes of a mixture."""
    config = tiny_config(CONFIG_MAPPING[model_type])
    config.architectures = [architecture]
    try:
        moe_layers(config)
        experts_per_token(config)
    except UserError as error:
        return Result(kind, model_type, architecture, "refused", error.message)
    return Result(kind, model_type, architecture, "merged", "yes")


def is_comparable(config: Any) -> bool:
    """Whether the tiny model is tiny in all of its parts, so that it can be run."""
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters()) < MOST_PARAMETERS


def summary(results: list[Result]) -> str:
    """The numbers of architectures by what `moe` makes of them."""
    counts = Counter(result.outcome for result in results)
    return (
        f"Tried with transformers {transformers.__version__}: {len(results)} architectures, of "
        f"which {counts['exact']} become a stock mixture, {counts['generic']} a generic one, "
        f"{counts['refused']} are refused, and of {counts['untried']} no tiny model could be "
        "built here."
    )


def summary_of_caem(results: list[Result]) -> str:
    """The numbers of mixtures by what `caem` makes of them."""
    counts = Counter(result.outcome for result in results)
    return (
        f"Tried with transformers {transformers.__version__}: {len(results)} mixtures, of which "
        f"{counts['merged']} can be merged and {counts['refused']} are refused."
    )


def tables(results: list[Result]) -> str:
    """Markdown: by outcome, what became of all architectures."""
    lines = []
    for outcome, heading in HEADINGS.items():
        rows: dict[tuple[str, str], list[str]] = {}
        for result in results:
            if result.outcome == outcome:
                name = result.architecture
                detail = result.detail.replace(f"UpcycledMoe{name}", "its mixture")
                detail = detail.replace(name, "it")
                row = rows.setdefault((result.kind, detail.replace("|", "/")), [])
                row.append(f"`{result.model_type}`")
        if rows:
            lines += ["", f"| kind | {heading} | model types |", "|---|---|---|"]
        for (kind, detail), names in rows.items():
            lines.append(f"| {kind} | {detail} | {', '.join(dict.fromkeys(names))} |")
    return "\n".join(lines)


def rows_of(page: str) -> dict[str, set[tuple[str, str]]]:
    """Kinds and model types by outcome, as the table in a page has them."""
    text = page.partition(BEGIN)[2].partition(END)[0]
    outcomes = {heading: outcome for outcome, heading in HEADINGS.items()}
    rows: dict[str, set[tuple[str, str]]] = {}
    outcome = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) == 3:
            outcome = outcomes.get(cells[1], outcome)
            for name in cells[2].split(", "):
                rows.setdefault(outcome, set()).add((cells[0], name.strip("`")))
    return rows


def write(path: Path, text: str) -> None:
    """Write a text between the marks in a page, in the place of an earlier one."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(upcycling: Path, caem: Path) -> None:
    results = []
    mixtures = []
    for each in architectures():
        result = tried(*each)
        print(result, flush=True)
        results.append(result)
        if "is a mixture of experts already" in result.detail:
            mixtures.append(tried_in_caem(*each))
    write(upcycling, f"{summary(results)}\n{tables(results)}")
    write(caem, f"{summary_of_caem(mixtures)}\n{tables(mixtures)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
