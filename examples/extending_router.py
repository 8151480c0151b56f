"""A router of one's own: cosines between the hidden state and a learned row per expert.

Importing this file registers the router. It is then named, trained, saved and loaded like those of
the package:

    import extending_router
    from peft_routing import RoutedLoraConfig

    RoutedLoraConfig(experts=..., router="cosine", router_options={"sharpness": 4.0, "top_k": 2})

As a script it is `peft-route` with that router:

    python examples/extending_router.py compose base --expert math-lora --expert code-lora \
        --router cosine --router-option sharpness=4 -o routed
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_routing import Router, RouterOptions, RouterSettings
from peft_routing.cli import main


@dataclass(frozen=True)
class CosineOptions(RouterOptions):
    """The options `top_k` and `router_temperature`, which every softmax has, and one more."""

    sharpness: float = 1.0  # what the cosines are multiplied by before the softmax

    def __post_init__(self) -> None:
        if self.sharpness <= 0:
            raise ValueError(f"sharpness={self.sharpness} is not above 0")


class CosineRouter(Router):
    """A router that scores an expert by `sharpness` times the cosine of the hidden state and the
    expert's row.
    """

    name = "cosine"
    options = CosineOptions

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__(config, experts, in_features)
        self.sharpness = self.options_of(config).sharpness
        # `rows` says by default that `weight` has a row per expert, so that experts can be added
        # and removed.
        self.weight = nn.Parameter(torch.zeros(len(experts), in_features))

    def scores(self, hidden: Tensor) -> Tensor:
        """The scores, (…, experts), of hidden states, (…, in_features)."""
        hidden = hidden.to(self.weight.dtype)
        cosines = functional.cosine_similarity(hidden[..., None, :], self.weight, dim=-1)
        return self.sharpness * cosines

    @torch.no_grad()
    def start(
        self,
        factors: Sequence[tuple[Tensor, Tensor]],
        scalings: Sequence[float],
        mixing: str,
    ) -> None:
        """Each row starts as the mean of its expert's A: a cosine with zeros has no direction, and
        its gradient there is enormous.
        """
        for row, (a, _b) in zip(self.weight, factors, strict=True):
            if len(a):  # an expert that has nothing at this module keeps its zeros
                row.copy_(a.mean(dim=0))


if __name__ == "__main__":
    main()
