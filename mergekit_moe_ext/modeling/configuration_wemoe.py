"""Configurations of weight-ensembling models (WEMoE): the base's own, and what is ensembled.

`WEMoE<X>Config` is derived from transformers' `<X>Config` when it is first used, for every X.
"""

from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import chain
from typing import Any, get_origin

from transformers import PretrainedConfig

from .any_base import config_subclass_of, made_on_demand

_PREFIX = "WEMoE"


@dataclass(frozen=True)
class Ensembling:
    """The way in which blocks are ensembled; stored under `ensembling` in the configuration.

    experts: the names of the task vectors.
    groups: per router, the name of the module whose input it reads, and the linear modules that it
        weighs.
    per_tensor: whether groups are parameters by their names, each with constants of its own
        (AdaMerging).
    router_layers: the number of layers of a router, 0, 1 or 2 (WEMoE, equations 3 and 4).
    shared_router: whether all groups have one router (E-WEMoE).
    init_lambda: the initial value of every coefficient.
    router_init_std: the standard deviation of the routers' initial weights.
    kept: the number of elements that are kept of a task vector, by module; all of those of a module
        that is absent (E-WEMoE).
    mode: for models that generate, `frozen` (the prefix chooses) or `running` (the mean over the
        tokens so far).
    routing_tokens: the length of the prefix in a plain forward pass; `generate` takes the prompt.
    heads: per task, the names of its classes by number, where sources have heads of their own.
    head: the name of the module that these stand in for.
    """

    experts: list[str]
    groups: dict[str, list[str]]
    per_tensor: bool = False
    router_layers: int = 2
    shared_router: bool = False
    init_lambda: float = 0.3
    router_init_std: float = 0.01
    kept: dict[str, int] = field(default_factory=dict)
    mode: str = "frozen"
    routing_tokens: int = 32
    heads: dict[str, list[str]] = field(default_factory=dict)
    head: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ensembling":
        """The ensembling that a configuration file holds, as `as_dict` gave it.

        `ValueError` for a value of another type, and where a router would weigh modules of a layer
        that it does not stand in.
        """
        # Older outputs hold `router_init_std` under the name `init_std`.
        values = dict(values)
        if "init_std" in values:
            values["router_init_std"] = values.pop("init_std")
        for part in fields(cls):
            kind: Any = get_origin(part.type) or part.type
            allowed = (int, float) if kind is float else kind
            if part.name in values and not isinstance(values[part.name], allowed):
                raise ValueError(
                    f"`{part.name}` under `ensembling` is {values[part.name]!r}, and must be of "
                    f"the type {kind.__name__}"
                )
        ensembling = cls(**values)
        if not ensembling.per_tensor:
            _check_layers(ensembling.groups)
        return ensembling

    def __post_init__(self) -> None:
        """Put groups and heads into the order in which routers and heads are numbered.

        JSON sorts keys, and puts layer 10 before layer 2.
        """
        groups = dict(sorted(self.groups.items(), key=_in_order_of_layers))
        heads = {task: self.heads[task] for task in self.experts if task in self.heads}
        object.__setattr__(self, "groups", groups)
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

    It must not begin with the parameter's own name: transformers looks for that, to tie them.
    """
    module, dot, part = parameter.rpartition(".")
    return f"{module}{dot}vectors_of_{part}"


def _check_layers(groups: dict[str, list[str]]) -> None:
    """`ValueError` where a router would weigh modules of a layer that it does not stand in."""
    for reader, linears in groups.items():
        layer = _numbers_in(reader)
        for linear in linears:
            if _numbers_in(linear)[: len(layer)] != layer:
                raise ValueError(
                    f"`groups` under `ensembling` puts {linear} under {reader}, which is in "
                    "another layer"
                )


def _numbers_in(name: str) -> list[str]:
    """The parts of a module's name that are numbers: its layer's, and what follows it."""
    return [part for part in name.split(".") if part.isdecimal()]


def _in_order_of_layers(group: tuple[str, list[str]]) -> list[tuple[int, str]]:
    """A key that sorts groups by the names of their readers, layer 2 before layer 10.

    Of two parts of names at one place, words come before numbers.
    """
    reader, _linears = group
    key = []
    for part in reader.split("."):
        key.append((int(part), "") if part.isdecimal() else (-1, part))
    return key


def class_names(config: PretrainedConfig) -> list[str]:
    """The names of a classifier's classes, in the order of their numbers."""
    return [str(name) for _, name in sorted(config.id2label.items())]


@cache
def config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """`WEMoE<X>Config` for `<X>Config`."""
    return config_subclass_of(base, _PREFIX, "wemoe", __name__, {"ensembling": None})


__getattr__ = made_on_demand(__name__, _PREFIX, config_class)
