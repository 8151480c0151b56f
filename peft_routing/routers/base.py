"""What a router is, and where routers are found by their names."""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from peft_routing.routers.tensors import largest, wide

Granularity = Literal["token", "sequence"]
Init = Literal["uniform", "arrow"]
Score = Literal["dot", "abs"]
_ROUTERS: dict[str, type["Router"]] = {}
# What only some routers take, each None where the user says nothing.
_OPTIONS = ("top_k", "router_temperature", "init", "score", "weights", "clusters", "mlp_layers", "init_lambda")


class RouterSettings(Protocol):
    """What a router reads of an adapter's configuration, which says what each of these is."""

    experts: Any
    top_k: int | None
    granularity: Granularity
    routing_tokens: int
    router_temperature: float | None
    router_aux_loss_coef: float
    init: Init | None
    score: Score | None
    weights: Any
    clusters: dict[str, Any] | None
    mlp_layers: int | None
    init_lambda: float | None

    @property
    def names(self) -> list[str]: ...


class Router(nn.Module):
    """Hidden states to coefficients. A subclass says how it scores; the rest is the same for all.

    Parameters are direct attributes (no submodules), so that PEFT can strip the adapter's name from their keys.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ("top_k", "router_temperature")  # of _OPTIONS, those that it takes
    is_shared: ClassVar[bool] = False  # one for the whole model, not one per adapted module
    is_simplex: ClassVar[bool] = True  # coefficients are a softmax; the load can be balanced
    mixing: ClassVar[Literal["full", "low_rank"]] = "low_rank"  # by default, where ranks and targets agree
    top_k: ClassVar[int | None] = None  # by default
    rows: ClassVar[dict[str, str]] = {"weight": "expert"}  # parameters with a row per "expert" or "cluster"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _ROUTERS[cls.name] = cls

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__()
        self.depends_on_input = self.uses_input(config)
        self.experts, self.in_features = list(experts), in_features
        self.k = min(config.top_k or self.top_k or len(experts), len(experts))
        self.temperature = config.router_temperature or 1.0
        self.granularity = config.granularity
        self.routing_tokens = config.routing_tokens
        self.is_balanced = config.router_aux_loss_coef > 0

    @classmethod
    def uses_input(cls, config: RouterSettings) -> bool:
        """Whether coefficients depend on the input: if not, the adapter can be merged."""
        return True

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        """`ValueError` for options that this router does not take or cannot work with."""
        for option in _OPTIONS:
            if getattr(config, option) is not None and option not in cls.options:
                takers = ", ".join(name for name, router in all_routers().items() if option in router.options)
                raise ValueError(f"{option} is not an option of router={cls.name!r}; it is one of {takers}")
        if config.router_aux_loss_coef and not (cls.uses_input(config) and cls.is_simplex):
            raise ValueError(f"router={cls.name!r} has no load to balance: leave router_aux_loss_coef at 0")

    @property
    def kept(self) -> int | None:
        """How many coefficients are not 0 at most, where that is known and fewer than all."""
        is_ours = type(self).coefficients is Router.coefficients
        return self.k if is_ours and self.k < len(self.experts) else None

    def scores(self, hidden: Tensor) -> Tensor:
        """(…, in_features) to (…, experts), or just (experts,) where the input does not matter."""
        raise NotImplementedError

    def coefficients(self, scores: Tensor) -> Tensor:
        """Softmax over the k largest scores, the others 0 (Trade-offs B.1 and B.4), in float32 or wider."""
        return torch.softmax(largest(self._tempered(scores), self.k), dim=-1)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Over all that could be chosen, before the top k: what the load-balancing loss has a gradient through."""
        return torch.softmax(self._tempered(scores), dim=-1)

    def _tempered(self, scores: Tensor) -> Tensor:
        return wide(scores) if self.temperature == 1 else wide(scores) / self.temperature

    def load(self, scores: Tensor) -> Tensor:
        """What was chosen, in the same terms."""
        return self.coefficients(scores)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.coefficients(self.scores(hidden))

    def start(self, factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], mixing: str) -> None:
        """Set what depends on the experts themselves: A (rank, in) and B (out, rank) of each, when composing."""

    def labels(self, of: str) -> list[str]:
        """What the rows of a parameter with a row per `of` stand for."""
        return self.experts

    def check_rows(self, other: "Router") -> None:
        """`ValueError` if a parameter depends on the experts and is not in `rows`."""
        for name, theirs in other.named_parameters():
            if name not in self.rows and self.get_parameter(name).shape != theirs.shape:
                raise ValueError(
                    f"router {self.name!r}: {name} has a row per expert or cluster; say so in its `rows`, "
                    f"as {{{name!r}: 'expert'}}, and experts can be added and removed"
                )

    @torch.no_grad()
    def take(self, other: "Router") -> None:
        """Copy from a router over other experts everything that both have."""
        theirs = dict(other.named_parameters())
        for name, parameter in self.named_parameters():
            if name in self.rows:
                ours, from_them = self.labels(self.rows[name]), other.labels(self.rows[name])
                for index, label in enumerate(ours):
                    if label in from_them:
                        parameter[index].copy_(theirs[name][from_them.index(label)])
            else:
                parameter.copy_(theirs[name])


class SharedRouter(nn.Module):
    """Stands in the modules that use the one router of a model, whose parameters lie in the first."""

    def __init__(self, owner: Router) -> None:
        super().__init__()
        self._owner = (owner,)  # a tuple, so that its parameters are not this module's as well

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_owner":  # while being copied
                raise
            return getattr(self._owner[0], name)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._owner[0](hidden).to(hidden.device)


def all_routers() -> dict[str, type[Router]]:
    """Every router by its name: ours, and all that were defined elsewhere."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_ROUTERS.items()))


def find_router(name: str) -> type[Router]:
    """`ValueError` if there is none of that name."""
    if name not in _ROUTERS and name not in all_routers():
        known = ", ".join(sorted(_ROUTERS))
        raise ValueError(f"there is no router {name!r}; there are {known}. One of your own must be imported first")
    return _ROUTERS[name]
