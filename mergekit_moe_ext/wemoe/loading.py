"""Reading a weight-ensembling model from its directory, by this package's classes: no code in it is run."""

from pathlib import Path
from typing import Any

import click
from transformers import PreTrainedConfig, PreTrainedModel

from mergekit_moe_ext.modeling import find_architecture
from mergekit_moe_ext.modeling.modeling_wemoe import Ensemble


def read_ensemble(path: str) -> tuple[type[PreTrainedModel], Any]:
    """The class and the configuration of the model. `ClickException` if it is not a weight-ensembling one."""
    local = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not local.is_dir():
        raise click.ClickException(f"{path} does not exist")
    if local.is_dir() and not (local / "config.json").exists():
        raise click.ClickException(f"{path} has no config.json: it is no model")
    try:
        architectures = PreTrainedConfig.get_config_dict(str(local))[0].get("architectures") or ["a model of no class"]
        found = find_architecture(architectures[0])
        if found is None or not issubclass(found, Ensemble):
            raise click.ClickException(
                f"{path} is {architectures[0]}, which has no routed task vectors: wemoe and ewemoe make such models"
            )
        config_type: Any = found.config_class  # type: ignore[attr-defined]
        return found, config_type.from_pretrained(str(local))
    except (OSError, ValueError) as error:
        raise click.ClickException(f"cannot read the config of {path}: {str(error).splitlines()[0]}") from error


def load_ensemble(path: str, architecture: type[PreTrainedModel], config: Any) -> Any:
    """The model, in the dtype in which it is stored."""
    try:
        return architecture.from_pretrained(str(Path(path).expanduser()), config=config, dtype="auto")
    except (OSError, ValueError) as error:
        raise click.ClickException(f"cannot load {path}: {str(error).splitlines()[0]}") from error
