"""`fixed` and `uniform`: coefficients that nobody learns (Trade-offs 2.2 and 4.1)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from peft_routing.routers.base import Router, RouterSettings
from peft_routing.routers.tensors import Constant


class FixedRouter(Router):
    """The given weights, whatever their sum."""

    name = "fixed"
    options: ClassVar[tuple[str, ...]] = ("weights",)
    is_simplex = False

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.weights = Constant(self.given(config, experts))

    @classmethod
    def uses_input(cls, config: RouterSettings) -> bool:
        return False

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        super().check(config)
        weights = cls.given(config, config.names)
        if len(weights) != len(config.experts) or not all(map(math.isfinite, weights)):
            raise ValueError(f"weights={config.weights!r}: give a finite number for each of {', '.join(config.names)}")

    @staticmethod
    def given(config: RouterSettings, experts: Sequence[str]) -> list[float]:
        """In the order of the experts."""
        if config.weights is None:
            raise ValueError("router='fixed' needs weights={'math': 0.7, 'code': 0.3}")
        if not isinstance(config.weights, dict):
            return [float(weight) for weight in config.weights]
        if unknown := config.weights.keys() - set(experts):
            raise ValueError(f"weights: there is no expert {min(unknown)!r}; there are {', '.join(experts)}")
        return [float(config.weights.get(name, math.nan)) for name in experts]

    def scores(self, hidden: Tensor) -> Tensor:
        return self.weights(torch.promote_types(hidden.dtype, torch.float32), hidden.device)

    def coefficients(self, scores: Tensor) -> Tensor:
        return scores


class UniformRouter(FixedRouter):
    """1/N each."""

    name = "uniform"
    options = ()

    @staticmethod
    def given(config: RouterSettings, experts: Sequence[str]) -> list[float]:
        return [1 / len(experts)] * len(experts)
