"""What a routed adapter is: its experts, its router, and how their updates are mixed.

The same fields are written by a user, who names experts by their directories, and by `save_pretrained`, when the
experts are inside: each then stands with its own LoRA configuration, and `layout` says what lies in which module.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from peft import PeftConfig

from peft_routing import card
from peft_routing.routers.base import Granularity, Init, Router, Score, find_router
from peft_routing.types import PeftType

Mixing = Literal["full", "low_rank"]


@dataclass(frozen=True)
class Site:
    """The experts at one adapted module; rank 0 is an expert that has nothing there.

    The last `general` are general experts: their mean update is subtracted from that of each other expert.
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    general: int = 0


@dataclass
class RoutedLoraConfig(PeftConfig):
    """N LoRA experts and a router as one adapter.

    >>> RoutedLoraConfig(experts={"math": "math/", "code": "code/"}, router="arrow", top_k=2).router
    'arrow'

    `ValueError` says what is wrong with a value, and which routers take an option that this one does not.
    """

    experts: Any = field(
        default_factory=dict,
        metadata={"help": "LoRA adapters by name, or a list of them: directories or repositories on the Hub."},
    )
    general_experts: Any = field(
        default_factory=dict,
        metadata={"help": "LoRA adapters of general knowledge; their mean update is subtracted from each expert's."},
    )
    router: str = field(
        default="arrow", metadata={"help": "Where the coefficients come from; see `peft-route compose -h`."}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Experts per token, or clusters. Default: all; 3 for arrow, as in PEFT."}
    )
    granularity: Granularity = field(
        default="token", metadata={"help": "One choice per token, or one per sequence, from its prefix."}
    )
    routing_tokens: int = field(
        default=32,
        metadata={
            "help": "The prefix of a sequence in a plain forward pass of a decoder; `generate` uses the prompt."
        },
    )
    mixing: Mixing | None = field(
        default=None,
        metadata={
            "help": "Mix the updates (full) or both factors apart (low_rank). Default: low_rank where ranks and "
            "targets agree, as in the paper; full otherwise, for arrow, and with general experts."
        },
    )
    router_temperature: float | None = field(default=None, metadata={"help": "Of the softmax. Default: 1."})
    init: Init | None = field(default=None, metadata={"help": "How a learned router starts. Default: uniform."})
    score: Score | None = field(
        default=None, metadata={"help": "The product with the hidden state, or its absolute value (Arrow's)."}
    )
    weights: Any = field(default=None, metadata={"help": "The coefficients of `fixed`: by expert, or a list."})
    clusters: dict[str, Any] | None = field(default=None, metadata={"help": "For `hierarchical`: expert to cluster."})
    mlp_layers: int | None = field(default=None, metadata={"help": "Of `mlp`: 0, 1 or 2 (WEMoE's default)."})
    init_lambda: float | None = field(
        default=None, metadata={"help": "Of `mlp`: where all coefficients start. Default: 0.3 (WEMoE)."}
    )
    router_aux_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the load-balancing loss, averaged over modules, in training."}
    )
    layout: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Written by composing: modules, and each expert's rank and scaling there."}
    )
    expert_dtype: str | None = field(default=None, metadata={"help": "Written by composing: the experts' dtype."})

    target_modules: ClassVar[None] = None  # PEFT asks; `layout` says it exactly

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ROUTED_LORA
        for option in ("experts", "general_experts"):
            setattr(self, option, _by_name(option, getattr(self, option)))
        if not self.experts:
            raise ValueError("a routed adapter needs experts: experts={'math': 'math/', 'code': 'code/'}")
        if both := self.experts.keys() & self.general_experts.keys():
            raise ValueError(
                f"{min(both)!r} names an expert and a general one: give names, general_experts={{'wiki': …}}"
            )
        if self.general_experts and self.mixing == "low_rank":
            raise ValueError(
                "general experts are subtracted from updates, which mixing='low_rank' never forms: use full"
            )
        for option in ("weights", "clusters"):  # by expert, whose names are strings
            if isinstance(getattr(self, option), dict):
                setattr(self, option, {str(name): value for name, value in getattr(self, option).items()})
        hints = get_type_hints(type(self))
        for name in ("granularity", "mixing", "init", "score"):
            value, allowed = getattr(self, name), _choices(hints[name])
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")
        for name in ("top_k", "routing_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if self.top_k is not None and self.top_k > len(self.experts):
            raise ValueError(f"top_k={self.top_k}, but there are {len(self.experts)} experts")
        if self.router_temperature is not None and not 0 < self.router_temperature < math.inf:
            raise ValueError(f"router_temperature={self.router_temperature} is not above 0")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(f"router_aux_loss_coef={self.router_aux_loss_coef} is below 0")
        self.router_class.check(self)
        self.sites = {
            module: Site(tuple(group["ranks"]), tuple(group["scalings"]), len(self.general_experts))
            for group in self.layout or ()
            for module in group["modules"]
        }

    @property
    def router_class(self) -> type[Router]:
        return find_router(self.router)

    @property
    def names(self) -> list[str]:
        """The experts' names, in the order of the coefficients."""
        return list(self.experts)

    @property
    def routes_sequences(self) -> bool:
        """Whether a choice is made per sequence: not where it does not depend on the input at all."""
        return self.granularity == "sequence" and self.router_class.uses_input(self)

    @property
    def is_composed(self) -> bool:
        """Whether the experts are inside, and not yet to be read."""
        return self.layout is not None

    def to_dict(self) -> dict[str, Any]:
        """PEFT sorts a dictionary's keys when it saves; the experts' order is that of the coefficients."""
        values = super().to_dict()
        for option in ("experts", "general_experts"):
            values[option] = [
                {"name": name, **(value if isinstance(value, dict) else {"path": value})}
                for name, value in getattr(self, option).items()
            ]
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        card.extend(save_directory, self.names, list(self.general_experts), self.router)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, or of a `Literal | None`."""
    parts = get_args(hint)
    return tuple(value for part in parts for value in (get_args(part) or ((None,) if part is type(None) else (part,))))


def _by_name(option: str, experts: Any) -> dict[str, Any]:
    if isinstance(experts, dict):
        return {str(name): value if isinstance(value, dict) else str(value) for name, value in experts.items()}
    if isinstance(experts, str) or not isinstance(experts, Sequence):
        raise ValueError(f"{option}={experts!r} is neither a dict of names and directories nor a list of directories")
    if all(isinstance(expert, dict) for expert in experts):  # as saved
        of_name = {expert["name"]: {k: v for k, v in expert.items() if k != "name"} for expert in experts}
        return {name: value.get("path", value) for name, value in of_name.items()}
    paths = [str(path) for path in experts]
    return dict(zip(_unique_names(paths), paths, strict=True))


def _unique_names(paths: Sequence[str]) -> list[str]:
    """As much of the end of each path as tells them apart; numbers, where the same path is there twice.

    >>> _unique_names(["runs/math/final", "runs/code/final"])
    ['math-final', 'code-final']
    """
    parts = [[part for part in PurePath(path).parts if part not in ("/", ".", "..")] or [path] for path in paths]
    names: list[str] = []
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{index}" for index, name in enumerate(names)]
