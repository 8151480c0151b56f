"""`mlp`: the router of WEMoE (3.2 and B.3), over LoRA experts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.routers.base import Router, RouterSettings
from peft_routing.routers.tensors import linear, wide

# The paper writes a variance of 0.01. With that, coefficients would start far from lambda for
# hidden states of the usual size, while the paper wants them "approximately equal". Its authors'
# code has 0.01 as the standard deviation.
_STANDARD_DEVIATION = 0.01


@dataclass(frozen=True)
class MlpOptions:
    top_k: int | None = None  # the number of coefficients that are not 0; all if None
    mlp_layers: int | None = None  # 0, 1 or 2; 2 if None
    init_lambda: float | None = None  # what all coefficients start at; 0.3 if None


class MlpRouter(Router):
    """A router with free coefficients, which need not be positive or have a fixed sum.

    `top_k` keeps the largest by magnitude, as they are. With 0 layers the router is a bias, with 1
    a linear map, and with 2 it has a hidden layer as wide as the input, with a ReLU. Over a
    sequence, coefficients are averaged.
    """

    name = "mlp"
    options = MlpOptions
    is_simplex = False
    rows = {"weight_out": "expert", "bias_out": "expert"}  # noqa: RUF012

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__(config, experts, in_features)
        options = self.options_of(config)
        self.layers = 2 if options.mlp_layers is None else options.mlp_layers
        start = 0.3 if options.init_lambda is None else options.init_lambda
        if self.layers == 2:
            self.weight_in = nn.Parameter(
                torch.randn(in_features, in_features) * _STANDARD_DEVIATION
            )
            self.bias_in = nn.Parameter(torch.zeros(in_features))
        if self.layers:
            self.weight_out = nn.Parameter(
                torch.randn(len(experts), in_features) * _STANDARD_DEVIATION
            )
        self.bias_out = nn.Parameter(torch.full((len(experts),), start))

    @classmethod
    def uses_input(cls, config: RouterSettings) -> bool:
        return cls.options_of(config).mlp_layers != 0

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        super().check(config)
        layers = cls.options_of(config).mlp_layers
        if layers not in (None, 0, 1, 2):
            raise UserError(f"mlp_layers={layers} is not 0, 1 or 2")

    @property
    def kept(self) -> int | None:
        return self.k if self.k < len(self.experts) and self.granularity == "token" else None

    def scores(self, hidden: Tensor) -> Tensor:
        if not self.layers:
            return self.bias_out
        if self.layers == 2:
            hidden = functional.relu(linear(hidden, self.weight_in, self.bias_in))
        return linear(hidden, self.weight_out, self.bias_out)

    def coefficients(self, scores: Tensor) -> Tensor:
        scores = wide(scores)
        if self.k == scores.shape[-1]:
            return scores
        kept = scores.abs().topk(self.k, dim=-1).indices
        return torch.zeros_like(scores).scatter(-1, kept, scores.gather(-1, kept))
