"""One vocabulary for models with different tokenizers: the rows of each model's embedding and head
that stand for a token of the donor's.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import tokenizer_of
from mergekit_moe_ext.sequence.tokens import ROLES, Tokens

# Added to the logit of a token that a model does not predict: a factor of 2e-9. Together such
# tokens take nothing that can be seen, and the loss of a text that has one stays finite.
UNLIKELY = -20.0
# The first tokens of a vocabulary are special, or single bytes, and not its most frequent ones.
_NUMBER_OF_RARE_TOKENS = 300
_EXAMPLES = 2


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows of one model for the tokens of the donor's vocabulary.

    own: (vocabulary,), the row of each token; -1 where the model lacks it.
    stand_ins: for tokens that it lacks, the rows whose mean stands in for them.
    spelled: those of them that the rows write whole, in their order.
    never_made: tokens that the donor's tokenizer makes of no text, since another one stands for the
        same bytes, and for which the model has no byte token.
    examples: for people, some tokens that are `spelled` and some that are `missing`.
    """

    own: Tensor
    stand_ins: Mapping[int, Sequence[int]]
    spelled: frozenset[int] = frozenset()
    never_made: frozenset[int] = frozenset()
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def lacking(self) -> list[int]:
        """The tokens that the model has no row of their own for."""
        return (self.own < 0).nonzero()[:, 0].tolist()

    @property
    def missing(self) -> list[int]:
        """The tokens that the model cannot write."""
        return [token for token in self.lacking if token not in self.spelled]

    def first_pieces(self) -> "TokenRows":
        """The same rows, with the first of its stand-ins alone for each token that has any."""
        return replace(self, stand_ins={token: bag[:1] for token, bag in self.stand_ins.items()})

    def shares(self) -> Tensor:
        """(vocabulary,) in float32: the logarithm of a token's part of the probability of its row,
        which for a lacking token is its first stand-in. `UNLIKELY` for tokens that nothing stands
        in for, and for those that the donor's tokenizer never makes.

        Tokens of one row share it: WordPiece has one for a word with a space before it and without.
        Lacking tokens take nothing away from the row's own, but share as if these took part.

        Nothing but the order of the donor's vocabulary says how often a token is used, and
        tokenizers number tokens from the most frequent on. As in Zipf's law, a part is inversely
        proportional to the token's number.
        """
        owners = self._tokens_by_row()
        beginners: dict[int, list[int]] = defaultdict(list)
        for token, bag in self.stand_ins.items():
            if token not in self.never_made:
                beginners[bag[0]].append(token)
        logarithms = torch.full(self.own.shape, UNLIKELY)
        for row, tokens in beginners.items():
            logarithms[tokens] = _logarithms_of_parts([*owners[row], *tokens])[-len(tokens) :]
        for tokens in owners.values():
            if tokens:
                logarithms[tokens] = _logarithms_of_parts(tokens)
        return logarithms

    def availability(self, *, with_stand_ins: bool) -> Tensor:
        """(vocabulary,) in float32: 0 for tokens that the model has and, `with_stand_ins`, for
        those that something stands in for; `UNLIKELY` for all others, and for those that the
        donor's tokenizer never makes. Tokens that share a row have the logarithms of their parts of
        it, as in `shares`.
        """
        logits = torch.full(self.own.shape, UNLIKELY)
        if with_stand_ins:
            logits[list(self.stand_ins)] = 0
        logits[list(self.never_made)] = UNLIKELY
        for tokens in self._tokens_by_row().values():
            logits[tokens] = _logarithms_of_parts(tokens)
        return logits

    def _tokens_by_row(self) -> dict[int, list[int]]:
        """The tokens that have a row of their own, but for those that no text is made into."""
        owners: dict[int, list[int]] = defaultdict(list)
        for token, row in enumerate(self.own.tolist()):
            if row >= 0 and token not in self.never_made:
                owners[row].append(token)
        return owners


def _logarithms_of_parts(tokens: Sequence[int]) -> Tensor:
    """(tokens,) in float32: the logarithms of the parts of some tokens that share a row."""
    frequencies = 1 / (torch.tensor(tokens) + _NUMBER_OF_RARE_TOKENS)
    return (frequencies / frequencies.sum()).log()


def align_vocabularies(
    job: Job, configs: Mapping[ModelReference, PretrainedConfig]
) -> dict[ModelReference, TokenRows]:
    """Every source's rows for the donor's tokens.

    `UserError` for a source without a tokenizer, for one that shares no token with the donor, and
    for a donor whose tokenizer has more words than its embedding.
    """
    tokens = {model: _tokens(job, model) for model in configs}
    of_donor = tokens[job.donor]
    size = configs[job.donor].vocab_size
    beyond = [token for token in of_donor.bytes_of if token >= size]
    if beyond:
        raise UserError(
            f"the tokenizer of {job.donor} has a token {beyond[0]}, but its embedding has only "
            f"{size} rows"
        )
    rows = {}
    for model, config in configs.items():
        # The donor keeps all of its rows, those beyond its tokenizer included.
        if model == job.donor:
            rows[model] = TokenRows(torch.arange(size), {})
            continue
        rows[model] = rows_of(of_donor, tokens[model], size, config.vocab_size)
        words = torch.tensor(list(of_donor.bytes_of))
        if not (rows[model].own[words] >= 0).any():
            raise UserError(
                f"{model} shares no token with {job.donor}: one tokenizer cannot serve both"
            )
    return rows


def _tokens(job: Job, model: ModelReference) -> Tokens:
    try:
        return Tokens(tokenizer_of(model, job.merge_options))
    except UserError as error:
        raise UserError(
            f"{error.message} (it is needed, since tokens are matched by what they stand for)"
        ) from error


def rows_of(donor: Tokens, model: Tokens, size: int, number_of_rows: int) -> TokenRows:
    """The rows of a model with so many rows for the `size` tokens of a donor."""
    own = torch.full((size,), -1)
    # A tokenizer may have more tokens than its model has rows.
    for text, token in donor.special.items():
        row = _row_of_special(donor, model, text, token)
        if token < size and row is not None and row < number_of_rows:
            own[token] = row
    stand_ins = {}
    spelled = set()
    examples: dict[str, list[str]] = {"spelled": [], "missing": []}
    for text, token in donor.special.items():
        if token < size and own[token] < 0:
            examples["missing"].append(text)
    texts_of_markers = {token: text for text, token in donor.markers.items()}
    for token, content in donor.bytes_of.items():
        row = _row_of_ordinary(donor, model, token, texts_of_markers.get(token, ""))
        if row is not None and row < number_of_rows:
            own[token] = row
            continue
        # The rows of the tokens by which the model writes the same bytes stand in for it.
        spelling = model.spell(content)
        bag = [piece for piece in spelling.tokens if piece < number_of_rows]
        if bag:
            stand_ins[token] = bag
        if spelling.is_whole and len(bag) == len(spelling.tokens):
            spelled.add(token)
            pieces = " ".join(_quoted(model.bytes_of[piece]) for piece in bag)
            examples["spelled"].append(f"{_quoted(content)} as {pieces}")
        else:
            examples["missing"].append(_quoted(content))
    shown = {kind: texts[:_EXAMPLES] for kind, texts in examples.items()}
    never_made = [
        token for token in donor.never_made if donor.bytes_of[token] not in model.byte_tokens
    ]
    return TokenRows(own, stand_ins, frozenset(spelled), frozenset(never_made), shown)


def _quoted(content: bytes) -> str:
    """The bytes of a token as people read them."""
    return json.dumps(content.decode(errors="backslashreplace"), ensure_ascii=False)


def _row_of_special(donor: Tokens, model: Tokens, text: str, token: int) -> int | None:
    """The model's row of a special token: of the same text, else of the same role."""
    if text in model.markers:
        return model.markers[text]
    row = None
    for role in ROLES:
        if donor.roles.get(role) == token and role in model.roles:
            row = model.roles[role]
    return row


def _row_of_ordinary(donor: Tokens, model: Tokens, token: int, marker: str) -> int | None:
    """The model's row of an ordinary token of the donor's, whose text is `marker` if it is one."""
    row = model.markers.get(marker)
    content = donor.bytes_of[token]
    # A byte that no text is made into is that to the model, too.
    if row is None and token in donor.never_made:
        row = model.byte_tokens.get(content)
    return model.number_of(content) if row is None else row


class AlignedRows(Task[Tensor]):
    """A tensor with a row per token, its rows in the donor's order.

    A token that it lacks gets the mean of its stand-ins; without stand-ins the mean of all rows.
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
        return aligned(tensor, self.rows).to(dtype_from_name(self.dtype))


class AlignedBias(Task[Tensor]):
    """What is added to a head's logits, a number per token of the donor's: the source's own bias,
    if it has one, and what its rows call for (`shares` or `availability` of `TokenRows`).
    """

    name: str
    source: LoadTensor | None
    rows: Any  # TokenRows
    of_rows: Any  # a tensor (vocabulary,)
    shape: tuple[int, ...]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> Tensor:
        bias = self.of_rows
        if self.source is not None:
            tensor = self.source.execute()
            assert tensor is not None
            bias = bias + aligned(tensor, self.rows).to(bias)
        return bias.to(dtype_from_name(self.dtype))


def aligned(tensor: Tensor, rows: TokenRows) -> Tensor:
    """(rows of a model, …) to (tokens of the donor, …): own rows, or means of stand-ins."""
    own = rows.own.to(tensor.device)
    result = tensor[own.clamp(min=0)]
    if (own < 0).any():
        result[own < 0] = tensor.mean(dim=0, dtype=torch.float32).to(tensor)
    if rows.stand_ins:
        # The means of bags of different sizes, all bags end to end and where each one starts.
        tokens = torch.tensor(list(rows.stand_ins), device=tensor.device)
        bags = list(rows.stand_ins.values())
        bag_rows = list(itertools.chain.from_iterable(bags))
        flat = torch.tensor(bag_rows, dtype=torch.long, device=tensor.device)
        starts = torch.tensor([0, *map(len, bags)], device=tensor.device).cumsum(dim=0)[:-1]
        table = tensor.float().reshape(len(tensor), -1)
        means = functional.embedding_bag(flat, table, starts, mode="mean")
        result[tokens] = means.reshape(len(tokens), *tensor.shape[1:]).to(tensor)
    return result


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
        total = torch.zeros(self.shape, device="cpu")
        counts = torch.zeros(self.shape[0], 1, device="cpu")
        for load, rows in self.sources:
            tensor = load.execute()
            assert tensor is not None
            is_there = rows.own >= 0
            own_rows = tensor[rows.own[is_there].to(tensor.device)]
            total[is_there, : tensor.shape[1]] += own_rows.to(total)
            counts[is_there] += 1
        return (total / counts.clamp(min=1)).to(dtype_from_name(self.dtype))
