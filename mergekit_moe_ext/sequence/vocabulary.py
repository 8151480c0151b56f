"""One vocabulary for models with different tokenizers: the row of each model's embedding that
stands for a token.

Rows are matched by the tokens' strings, with mergekit's own tokenizer machinery.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from mergekit.tokenizer.build import build_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import lacks_tokenizer, tokenizer_of

_ROLES = ("unk_token", "pad_token", "bos_token", "eos_token")  # the last of a token's roles counts


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows of one model for the tokens of the donor's vocabulary.

    own: (vocabulary,), the row of each token; -1 where the model lacks it.
    stand_ins: for tokens that it lacks, the rows whose mean stands in for them.
    """

    own: Tensor
    stand_ins: Mapping[int, Sequence[int]]


def align_vocabularies(
    job: Job, configs: Mapping[ModelReference, PretrainedConfig], *, stand_ins: bool
) -> dict[ModelReference, TokenRows]:
    """Every source's rows for the donor's tokens.

    With `stand_ins` a token that a model lacks is replaced by the model's token of the same role
    (end of text …), else by the tokens into which its own tokenizer splits the text. `UserError`
    for a source without a tokenizer, for one that shares no token with the donor, and for a donor
    whose tokenizer has more tokens than its embedding.
    """
    tokenizers = {model: _tokenizer(job, model) for model in configs}
    try:
        alignment = build_tokenizer(
            base_model=job.donor,
            referenced_models=list(configs),
            tokenizer_source="base",
            trust_remote_code=job.merge_options.trust_remote_code,
            add_tokens=[],
        )
    except RuntimeError as error:
        raise UserError(f"the tokenizer of {job.donor} cannot be used: {error}") from error
    size = configs[job.donor].vocab_size
    rows = {}
    for model in configs:
        # The donor keeps all of its rows, those beyond its tokenizer included.
        if model == job.donor:
            rows[model] = TokenRows(torch.arange(size), {})
            continue
        own = torch.full((size,), -1)
        for token_id, row in alignment.permutations[model].items():
            if token_id < size:
                own[token_id] = row
        if not (own >= 0).any():
            raise UserError(
                f"{model} shares no token with {job.donor}: one tokenizer cannot serve both"
            )
        lacking = (own < 0).nonzero()[:, 0].tolist() if stand_ins else []
        bags = {}
        for token, bag in _stand_ins(tokenizers[job.donor], tokenizers[model], lacking).items():
            # A tokenizer may have more tokens than its model has rows.
            bag_rows = [row for row in bag if row < configs[model].vocab_size]
            if bag_rows:
                bags[token] = bag_rows
        rows[model] = TokenRows(own, bags)
    return rows


def _tokenizer(job: Job, model: ModelReference) -> PreTrainedTokenizerBase:
    if lacks_tokenizer(model):
        raise UserError(f"{model} has no tokenizer, and tokens are matched by their strings")
    try:
        return tokenizer_of(model, job.merge_options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the tokenizer of {model} cannot be read, and tokens are matched by their strings: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _stand_ins(
    donor: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, lacking: Sequence[int]
) -> dict[int, list[int]]:
    """The model's own tokens that stand in for each token of the donor that it lacks."""
    roles = {}
    for role in _ROLES:
        if getattr(donor, role) is not None and getattr(own, role) is not None:
            roles[getattr(donor, f"{role}_id")] = getattr(own, f"{role}_id")
    stand_ins = {token: [roles[token]] for token in lacking if token in roles}
    texts = {}
    for token in lacking:
        if token < len(donor) and token not in roles:
            texts[token] = donor.decode([token])
    if texts:
        spellings = own(list(texts.values()), add_special_tokens=False)["input_ids"]
        stand_ins |= dict(zip(texts, spellings, strict=True))
    return stand_ins


class AlignedRows(Task[Tensor]):
    """A tensor with a row per token, its rows in the donor's order.

    A token that it lacks gets the mean of its stand-ins. Without stand-ins it gets the mean of all
    rows, so that the head finds it no more likely than the average token; with zeros it would win
    wherever logits are negative.
    """

    source: LoadTensor
    rows: Any  # TokenRows, of which pydantic makes no schema
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> Tensor:
        tensor = self.source.execute()
        assert tensor is not None
        own = self.rows.own.to(tensor.device)
        aligned = tensor[own.clamp(min=0)]
        if (own < 0).any():
            aligned[own < 0] = tensor.mean(dim=0, dtype=torch.float32).to(tensor)
        if self.rows.stand_ins:
            # The means of bags of different sizes, all bags end to end and where each one starts.
            tokens = torch.tensor(list(self.rows.stand_ins), device=tensor.device)
            bags = list(self.rows.stand_ins.values())
            bag_rows = list(itertools.chain.from_iterable(bags))
            flat = torch.tensor(bag_rows, dtype=torch.long, device=tensor.device)
            starts = torch.tensor([0, *map(len, bags)], device=tensor.device).cumsum(dim=0)[:-1]
            table = tensor.float().reshape(len(tensor), -1)
            means = functional.embedding_bag(flat, table, starts, mode="mean")
            aligned[tokens] = means.reshape(len(tokens), *tensor.shape[1:]).to(tensor)
        return aligned.to(dtype_from_name(self.dtype))


class AveragedRows(Task[Tensor]):
    """A tensor (tokens, width) of the averages of each token's rows in the models that have it,
    padded with zeros to the width (MergeME 3.2).
    """

    sources: tuple[tuple[LoadTensor, Any], ...]  # with the TokenRows of each
    shape: tuple[int, int]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> Tensor:
        total = torch.zeros(self.shape)
        counts = torch.zeros(self.shape[0], 1)
        for load, rows in self.sources:
            tensor = load.execute()
            assert tensor is not None
            is_there = rows.own >= 0
            own_rows = tensor[rows.own[is_there].to(tensor.device)]
            total[is_there, : tensor.shape[1]] += own_rows.to(total)
            counts[is_there] += 1
        return (total / counts.clamp(min=1)).to(dtype_from_name(self.dtype))
