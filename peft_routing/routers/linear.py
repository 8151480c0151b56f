"""`linear`, learned routing (Trade-offs 4.4), and `arrow`, the same without learning (2.4, B.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.routers.base import Router, RouterSettings
from peft_routing.routers.options import RouterOptions
from peft_routing.routers.prototypes import top_right_singular_vectors
from peft_routing.routers.tensors import linear


@dataclass(frozen=True)
class LinearOptions(RouterOptions):
    init: Literal["uniform", "arrow"] | None = None  # how the rows start; uniform if None
    score: Literal["dot", "abs"] | None = None  # the product with a row, or its absolute value


class LinearRouter(Router):
    """A router whose scores are the products of the hidden state with a row per expert, or their
    absolute values.

    Rows start at 0 (`init="uniform"`) or as Arrow's prototypes (`init="arrow"`, with
    `score="abs"`).
    """

    name = "linear"
    options: ClassVar[Any] = LinearOptions

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.from_arrow, self.absolute = self.start_and_score(config)
        self.weight = nn.Parameter(torch.zeros(len(self.labels(self.rows["weight"])), in_features))

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        super().check(config)
        from_arrow, absolute = cls.start_and_score(config)
        if from_arrow and not absolute:
            raise UserError("init='arrow' is score='abs': singular vectors have no sign")
        if absolute and not from_arrow:
            raise UserError(
                "score='abs' has no gradient where all rows are 0: use it with init='arrow'"
            )

    @classmethod
    def starts_from_experts(cls, config: RouterSettings) -> bool:
        return cls.start_and_score(config)[0]

    @classmethod
    def start_and_score(cls, config: RouterSettings) -> tuple[bool, bool]:
        """Whether rows start as Arrow's do, and whether scores are absolute values.

        Each follows from the other where only one is stated.
        """
        options = cls.options_of(config)
        from_arrow = options.init == "arrow" or (options.init is None and options.score == "abs")
        absolute = options.score == "abs" or (options.score is None and from_arrow)
        return from_arrow, absolute

    def scores(self, hidden: Tensor) -> Tensor:
        products = linear(hidden, self.weight)
        return products.abs() if self.absolute else products

    @torch.no_grad()
    def start(
        self, factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], mixing: str
    ) -> None:
        if self.from_arrow:
            self._start_as_prototypes(factors)

    def _start_as_prototypes(self, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make each row Arrow's prototype of the update whose A and B stand at its place."""
        vectors = top_right_singular_vectors(factors)
        self.weight = nn.Parameter(
            vectors.to(torch.float32), requires_grad=self.weight.requires_grad
        )


class ArrowRouter(LinearRouter):
    """A router by the softmax over the top k of |hidden state · v|, with v the top right singular
    vector of an expert's B A.

    v lies in the module's input space: the paper writes an update as A B with A on the
    input's side (2.2), PEFT as B A, whose right singular vectors those are. Experts with an empty
    update have the score 0.
    """

    name = "arrow"
    options = RouterOptions
    mixing = "full"
    top_k = 3

    @classmethod
    def start_and_score(cls, config: RouterSettings) -> tuple[bool, bool]:
        return True, True
