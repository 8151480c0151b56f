"""How alike the task vectors of fine-tunes are in attention and in the FFNs, layer by layer (MergeME, 4.4, figure 4).

Task vectors that point in different directions interfere when they are averaged. `examples/task_vector_similarity.py`
prints and draws what is measured here.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import click
import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.options import MergeOptions
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from _mergekit_moe_ext_common.loading import load_config
from _mergekit_moe_ext_common.options import Reading as ModelReading
from mergekit_moe_ext.layers import attention_and_ffn, decoder_layers, is_norm
from mergekit_moe_ext.manifest import hub_state
from mergekit_moe_ext.sources import DTYPES, Headers, stored_headers

Reading = Literal["concatenated", "mean"]
_CHUNK = 2**20  # elements of each model that are in float64 at a time


@dataclass(frozen=True)
class PairSimilarity:
    """Cosines of the task vectors of two fine-tunes: one number per decoder layer, NaN where there is none."""

    first: str
    second: str
    attention: tuple[float, ...]
    ffn: tuple[float, ...]


@dataclass(frozen=True)
class _Layer:
    """Hub names of a decoder layer's tensors, and their shapes."""

    attention: Mapping[str, tuple[int, ...]]
    ffn: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Checkpoint:
    name: str  # for errors
    headers: Headers
    loader: LazyTensorLoader
    prefix: str  # of hub names; checkpoints of a model without its head lack it, and transformers reads them too

    def stored_name(self, name: str) -> str:
        return name if name in self.headers.shapes else name.removeprefix(self.prefix)

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """`ValueError` if a tensor is missing, or of another shape, or of a dtype that has no plain value."""
        for name, shape in wanted.items():
            stored = self.stored_name(name)
            if stored not in self.headers.shapes:
                raise ValueError(f"{self.name} lacks the tensor {name}")
            if self.headers.shapes[stored] != shape:
                raise ValueError(
                    f"{name} of {self.name} has the shape {self.headers.shapes[stored]}; the base's architecture "
                    f"wants {shape}"
                )
            if self.headers.dtypes[stored] not in DTYPES.values():
                comparable = ", ".join(DTYPES.values())
                raise ValueError(
                    f"{name} of {self.name} is {self.headers.dtypes[stored]}; only {comparable} can be compared"
                )

    def read(self, name: str) -> torch.Tensor:
        return self.loader.get_tensor(self.stored_name(name)).reshape(-1)


def task_vector_similarity(
    base: str | Path, models: Mapping[str, str | Path], reading: Reading = "concatenated", *, quiet: bool = True
) -> list[PairSimilarity]:
    """Per pair of fine-tunes and decoder layer, the cosine of their task vectors in attention and in the FFN.

    `base` is the directory of the model that all of `models` (name -> directory) were fine-tuned from: safetensors, in
    shards or not, in any floating dtype. Pairs come in the order of `models`. MergeME has two readings:

    - "concatenated", its text: all tensors of a kind in a layer are one long vector, of which the cosine is taken.
    - "mean", its figure's caption: the mean over these tensors of the cosine of each, small biases counting as much as
      large matrices. Tensors that one of the two left as they were have no cosine, and are left out of the mean.

    Weights and biases count, norms do not, those inside attention included. A cosine with a task vector that is zero
    is 0/0, and NaN here. Sums are in float64. Files are mapped and one tensor of each is read at a time, so that
    memory does not grow with the number of layers.

    `ValueError` for other architectures and shapes, missing tensors, and decoder layers of which it cannot be told
    what is attention and what is the FFN, as in most mixtures of experts.
    """
    if len(models) < 2:
        raise ValueError(f"similarity takes two fine-tunes or more, not {len(models)}")
    if reading not in get_args(Reading):
        raise ValueError(f"reading: {reading!r} is none of {', '.join(get_args(Reading))}")
    config = _read_config(base)
    for path in models.values():
        _check_same_architecture(path, _read_config(path), base, config)
    with _as_value_error():
        network, state = hub_state(config)
    layers = _layers(network, state)
    checkpoints = [_open(path, f"{network.base_model_prefix}.") for path in (base, *models.values())]
    for checkpoint in checkpoints:
        for layer in layers:
            checkpoint.check({**layer.attention, **layer.ffn})
    cosines = [
        (_cosines(checkpoints, layer.attention, reading), _cosines(checkpoints, layer.ffn, reading))
        for layer in tqdm(layers, desc="layers", disable=quiet)
    ]
    return [
        PairSimilarity(
            first,
            second,
            attention=tuple(attention[i, j].item() for attention, _ in cosines),
            ffn=tuple(ffn[i, j].item() for _, ffn in cosines),
        )
        for (i, first), (j, second) in itertools.combinations(enumerate(models), 2)
    ]


def _cosines(checkpoints: list[_Checkpoint], names: Mapping[str, tuple[int, ...]], reading: Reading) -> torch.Tensor:
    """Of every fine-tune with every other, (models, models)."""
    products = torch.stack([_inner_products(*(model.read(name) for model in checkpoints)) for name in names])
    if reading == "concatenated":
        return _normalised(products.sum(dim=0))
    return _normalised(products).nanmean(dim=0)


def _inner_products(base: torch.Tensor, *models: torch.Tensor) -> torch.Tensor:
    """Of the task vectors of one tensor, flat, with each other: (models, models), float64."""
    products = torch.zeros(len(models), len(models), dtype=torch.float64)
    for start, *ends in zip(*(tensor.split(_CHUNK) for tensor in (base, *models)), strict=True):
        task_vectors = torch.stack([end.double() for end in ends]) - start.double()
        products += task_vectors @ task_vectors.T
    return products


def _normalised(products: torch.Tensor) -> torch.Tensor:
    """Inner products (..., models, models) to cosines."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    return (products / norms[..., None, :] / norms[..., :, None]).clamp(-1, 1)  # rounding may lead beyond


def _layers(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> list[_Layer]:
    hub_names = {id(tensor): name for name, tensor in state.items()}
    layers = []
    for name, module in decoder_layers(model).items():
        try:
            attention, ffn = (_tensors(part.values(), hub_names) for part in attention_and_ffn(module))
        except ValueError as error:
            raise ValueError(f"layer {name} of {type(model).__name__}: {error}") from error
        layers.append(_Layer(attention, ffn))
    return layers


def _tensors(modules: Iterable[nn.Module], hub_names: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
    """Hub names and shapes of their parameters, norms left out."""
    tensors = {}
    for module in modules:
        for part in module.modules():
            if is_norm(part):
                continue
            for name, parameter in part.named_parameters(recurse=False):
                if id(parameter) not in hub_names:
                    raise ValueError(f"{name} of {type(part).__name__} is stored in another form than it is used")
                tensors[hub_names[id(parameter)]] = tuple(parameter.shape)
    return tensors


def _open(path: str | Path, prefix: str) -> _Checkpoint:
    if not any(Path(path, name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        hint = ": a LoRA has to be merged into its base first" if Path(path, "adapter_config.json").exists() else ""
        raise ValueError(f"{path} holds no model.safetensors, in shards or not{hint}")
    with _as_value_error():
        headers = stored_headers(ModelReference(model=ModelPath(path=str(path))), MergeOptions())
    return _Checkpoint(str(path), headers, LazyTensorLoader.from_disk(str(path)), prefix)


def _read_config(path: str | Path) -> PretrainedConfig:
    if not Path(path).is_dir():
        raise ValueError(f"there is no directory {path}")
    with _as_value_error():
        config = load_config(str(path), ModelReading())
    if not config.architectures:
        raise ValueError(f"the config of {path} names no architecture")
    return config


def _check_same_architecture(
    path: str | Path, config: PretrainedConfig, base: str | Path, of_base: PretrainedConfig
) -> None:
    """Layers in particular: a model with more than the base's would seem to fit. Sizes show in the shapes."""
    for key in ("model_type", "num_hidden_layers"):
        here, there = (getattr(each.get_text_config(), key, None) for each in (config, of_base))
        if here != there:
            raise ValueError(f"{path} is no fine-tune of {base}: `{key}` is {here!r}, not {there!r}")


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        raise ValueError(error.message) from error
