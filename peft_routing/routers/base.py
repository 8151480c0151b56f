"""The base class of all routers, and how a router is found by its name."""

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from _mergekit_moe_ext_common.errors import UserError
from peft_routing.routers.options import (
    RouterOptions,
    option_names,
    options_of_names,
    read_options,
)
from peft_routing.routers.tensors import largest, straight_through, wide

Granularity = Literal["token", "sequence"]
RouterGranularity = Literal["module", "block", "model"]
_ROUTERS: dict[str, type["Router"]] = {}


class RouterSettings(Protocol):
    """The fields of an adapter's configuration that a router reads: what a router's `config` is.

    Attributes:
        experts: the experts by their names, in the order of the coefficients.
        granularity: a choice per "token", or one per "sequence".
        router_granularity: a router per "module", per "block" or for the "model"; None for the
            router's own default.
        routing_tokens: the number of tokens of a sequence by which its choice is made.
        router_aux_loss_coef: the weight of the load-balancing loss; 0 without one.
        names: the experts' names, in the same order.
        stated_options: the router's options that a user has stated, by name; `Router.options_of`
            gives all of them, in their types.
    """

    experts: Any
    granularity: Granularity
    router_granularity: RouterGranularity | None
    routing_tokens: int
    router_aux_loss_coef: float

    @property
    def names(self) -> list[str]: ...

    @property
    def stated_options(self) -> dict[str, Any]: ...


class Router(nn.Module):
    """A map from hidden states to coefficients.

    A subclass says how experts are scored; the rest is the same for all. One that has a `name` is
    registered under it when its class is defined; `UserError` where it lacks `scores`, has `rows`
    of another form, or takes another router's name. Its parameters are direct attributes (no
    submodules), so that PEFT can strip the adapter's name from their keys.

    Attributes of the class, which a subclass may set:

    Attributes:
        name: what `RoutedLoraConfig(router=...)` takes.
        options: a dataclass whose fields are the router's options, `RouterOptions` by default; or
            a tuple of names, whose options take any value and are None by default.
        rows: the parameters with a row per expert, so that experts can be added and removed: a
            dictionary from a parameter's name to "expert", or to "cluster" where `labels` returns
            the names of clusters; `{"weight": "expert"}` by default.
        top_k: the default of the option `top_k`; all experts if None.
        is_simplex: whether coefficients are not negative and have the sum 1, so that the load can
            be balanced.
        mixing: the default of the adapter's `mixing`, where the experts' ranks and targets agree.
        router_granularity: the default of the adapter's: a router per "module", per "block" or for
            the "model".

    Attributes of an instance, which `Router.__init__` sets:

    Attributes:
        experts: the experts' names, in the order of the coefficients.
        in_features: the width of the hidden states.
        k: how many coefficients are not 0.
        temperature: what scores are divided by.
        granularity: "token" or "sequence", as in the adapter's configuration.
    """

    name: ClassVar[str]
    options: ClassVar[Any] = RouterOptions
    router_granularity: ClassVar[RouterGranularity] = "module"
    is_simplex: ClassVar[bool] = True
    mixing: ClassVar[Literal["full", "low_rank"]] = "low_rank"
    top_k: ClassVar[int | None] = None
    rows: ClassVar[dict[str, str]] = {"weight": "expert"}
    # The modules that an adapter's router is for, and their choice, where it is for several and
    # depends on the input (`sharing`).
    group: str = ""
    choice: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.options, tuple):
            cls.options = options_of_names(f"{cls.__name__}Options", cls.options)
        if "name" in cls.__dict__:
            _register(cls)

    def __init__(self, config: RouterSettings, experts: Sequence[str], in_features: int) -> None:
        super().__init__()
        options = self.options_of(config)
        self.depends_on_input = self.uses_input(config)
        self.experts = list(experts)
        self.in_features = in_features
        top_k = getattr(options, "top_k", None) or self.top_k or len(experts)
        self.k = min(top_k, len(experts))
        self.temperature = getattr(options, "router_temperature", None) or 1.0
        self.granularity = config.granularity
        self.routing_tokens = config.routing_tokens
        self.is_balanced = config.router_aux_loss_coef > 0

    @classmethod
    def options_of(cls, config: RouterSettings) -> Any:
        """The options that a configuration states, as an instance of this router's dataclass.

        `UserError` for an option that it does not have, or a value of the wrong type.
        """
        where = f"router={cls.name!r}"
        return read_options(cls.options, config.stated_options, where, _hint_at_takers)

    @classmethod
    def uses_input(cls, config: RouterSettings) -> bool:
        """Whether coefficients depend on the input: if not, the adapter can be merged."""
        return True

    @classmethod
    def starts_from_experts(cls, config: RouterSettings) -> bool:
        """Whether `start` takes the rows from the experts, each of which then needs an update at
        the module that the router reads.
        """
        return False

    @classmethod
    def check(cls, config: RouterSettings) -> None:
        """`UserError` for options that this router does not take or cannot work with."""
        cls.options_of(config)
        if config.router_aux_loss_coef and not (cls.uses_input(config) and cls.is_simplex):
            raise UserError(
                f"router={cls.name!r} has no load to balance: leave router_aux_loss_coef at 0"
            )

    @property
    def kept(self) -> int | None:
        """The largest number of coefficients that are not 0; None where that is unknown or all."""
        # A subclass with coefficients of its own may keep more than k.
        is_ours = type(self).coefficients is Router.coefficients
        return self.k if is_ours and self.k < len(self.experts) else None

    @property
    def learns(self) -> bool:
        """Whether there is anything to choose: the softmax over one expert is always 1."""
        return len(self.experts) > 1 or type(self).coefficients is not Router.coefficients

    @property
    def why_it_learns_nothing(self) -> str:
        """What to say of a router that does not learn."""
        return f"router={self.name!r} has nothing to learn: there is one expert"

    def scores(self, hidden: Tensor) -> Tensor:
        """The scores (…, experts) of hidden states (…, in_features), or just (experts,) where the
        input does not matter.
        """
        raise NotImplementedError

    def coefficients(self, scores: Tensor) -> Tensor:
        """The softmax over the k largest scores, in float32 or wider (Trade-offs B.1 and B.4).

        With k = 1 the only coefficient is 1, which has no gradient. While the router is trained it
        has that of the expert's probability among all experts instead, an estimate; see
        `straight_through`. A frozen router stays exact.
        """
        coefficients = torch.softmax(largest(self._tempered(scores), self.k), dim=-1)
        if self.k == 1 and scores.shape[-1] > 1 and self._is_trained():
            return straight_through(coefficients, self.probabilities(scores))
        return coefficients

    def _is_trained(self) -> bool:
        """Whether a gradient of this router's own parameters is wanted now."""
        return torch.is_grad_enabled() and any(each.requires_grad for each in self.parameters())

    def probabilities(self, scores: Tensor) -> Tensor:
        """The softmax over all scores, through which the load-balancing loss has its gradient, and
        a choice of one expert.
        """
        return torch.softmax(self._tempered(scores), dim=-1)

    def _tempered(self, scores: Tensor) -> Tensor:
        return wide(scores) if self.temperature == 1 else wide(scores) / self.temperature

    def load(self, scores: Tensor) -> Tensor:
        """The choice that the load-balancing loss counts, over the same experts or clusters as the
        scores.
        """
        return self.coefficients(scores)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.coefficients(self.scores(hidden))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A cast or a move of the whole model; out of float32 it does not cast a router.

        `model.half()` means the model's arithmetic. Rounded, a router chooses other experts.
        """

        def keeping_float32(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if tensor.dtype == torch.float32 and applied.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(applied.device)
            return applied

        return super()._apply(keeping_float32, recurse)

    def start(
        self, factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], mixing: str
    ) -> None:
        """Set what depends on the experts, once, when they are composed.

        `factors` are A (rank, in) and B (out, rank) of each expert; `scalings` multiply B A.
        """

    @torch.no_grad()
    def check_started(self) -> None:
        """`UserError` for a router that could not be loaded again, or whose scores are no scores.

        It is tried on a few hidden states once, when the experts are composed. No later call checks
        anything: a look at a number makes a GPU wait.
        """
        self._check_parameters()
        tensors = [*self.parameters(), *self.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            return
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, 3, self.in_features, generator=generator, device="cpu")
        if tensors:
            hidden = hidden.to(tensors[0].device)
        trial = copy.deepcopy(self)  # a router may count its calls
        scores = trial.scores(hidden)
        number = scores.shape[-1:]
        if type(self).coefficients is Router.coefficients:  # which makes of each score one
            number = torch.Size([len(self.experts)])
        self._check_shape("scores", scores, hidden, number)
        coefficients = trial.coefficients(scores)
        self._check_shape("coefficients", coefficients, hidden, torch.Size([len(self.experts)]))
        if scores.isnan().any() or coefficients.isnan().any():
            raise UserError(
                f"router {self.name!r}: its scores are NaN for hidden states that are not; is "
                "something divided by 0, as the norm of a row of zeros?"
            )

    def _check_parameters(self) -> None:
        """`UserError` for a parameter in a submodule, and for one without the rows that `rows` says
        it has.
        """
        where = f"router {self.name!r}"
        inner = next((name for name in self.state_dict() if "." in name), None)
        if inner is not None:
            raise UserError(
                f"{where}: {inner} lies in a submodule, where PEFT does not find it under another "
                "name of the adapter: make it a parameter of the router itself, "
                "self.weight = nn.Parameter(...)"
            )
        parameters = dict(self.named_parameters())
        for name, of in self.rows.items():
            rows = len(self.labels(of))
            if name in parameters and parameters[name].shape[:1] != (rows,):
                raise UserError(
                    f"{where}: by its `rows`, {name} has a row per {of}, which are {rows}, and its "
                    f"shape is {tuple(parameters[name].shape)}: store it with such rows, or write "
                    "rows = {} if nothing has them"
                )

    def _check_shape(self, what: str, result: Tensor, hidden: Tensor, number: torch.Size) -> None:
        """`UserError` for scores or coefficients that are not a row of so many per token, nor one
        for all tokens where the input does not matter.
        """
        expected = [hidden.shape[:-1] + number]
        if not self.depends_on_input:
            expected.append(number)
        if result.shape not in expected:
            raise UserError(
                f"router {self.name!r}: its {what} have the shape {tuple(result.shape)} for hidden "
                f"states of the shape {tuple(hidden.shape)} and {len(self.experts)} experts; "
                f"{' or '.join(str(tuple(shape)) for shape in expected)} would be right"
            )

    def labels(self, of: str) -> list[str]:
        """The names of the rows of a parameter with a row per `of`, "expert" or "cluster"."""
        return self.experts

    def check_rows(self, other: "Router") -> None:
        """`UserError` for a parameter that depends on the experts but is not in `rows`."""
        for name, theirs in other.named_parameters():
            if name not in self.rows and self.get_parameter(name).shape != theirs.shape:
                raise UserError(
                    f"router {self.name!r}: {name} has a row per expert or cluster; say so in its "
                    f"`rows`, as {{{name!r}: 'expert'}}, and experts can be added and removed"
                )

    @torch.no_grad()
    def take(self, other: "Router") -> None:
        """Copy from a router over other experts everything that both have."""
        parameters_of_other = dict(other.named_parameters())
        for name, parameter in self.named_parameters():
            source = parameters_of_other[name]
            if name not in self.rows:
                parameter.copy_(source)
                continue
            # Rows are matched by name: experts that came or went have moved the others.
            labels_of_other = other.labels(self.rows[name])
            for index, label in enumerate(self.labels(self.rows[name])):
                if label in labels_of_other:
                    parameter[index].copy_(source[labels_of_other.index(label)])


class SharedRouter(nn.Module):
    """What stands in the place of a router that several modules share, in all but the first of
    these, where it lies with its parameters.
    """

    def __init__(self, owner: Router) -> None:
        super().__init__()
        self._owner = (owner,)  # a tuple, so that its parameters are not this module's as well

    @property
    def owner(self) -> Router:
        return self._owner[0]


def all_routers() -> dict[str, type[Router]]:
    """Every router by its name: those of this package, and all that were defined elsewhere."""
    # A class registers itself when its file is imported.
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_ROUTERS.items()))


def is_of_package(router: type[Router]) -> bool:
    """Whether a router comes with this package, so that nobody has to import it."""
    return router.__module__.startswith(f"{__package__}.")


def _register(router: type[Router]) -> None:
    """Keep a router under its name. `UserError` if it lacks `scores`, if its `rows` are not of
    their form, or if another class has that name.
    """
    where = f"router {router.name!r} ({router.__qualname__})"
    if router.scores is Router.scores:
        raise UserError(
            f"{where} has no method `scores(self, hidden)`, which maps hidden states (…, "
            "in_features) to scores (…, experts)"
        )
    _check_form_of_rows(router.rows, where)
    if not is_of_package(router):
        # Ours are all imported first: one that came later would take the place of a namesake.
        other = all_routers().get(router.name)
        # The same class may be defined again, as when a cell of a notebook is run twice.
        if other is not None and other.__qualname__ != router.__qualname__:
            raise UserError(
                f"{router.__qualname__}: {other.__module__}.{other.__qualname__} has the name "
                f"{router.name!r} already; choose another"
            )
    _ROUTERS[router.name] = router


def _check_form_of_rows(rows: Any, where: str) -> None:
    """`UserError` for `rows` of another form than from a parameter's name to what its rows are of,
    which says how the same parameters are written right.
    """
    kinds = ("expert", "cluster")
    is_right = isinstance(rows, dict) and all(
        isinstance(name, str) and of in kinds for name, of in rows.items()
    )
    if is_right:
        return
    names = [rows] if isinstance(rows, str) else rows
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        names = ["weight"]
    right = dict.fromkeys(names, "expert")
    raise UserError(
        f"{where}: rows={rows!r} is no dictionary from a parameter's name to 'expert' or "
        f"'cluster', which its rows are of: write rows = {right!r}"
    )


def find_router(name: str) -> type[Router]:
    """The router of a name. `UserError` if there is none."""
    if name not in _ROUTERS and name not in all_routers():
        known = ", ".join(sorted(_ROUTERS))
        raise UserError(
            f"there is no router {name!r}; there are {known}. One of your own must be imported "
            "first: in a shell, run its file, which ends with a call of peft_routing.cli.main(), "
            "in place of peft-route"
        )
    return _ROUTERS[name]


def _hint_at_takers(option: str) -> str:
    """The routers that have an option of this name, in words; empty if none has."""
    takers = [
        name for name, router in all_routers().items() if option in option_names(router.options)
    ]
    return f"it is one of {', '.join(takers)}" if takers else ""
