"""Similarity of adapters by their updates s B A, which are never made (Trade-offs 2.1).

The index keeps a sketch of each adapter: per module the matrix s (Psi B)(A Omega), (64, 64), with
random Psi and Omega of mean 0 and variance 1/64. The inner product of two sketches is on the mean
that of the updates. Factors are not compared: adapters that start from one A have like A, however
unlike their updates are.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from _mergekit_moe_ext_common.checkpoints import damage
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import new_file
from peft_routing.expert import Expert

WIDTH = 64  # of a sketch: more is more exact, and takes more room
# A file of another layout, or with other random matrices, has another name.
_VERSION = 1
_REMEDY = "remove the adapter from the library and add it again"
# Adapters that are in memory at a time for exact products, twice.
_BLOCK = 8


def sketch_file(index: Path, sha256: str) -> Path:
    """The file of an adapter's sketch."""
    return index / f"{sha256}.sketch{_VERSION}.safetensors"


@torch.no_grad()
def sketch(expert: Expert) -> dict[str, Tensor]:
    """By module the sketch of the update (64, 64), in bfloat16, whose rounding is far below the
    sketch's own error.
    """
    sketches = {}
    for module, (a, b) in expert.factors.items():
        left = _random("out", b.shape[0]) @ b.float()
        right = a.float() @ _random("in", a.shape[1]).T
        sketches[module] = (expert.scalings[module] * (left @ right)).to(torch.bfloat16)
    return sketches


# Modules are of few sizes, and their sketches are never compared with each other.
@lru_cache(maxsize=32)
def _random(side: str, size: int) -> Tensor:
    """(64, size): the same each time, by side and size."""
    digest = hashlib.sha256(f"{side} {size}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1  # 63 bits, which torch takes as they are
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, size, generator=generator) / WIDTH**0.5


def write_sketch(sketches: dict[str, Tensor], path: Path) -> None:
    """Keeps a sketch, whole or not at all. `UserError` where it cannot be written."""
    with new_file(path) as partial:
        save_file(sketches, partial)


def sketched_products(files: Sequence[Path]) -> Tensor:
    """(adapters, adapters): the inner products of the updates by their sketches, in float64.

    A module at a time is in memory. `UserError` for a file that is missing or damaged.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(_opened(file)) for file in files]
        modules_of = [set(reader.keys()) for reader in readers]
        modules = sorted(set().union(*modules_of))
        products = torch.zeros(len(files), len(files), dtype=torch.float64)
        for module in modules:
            rows = torch.zeros(len(files), WIDTH * WIDTH)
            for place, reader in enumerate(readers):
                if module in modules_of[place]:
                    rows[place] = _tensor(reader, module, files[place]).float().flatten()
            products += (rows @ rows.T).double()
    return products


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise UserError(f"{damage(file, error)}; {_REMEDY}") from error


def _tensor(reader: Any, module: str, file: Path) -> Tensor:
    tensor: Tensor = reader.get_tensor(module)
    if tensor.shape != (WIDTH, WIDTH) or not torch.isfinite(tensor).all():
        raise UserError(f"{file} does not hold what its name says; {_REMEDY}")
    return tensor


@torch.no_grad()
def exact_products(count: int, read: Callable[[int], Expert]) -> Tensor:
    """(adapters, adapters): the inner products of the updates, by their factors, in float64.

    <B A, D C> is the sum of the entries of (Bᵀ D) times those of (A Cᵀ). Few adapters are in memory
    at a time, so that each is read many times.

    Args:
        count: the number of adapters.
        read: an adapter by its number.
    """
    products = torch.zeros(count, count, dtype=torch.float64)
    # Each block of adapters stays in memory while those from it on come by, one block at a time.
    # What lies below the diagonal is what lies above it.
    blocks = [range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
    for place, rows in enumerate(blocks):
        of_rows = [read(number) for number in rows]
        for columns in blocks[place:]:
            of_columns = of_rows if columns == rows else [read(number) for number in columns]
            for row, first in zip(rows, of_rows, strict=True):
                for column, second in zip(columns, of_columns, strict=True):
                    product = _product(first, second)
                    products[row, column] = product
                    products[column, row] = product
    return products


def _product(first: Expert, second: Expert) -> float:
    total = 0.0
    for module in first.factors.keys() & second.factors.keys():
        a, b = (factor.double() for factor in first.factors[module])
        c, d = (factor.double() for factor in second.factors[module])
        of_module = ((b.T @ d) * (a @ c.T)).sum().item()
        total += first.scalings[module] * second.scalings[module] * of_module
    return total


def cosines(products: Tensor, names: Sequence[str]) -> Tensor:
    """(adapters, adapters): cosines by inner products. `UserError` for an adapter that is 0."""
    lengths = products.diagonal().sqrt()
    if not lengths.all():
        empty = names[int((lengths == 0).nonzero()[0])]
        raise UserError(f"{empty!r} changes nothing (its update is 0), and is like no other")
    return (products / lengths / lengths[:, None]).clamp(-1, 1)
