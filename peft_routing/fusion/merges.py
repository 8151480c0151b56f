"""TIES and DARE merges of the adapters' updates, each written as one plain LoRA.

The arithmetic is PEFT's (`peft.utils.merge_utils`). It is done on the updates s B A, a module at a
time, since that of A and B apart would merge what has no meaning by itself.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import check_output, staged
from peft_routing.adapter_files import fingerprint
from peft_routing.expert import Expert, read_expert
from peft_routing.exporting import lora_config, write_adapter

MERGES = ("ties", "dare")
DENSITY = 0.2  # the share of an update that is kept: TIES' own, and DARE's within its range
_NOTES = "merge.json"
# Ranks that are computed beyond those that are kept, which makes these exact enough.
_MORE_RANKS = 16


def write_merge(
    strategy: str,
    experts: Mapping[str, str],
    empty: nn.Module,
    base: str,
    directory: Path,
    *,
    device: torch.device,
    seed: int,
    density: float = DENSITY,
) -> None:
    """Writes the merge of all adapters as one LoRA, of the rank that they have together.

    Args:
        strategy: `ties`, the mean of what agrees with the elected sign, or `dare`, the mean of what
            was dropped at random and rescaled.
        empty: the base model's architecture, by which modules are named.
        directory: one that does not exist.
        seed: of what is dropped at random.

    `UserError` as of `check_mergeable`, and where it cannot be written.
    """
    check_mergeable(experts, empty)
    adapters = [read_expert(name, path, empty) for name, path in experts.items()]
    modules: set[str] = set()
    for adapter in adapters:
        modules |= adapter.factors.keys()
    factors = {}
    lost = 0.0  # squared norms
    whole = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in sorted(modules):
            merged = _merged(strategy, adapters, module, density, device)
            rank = sum(adapter.rank(module) for adapter in adapters)
            a, b = _closest(merged, rank)
            lost += (merged - b @ a).square().sum().item()
            whole += merged.square().sum().item()
            first = next(adapter for adapter in adapters if adapter.rank(module))
            dtype = first.factors[module][0].dtype
            factors[module] = (a.to(dtype), b.to(dtype))
    error = math.sqrt(lost / whole) if whole else 0.0
    config = lora_config(factors, base, adapters[0].config.get("task_type"))
    with staged(check_output(str(directory))) as out:
        write_adapter(factors, {}, config, out)
        notes = {"strategy": strategy, "density": density, "seed": seed, "error": error}
        (out / _NOTES).write_text(json.dumps(notes), encoding="utf-8")


def check_mergeable(experts: Mapping[str, str], empty: nn.Module) -> None:
    """`UserError` for an adapter with biases, and as of `read_expert`. One at a time is read."""
    for name, path in experts.items():
        if read_expert(name, path, empty).biases:
            raise UserError(f"expert {name!r} has biases (lora_bias), which are not merged")


def merge_name(strategy: str, base: str, experts: Mapping[str, str], seed: int) -> str:
    """The name of a merge's directory, by all that its files depend on."""
    own = [fingerprint(path, f"expert {name!r} ({path})") for name, path in experts.items()]
    parts = json.dumps([strategy, base, own, seed, DENSITY])
    return f"{strategy}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def error_of(directory: Path) -> float:
    """The relative error that the limited rank of a written merge makes."""
    notes: dict[str, Any] = json.loads((directory / _NOTES).read_text(encoding="utf-8"))
    return float(notes["error"])


def _merged(
    strategy: str, adapters: list[Expert], module: str, density: float, device: torch.device
) -> Tensor:
    """(out, in): the merged update of a module, in float32."""
    deltas = []
    for adapter in adapters:
        if adapter.rank(module):
            a, b = adapter.factors[module]
            update = b.to(device).float() @ a.to(device).float()
            deltas.append(adapter.scalings[module] * update)
    if strategy == "ties":  # takes the mean itself, of those that agree
        return ties(deltas, torch.ones(len(deltas), device=device), density)
    # Of all adapters: one that has nothing here counts as 0.
    shares = torch.full((len(deltas),), 1 / len(adapters), device=device)
    return dare_linear(deltas, shares, density)


def _closest(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is close to the closest update of that rank."""
    most = min(update.shape)
    left, sizes, right = torch.svd_lowrank(update, q=min(rank + _MORE_RANKS, most), niter=4)
    kept = min(rank, most)
    roots = sizes[:kept].sqrt()
    return (right[:, :kept] * roots).T, left[:, :kept] * roots
