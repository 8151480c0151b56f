"""What of a decoder is a layer, and what of a layer is attention and what is the FFN."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Its layers by name: what transformers can checkpoint. `ValueError` if that is not one stack."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and id(module) in inside
    }
    stacks = {name.rpartition(".")[0] for name in found}
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} has {len(stacks)} stacks of decoder layers, not one")
    return found


def attention_and_ffn(layer: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The parts of a layer by name, told by their classes, which transformers names alike for all architectures.

    `ValueError` for a part that is neither, nor a norm, and for a layer that lacks one.
    """
    attention: dict[str, nn.Module] = {}
    ffn: dict[str, nn.Module] = {}
    linear: dict[str, nn.Module] = {}
    if any(True for _ in layer.parameters(recurse=False)):
        raise ValueError("it has parameters of its own, which are neither attention nor FFN")
    for name, module in layer.named_children():
        kind = type(module).__name__
        if not any(True for _ in module.parameters()):
            continue
        if "Attention" in kind:
            attention[name] = module
        elif "MLP" in kind or "FeedForward" in kind:
            ffn[name] = module
        elif isinstance(module, nn.Linear):
            linear[name] = module
        elif not is_norm(module):
            raise ValueError(f"{name} ({kind}) is neither attention nor FFN nor norm")
    if linear and ffn:
        raise ValueError("it has linear layers that belong neither to attention nor to the FFN")
    ffn |= linear  # OPT's FFN is no module of its own
    for name, parts in {"attention": attention, "FFN": ffn}.items():
        if not parts:
            raise ValueError(f"it has no {name}")
    return attention, ffn


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
