"""Configurations of weight-ensembling models (WEMoE): the base's own, and what is ensembled.

`WEMoE<X>Config` is made of transformers' `<X>Config` when it is asked for, for every X.
"""

from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import transformers
from transformers import PretrainedConfig

_PREFIX = "WEMoE"


@dataclass(frozen=True)
class Ensembling:
    """How blocks are ensembled; stored under `ensembling` in the configuration.

    experts: what the task vectors are called.
    groups: per router the name of the module that it reads the input of, and the linear modules
        that it weighs.
    per_tensor: groups are parameters by their names, each with constants of its own (AdaMerging).
    router_layers: 0, 1 or 2 (WEMoE, equations 3 and 4).
    shared_router: one router for all groups (E-WEMoE).
    init_lambda, init_std: where coefficients start, and the standard deviation of the routers'
        weights.
    kept: how many elements of a task vector are kept, by module; all where it is absent (E-WEMoE).
    mode: for models that generate, `frozen` (the prefix chooses) or `running` (the mean over what
        is past).
    routing_tokens: the prefix in a plain forward pass; `generate` takes the prompt.
    heads: per task the names of its classes by number, where sources have heads of their own.
    head: the module that these stand in for.
    """

    experts: list[str]
    groups: dict[str, list[str]]
    per_tensor: bool = False
    router_layers: int = 2
    shared_router: bool = False
    init_lambda: float = 0.3
    init_std: float = 0.01
    kept: dict[str, int] = field(default_factory=dict)
    mode: str = "frozen"
    routing_tokens: int = 32
    heads: dict[str, list[str]] = field(default_factory=dict)
    head: str = ""

    def __post_init__(self) -> None:
        """Put groups and heads in order, in which routers and heads are numbered.

        JSON sorts keys, and layer 10 before layer 2.
        """
        heads = {task: self.heads[task] for task in self.experts if task in self.heads}
        object.__setattr__(self, "groups", dict(sorted(self.groups.items(), key=_with_numbers)))
        object.__setattr__(self, "heads", heads)

    @property
    def linears(self) -> list[str]:
        """All linear modules that routers weigh."""
        if self.per_tensor:
            return []
        return list(chain.from_iterable(self.groups.values()))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def vectors_of(parameter: str) -> str:
    """The name of a parameter's task vectors.

    It must not begin as the parameter's own does: transformers looks for that, to tie them.
    """
    module, dot, part = parameter.rpartition(".")
    return f"{module}{dot}vectors_of_{part}"


def _with_numbers(group: tuple[str, list[str]]) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in group[0].split(".")]


def class_names(config: PretrainedConfig) -> list[str]:
    """The names of a classifier's classes, in the order of their numbers."""
    return [str(name) for _, name in sorted(config.id2label.items())]


@cache
def config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """`WEMoE<X>Config` for `<X>Config`."""
    return type(
        _PREFIX + base.__name__,
        (base,),
        {
            "model_type": f"wemoe_{base.model_type}",
            "ensembling": None,
            "__module__": __name__,
            "_auto_class": "AutoConfig",
        },
    )


def __getattr__(name: str) -> Any:
    base = None
    if name.startswith(_PREFIX):
        base = getattr(transformers, name.removeprefix(_PREFIX), None)
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(base)
