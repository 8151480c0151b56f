"""Centroids: what the base model makes of the texts that an adapter was trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from _mergekit_moe_ext_common.checkpoints import damage, model_fingerprint
from _mergekit_moe_ext_common.data import collate, load, parse_sources, tokenise
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    padding_token,
    vocabulary_of,
)
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.staging import new_file
from peft_routing.library.catalogue import Library

_VERSION = 1
_TENSOR = "centroid"


class Base:
    """A library's base model, which reads texts: loaded when it is first asked for.

    Making it reads its configuration, tokenizer and headers, so that what is wrong with them is
    said before any work. `UserError` for an encoder-decoder, whose encoder predicts nothing.
    """

    def __init__(self, name: str, reading: Reading) -> None:
        self.name = name
        self.reading = reading
        self.config = load_config(name, reading)
        if self.config.is_encoder_decoder:
            raise UserError(
                f"{name} is an encoder-decoder, and texts are routed for decoders alone"
            )
        self._headers = check_model(name, self.config, reading)
        self.tokenizer = load_tokenizer(name, reading)
        self.pad_token_id = padding_token(self.tokenizer, vocabulary_of(self.config))

    def model(self) -> Any:
        """The model with its weights, in evaluation mode, on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(
            self.name, self.config, self.reading, headers=self._headers, dtype="auto"
        )
        return model.to(device).eval()

    def read(self, source: str, max_samples: int | None) -> Dataset:
        """The token ids of each row of a source.

        `UserError` for what cannot be read, and where a row is empty: rows are told apart by their
        numbers.
        """
        (parsed,) = parse_sources([source])
        rows = load(parsed, max_samples)
        encoded = tokenise(
            rows,
            parsed,
            self.tokenizer,
            columns=self.reading.columns,
            max_length=self.reading.max_length,
            vocabulary=vocabulary_of(self.config),
        )
        if len(encoded) < len(rows):
            raise UserError(
                f"{parsed}: {len(rows) - len(encoded)} of {len(rows)} rows are empty; take them out"
            )
        return encoded


def write_centroids(
    library: Library, base: Base, texts: Mapping[str, Dataset], *, batch_size: int
) -> None:
    """Keeps the centroid of each adapter's texts, which are by the adapter's sha256."""
    notes = {"base": model_fingerprint(library.base)}
    model = base.model()
    for sha256, rows in texts.items():
        centroid = embeddings(model, rows, base.pad_token_id, batch_size).mean(dim=0)
        with new_file(_file(library.index, sha256)) as partial:
            save_file({_TENSOR: centroid}, partial, metadata=notes)


def read_centroids(library: Library, names: list[str]) -> Tensor:
    """(adapters, width), in float32. `UserError` for an adapter without a centroid, and for one of
    another base model.
    """
    fingerprint = model_fingerprint(library.base)
    centroids = []
    for name in names:
        file = _file(library.index, library.entries[name].sha256)
        if not file.is_file():
            raise UserError(
                f"{name!r} has no centroid, by which a text's shortlist is made: remove it, and "
                f"add it again with --data {name}=SOURCE"
            )
        try:
            with safe_open(file, framework="pt") as reader:
                centroid = reader.get_tensor(_TENSOR)
                of_base = reader.metadata()["base"]
        except Exception as error:  # whatever a damaged file makes its reader raise
            raise UserError(f"{damage(file, error)}; add {name!r} again") from error
        if of_base != fingerprint:
            raise UserError(
                f"the centroid of {name!r} was made with other weights of {library.base}: remove "
                "the adapter and add it again"
            )
        centroids.append(centroid)
    return torch.stack(centroids)


def _file(index: Path, sha256: str) -> Path:
    return index / f"{sha256}.centroid{_VERSION}.safetensors"


@torch.no_grad()
def embeddings(model: Any, rows: Dataset, pad_token_id: int, batch_size: int) -> Tensor:
    """(rows, width): of each row the mean over its tokens of the hidden states in the middle of the
    model, in float32.

    The first token is left out where there are others: decoders make a huge state of it, whatever
    it is.
    """
    device = next(model.parameters()).device
    means = []
    for start in range(0, len(rows), batch_size):
        items = rows.select(range(start, min(start + batch_size, len(rows))))
        only_ids = [{"input_ids": item["input_ids"]} for item in items]
        collated = collate(only_ids, pad_token_id)
        batch = {key: tensor.to(device) for key, tensor in collated.items()}
        states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        middle = states[len(states) // 2].float()
        counted = batch["attention_mask"].float()
        has_others = counted.sum(dim=1) > 1
        counted[has_others, 0] = 0
        sums = (middle * counted[..., None]).sum(dim=1)
        means.append((sums / counted.sum(dim=1, keepdim=True)).cpu())
    return torch.cat(means)


def nearest(texts: Tensor, centroids: Tensor, count: int) -> Tensor:
    """(texts, count): the numbers of the nearest centroids, the nearest first.

    What all centroids have in common is taken from both sides before the cosine: a model's hidden
    states point nearly the same way, whatever they are of.
    """
    common = centroids.mean(dim=0)
    centroid_directions = torch.nn.functional.normalize(centroids - common, dim=1)
    text_directions = torch.nn.functional.normalize(texts - common, dim=1)
    cosines = text_directions @ centroid_directions.T
    return cosines.topk(count, dim=1).indices
