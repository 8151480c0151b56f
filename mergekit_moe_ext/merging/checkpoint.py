"""A fingerprint that tells the weights of one model from those of another, without reading all of
them.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from mergekit.options import MergeOptions
from safetensors import safe_open


def checkpoint_fingerprint(model: ModelReference, options: MergeOptions) -> str:
    """The sha256 of every tensor's name, shape and first row: the same for a copy of the model,
    another for a fine-tune.
    """
    index = model.tensor_index(cache_dir=options.transformers_cache)
    rows = {}
    for shard in index.shards:
        path = Path(index.base_path, shard.filename)
        for name, first in _first_rows(index, path):
            content = first.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            rows[name] = (tuple(first.shape[1:]), content)
    # Sorted, since shards may hold the same tensors in another order.
    digest = hashlib.sha256()
    for name in sorted(rows):
        shape, content = rows[name]
        digest.update(f"{name} {shape}".encode() + content)
    return digest.hexdigest()


def _first_rows(index: ShardedTensorIndex, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if index.is_safetensors:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                view = shard.get_slice(name)
                yield name, view[:1] if view.get_shape() else shard.get_tensor(name)[None]
    else:
        for name, tensor in torch.load(path, weights_only=True).items():
            yield name, tensor[:1] if tensor.dim() else tensor[None]
