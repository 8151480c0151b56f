"""The fusion that a report recommends, as files that are ready to load or serve."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn

from peft_routing.adapter_files import weights_file
from peft_routing.fusion.report import Row
from peft_routing.fusion.rows import coefficients_of
from peft_routing.fusion.strategies import ENSEMBLE, PLAIN, composed_of
from peft_routing.fusion.subjects import composed

ENSEMBLE_FILE = "ensemble.json"


def write_recommended(
    row: Row, experts: Mapping[str, str], written: str, empty: nn.Module, out: Path
) -> bool:
    """Writes the adapter of a row to a directory that does not exist; returns whether there is one.

    One adapter is copied, and so is a merge or a trained router. Another router is a routed
    adapter. An ensemble is a routed adapter of the experts that have a coefficient, with
    `ensemble.json` beside it, whose entries are arguments of `peft_routing.ensemble`. The base
    model needs nothing, and an adapter of the user's own lies where it lies.

    Args:
        written: the directory of a merge, or of a trained router, that was written to be measured;
            empty for other rows.
        empty: the base model's architecture.
    """
    if written:
        _copy(written, out)
        if "top_k" in row.values:
            _set_top_k(out, row.values["top_k"])
        return True
    if row.name == "best_expert":  # which its note names
        _copy(experts[row.note], out)
        return True
    if row.kind == ENSEMBLE:
        _write_ensemble(row, experts, empty, out)
        return True
    if row.name not in composed_of(len(experts)):
        return False
    kind, options = composed_of(len(experts))[row.name]
    model = get_peft_model(empty, composed(experts, **options))
    if kind == PLAIN:
        model.base_model.to_lora(str(out))
    else:
        model.save_pretrained(str(out))
    model.unload()
    return True


def _copy(adapter: str, out: Path) -> None:
    weights = weights_file(adapter, adapter)
    out.mkdir()
    shutil.copyfile(weights, out / weights.name)
    shutil.copyfile(weights.with_name(CONFIG_NAME), out / CONFIG_NAME)


def _set_top_k(adapter: Path, k: int) -> None:
    """Has the router of a written adapter keep the k largest coefficients."""
    path = adapter / CONFIG_NAME
    values = json.loads(path.read_text(encoding="utf-8"))
    values["top_k"] = k
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _write_ensemble(row: Row, experts: Mapping[str, str], empty: nn.Module, out: Path) -> None:
    coefficients = {}
    for name, value in coefficients_of(row, experts).items():
        if value > 0:
            coefficients[name] = value
    used = {name: experts[name] for name in coefficients}
    model = get_peft_model(empty, composed(used, router="uniform", mixing="full"))
    with torch.no_grad():
        model.save_pretrained(str(out))
    model.unload()
    arguments = {
        "coefficients": coefficients,
        "beta": row.values.get("beta", 0.0),
        "of": row.values.get("of", "probabilities"),
    }
    text = json.dumps(arguments, indent=1) + "\n"
    (out / ENSEMBLE_FILE).write_text(text, encoding="utf-8")
