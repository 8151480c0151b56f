"""`Nearest`: the experts whose training texts lie closest to a text, by an encoder's embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.choosers.experts import (
    check_known,
    check_top_k,
    expert_names,
    softmax_over_largest,
)


class Encoder(Protocol):
    """What turns texts into vectors, as the models of sentence-transformers do."""

    def encode(self, sentences: list[str]) -> Any:
        """The embeddings of texts, as an array or a tensor (texts, features)."""


class Nearest:
    """A chooser by the cosine of a text's embedding and the mean of each expert's examples.

        nearest = Nearest(encoder, {"math": [...], "code": [...]}, model)
        model.generate(**tokenizer(texts, return_tensors="pt"), coefficients=nearest(texts))

    `experts` are all names in the order of the coefficients, or a model with one active routed
    adapter. `UserError` if `examples` has other experts, or none for one of them.
    """

    def __init__(
        self,
        encoder: Encoder,
        examples: Mapping[str, Sequence[str]],
        experts: Sequence[str] | nn.Module,
    ) -> None:
        self.encoder = encoder
        self.experts = expert_names(experts)
        check_known(examples, self.experts, "examples")
        centroids = []
        for name in self.experts:
            if not examples.get(name):
                raise UserError(f"examples: there is none for the expert {name!r}")
            centroids.append(self._embed(examples[name]).mean(dim=0))
        self.centroids = torch.stack(centroids)  # (experts, features)

    def __call__(self, texts: Sequence[str], top_k: int = 1) -> Tensor:
        """Coefficients (texts, experts): the softmax over the `top_k` largest cosines; the others
        are 0.
        """
        k = check_top_k(top_k, len(self.experts))
        cosines = functional.cosine_similarity(self._embed(texts)[:, None], self.centroids, dim=-1)
        return softmax_over_largest(cosines, k)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """The embeddings (texts, features) in float32."""
        if isinstance(texts, str):
            raise UserError(f"give a list of texts, not the text {texts!r} alone")
        return torch.as_tensor(self.encoder.encode(list(texts))).float()
