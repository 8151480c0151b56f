"""Configurations of upcycled models: the base's own, and how its FFNs are routed.

`UpcycledMoe<X>Config` is derived from transformers' `<X>Config` when it is first used, for every X.
"""

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from transformers import PretrainedConfig

from .any_base import config_subclass_of, made_on_demand

_PREFIX = "UpcycledMoe"


@dataclass(frozen=True)
class RoutedFFN:
    """One FFN whose linear modules hold all experts, as names of modules in the model.

    readers: those that read the FFN's input; each sends its tokens to the experts.
    writer: the one whose output is the FFN's; it brings the tokens together again.
    inner: those between them, if any.
    """

    readers: list[str]
    writer: str
    inner: list[str] = field(default_factory=list)

    @property
    def linears(self) -> list[str]:
        return [*self.readers, *self.inner, self.writer]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def routed_ffns(config: PretrainedConfig) -> dict[str, RoutedFFN]:
    """The FFNs of a configuration, by the names of their routers."""
    return {router: RoutedFFN(**names) for router, names in config.routed_ffns.items()}


@cache
def config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """`UpcycledMoe<X>Config` for `<X>Config`.

    routed_ffns: by the name of its router, the linear modules of every FFN (`RoutedFFN`).
    num_local_experts, num_experts_per_tok, router_aux_loss_coef, output_router_logits: as Mixtral
        has them.
    """
    members = {
        "routed_ffns": None,
        "num_local_experts": None,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        # The base's plan would cut matrices of experts as if they were matrices.
        "base_model_tp_plan": None,
    }
    return config_subclass_of(base, _PREFIX, "upcycled_moe", __name__, members)


__getattr__ = made_on_demand(__name__, _PREFIX, config_class)
