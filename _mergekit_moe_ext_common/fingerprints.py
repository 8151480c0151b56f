"""A fingerprint that tells the weights of one model from those of another, without reading all of
them.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# What is read whole: vectors and what has few rows, so that a router of which some rows alone were
# trained is another one.
_FEW_ROWS = 1024
_FEW_NUMBERS = 2**22
# Of matrices like these a mixture may have thousands: `experts.3.up_proj.weight`, Switch's
# `experts.expert_3.wo.weight`.
_OF_ONE_EXPERT = re.compile(r"(^|\.)experts\.(expert_)?\d+(\.\w+){1,3}$")


def weights_fingerprint(files: Iterable[Path]) -> str:
    """The fingerprint of the weights in safetensors files."""
    return fingerprint_of(_of_files(files))


def fingerprint_of(tensors: Iterable[tuple[str, Sequence[int], Any]]) -> str:
    """The sha256 of the name, the shape and a sample of every tensor: the same for a copy of the
    model, another for a fine-tune, be it of single rows of its routers.

    tensors: the name and the shape of each, and what gives its rows by slices, which are tensors.
    """
    lines = []
    for name, shape, rows in tensors:
        sample = _sample(name, shape, rows).contiguous().reshape(-1).view(torch.uint8)
        content = hashlib.sha256(sample.numpy().tobytes()).hexdigest()
        lines.append(f"{name} {tuple(shape)} {content}")
    # Sorted, since shards may hold the same tensors in another order.
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sample(name: str, shape: Sequence[int], rows: Any) -> Tensor:
    """What is read of a tensor: all of a small one, else its first row; of a stack of matrices the
    first row of each.
    """
    if len(shape) > 2:
        return rows[:, :1]
    if len(shape) < 2:
        return rows[:]
    is_small = shape[0] <= _FEW_ROWS and math.prod(shape) < _FEW_NUMBERS
    return rows[:] if is_small and not _OF_ONE_EXPERT.search(name) else rows[:1]


def _of_files(files: Iterable[Path]) -> Iterator[tuple[str, Sequence[int], Any]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                view = file.get_slice(name)
                shape = view.get_shape()
                # A slice of safetensors has no way to give a single number.
                yield name, shape, view if shape else file.get_tensor(name)[None]
