"""How alike the task vectors of fine-tunes are in attention and in the FFNs, layer by layer
(MergeME, 4.4, figure 4).

Task vectors that point in different directions interfere when they are averaged.
`examples/task_vector_similarity.py` prints and draws what is measured here.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.analysis.fine_tunes import StoredModel, network_of
from mergekit_moe_ext.merging.layers import attention_and_ffn, decoder_layers, is_norm

Reading = Literal["concatenated", "mean"]
_CHUNK = 2**20  # elements of each model that are in float64 at a time


@dataclass(frozen=True)
class PairSimilarity:
    """Cosines of the task vectors of two fine-tunes: one number per decoder layer, NaN where there
    is none.
    """

    first: str
    second: str
    attention: tuple[float, ...]
    ffn: tuple[float, ...]


@dataclass(frozen=True)
class _Layer:
    """Hub names of a decoder layer's tensors, and their shapes."""

    attention: Mapping[str, tuple[int, ...]]
    ffn: Mapping[str, tuple[int, ...]]


def task_vector_similarity(
    base: str | Path,
    models: Mapping[str, str | Path],
    reading: Reading = "concatenated",
    *,
    quiet: bool = True,
) -> list[PairSimilarity]:
    """Per pair of fine-tunes and decoder layer, the cosine of their task vectors in attention and
    in the FFN.

    `base` is the directory of the model that all of `models` (name -> directory) were fine-tuned
    from: safetensors, in shards or not, in any floating dtype. Pairs come in the order of `models`.
    MergeME has two readings:

    - "concatenated", its text: all tensors of a kind in a layer are one long vector, of which the
      cosine is taken.
    - "mean", its figure's caption: the mean over these tensors of the cosine of each, small biases
      counting as much as large matrices. Tensors that one of the two left as they were have no
      cosine, and are left out of the mean.

    Weights and biases count, norms do not, those inside attention included. A cosine with a task
    vector that is zero is 0/0, and NaN here. Sums are in float64. Files are mapped and one tensor
    of each is read at a time, so that memory does not grow with the number of layers.

    `UserError` for other architectures and shapes, missing tensors, and decoder layers of which it
    cannot be told what is attention and what is the FFN, as in most mixtures of experts.
    """
    if len(models) < 2:
        raise UserError(f"similarity takes two fine-tunes or more, not {len(models)}")
    if reading not in get_args(Reading):
        raise UserError(f"reading: {reading!r} is none of {', '.join(get_args(Reading))}")
    network, state = network_of(base, models.values())
    layers = _layers(network, state)
    checkpoints = [StoredModel.open(path, network) for path in (base, *models.values())]
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


def _cosines(
    checkpoints: list[StoredModel], names: Mapping[str, tuple[int, ...]], reading: Reading
) -> torch.Tensor:
    """Of every fine-tune with every other, (models, models)."""
    products = torch.stack(
        [_inner_products(*(model.read(name) for model in checkpoints)) for name in names]
    )
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
    return (products / norms[..., None, :] / norms[..., :, None]).clamp(
        -1, 1
    )  # rounding may lead beyond


def _layers(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> list[_Layer]:
    hub_names = {id(tensor): name for name, tensor in state.items()}
    layers = []
    for name, module in decoder_layers(model).items():
        try:
            attention, ffn = (
                _tensors(part.values(), hub_names) for part in attention_and_ffn(module)
            )
        except ValueError as error:
            raise UserError(f"layer {name} of {type(model).__name__}: {error}") from error
        layers.append(_Layer(attention, ffn))
    return layers


def _tensors(
    modules: Iterable[nn.Module], hub_names: Mapping[int, str]
) -> dict[str, tuple[int, ...]]:
    """Hub names and shapes of their parameters, norms left out."""
    tensors = {}
    for module in modules:
        for part in module.modules():
            if is_norm(part):
                continue
            for name, parameter in part.named_parameters(recurse=False):
                if id(parameter) not in hub_names:
                    raise UserError(
                        f"{name} of {type(part).__name__} is stored in another form than it is used"
                    )
                tensors[hub_names[id(parameter)]] = tuple(parameter.shape)
    return tensors
