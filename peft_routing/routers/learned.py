"""`global` and `layer`: learned coefficients that do not depend on the input (Trade-offs 4.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.routers.base import Router, RouterSettings


class LayerRouter(Router):
    """A router with learned logits, by default for each adapted module: uniform before training."""

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
    """A router with one set of learned logits for the whole model: the paper's name for `layer`
    with `router_granularity="model"`.
    """

    name = "global"
    router_granularity = "model"

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        super().check(config)
        if config.router_granularity not in (None, "model"):
            raise UserError(
                f"router='global' is one for the model: for router_granularity="
                f"{config.router_granularity!r} use router='layer'"
            )
