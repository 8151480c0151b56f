"""`global` and `layer`: learned coefficients that do not depend on the input (Trade-offs 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft_routing.routers.base import Router, RouterSettings


class LayerRouter(Router):
    """A router with learned logits for each adapted module: uniform before training."""

    name = "layer"
    rows = {"logits": "expert"}  # noqa: RUF012

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.logits = nn.Parameter(torch.zeros(len(experts)))

    @classmethod
    def uses_input(cls, config: RouterSettings) -> bool:
        return False

    def scores(self, hidden: Tensor) -> Tensor:
        return self.logits


class GlobalRouter(LayerRouter):
    """A router with one set of learned logits for the whole model."""

    name = "global"
    is_shared = True
