"""Routers map a module's hidden states to coefficients over its experts. Each has its own file.

A router of your own is a subclass of `Router` with a `name`, in any module that is imported before
it is used:

    class Angle(Router):
        name = "angle"

        def __init__(self, config, experts, in_features):
            super().__init__(config, experts, in_features)
            self.weight = nn.Parameter(torch.randn(len(experts), in_features))

        def scores(self, hidden):
            return functional.cosine_similarity(hidden[..., None, :], self.weight, dim=-1)

`docs/extending.md` has the whole contract, and a router with an option of its own.
"""

from peft_routing.routers.base import Router, RouterSettings, SharedRouter, all_routers, find_router
from peft_routing.routers.options import NoOptions, RouterOptions
from peft_routing.routers.tensors import Constant, largest, over_tokens, wide

__all__ = [
    "Constant",
    "NoOptions",
    "Router",
    "RouterOptions",
    "RouterSettings",
    "SharedRouter",
    "all_routers",
    "find_router",
    "largest",
    "over_tokens",
    "wide",
]
