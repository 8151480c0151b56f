"""The fingerprint of a source's weights, by which `caem` and resumed trainings know them again."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from _mergekit_moe_ext_common.fingerprints import fingerprint_of, weights_fingerprint


def checkpoint_fingerprint(model: ModelReference, options: MergeOptions) -> str:
    """The fingerprint of a model's weights, in safetensors or, without code, in pickles."""
    index = model.tensor_index(cache_dir=options.transformers_cache)
    files = [Path(index.base_path, shard.filename) for shard in index.shards]
    return (
        weights_fingerprint(files) if index.is_safetensors else fingerprint_of(_of_pickles(files))
    )


def _of_pickles(files: Sequence[Path]) -> Iterator[tuple[str, Sequence[int], Any]]:
    for path in files:
        for name, tensor in torch.load(path, weights_only=True).items():
            yield name, tensor.shape, tensor if tensor.dim() else tensor[None]
