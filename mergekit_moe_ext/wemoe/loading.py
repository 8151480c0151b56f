"""Reading a weight-ensembling model from its directory, by this package's classes: none of the code
in the directory is run.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.modeling import find_architecture
from mergekit_moe_ext.modeling.modeling_wemoe import Ensemble


def read_ensemble(path: str) -> tuple[type[PreTrainedModel], Any]:
    """The class and the configuration of the model. `UserError` if it is not a weight-ensembling
    model.
    """
    local = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not local.is_dir():
        raise UserError(f"{path} does not exist")
    if local.is_dir() and not (local / "config.json").exists():
        raise UserError(f"{path} has no config.json: it is not a model")
    try:
        values, _ = PreTrainedConfig.get_config_dict(str(local))
        name = (values.get("architectures") or ["a model of no class"])[0]
        architecture: Any = find_architecture(name)
        is_ensemble = architecture is not None and issubclass(architecture, Ensemble)
        config = architecture.config_class.from_pretrained(str(local)) if is_ensemble else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the config of {path}: {str(error).splitlines()[0]}"
        ) from error
    if not is_ensemble:
        raise UserError(
            f"{path} is {name}, which has no routed task vectors: wemoe and ewemoe make such models"
        )
    return architecture, config


def load_ensemble(path: str, architecture: type[PreTrainedModel], config: Any) -> Any:
    """The model, in the dtype in which it is stored."""
    try:
        return architecture.from_pretrained(
            str(Path(path).expanduser()), config=config, dtype="auto"
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {path}: {str(error).splitlines()[0]}") from error
