"""Fine-tunes of one base as they are stored, for analyses that read them tensor by tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.options import MergeOptions
from transformers import PretrainedConfig, PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import load_config
from _mergekit_moe_ext_common.options import Reading
from mergekit_moe_ext.merging.manifest import hub_state
from mergekit_moe_ext.merging.sources import DTYPES, Headers, stored_headers


def network_of(
    base: str | Path, fine_tunes: Iterable[str | Path]
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The base's network without memory, and its state dict in hub layout.

    `UserError` for a fine-tune of another architecture.
    """
    config = _config_of(base)
    for path in fine_tunes:
        _check_same_architecture(path, _config_of(path), base, config)
    return hub_state(config)


@dataclass(frozen=True)
class StoredModel:
    """A model's tensors as they are stored, by the names that its architecture has for them on the
    Hub.

    name: the model's name in errors.
    prefix: the prefix of hub names that the checkpoint of a model without its head lacks;
        transformers reads such checkpoints, too.
    """

    name: str
    headers: Headers
    loader: LazyTensorLoader
    prefix: str

    @classmethod
    def open(cls, path: str | Path, network: PreTrainedModel) -> "StoredModel":
        """The model in a directory. `UserError` where there are no safetensors to read."""
        files = (Path(path, "model.safetensors"), Path(path, "model.safetensors.index.json"))
        if not any(file.exists() for file in files):
            hint = ""
            if Path(path, "adapter_config.json").exists():
                hint = ": a LoRA has to be merged into its base first"
            raise UserError(f"{path} holds no model.safetensors, in shards or not{hint}")
        headers = stored_headers(ModelReference(model=ModelPath(path=str(path))), MergeOptions())
        loader = LazyTensorLoader.from_disk(str(path))
        return cls(str(path), headers, loader, f"{network.base_model_prefix}.")

    def stored_name(self, name: str) -> str:
        """The name in the files of a tensor with this hub name."""
        return name if name in self.headers.shapes else name.removeprefix(self.prefix)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that all tensors with these names are there, in these shapes and a plain floating
        dtype. `UserError` if not.
        """
        for name, shape in shapes.items():
            stored = self.stored_name(name)
            if stored not in self.headers.shapes:
                raise UserError(f"{self.name} lacks the tensor {name}")
            if self.headers.shapes[stored] != shape:
                raise UserError(
                    f"{name} of {self.name} has the shape {self.headers.shapes[stored]}; the "
                    f"base's architecture has {shape}"
                )
            if self.headers.dtypes[stored] not in DTYPES.values():
                comparable = ", ".join(DTYPES.values())
                raise UserError(
                    f"{name} of {self.name} is {self.headers.dtypes[stored]}; only {comparable} "
                    "can be compared"
                )

    def read(self, name: str) -> torch.Tensor:
        """The tensor with this hub name, flat."""
        return self.loader.get_tensor(self.stored_name(name)).reshape(-1)


def _config_of(path: str | Path) -> PretrainedConfig:
    if not Path(path).is_dir():
        raise UserError(f"there is no directory {path}")
    config = load_config(str(path), Reading())
    if not config.architectures:
        raise UserError(f"the config of {path} names no architecture")
    return config


def _check_same_architecture(
    path: str | Path, config: PretrainedConfig, base: str | Path, of_base: PretrainedConfig
) -> None:
    """Check that two models have one model type and the same numbers of layers.

    A model with more layers than the base's would seem to fit. Other sizes show in the shapes.
    """
    for key in (
        "model_type",
        "num_hidden_layers",
        "num_decoder_layers",
        "encoder_layers",
        "decoder_layers",
    ):
        value = getattr(config.get_text_config(), key, None)
        base_value = getattr(of_base.get_text_config(), key, None)
        if value != base_value:
            raise UserError(
                f"{path} is not a fine-tune of {base}: `{key}` is {value!r}, not {base_value!r}"
            )
