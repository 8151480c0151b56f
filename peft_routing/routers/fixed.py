"""`fixed` and `uniform`: coefficients that are not learned (Trade-offs 2.2 and 4.1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.routers.base import Router, RouterSettings
from peft_routing.routers.options import NoOptions
from peft_routing.routers.tensors import Constant


@dataclass(frozen=True)
class FixedOptions:
    weights: Any = None  # the coefficients: a dictionary by expert, or a list in the experts' order


class FixedRouter(Router):
    """A router whose coefficients are the weights in its options, whatever their sum."""

    name = "fixed"
    options: ClassVar[Any] = FixedOptions
    is_simplex = False

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.weights = Constant(self.weights_of(config, experts))

    @classmethod
    def uses_input(cls, config: RouterSettings) -> bool:
        return False

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        super().check(config)
        weights = cls.weights_of(config, config.names)
        if len(weights) != len(config.experts) or not all(map(math.isfinite, weights)):
            raise _wrong(cls.options_of(config).weights, config.names)

    @classmethod
    def weights_of(cls, config: RouterSettings, experts: Sequence[str]) -> list[float]:
        """The coefficients in the order of the experts; NaN for an expert that has none."""
        weights = cls.options_of(config).weights
        if weights is None:
            raise UserError("router='fixed' needs weights={'math': 0.7, 'code': 0.3}")
        if isinstance(weights, dict):
            unknown = weights.keys() - set(experts)
            if unknown:
                raise UserError(
                    f"weights: there is no expert {min(unknown)!r}; there are {', '.join(experts)}"
                )
            weights = [weights.get(name, math.nan) for name in experts]
        try:
            return [float(weight) for weight in weights]
        except (TypeError, ValueError) as error:
            raise _wrong(weights, experts) from error

    def scores(self, hidden: Tensor) -> Tensor:
        return self.weights(torch.promote_types(hidden.dtype, torch.float32), hidden.device)

    def coefficients(self, scores: Tensor) -> Tensor:
        return scores


class UniformRouter(FixedRouter):
    """A router that gives each of N experts the coefficient 1/N."""

    name = "uniform"
    options = NoOptions

    @classmethod
    def weights_of(cls, config: RouterSettings, experts: Sequence[str]) -> list[float]:
        return [1 / len(experts)] * len(experts)


def _wrong(weights: Any, experts: Sequence[str]) -> UserError:
    """The error for weights that are not one finite number per expert."""
    return UserError(f"weights={weights!r}: give a finite number for each of {', '.join(experts)}")
