"""One adapter per cluster, trained anew on the texts of all its adapters (MBC, Trade-offs 2.1).

No trainer of ours does that. For each cluster a file says what to train on what, as TRL reads it:
`trl sft --config FILE`.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from _mergekit_moe_ext_common.data import dataset_arguments, parse_sources
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import check_output, staged
from peft_routing.library.catalogue import Library
from peft_routing.library.clusters import Clusters


def training_sets(library: Library) -> dict[str, dict[str, Any]]:
    """By adapter the arguments of `datasets.load_dataset` for its texts.

    `UserError` for an adapter whose texts are not known, not here, or not for `load_dataset`.
    """
    sets = {}
    for name, entry in library.entries.items():
        if entry.data is None:
            raise UserError(
                f"the library does not say what {name!r} was trained on: remove it, and add it "
                f"again with --data {name}=SOURCE"
            )
        sets[name] = _training_set(entry.data)
    return sets


def write_recipes(
    clusters: Clusters, library: Library, sets: Mapping[str, dict[str, Any]], output: str
) -> None:
    """Writes a file for each cluster, all of them or none, into a new directory.

    `UserError` where that exists or cannot be written.
    """
    out = check_output(output)
    with staged(out) as directory:
        for number, names in clusters.members.items():
            recipe = {
                **_lora(library, names),
                "datasets": _without_repeats(sets[name] for name in names),
                "output_dir": str(out / f"cluster{number}"),
            }
            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
            (directory / _file(number)).write_text(text, encoding="utf-8")


def retraining_command(output: str, number: int) -> str:
    """The command that trains the adapter of a cluster."""
    return shlex.join(["trl", "sft", "--config", str(Path(output) / _file(number))])


def _file(number: int) -> str:
    return f"cluster{number}.yml"


def _lora(library: Library, names: Sequence[str]) -> dict[str, Any]:
    """What TRL is to train: a LoRA of the adapters' highest rank on all modules that they have."""
    entries = [library.entries[name] for name in names]
    rank = max(max(entry.ranks) for entry in entries)
    targets: set[str] = set()
    for entry in entries:
        targets.update(entry.targets)
    return {
        "model_name_or_path": library.base,
        "use_peft": True,
        "lora_r": rank,
        "lora_alpha": 2 * rank,
        "lora_target_modules": sorted(targets),
    }


def _without_repeats(sets: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each once: adapters of one cluster may have been trained on the same texts."""
    once: list[dict[str, Any]] = []
    for each in sets:
        if each not in once:
            once.append(dict(each))  # a dictionary of its own, which YAML writes out
    return once


def _training_set(written: str) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset` for a source, wherever TRL is started.

    `UserError` for a source that is not here, or that `load_dataset` does not read.
    """
    (source,) = parse_sources([written])
    arguments = dataset_arguments(source)
    path = Path(source.path).expanduser()
    if "data_files" in arguments:
        arguments["data_files"] = {"train": str(path.resolve())}
    elif path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            raise UserError(
                f"{written} was saved by `save_to_disk`, which TRL does not read: save it as "
                "parquet, and name that with --data"
            )
        arguments["path"] = str(path.resolve())
    return arguments
