"""The key-value cache of a sequence MoE: one per expert, and the choice that the prompt made.

An expert's cache holds the sequences that chose the expert, and these alone.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, StaticCache


class SequenceMoECache(Cache):
    """Per expert a cache of the sequences that chose it, and the choice itself.

    `length` is a number of tokens that experts' caches make room for at once; without one they
    grow.
    """

    def __init__(self, length: int | None = None) -> None:
        super().__init__(layers=[])
        self.room = length
        self.records_past = False
        self.coefficients: Tensor | None = None  # (batch, experts)
        # What follows from the coefficients. It is the same for every token that is generated, and
        # finding it out makes a GPU wait.
        self.shares: list[Any] = []
        # By expert, the rows of the batch that chose it, and their cache.
        self.of_expert: dict[int, tuple[Tensor, Cache]] = {}
        self.length = 0
        # (batch, length) of tokens that came without a mask and have padding at an end.
        self.mask: Tensor | None = None

    def new(self, config: PretrainedConfig) -> Cache:
        """An empty cache for an expert of this configuration."""
        cache: Cache
        if self.room is None:
            cache = DynamicCache(config=config)
        else:
            cache = StaticCache(config=config, max_cache_len=self.room)
        if self.records_past:
            cache.activate_past_recording()
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def batch_size(self) -> int:
        return -1 if self.coefficients is None else len(self.coefficients)

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer is linear: one that is not.

        From transformers 5.24 a cache without any counts as one that knows no length.
        """
        return [False]

    # Assisted decoding hands in guesses and takes back those that were wrong. (It has the prompt
    # choose first, so that no guess does.)
    @property
    def is_croppable(self) -> bool:
        return all(getattr(cache, "is_croppable", True) for _, cache in self.of_expert.values())

    def activate_past_recording(self) -> None:
        self.records_past = True
        for _, cache in self.of_expert.values():
            cache.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        for _, cache in self.of_expert.values():
            cache.crop(tokens_to_remove)
            self.length = int(cache.get_seq_length())
        if self.mask is not None:
            self.mask = self.mask[:, : self.length]

    def reset(self) -> None:
        self.coefficients = None
        self.shares = []
        self.of_expert = {}
        self.length = 0
        self.mask = None

    # Beam search drops and doubles sequences of the batch, and each takes its choice along. An
    # expert's cache holds some of the sequences only, so that a sequence's place in it is not its
    # place in the batch; the new batch's sequences are looked up there (-1: not this expert's), and
    # an expert that no sequence chooses any more loses its cache.
    def batch_select_indices(self, indices: Tensor) -> None:
        if self.coefficients is None:
            return
        kept = {}
        for expert, (rows, cache) in self.of_expert.items():
            place_of_row = torch.full((len(self.coefficients),), -1, device=rows.device)
            place_of_row[rows] = torch.arange(len(rows), device=rows.device)
            places = place_of_row[indices.to(rows.device)]
            here = places >= 0
            if here.any():
                select_rows(cache, places[here])
                kept[expert] = here.nonzero()[:, 0], cache
        self.of_expert = kept
        self.coefficients = self.coefficients[indices.to(self.coefficients.device)]
        self.shares = []
        if self.mask is not None:
            self.mask = self.mask[indices.to(self.mask.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.coefficients is not None:
            rows = torch.arange(len(self.coefficients), device=self.coefficients.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep these rows of a cache, in this order; a row may come twice."""
    if not isinstance(cache, StaticCache):
        cache.batch_select_indices(rows)
        return
    # transformers' static layers can be reordered, but keep their number of rows.
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys = layer.keys[rows.to(layer.keys.device)]
            layer.values = layer.values[rows.to(layer.values.device)]
            layer.batch_size = len(rows)
