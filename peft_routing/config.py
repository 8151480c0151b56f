"""What a routed adapter is: its experts, its router, and how their updates are mixed.

The same fields are written by a user, who names experts by their directories, and by
`save_pretrained`, when the experts are inside: each then stands with its own LoRA configuration,
and `layout` says what lies in which module.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig

from _mergekit_moe_ext_common.errors import UserError
from peft_routing import card
from peft_routing.adapter_files import common_task
from peft_routing.moved import PATTERNS
from peft_routing.routers.base import Granularity, Router, RouterGranularity, find_router
from peft_routing.routers.options import read_value, saved_options
from peft_routing.types import PeftType

Mixing = Literal["full", "low_rank"]
ExpertDtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
# Options of routers that have a field of their own. A new option has none: it stands in
# `router_options`.
_FIELDS_OF_ROUTERS = (
    "top_k",
    "router_temperature",
    "init",
    "score",
    "weights",
    "clusters",
    "mlp_layers",
    "init_lambda",
)
HEADS = ("mean", "new", "own")  # what `head` may be besides the name of an expert
CHANGEABLE = ("top_k", "router_temperature")  # in a model, by `set_routing`
_OWN_TYPES = {
    "granularity": Granularity,
    "router_granularity": RouterGranularity | None,
    "routing_tokens": int,
    "mixing": Mixing | None,
    "mixing_by_default": bool,
    "router_aux_loss_coef": float,
    "expert_dtype": ExpertDtype,
}


@dataclass(frozen=True)
class Site:
    """The experts at one adapted module; rank 0 is an expert with no update there.

    The last `general` are general experts: their mean update is subtracted from that of each other
    expert. Where any expert has a bias (LoRA's `lora_bias`), all have one, those without it 0.
    """

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    general: int = 0
    has_biases: bool = False


@dataclass
class RoutedLoraConfig(PeftConfig):
    """N LoRA experts and a router as one adapter.

    >>> RoutedLoraConfig(experts={"math": "math/", "code": "code/"}, router="arrow", top_k=2).router
    'arrow'

    What a router declares as its options stands in `router_options`, whether the router comes with
    this package or not. An option that has a field of its own may be given either way, and is kept
    in that field. `UserError`, a `ValueError`, says what is wrong with a value, and which routers
    take an option that this one does not.
    """

    experts: Any = field(
        default_factory=dict,
        metadata={"help": "LoRA adapters by name, or a list of directories or Hub repositories."},
    )
    general_experts: Any = field(
        default_factory=dict,
        metadata={"help": "LoRA adapters of general knowledge, whose mean update is subtracted."},
    )
    router: str = field(
        default="arrow",
        metadata={"help": "Router that decides; `peft-route compose -h` lists them."},
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "Number of experts per token, or of clusters. Default: all; 3 for arrow."
        },
    )
    granularity: Granularity = field(
        default="token",
        metadata={"help": "Choice per token, or one per sequence by its prefix."},
    )
    routing_tokens: int = field(
        default=32,
        metadata={
            "help": "Length of a prefix in a plain forward pass; `generate` uses the prompt."
        },
    )
    router_granularity: RouterGranularity | None = field(
        default=None,
        metadata={
            "help": "Router per module, per block (a decoder layer, say), or one for the model. "
            "Default: module; model for global."
        },
    )
    mixing: Mixing | None = field(
        default=None,
        metadata={
            "help": "Mix the updates (full), or both factors apart (low_rank). Default: low_rank "
            "where the experts agree in ranks and targets and share their initial A, as in the "
            "paper; full otherwise, for arrow, and with general experts."
        },
    )
    router_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the softmax. Default: 1."}
    )
    init: Literal["uniform", "arrow"] | None = field(
        default=None, metadata={"help": "Start of a learned router. Default: uniform."}
    )
    score: Literal["dot", "abs"] | None = field(
        default=None,
        metadata={"help": "Product with the hidden state, or its absolute value (Arrow's)."},
    )
    weights: Any = field(
        default=None, metadata={"help": "Coefficients of `fixed`: by expert, or a list."}
    )
    clusters: dict[str, Any] | None = field(
        default=None, metadata={"help": "Cluster of each expert, for `hierarchical`."}
    )
    mlp_layers: int | None = field(
        default=None,
        metadata={"help": "Number of layers of `mlp`: 0, 1 or 2. Default: 2 (WEMoE)."},
    )
    init_lambda: float | None = field(
        default=None,
        metadata={"help": "Start of all coefficients of `mlp`. Default: 0.3 (WEMoE)."},
    )
    router_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the router by name: {'sharpness': 2.0}."},
    )
    router_aux_loss_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the load-balancing loss, averaged over modules, in training."},
    )
    head: str | None = field(
        default=None,
        metadata={
            "help": "Head of a classifier, where experts have their own: an expert's name, mean, "
            "new (trained with the router) or own (all, chosen by task= in forward)."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that PEFT trains and saves whole, beside the router."},
    )
    layout: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "Modules with each expert's rank and scaling; written by composing."},
    )
    mixing_by_default: bool = field(
        default=False,
        metadata={"help": "Whether `mixing` was not stated; written by composing."},
    )
    expert_dtype: ExpertDtype = field(
        default="auto",
        metadata={
            "help": "Dtype of the experts. Default: as PEFT keeps a LoRA; products are in bfloat16 "
            "where a GPU runs the base model in it."
        },
    )

    target_modules: ClassVar[None] = None  # PEFT asks; `layout` says it exactly

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ROUTED_LORA
        for option in ("experts", "general_experts"):
            setattr(self, option, experts_by_name(option, getattr(self, option)))
        for option, declared in _OWN_TYPES.items():
            setattr(self, option, read_value(option, declared, getattr(self, option)))
        self._check_experts()
        self._check_head()
        self._read_router_options()
        for option in ("top_k", "routing_tokens"):
            number = getattr(self, option)
            if number is not None and number < 1:
                raise UserError(f"{option}={number} is below 1")
        if self.top_k is not None and self.top_k > len(self.experts):
            raise UserError(f"top_k={self.top_k}, but there are {len(self.experts)} experts")
        temperature = self.router_temperature
        if temperature is not None and not 0 < temperature < math.inf:
            raise UserError(f"router_temperature={temperature} is not above 0")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise UserError(f"router_aux_loss_coef={self.router_aux_loss_coef} is below 0")
        self.router_class.check(self)
        self.sites: dict[str, Site] = {}
        if self.layout is not None:
            self._read_layout(self.layout)

    def _read_layout(self, layout: Any) -> None:
        """What lies in which module, by the module's name.

        `UserError` where that, or a description of an expert, is not what `compose` writes.
        """
        described = {**self.experts, **self.general_experts}
        for name, of_expert in described.items():
            dtype = of_expert.get("dtype") if isinstance(of_expert, dict) else None
            if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
                raise UserError(f"the expert {name!r} has the dtype {dtype!r}, which is none")
        if not isinstance(layout, list) or not all(isinstance(group, dict) for group in layout):
            raise UserError(f"`layout` is a list of mappings, not {layout!r:.80}")
        for group in layout:
            if not _is_part_of_layout(group, len(described)):
                raise UserError(
                    "each part of `layout` has names of modules, and a rank and a scaling for each "
                    f"of {len(described)} experts, which {group} has not"
                )
            site = Site(
                tuple(group["ranks"]),
                tuple(group["scalings"]),
                len(self.general_experts),
                group.get("has_biases", False),
            )
            self.sites |= dict.fromkeys(group["modules"], site)

    @property
    def task_type(self) -> Any:
        """The task that is stated, else the one that all experts were made for.

        By it PEFT chooses the class of the model, before the experts are composed. Their files are
        not read while the configuration itself is made.
        """
        task = self.__dict__.get("_task_type")
        is_made = "sites" in self.__dict__
        if task is None and is_made and not self.is_composed:
            sources = [*self.experts.values(), *self.general_experts.values()]
            # Where experts are added or taken out, they are described, and are no directories.
            if all(isinstance(source, str) for source in sources):
                task = common_task(sources)
        return task

    @task_type.setter
    def task_type(self, task: Any) -> None:
        self.__dict__["_task_type"] = task

    @property
    def source(self) -> "RoutedLoraConfig | None":
        """The configuration that names the experts' directories; None where they came inside."""
        if not self.is_composed:
            return self
        as_given = self.__dict__.get("_as_given")
        return None if as_given is None else replace(self, **as_given)

    def become(self, composed: "RoutedLoraConfig") -> None:
        """Take the values of this configuration, composed; `source` remembers what they were."""
        as_given = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if value != getattr(composed, each.name):
                as_given[each.name] = value
        self.__dict__.update(composed.__dict__)
        self.__dict__["_as_given"] = as_given

    @property
    def is_locked(self) -> bool:
        """Whether the modules of a model were made by this configuration."""
        return self.__dict__.get("_is_locked", False)

    def lock(self) -> None:
        """Refuse other values from now on: the modules of a model were made by these."""
        self.__dict__["_is_locked"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. `UserError` where it would be saved and have no effect.

        What PEFT's own configurations have can always be set.
        """
        # PEFT's classes of some tasks set `modules_to_save`, and do when the modules are made.
        is_ours = name in RoutedLoraConfig.__annotations__ and name != "modules_to_save"
        if is_ours and self.is_locked and value != getattr(self, name):
            hint = (
                "change a configuration before it is loaded: PeftConfig.from_pretrained, then "
                "PeftModel.from_pretrained(base, directory, config=config)"
            )
            if name in CHANGEABLE:
                hint = f"use model.set_routing({name}={value!r})"
            raise UserError(
                f"{name}={value!r} would change nothing in a model whose modules are made by this "
                f"configuration: {hint}"
            )
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The configuration in a directory or on the Hub.

        `UserError` for a keyword that is a field of it, since PEFT ignores these.
        """
        ignored = [name for name in kwargs if name in RoutedLoraConfig.__annotations__]
        if ignored:
            how = "with model.set_routing" if ignored[0] in CHANGEABLE else "on the configuration"
            raise UserError(
                f"{ignored[0]}= is not taken when an adapter is loaded: set it afterwards, {how}"
            )
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def _check_experts(self) -> None:
        """`UserError` where there are none, or they cannot stand beside the general ones."""
        if not self.experts:
            raise UserError(
                "a routed adapter needs experts: experts={'math': 'math/', 'code': 'code/'}"
            )
        both = self.experts.keys() & self.general_experts.keys()
        if both:
            raise UserError(
                f"{min(both)!r} names an expert and a general one: give names, "
                f"general_experts={{'wiki': …}}"
            )
        if self.general_experts and self.mixing == "low_rank":
            raise UserError(
                "general experts are subtracted from updates, which mixing='low_rank' never "
                "forms: use full"
            )

    def _check_head(self) -> None:
        """`UserError` for a head that nothing has, or a word that names an expert as well."""
        if self.head is None:
            return
        if self.head in HEADS and self.head in self.experts:
            raise UserError(f"head={self.head!r} names an expert as well: give that another name")
        if self.head not in (*HEADS, *self.experts):
            raise UserError(
                f"head={self.head!r} is none of the experts ({', '.join(self.experts)}) and none "
                f"of {', '.join(HEADS)}"
            )

    def _read_router_options(self) -> None:
        """Each option of the router in one place, in the type that the router declares.

        All of them are kept, so that a saved adapter stays what it is when a default changes. Only
        the fields stay None where nothing was stated.
        """
        if not isinstance(self.router_options, dict):
            raise UserError(
                f"router_options={self.router_options!r} is no dictionary: write {{'sharpness': "
                "2.0}"
            )
        own = dict(self.router_options)
        for option in _FIELDS_OF_ROUTERS:
            if option not in own:
                continue
            value = own.pop(option)
            stated = getattr(self, option)
            if stated is not None and stated != value:
                raise UserError(
                    f"{option}={stated!r}, and {value!r} in router_options: give it once"
                )
            setattr(self, option, value)
        self.router_options = own
        for option in ("weights", "clusters"):  # by expert, whose names are strings
            value = getattr(self, option)
            if isinstance(value, dict):
                setattr(self, option, {str(name): of_name for name, of_name in value.items()})
        options = self.router_class.options_of(self)
        for option in self.stated_options.keys() & set(_FIELDS_OF_ROUTERS):
            setattr(self, option, getattr(options, option))
        self.router_options = {
            option: value
            for option, value in saved_options(options).items()
            if option not in _FIELDS_OF_ROUTERS
        }

    @property
    def stated_options(self) -> dict[str, Any]:
        """The router's options by name, without the fields in which nothing is stated."""
        stated = {}
        for option in _FIELDS_OF_ROUTERS:
            value = getattr(self, option)
            if value is not None:
                stated[option] = value
        return stated | self.router_options

    @property
    def router_class(self) -> type[Router]:
        """The class that is registered under the router's name."""
        return find_router(self.router)

    @property
    def names(self) -> list[str]:
        """The experts' names, in the order of the coefficients."""
        return list(self.experts)

    @property
    def routes_sequences(self) -> bool:
        """Whether a choice is made per sequence, and depends on the input at all."""
        return self.granularity == "sequence" and self.router_class.uses_input(self)

    @property
    def modules_per_router(self) -> RouterGranularity:
        """The modules that have a router in common: as stated, or the router's default."""
        return self.router_granularity or self.router_class.router_granularity

    @property
    def shares_choices(self) -> bool:
        """Whether several modules follow one choice that depends on the input."""
        return self.modules_per_router != "module" and self.router_class.uses_input(self)

    @property
    def is_composed(self) -> bool:
        """Whether the experts are inside, and not yet to be read."""
        return self.layout is not None

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved, with experts in lists, and patterns where order counts.

        PEFT sorts a dictionary's keys, and the experts' order is that of the coefficients. Of a
        pattern's keys it takes the first that matches.
        """
        values = super().to_dict()
        for option in ("experts", "general_experts"):
            experts = []
            for name, expert in getattr(self, option).items():
                described = expert if isinstance(expert, dict) else {"path": expert}
                experts.append({"name": name, **_with_ordered_patterns(described)})
            values[option] = experts
        if self.modules_to_save is not None:  # PEFT adds the same names whenever it loads them
            values["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration as PEFT does, and what experts and router are in the card."""
        super().save_pretrained(save_directory, **kwargs)
        card.extend(save_directory, self.names, list(self.general_experts), self.router_class)


def _is_part_of_layout(group: dict[str, Any], experts: int) -> bool:
    """Whether a part of `layout` has names of modules, and a rank and a scaling for each of so many
    experts.
    """
    if not all(isinstance(group.get(key), list) for key in ("modules", "ranks", "scalings")):
        return False
    if not isinstance(group.get("has_biases", False), bool):
        return False
    ranks = group["ranks"]
    scalings = group["scalings"]
    return (
        len(ranks) == len(scalings) == experts
        and all(isinstance(module, str) for module in group["modules"])
        and all(isinstance(rank, int) and rank >= 0 for rank in ranks)
        and all(isinstance(each, int | float) and math.isfinite(each) for each in scalings)
    )


def experts_by_name(option: str, experts: Any) -> dict[str, Any]:
    """Each expert's directory or configuration by its name. `UserError` for anything else."""
    if isinstance(experts, dict):
        return {
            str(name): value if isinstance(value, dict) else _as_text(value)
            for name, value in experts.items()
        }
    if isinstance(experts, str) or not isinstance(experts, Sequence):
        raise UserError(
            f"{option}={experts!r} is neither a dict of names and directories nor a list of "
            "directories"
        )
    if all(isinstance(expert, dict) for expert in experts):
        return dict(map(_as_saved, experts))
    paths = [_as_text(path) for path in experts]
    return dict(zip(_unique_names(paths), paths, strict=True))


def _as_text(path: Any) -> str:
    """A directory as text; a `Path` so that it cannot be taken for a repository on the Hub."""
    text = str(path)
    is_relative = isinstance(path, PurePath) and not path.is_absolute()
    return f"./{text}" if is_relative and not text.startswith((".", "~")) else text


def _with_ordered_patterns(expert: dict[str, Any]) -> dict[str, Any]:
    """The description of an expert, with pairs for patterns that sorting would put in disorder."""
    described = dict(expert)
    for name in PATTERNS:
        pattern = described.get(name)
        if isinstance(pattern, dict) and list(pattern) != sorted(pattern):
            described[name] = [[key, value] for key, value in pattern.items()]
    return described


def _as_saved(expert: dict[str, Any]) -> tuple[str, Any]:
    """The name of an expert, and its directory or, where it is inside, its LoRA configuration."""
    config = {key: value for key, value in expert.items() if key != "name"}
    for name in PATTERNS:
        pattern = config.get(name)
        if isinstance(pattern, list):
            if not all(isinstance(pair, list) and len(pair) == 2 for pair in pattern):
                raise UserError(f"{name} of the expert {expert.get('name')!r} has no pairs")
            config[name] = dict(pattern)
    if not isinstance(expert.get("name"), str):
        raise UserError(f"an expert has the name {expert.get('name')!r}, which is no text")
    return expert["name"], config.get("path", config)


def _unique_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart; numbers for a path that is there twice.

    >>> _unique_names(["runs/math/final", "runs/code/final"])
    ['math-final', 'code-final']
    """
    parts = [_parts(path) for path in paths]
    names: list[str] = []
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{index}" for index, name in enumerate(names)]


def _parts(path: str) -> list[str]:
    """The names in a path, without those that name no directory of their own."""
    return [part for part in PurePath(path).parts if part not in ("/", ".", "..")] or [path]
