"""One vocabulary for models with different tokenizers: which row of a model's embedding stands for
which token.

Rows are matched by the tokens' strings, with mergekit's own tokenizer machinery.
"""

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

_ROLES = ("unk_token", "pad_token", "bos_token", "eos_token")  # of a token with several, the last


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Of one model, per token of the donor's vocabulary: its row, or -1; and the rows that stand in
    for it.
    """

    own: Tensor  # (vocabulary,)
    stand_ins: Mapping[int, Sequence[int]]


def align_vocabularies(
    job: Job, configs: Mapping[ModelReference, PretrainedConfig], *, stand_ins: bool
) -> dict[ModelReference, TokenRows]:
    """Every source's rows for the donor's tokens.

    A token that a model lacks is stood in for, if `stand_ins`, by the model's token of the same
    role (end of text …), else by the tokens that its own tokenizer makes of the text. `UserError`
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
        if model == job.donor:  # rows beyond its tokenizer included
            rows[model] = TokenRows(torch.arange(size), {})
            continue
        own = torch.full((size,), -1)
        for token_id, row in alignment.permutations[model].items():
            if token_id < size:
                own[token_id] = row
        if not (own >= 0).any():
            raise UserError(
                f"{model} shares no token with {job.donor}: they cannot speak with one tokenizer"
            )
        lacking = (own < 0).nonzero()[:, 0].tolist() if stand_ins else []
        bags = _stand_ins(tokenizers[job.donor], tokenizers[model], lacking)
        known = {
            i: [row for row in bag if row < configs[model].vocab_size] for i, bag in bags.items()
        }
        rows[model] = TokenRows(own, {i: bag for i, bag in known.items() if bag})
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
    roles = {
        getattr(donor, f"{role}_id"): getattr(own, f"{role}_id")
        for role in _ROLES
        if getattr(donor, role) is not None and getattr(own, role) is not None
    }
    texts = {i: donor.decode([i]) for i in lacking if i < len(donor) and i not in roles}
    spelled = own(list(texts.values()), add_special_tokens=False)["input_ids"] if texts else []
    of_role = {i: [roles[i]] for i in lacking if i in roles}
    return {**of_role, **dict(zip(texts, spelled, strict=True))}


class AlignedRows(Task[Tensor]):
    """A tensor with a row per token, its rows in the donor's order.

    For a token that it lacks the mean of the stand-ins; where there are none, of all rows, so that
    what the head makes of it is no more likely than the average token (zeros would win where logits
    are negative).
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
        tokens, bags = list(self.rows.stand_ins), list(self.rows.stand_ins.values())
        if tokens:
            flat = torch.tensor(
                [row for bag in bags for row in bag], dtype=torch.long, device=tensor.device
            )
            starts = torch.tensor([0, *map(len, bags)], device=tensor.device).cumsum(dim=0)[:-1]
            table = tensor.float().reshape(len(tensor), -1)
            means = functional.embedding_bag(flat, table, starts, mode="mean")
            aligned[torch.tensor(tokens, device=tensor.device)] = means.reshape(
                len(tokens), *tensor.shape[1:]
            ).to(tensor)
        return aligned.to(dtype_from_name(self.dtype))


class AveragedRows(Task[Tensor]):
    """(tokens, width): each token's rows in the models that have it, filled with zeros to the width
    and averaged.
    """

    sources: tuple[tuple[LoadTensor, Any], ...]  # TokenRows again
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
            has = rows.own >= 0
            total[has, : tensor.shape[1]] += tensor[rows.own[has].to(tensor.device)].to(total)
            counts[has] += 1
        return (total / counts.clamp(min=1)).to(dtype_from_name(self.dtype))
