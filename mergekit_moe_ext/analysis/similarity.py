"""The similarity of the task vectors of fine-tunes in attention and in the FFNs, layer by layer
(MergeME, 4.4, figure 4).

Task vectors that point in different directions interfere when they are averaged.
`examples/task_vector_similarity.py` prints and draws what is measured here.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
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

Definition = Literal["concatenated", "mean"]
_CHUNK = 2**20  # elements of each model that are in float64 at a time


@dataclass(frozen=True)
class PairSimilarity:
    """The cosines of the task vectors of two fine-tunes: one number per decoder layer, NaN where
    there is none.
    """

    first: str
    second: str
    attention: tuple[float, ...]
    ffn: tuple[float, ...]


@dataclass(frozen=True)
class _Layer:
    """The shapes of a decoder layer's tensors, by hub names."""

    attention: Mapping[str, tuple[int, ...]]
    ffn: Mapping[str, tuple[int, ...]]


def task_vector_similarity(
    base: str | Path,
    models: Mapping[str, str | Path],
    definition: Definition = "concatenated",
    *,
    quiet: bool = True,
) -> list[PairSimilarity]:
    """The cosines of the task vectors of each pair of fine-tunes, in attention and in the FFN of
    each decoder layer.

    `base` is the directory of the model that all of `models` (name -> directory) were fine-tuned
    from: safetensors, in shards or not, in any floating dtype. Pairs come in the order of `models`.
    MergeME allows two definitions:

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
    if definition not in get_args(Definition):
        raise UserError(f"definition: {definition!r} is none of {', '.join(get_args(Definition))}")
    network, state = network_of(base, models.values())
    layers = _layers(network, state)
    checkpoints = [StoredModel.open(path, network) for path in (base, *models.values())]
    for checkpoint in checkpoints:
        for layer in layers:
            checkpoint.check({**layer.attention, **layer.ffn})
    attention_cosines = []
    ffn_cosines = []
    for layer in tqdm(layers, desc="layers", disable=quiet):
        attention_cosines.append(_cosines(checkpoints, layer.attention, definition))
        ffn_cosines.append(_cosines(checkpoints, layer.ffn, definition))
    pairs = []
    for (i, first), (j, second) in itertools.combinations(enumerate(models), 2):
        attention = tuple(cosines[i, j].item() for cosines in attention_cosines)
        ffn = tuple(cosines[i, j].item() for cosines in ffn_cosines)
        pairs.append(PairSimilarity(first, second, attention, ffn))
    return pairs


def _cosines(
    checkpoints: list[StoredModel], names: Mapping[str, tuple[int, ...]], definition: Definition
) -> torch.Tensor:
    """The cosines (models, models) of every fine-tune with every other."""
    products = []
    for name in names:
        base, *models = [model.read(name) for model in checkpoints]
        products.append(_inner_products(base, models))
    stacked = torch.stack(products)
    # The inner product of concatenated vectors is the sum of the inner products.
    if definition == "concatenated":
        return _normalised(stacked.sum(dim=0))
    return _normalised(stacked).nanmean(dim=0)


def _inner_products(base: torch.Tensor, models: Sequence[torch.Tensor]) -> torch.Tensor:
    """The inner products (models, models), in float64, of the task vectors of one flat tensor."""
    products = torch.zeros(len(models), len(models), dtype=torch.float64)
    for position in range(0, len(base), _CHUNK):
        chunk = slice(position, position + _CHUNK)
        task_vectors = torch.stack([model[chunk].double() for model in models])
        task_vectors -= base[chunk].double()
        products += task_vectors @ task_vectors.T
    return products


def _normalised(products: torch.Tensor) -> torch.Tensor:
    """Cosines from inner products, both (..., models, models)."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = products / norms[..., None, :] / norms[..., :, None]
    return cosines.clamp(-1, 1)  # rounding may lead beyond


def _layers(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> list[_Layer]:
    hub_names = {id(tensor): name for name, tensor in state.items()}
    layers = []
    for name, module in decoder_layers(model).items():
        try:
            attention, ffn = attention_and_ffn(module)
            layer = _Layer(
                _tensors(attention.values(), hub_names), _tensors(ffn.values(), hub_names)
            )
        except ValueError as error:
            raise UserError(f"layer {name} of {type(model).__name__}: {error}") from error
        layers.append(layer)
    return layers


def _tensors(
    modules: Iterable[nn.Module], hub_names: Mapping[int, str]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the modules' parameters by hub names, without those of norms."""
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
