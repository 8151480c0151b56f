"""Functions that families use in their `Rewriting`s: of a dense tensor and the dense config, they
give the tensors that it becomes.
"""

import torch
from transformers import PretrainedConfig


def head_size(config: PretrainedConfig) -> int:
    """The number of rows of one attention head in the projections of queries, keys and values."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def queries_keys_values(tensor: torch.Tensor, config: PretrainedConfig) -> tuple[torch.Tensor, ...]:
    """The three projections that one tensor (all their rows, hidden) holds one after the other."""
    size = head_size(config)
    queries = config.num_attention_heads * size
    keys = config.num_key_value_heads * size
    return tensor.split([queries, keys, keys])


def halves(tensor: torch.Tensor, _config: PretrainedConfig) -> tuple[torch.Tensor, ...]:
    """The two projections, gate and up, that one tensor holds one after the other."""
    return tensor.chunk(2)


def heads_from_interleaved(
    tensor: torch.Tensor, config: PretrainedConfig
) -> tuple[torch.Tensor, ...]:
    """A projection, or its bias, for rotary embeddings that turn the pairs (i, i + n / 2) of the n
    turned rows of a head, from one for those that turn the pairs (2 i, 2 i + 1).
    """
    size = head_size(config)
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    turned = int(size * factor)
    order = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, size)]
    heads = tensor.reshape(-1, size, *tensor.shape[1:])
    rows = torch.tensor(order, device=tensor.device)
    return (heads.index_select(1, rows).reshape(tensor.shape),)


def one_plus(tensor: torch.Tensor, _config: PretrainedConfig) -> tuple[torch.Tensor, ...]:
    """The weight of a norm that multiplies by it, from one of a norm that multiplies by one plus
    it."""
    return (tensor + 1,)


def scaled_embedding_and_head(
    tensor: torch.Tensor, config: PretrainedConfig
) -> tuple[torch.Tensor, ...]:
    """The embedding times the root of the hidden size, rounded to the embedding's dtype as the
    model rounds it, and a head that is the embedding itself.
    """
    scale = torch.tensor(config.hidden_size**0.5, dtype=tensor.dtype, device="cpu").item()
    return tensor * scale, tensor
