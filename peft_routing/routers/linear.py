"""`linear`, learned routing per adapted module (Trade-offs 4.4), and `arrow`, the same without learning (2.4, B.1)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_routing.routers.base import Router, RouterSettings
from peft_routing.routers.prototypes import top_right_singular_vectors


class LinearRouter(Router):
    """Scores are products of the hidden state with a row per expert, or their absolute values.

    Rows start at 0 (`init="uniform"`) or as Arrow's prototypes (`init="arrow"`, with `score="abs"`).
    """

    name = "linear"
    options: ClassVar[tuple[str, ...]] = ("top_k", "router_temperature", "init", "score")

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.from_arrow, self.absolute = self.settings(config)
        self.weight = nn.Parameter(torch.zeros(len(self.labels(self.rows["weight"])), in_features))

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        super().check(config)
        from_arrow, absolute = cls.settings(config)
        if from_arrow and not absolute:
            raise ValueError("init='arrow' is score='abs': singular vectors have no sign")
        if absolute and not from_arrow:
            raise ValueError("score='abs' has no gradient where all rows are 0: use it with init='arrow'")

    @staticmethod
    def settings(config: RouterSettings) -> tuple[bool, bool]:
        """Whether it starts as Arrow does, and whether scores are absolute: each follows from the other."""
        from_arrow = config.init == "arrow" or (config.init is None and config.score == "abs")
        return from_arrow, config.score == "abs" or (config.score is None and from_arrow)

    def scores(self, hidden: Tensor) -> Tensor:
        products = functional.linear(hidden.to(self.weight.dtype), self.weight)
        return products.abs() if self.absolute else products

    @torch.no_grad()
    def start(self, factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], mixing: str) -> None:
        if self.from_arrow:
            vectors = top_right_singular_vectors(factors)
            self.weight = nn.Parameter(vectors.to(torch.float32), requires_grad=self.weight.requires_grad)


class ArrowRouter(LinearRouter):
    """Softmax over the top k of |hidden state · top right singular vector of the expert's B A|.

    The vector lies in the module's input space: the paper writes an update as A B with A on the input's side (2.2),
    PEFT as B A, whose right singular vectors those are. Experts with an empty update have the score 0.
    """

    name = "arrow"
    options = ("top_k", "router_temperature")
    mixing = "full"
    top_k = 3

    @staticmethod
    def settings(config: RouterSettings) -> tuple[bool, bool]:
        return True, True
