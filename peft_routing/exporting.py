"""The ways out of a routed adapter, all of them ordinary LoRA directories, as PEFT saves them.

Outputs appear whole or not at all, and nothing that exists is overwritten.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import check_output, staged
from peft_routing.expert import Expert
from peft_routing.moved import PREFIX

Factors = Mapping[str, tuple[Tensor, Tensor]]


def write_experts(experts: Sequence[Expert], directory: str) -> None:
    """Writes a directory per expert, with the tensors and the configuration that it came from.

    `UserError` where two names make one directory.
    """
    folders: dict[str, Expert] = {}
    for expert in experts:
        folder = folder_of(expert.name)
        if folder in folders:
            raise UserError(
                f"the experts {folders[folder].name!r} and {expert.name!r} would both be written "
                f"to {folder}: compose them with names that differ in more than such signs"
            )
        folders[folder] = expert
    with staged(check_output(directory)) as out:
        for folder, expert in folders.items():
            # `dtype` is ours: the experts of an adapter are kept in the widest, and go back here.
            config = dict(expert.config)
            dtype = getattr(torch, config.pop("dtype"))
            config.pop("head", None)
            factors = {}
            for module, (a, b) in expert.factors.items():
                factors[module] = (a.to(dtype), b.to(dtype))
            biases = {module: bias.to(dtype) for module, bias in expert.biases.items()}
            write_adapter(factors, biases, config, out / folder, expert.head)


def folder_of(name: str) -> str:
    """The name of an expert's directory. A name need not be a path: what could lead out of the
    directory is replaced.
    """
    return re.sub(r"[^\w.-]|^\.+", "-", name)


def write_lora(
    factors: Factors,
    biases: Mapping[str, Tensor],
    base: str | None,
    task_type: Any,
    directory: str,
    head: Mapping[str, Tensor],
    modules_to_save: Sequence[str] | None,
) -> None:
    """Writes one LoRA adapter whose updates are B A plus a bias, with the tensors of its head.

    The scaling is 1: alpha equals the rank, at every module.
    """
    with staged(check_output(directory)) as out:
        config = lora_config(factors, base, task_type, lora_bias=bool(biases))
        config["modules_to_save"] = modules_to_save
        if biases:  # PEFT has a bias at all modules or at none
            nothing = {module: b.new_zeros(len(b)) for module, (_, b) in factors.items()}
            biases = {**nothing, **biases}
        write_adapter(factors, biases, config, out, head)


def lora_config(
    factors: Factors,
    base: str | None,
    task_type: Any,
    scaling: float = 1,
    lora_bias: bool = False,
) -> dict[str, Any]:
    """The configuration of a LoRA adapter with these factors and one scaling at all modules."""
    # PEFT has one rank for all modules and patterns for the others, so the most frequent one is it.
    ranks = {module: a.shape[0] for module, (a, _) in factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: other for module, other in ranks.items() if other != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank * scaling,
        rank_pattern=others,
        alpha_pattern={module: other * scaling for module, other in others.items()},
        lora_bias=lora_bias,
        target_modules=sorted(ranks),
        base_model_name_or_path=base,
        task_type=task_type,
        inference_mode=True,
    )
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }


def write_adapter(
    factors: Factors,
    biases: Mapping[str, Tensor],
    config: Mapping[str, Any],
    out: Path,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the two files of a LoRA adapter."""
    out.mkdir(exist_ok=True)
    # Not `sort_keys`: of the patterns of ranks and alphas, PEFT takes the first that matches.
    in_order = dict(sorted(config.items()))
    (out / CONFIG_NAME).write_text(json.dumps(in_order, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous().cpu()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous().cpu()
    for module, bias in biases.items():
        tensors[f"{PREFIX}{module}.lora_B.bias"] = bias.contiguous().cpu()
    for name, tensor in (head or {}).items():
        tensors[f"{PREFIX}{name}"] = tensor.contiguous().cpu()
    save_file(tensors, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def truncated(factors: Factors, rank: int) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """The closest update of at most this rank to each B A, and the relative error of all of them.

    Both are by the Frobenius norm. The decompositions are in float64, the factors in their dtype.
    """
    closest = {}
    dropped = 0.0  # squared norms
    whole = 0.0
    # B A = Q_b (R_b R_aᵀ) Q_aᵀ, and Q_b and Q_a change no length: the singular values of B A are
    # those of the small matrix between them, so that no update is ever built. Each factor is
    # multiplied by the roots of these, so that both are of one size.
    for module, (a, b) in factors.items():
        left, core_left = torch.linalg.qr(b.double())
        right, core_right = torch.linalg.qr(a.double().T)
        u, s, vt = torch.linalg.svd(core_left @ core_right.T)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        closest[module] = (
            (root[:, None] * (vt[:kept] @ right.T)).to(a.dtype),
            (left @ (u[:, :kept] * root)).to(b.dtype),
        )
        dropped += s[kept:].square().sum().item()
        whole += s.square().sum().item()
    return closest, math.sqrt(dropped / whole) if whole else 0.0
