"""What an adapter's file holds beside its factors: copies of the base model's own tensors.

PEFT saves the embedding and the head with an adapter that targets them, or whose vocabulary grew.
A copy that equals the base model's says nothing; another one would be a change of the base model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from _mergekit_moe_ext_common.checkpoints import read_headers, weight_files
from _mergekit_moe_ext_common.errors import UserError
from peft_routing.moved import PREFIX, name_in


def check_base_tensors(
    tensors: Mapping[str, Tensor], model: nn.Module, path: str, where: str
) -> None:
    """`UserError` for a tensor that is not the base model's own.

    `path` is the adapter's. A model without weights has them in its checkpoint, of which these
    tensors are read.
    """
    if not tensors:
        return
    of_base = {name.replace(".base_layer", ""): each for name, each in model.state_dict().items()}
    way_out = (
        f"PeftModel.from_pretrained(base, {path!r}).unload().save_pretrained('new-base') puts it "
        "into the base model; name that one instead"
    )
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer", "")
        if name not in of_base:
            name = name_in(model, name)
        if name not in of_base:
            raise UserError(f"{where} cannot be routed: {key}: it is not a LoRA factor")
        own = of_base[name]
        if len(tensor) != len(own) and _is_embedding(model, name):
            raise UserError(
                f"{where} cannot be routed: it was trained on a vocabulary of {len(tensor)} "
                f"tokens, and the base model has {len(own)}: after "
                f"base.resize_token_embeddings({len(tensor)}), {way_out}"
            )
        if own.is_meta and tensor.shape == own.shape:
            own = _from_checkpoint(model, name, f"{where} cannot be routed: {key}")
        if tensor.shape != own.shape or not _are_equal(tensor, own.cpu()):
            raise UserError(
                f"{where} cannot be routed: {key}: it is not the base model's own: {way_out}"
            )


def is_output_embedding(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module is the head over the vocabulary."""
    ends = getattr(model, "get_output_embeddings", None)
    return ends is not None and ends() is module


def _is_embedding(model: Any, name: str) -> bool:
    """Whether a tensor has a row per token of the vocabulary."""
    if not hasattr(model, "get_input_embeddings"):
        return False
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    module = model.get_submodule(name.rpartition(".")[0])
    return any(module is end or module is getattr(end, "base_layer", None) for end in ends)


def _are_equal(tensor: Tensor, own: Tensor) -> bool:
    """Whether two tensors are equal in the dtype of one of them, in which one may be loaded."""
    return torch.equal(tensor.to(own.dtype), own) or torch.equal(tensor, own.to(tensor.dtype))


def _from_checkpoint(model: Any, name: str, what: str) -> Tensor:
    """A tensor of a model on the meta device, from the files of its weights.

    `what` begins the message of the `UserError` where it is not there.
    """
    stored = read_headers(weight_files(model.name_or_path))
    source = model.all_tied_weights_keys.get(name, name)
    tensor = model.state_dict()[source]
    for in_file in revert_weight_conversion(model, {source: tensor}):
        if in_file in stored:
            with safe_open(stored[in_file].file, framework="pt") as opened:
                return opened.get_tensor(in_file)
    raise UserError(f"{what}: {model.name_or_path} has no {source} to compare it with")
