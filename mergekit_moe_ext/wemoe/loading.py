"""Reading a weight-ensembling model from its directory, by this package's classes: none of the code
in the directory is run.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import (
    check_directory,
    existing,
    explained,
    load_model,
    read_values,
)
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.modeling import find_architecture
from mergekit_moe_ext.modeling.configuration_wemoe import Ensembling
from mergekit_moe_ext.modeling.modeling_wemoe import Ensemble


def read_ensemble(path: str) -> tuple[type[PreTrainedModel], Any]:
    """The class and the configuration of the model. `UserError` if it is not a weight-ensembling
    model.
    """
    check_directory(path)
    local = str(Path(path).expanduser())
    with explained(f"cannot read the config of {path}", path):
        with existing(path):
            values = read_values(local)
        name = (values.get("architectures") or ["a model of no class"])[0]
        architecture: Any = find_architecture(name)
        is_ensemble = architecture is not None and issubclass(architecture, Ensemble)
        config: Any = None
        if is_ensemble:
            config = architecture.config_class.from_pretrained(local)
            config.ensembling = Ensembling.from_dict(config.ensembling).as_dict()
    if not is_ensemble:
        raise UserError(
            f"{path} is {name}, which has no routed task vectors: wemoe and ewemoe make such models"
        )
    return architecture, config


def load_ensemble(path: str, architecture: type[PreTrainedModel], config: Any) -> Any:
    """The model, whole and finite, in the dtype in which it is stored."""
    return load_model(path, config, Reading(), architecture=architecture, dtype="auto")
