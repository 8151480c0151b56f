"""The import of expert libraries of mttl (github.com/microsoft/mttl), the program behind "Towards
Modular LLMs by Building and Reusing a Library of LoRAs", whose experts exist in its format alone.

A library is a directory with two files per expert, which `torch.save` wrote. NAME.ckpt has
`<module>.lora_a` (in, rank) and `<module>.lora_b` (rank, out), with which mttl computes
x lora_a lora_b (alpha / rank): PEFT's A and B, transposed. NAME.meta says alpha, rank and the base
model. Both are read without running code.

mttl makes the place for all experts of a library from the first one's configuration, and so all of
them have the scaling of the first.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from _mergekit_moe_ext_common.checkpoints import check_finite
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import check_output, staged
from peft_routing.adapter_files import read_pickle
from peft_routing.exporting import Factors, lora_config, write_adapter

_FACTOR = re.compile(r"(.+)\.(lora_[ab])")


def import_library(files: Sequence[str], output: str) -> dict[str, float]:
    """Writes every expert as a LoRA directory of its name; returns the scaling of each, by name.

    `files` are NAME.ckpt, with NAME.meta beside each, or directories of these. `UserError` for what
    is no library of LoRAs, and for an output that exists.
    """
    check_output(output)
    paths = _checkpoints(files)
    infos = {}
    for name, path in paths.items():
        info = _read_info(path.with_suffix(".meta"))
        if not info.get("expert_deleted"):
            infos[name] = info
    if not infos:
        raise UserError("every expert of the library is marked as deleted")
    scalings = {
        name: _scaling(info, paths[name].with_suffix(".meta")) for name, info in infos.items()
    }
    scaling = next(iter(scalings.values()))
    with staged(check_output(output)) as out:
        for name, info in infos.items():
            training = info.get("training_config") or {}
            factors = _factors(paths[name], _config_of(info).get("tie_params"))
            base = info.get("expert_model") or training.get("model")
            is_pair = training.get("model_family") == "seq2seq"
            task_type = "SEQ_2_SEQ_LM" if is_pair else "CAUSAL_LM"
            write_adapter(factors, {}, lora_config(factors, base, task_type, scaling), out / name)
    return scalings


def _checkpoints(files: Sequence[str]) -> dict[str, Path]:
    """The checkpoints by the experts' names, in the order in which mttl takes them."""
    paths = []
    for each in files:
        path = Path(each).expanduser()
        if path.is_dir():
            inside = list(path.glob("*.ckpt"))
            if not inside:
                raise UserError(f"{each} has no *.ckpt: it is not a library of mttl")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"{each} does not exist")
    by_name = {path.stem: path for path in paths}
    if len(by_name) < len(paths):
        raise UserError("two files are of one expert: each name can be there once")
    return dict(sorted(by_name.items()))


def _read_info(file: Path) -> dict[str, Any]:
    """What a library says of an expert."""
    if not file.is_file():
        raise UserError(f"{file} is missing: it says the alpha and the rank of the expert")
    info = read_pickle(file, "mttl's library")
    if not isinstance(info, dict):
        raise UserError(f"{file} holds no names with values: it is not mttl's")
    return info


def _config_of(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of an expert's LoRA, which an older mttl had in that of its training."""
    return info.get("expert_config") or info.get("training_config") or {}


def _scaling(info: Mapping[str, Any], file: Path) -> float:
    """alpha / rank of an expert."""
    config = _config_of(info)
    kind = config.get("class_name") or config.get("__model_modifier__") or "lora"
    if kind.rpartition(".")[2].lower() not in ("lora", "loraconfig"):
        raise UserError(f"{file}: its expert is a {kind}; only LoRAs are imported")
    try:
        return config["lora_alpha"] / config["lora_rank"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file} says no lora_alpha and lora_rank of its expert") from error


def _factors(file: Path, tied: str | None) -> Factors:
    """A (rank, in) and B (out, rank) of each module, in PEFT's layout.

    `tied` is a pattern of factors that modules of one block share; a file may hold one of them.
    """
    where = f"mttl's expert {file.stem!r}"
    content = read_pickle(file, where)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no tensors by their names: it is not mttl's")
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    check_finite(tensors, where)
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise UserError(
                f"{file}: {name} {tuple(tensor.shape)} is no factor of a LoRA, which is named "
                "<module>.lora_a or <module>.lora_b and has two dimensions"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise UserError(f"{file} holds no LoRA: it is not of a library of mttl")
    if any(".mixer.Wqkv" in module for module in halves):
        raise UserError(
            f"{file} names the modules of a Phi-2 that is not transformers': convert the library "
            "with mttl/cli/convert_library_to_hf_phi2.py first"
        )
    for module, pair in halves.items():
        for half in {"lora_a", "lora_b"} - pair.keys():
            pair[half] = _shared(module, half, halves, tied, file)
    return {module: (pair["lora_a"].T, pair["lora_b"].T) for module, pair in halves.items()}


def _shared(
    module: str,
    half: str,
    halves: Mapping[str, Mapping[str, Tensor]],
    tied: str | None,
    file: Path,
) -> Tensor:
    """The factor that a module shares with another one of its block."""
    block = module.rpartition(".")[0]
    if tied and re.search(tied, f"{module}.{half}"):
        for other, pair in halves.items():
            is_tied = other.rpartition(".")[0] == block and re.search(tied, f"{other}.{half}")
            if is_tied and half in pair:
                return pair[half]
    raise UserError(f"{file}: {module} has no {half}")
