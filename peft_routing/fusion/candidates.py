"""What `compare` puts on the base model: fusions of all adapters, and the user's own."""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.adapter_files import read_config, weights_file
from peft_routing.config import RoutedLoraConfig
from peft_routing.fusion.cache import Subject
from peft_routing.fusion.generation import ensemble
from peft_routing.fusion.merges import (
    MERGES,
    check_mergeable,
    error_of,
    merge_name,
    write_merge,
)
from peft_routing.fusion.strategies import (
    CACHED,
    ENSEMBLE,
    OTHER,
    PLAIN,
    ROUTED,
    STRATEGIES,
    TRAINED,
    composed_of,
)
from peft_routing.fusion.subjects import (
    any_adapter,
    composed,
    fused,
    mixture_of,
    one_expert,
    with_top_k,
)

# B.4: the gap between one expert and so many says how well a router is calibrated.
_MANY = 4
TOP = ", top "
_KINDS = {"LORA": PLAIN, "ROUTED_LORA": ROUTED}


@dataclass(frozen=True)
class Candidate:
    """An adapter that is put on the base model and measured.

    kind: that of its row, as `strategies` calls them.
    size: the bytes of its tensors.
    note: what is to be said of it.
    directory: that of an adapter that was written to be measured; empty for others.
    passes: the forward passes per text.
    values: what `recommended` needs to know of it.
    parameters: how many numbers were learned.
    """

    subject: Subject
    kind: str
    size: int
    note: str = ""
    directory: str = ""
    passes: int = 1
    values: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0


def candidates_of(
    experts: Mapping[str, str],
    fusions: Mapping[str, str],
    wanted: Collection[str],
    empty: nn.Module,
    left_out: dict[str, str],
) -> dict[str, Candidate]:
    """What is put on the base model and measured as it is, by the name of its row.

    Why a strategy cannot be composed of these experts goes into `left_out`. `UserError` for a
    fusion of the user's that cannot be read or has a strategy's name.
    """
    candidates = _candidates_of_strategies(experts, wanted, empty, left_out)
    for name, path in fusions.items():
        if name in STRATEGIES or TOP in name:
            raise UserError(f"--fusion {name}={path}: a row has that name; give another")
        subject = any_adapter(name, path, f"--fusion {name}={path}")
        with warnings.catch_warnings():
            # torch warns that nothing is copied into a model without memory.
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
            subject.put_on(copy.deepcopy(empty))  # says now what does not fit
        peft_type = read_config(path, name).get("peft_type")
        kind = _KINDS.get(str(peft_type), OTHER)
        add_adapter(candidates, name, Candidate(subject, kind, size_of(path, name)), path)
    return candidates


def _candidates_of_strategies(
    experts: Mapping[str, str],
    wanted: Collection[str],
    empty: nn.Module,
    left_out: dict[str, str],
) -> dict[str, Candidate]:
    """The strategies that need nothing but the experts, by name, as far as they can be composed."""
    sizes = [size_of(path, name) for name, path in experts.items()]
    candidates = {}
    composable = composed_of(len(experts))
    for name in wanted:
        if name in CACHED or name in MERGES or name in TRAINED:
            continue
        if name not in composable:
            left_out[name] = f"of {len(experts)} adapters it takes all, as arrow_all does"
            continue
        kind, options = composable[name]
        try:
            model = get_peft_model(empty, composed(experts, **options))
            if kind == ENSEMBLE:
                ensemble(model)
            model.unload()
        except ValueError as error:  # a UserError is one
            left_out[name] = str(error)
            continue
        candidates[name] = _composed(name, kind, options, experts, sizes)
    return candidates


def add_adapter(
    candidates: dict[str, Candidate], name: str, candidate: Candidate, path: str
) -> None:
    """Adds an adapter that lies in a directory and, of one whose coefficients are a softmax, itself
    with fewer experts.
    """
    candidates[name] = candidate
    if candidate.kind != ROUTED:
        return
    for k in _ks_of(path):
        candidates[top_k_name(name, k)] = replace(
            candidate,
            subject=with_top_k(candidate.subject, k),
            values={**candidate.values, "top_k": k},
        )


def _composed(
    name: str,
    kind: str,
    options: Mapping[str, Any],
    experts: Mapping[str, str],
    sizes: Sequence[int],
) -> Candidate:
    """All experts as one routed adapter, or as the ensemble of their logits."""
    if kind == ENSEMBLE:
        alike = dict.fromkeys(experts, 1 / len(experts))
        return Candidate(
            mixture_of(name, experts, alike, of="logits"),
            kind,
            sum(sizes),
            passes=len(experts),
            values={"of": "logits"},
        )
    # Low-rank mixing of experts of one rank is an adapter of that rank.
    size = max(sizes) if options.get("mixing") == "low_rank" else sum(sizes)
    return Candidate(fused(name, experts, options), kind, size)


def top_k_name(name: str, k: int) -> str:
    """The row of a routed adapter whose router keeps k experts."""
    return f"{name}{TOP}{k}"


def _ks_of(path: str) -> tuple[int, ...]:
    """The numbers of experts, or clusters, to keep for the calibration gap of a routed adapter.

    None of a router whose coefficients are constant or no softmax.
    """
    config = RoutedLoraConfig.from_pretrained(path)
    assert isinstance(config, RoutedLoraConfig)
    router = config.router_class
    choices = len(set(config.clusters.values())) if config.clusters else len(config.names)
    if not (router.is_simplex and router.uses_input(config)) or choices < 2:
        return ()
    return 1, min(_MANY, choices)


def add_merges(
    candidates: dict[str, Candidate],
    wanted: Collection[str],
    experts: Mapping[str, str],
    empty: nn.Module,
    base: str,
    directory: Path,
    device: torch.device,
    seed: int,
    left_out: dict[str, str],
) -> None:
    """Adds the merges that are wanted to the candidates, made in the cache's `directory`.

    Why adapters cannot be merged goes into `left_out`. `UserError` where a merge cannot be written.
    """
    for name in MERGES:
        if name not in wanted:
            continue
        try:
            check_mergeable(experts, empty)
        except UserError as error:
            left_out[name] = error.message
            continue
        candidates[name] = _merge(name, experts, empty, base, directory, device, seed)


def _merge(
    strategy: str,
    experts: Mapping[str, str],
    empty: nn.Module,
    base: str,
    directory: Path,
    device: torch.device,
    seed: int,
) -> Candidate:
    """The merge of all adapters as one LoRA, which is made in the cache where it is not there
    yet.
    """
    merged = directory / merge_name(strategy, base, experts, seed)
    if not merged.exists():
        write_merge(strategy, experts, empty, base, merged, device=device, seed=seed)
    return Candidate(
        one_expert(strategy, str(merged)),
        PLAIN,
        size_of(str(merged), strategy),
        note=f"the limited rank loses {error_of(merged):.0%} of the merged update's norm",
        directory=str(merged),
    )


def size_of(path: str, name: str) -> int:
    """The bytes of an adapter's tensors."""
    return weights_file(path, f"expert {name!r} ({path})").stat().st_size
