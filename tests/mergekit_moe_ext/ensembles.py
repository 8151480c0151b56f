"""Tiny weight-ensembling models, and what they compute written as loops over samples, tokens and
experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from mergekit_moe_ext.modeling.configuration_wemoe import config_class, vectors_of
from mergekit_moe_ext.modeling.modeling_wemoe import model_class
from mergekit_moe_ext.modeling.wemoe_products import EnsembledLinear
from mergekit_moe_ext.wemoe.groups import ensembled_groups, weighed_tensors

EXPERTS = ("sun", "cars", "dtd")
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TEXT = {**_SIZES, "vocab_size": 64, "max_position_embeddings": 96, "pad_token_id": 0}
_IMAGE = {**_SIZES, "image_size": 12, "patch_size": 4}
FAMILIES = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**_TEXT, bos_token_id=1, eos_token_id=1, num_key_value_heads=1),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=96,
            bos_token_id=1,
            eos_token_id=1,
        ),
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(**_TEXT, word_embed_proj_dim=16, ffn_dim=24, bos_token_id=1, eos_token_id=1),
    ),
    "bert": (BertForSequenceClassification, BertConfig(**_TEXT, num_labels=4)),
    "bert-masked": (BertForMaskedLM, BertConfig(**_TEXT)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            d_model=16,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            d_kv=8,
            vocab_size=64,
            decoder_start_token_id=0,
        ),
    ),
    "bart": (
        BartForConditionalGeneration,
        BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=64,
            max_position_embeddings=96,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        ),
    ),
    "llama-classifier": (
        LlamaForSequenceClassification,
        LlamaConfig(**_TEXT, num_key_value_heads=1, num_labels=4),
    ),
    "llama-tied": (
        LlamaForCausalLM,
        LlamaConfig(
            **_TEXT, bos_token_id=1, eos_token_id=1, num_key_value_heads=1, tie_word_embeddings=True
        ),
    ),
    "swin": (
        SwinForImageClassification,
        SwinConfig(
            image_size=12,
            patch_size=3,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 1],
            window_size=2,
            num_labels=4,
        ),
    ),
    "vit": (ViTForImageClassification, ViTConfig(**_IMAGE, num_labels=4)),
    "clip": (CLIPVisionModel, CLIPVisionConfig(**_IMAGE, projection_dim=8)),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**_IMAGE, num_labels=4)),
}
IMAGES = ("vit", "clip", "dinov2", "swin")
PAIRS = ("t5", "bart")


def build(
    family: str,
    *,
    upscale: Any = "mlp",
    sparsity: float = 0.0,
    dtype: Any = None,
    base: Any = None,
    **ensembling: Any,
) -> Any:
    """A model with task vectors and routers drawn at random, in evaluation mode."""
    stock_class, config = FAMILIES[family]
    torch.manual_seed(0)
    stock = stock_class(config)
    linears = []
    if upscale == "all":
        groups = weighed_tensors(stock, ensembling.get("head"))
        ensembling |= {"per_tensor": True, "router_layers": 0}
    else:
        groups = ensembled_groups(stock, upscale, None)
        for group in groups.values():
            linears += group
    sizes = {linear: stock.get_submodule(linear).weight.numel() for linear in linears}
    kept = (
        {linear: round((1 - sparsity) * size) for linear, size in sizes.items()} if sparsity else {}
    )
    values = {
        key: value for key, value in config.to_dict().items() if key not in ("model_type", "dtype")
    }
    ours = config_class(type(config))(
        **values,
        ensembling={"experts": list(EXPERTS), "groups": groups, "kept": kept, **ensembling},
    )
    ours._attn_implementation = config._attn_implementation
    model = model_class(stock_class)(ours)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for parameter in model.routers.parameters():
            parameter.normal_(std=0.5)
        for module in model.modules():
            if isinstance(module, EnsembledLinear):
                _draw_vectors(module)
        for name, buffer in model.named_buffers():
            if upscale == "all" and "vectors_of_" in name:
                buffer.normal_(std=0.3)
    return model.to(dtype or torch.float32).eval()


def _draw_vectors(module: Any) -> None:
    for name in ("vectors", "values", "bias_vectors"):
        if hasattr(module, name):
            getattr(module, name).normal_(std=0.3)
    if module.kept is None:
        return
    rows, width = module.weight.shape
    for expert in range(len(EXPERTS)):
        places = torch.randperm(rows * width)[: module.kept].sort().values
        module.columns[expert] = (places % width).to(module.columns.dtype)
        module.row_ends[expert] = torch.tensor(
            [int((places < (row + 1) * width).sum()) for row in range(rows)]
        )


def inputs_of(family: str, samples: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family in IMAGES:
        return {"pixel_values": torch.randn(samples, 3, 12, 12, generator=generator)}
    found = {"input_ids": torch.randint(2, 64, (samples, tokens), generator=generator)}
    if family in PAIRS:
        found["decoder_input_ids"] = torch.randint(2, 64, (samples, 5), generator=generator)
    return found


def padded(inputs: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The first sample is whole, the others lose some tokens at that side."""
    ids = inputs["input_ids"].clone()
    mask = torch.ones_like(ids)
    for row in range(1, len(ids)):
        gone = slice(0, row + 1) if side == "left" else slice(-row - 1, None)
        ids[row, gone], mask[row, gone] = 0, 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def task_vectors(model: Any, linear: str) -> list[Tensor]:
    """Those of a linear module, dense, element by element where they are stored sparse."""
    module = model.get_submodule(linear)
    if module.kept is None:
        return list(module.vectors)
    found = []
    for values, columns, ends in zip(
        module.values, module.columns.long(), module.row_ends, strict=True
    ):
        dense, start = torch.zeros_like(module.weight), 0
        for row, end in enumerate(ends.tolist()):
            for place in range(start, end):
                dense[row, columns[place]] = values[place]
            start = end
        found.append(dense)
    return found


def route(model: Any, group: str, h: Tensor) -> Tensor:
    """Equations 3 and 4 for one token."""
    index = (
        "0" if model.ensembling.shared_router else str(list(model.ensembling.groups).index(group))
    )
    router = model.routers[index]
    if model.ensembling.router_layers == 2:
        h = torch.relu(router.hidden.weight @ h + router.hidden.bias)
    return router.bias if model.ensembling.router_layers == 0 else router.weight @ h + router.bias


def stock_of(model: Any, family: str) -> Any:
    """The stock class with the base's weights."""
    stock_class, config = FAMILIES[family]
    stock = stock_class(config).to(model.dtype).eval()
    state = model.state_dict()
    stock.load_state_dict({name: state[name] for name in stock.state_dict()})
    return stock


def weights_of_sample(
    model: Any, family: str, sample: dict[str, Tensor], prefix: Tensor
) -> dict[str, Tensor]:
    """Equations 1 and 2 for one sample: every ensembled weight, materialised.

    A group's input depends on the groups before it only, so each pass through the stock model finds
    one more group's.
    `prefix`: which tokens have a part in the mean.
    """
    stock, found, ready = stock_of(model, family), {}, []
    while len(ready) < len(model.ensembling.groups):
        seen: dict[str, Tensor] = {}
        hooks = [
            stock.get_submodule(group).register_forward_pre_hook(
                lambda _module, args, kwargs, group=group, seen=seen: seen.update(
                    {group: (*args, *kwargs.values())[0]}
                ),
                with_kwargs=True,
            )
            for group in model.ensembling.groups
        ]
        functional_call(stock, found, kwargs=sample)
        for hook in hooks:
            hook.remove()
        group, h = list(seen.items())[len(ready)]
        tokens = h.reshape(-1, h.shape[-1])
        chosen = prefix if prefix is not None else torch.ones(len(tokens), dtype=torch.bool)
        outputs = [
            route(model, group, token)
            for token, counts in zip(tokens, chosen, strict=True)
            if counts
        ]
        w = sum(outputs) / len(outputs)
        for linear in model.ensembling.groups[group]:
            module = stock.get_submodule(linear)
            found[f"{linear}.weight"] = module.weight.detach() + sum(
                c * vector for c, vector in zip(w, task_vectors(model, linear), strict=True)
            )
            if module.bias is not None:
                biases = model.get_submodule(linear).bias_vectors
                found[f"{linear}.bias"] = module.bias.detach() + sum(
                    c * vector for c, vector in zip(w, biases, strict=True)
                )
        ready.append(group)
    return found


def with_constants(model: Any, family: str) -> tuple[Any, dict[str, Tensor]]:
    """The stock model, and each parameter of it as the base's plus coefficients times task vectors
    (B.1).
    """
    stock, state, found = stock_of(model, family), model.state_dict(), {}
    for name in dict(stock.named_parameters()):
        if name in model.ensembling.groups:
            c = route(model, name, torch.empty(0))
            found[name] = state[name] + sum(
                w * vector for w, vector in zip(c, state[vectors_of(name)], strict=True)
            )
    for tied, name in stock.all_tied_weights_keys.items():
        found[tied] = found[name]
    return stock, found


def by_samples(
    model: Any, family: str, inputs: dict[str, Tensor], routing_tokens: int | None = None
) -> Tensor:
    """The model's first output, sample by sample."""
    stock, outputs = stock_of(model, family), []
    for row in range(len(next(iter(inputs.values())))):
        sample = {name: value[row : row + 1] for name, value in inputs.items()}
        prefix = None
        if "input_ids" in sample:
            real = (
                sample.get("attention_mask", torch.ones_like(sample["input_ids"]))[0]
                .bool()
                .tolist()
            )
            before = [sum(real[: index + 1]) for index in range(len(real))]
            limit = routing_tokens or len(real)
            prefix = torch.tensor(
                [is_real and n <= limit for is_real, n in zip(real, before, strict=True)]
            )
        weights = weights_of_sample(model, family, sample, prefix)
        outputs.append(functional_call(stock, weights, kwargs=sample)[0])
    return torch.cat(outputs)


class ByTokens(nn.Module):
    """A linear module that materialises its weights for every token of every sample."""

    def __init__(
        self, base: Any, model: Any, linear: str, chosen: dict[str, Any], group: str
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.is_transposed = (
            base.weight,
            base.bias,
            isinstance(base, Conv1D),
        )
        self.vectors = task_vectors(model, linear)
        self.bias_vectors = (
            [] if base.bias is None else list(model.get_submodule(linear).bias_vectors)
        )
        self.chosen, self.group = chosen, group

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for sample, coefficients in zip(x, self.chosen[self.group], strict=True):
            for token, c in zip(sample, coefficients, strict=True):
                weight = self.weight + sum(
                    w * vector for w, vector in zip(c, self.vectors, strict=True)
                )
                y = token @ weight if self.is_transposed else weight @ token
                if self.bias is not None:
                    y = (
                        y
                        + self.bias
                        + sum(w * vector for w, vector in zip(c, self.bias_vectors, strict=True))
                    )
                rows.append(y)
        return torch.stack(rows).view(*x.shape[:-1], -1)


def by_tokens(model: Any, family: str, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first output where every position of a decoder has the mean over those up to
    it."""
    stock, chosen = stock_of(model, family), {}

    def choose(group: str, h: Tensor) -> None:
        in_encoder = "encoder" in group.split(".")
        has_mask = in_encoder or family not in PAIRS
        mask = inputs.get("attention_mask") if has_mask else None
        real = torch.ones(h.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        chosen[group] = []
        for sample, is_real in zip(h, real, strict=True):
            outputs = [route(model, group, token) for token in sample]
            per_token = []
            for position in range(len(sample)):
                ends = len(sample) if in_encoder else position + 1
                counted = [outputs[i] for i in range(ends) if is_real[i]]
                per_token.append(
                    sum(counted) / len(counted) if counted else torch.zeros(len(EXPERTS))
                )
            chosen[group].append(per_token)

    for group, linears in model.ensembling.groups.items():
        for linear in linears:
            parent, _, last = linear.rpartition(".")
            replaced = ByTokens(stock.get_submodule(linear), model, linear, chosen, group)
            setattr(stock.get_submodule(parent), last, replaced)
        stock.get_submodule(group).register_forward_pre_hook(
            lambda _module, args, kwargs, group=group: choose(group, (*args, *kwargs.values())[0]),
            with_kwargs=True,
        )
    return stock(**inputs)[0]
