"""A linear module with routed LoRA experts.

All experts' A lie below each other as (R, in), and so do all B, transposed, as (R, out), R being
the sum of their ranks. A forward pass is z = x Aᵀ, z weighed by the coefficients, and z Bᵀ;
`mixing` has three ways to compute it.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from _mergekit_moe_ext_common.errors import UserError
from peft_routing import given, mixing
from peft_routing.calls import Reads, coefficients_at
from peft_routing.config import RoutedLoraConfig, Site
from peft_routing.fused import Fused, is_watched
from peft_routing.routers import Constant, SharedRouter
from peft_routing.routers.tensors import Source, is_captured, wait_for

_CAN_BE_ADDED_TO = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Experts(nn.Module):
    """The frozen factors of all experts at one module."""

    owners: Tensor

    def __init__(
        self, site: Site, in_features: int, out_features: int, mixed: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.site = site
        self.mixing = mixed
        self.scalings = Constant(site.scalings)
        rank = sum(site.ranks)
        self.A = nn.Parameter(torch.zeros(rank, in_features, dtype=dtype), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(rank, out_features, dtype=dtype), requires_grad=False)
        if site.has_biases:
            biases = torch.zeros(len(site.ranks), out_features, dtype=dtype)
            self.biases = nn.Parameter(biases, requires_grad=False)
        # Whether the configuration states no dtype, so that products have that of the input.
        self.follows_base = False
        self._cast: tuple[Source, Source, Tensor, Tensor] | None = None
        self.is_of_one_rank = len(set(site.ranks)) == 1
        owners = torch.arange(len(site.ranks)).repeat_interleave(torch.tensor(site.ranks))
        self._owners: list[int] = []  # the same for Python
        for expert, of_expert in enumerate(site.ranks):
            self._owners += [expert] * of_expert
        # Numbers of experts that coefficients chose last, and of their rows of A and B.
        self._few: tuple[Any, list[Tensor]] | None = None
        self.register_buffer("owners", owners, persistent=False)

    def fill(self, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put each expert's A (rank, in) and B (out, rank) in, on the CPU or where they are."""
        # Cast one by one, since float8 cannot be joined with another dtype.
        a = torch.cat([a.to(self.A.dtype) for a, _ in factors])
        b = torch.cat([b.mT.to(self.B.dtype) for _, b in factors])
        # not by setattr: under `low_cpu_mem_usage` PEFT would send a new parameter to the meta
        # device
        self._parameters["A"] = nn.Parameter(a, requires_grad=False)
        self._parameters["B"] = nn.Parameter(b, requires_grad=False)

    def fill_biases(self, biases: Tensor) -> None:
        """Put each expert's bias in (experts, out), on the CPU or where they are."""
        self._parameters["biases"] = nn.Parameter(biases.to(self.biases.dtype), requires_grad=False)

    def biases_of_all(self) -> list[Tensor]:
        """The bias (out,) of each expert, as views; zeros where there are none."""
        if self.site.has_biases:
            return list(self.biases)
        return [self.B.new_zeros(self.B.shape[1])] * len(self.site.ranks)

    def dtype_of_products(self, x: Tensor, result: Tensor) -> torch.dtype:
        """The dtype in which products with the experts are computed, for a module with this input
        and output.
        """
        if not self.follows_base:
            return self.A.dtype
        # A GPU multiplies in bfloat16 many times as fast as in float32, and what it rounds is no
        # more than what the base model rounds. Most CPUs are slower in bfloat16.
        is_half = x.dtype == torch.bfloat16 and result.dtype == torch.bfloat16
        if is_half and x.device.type != "cpu":
            return torch.bfloat16
        return torch.promote_types(self.A.dtype, x.dtype)

    def factors_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B; in another dtype than theirs, copies that are made once."""
        return self.cast_factors(self.A, self.B, dtype)

    def cast_factors(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `factors_in` gives, for whoever has looked A and B up."""
        if dtype == a.dtype:
            return a, b
        is_trained = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        is_lost = torch.compiler.is_compiling() or a.is_inference() or b.is_inference()
        if is_trained or is_lost:
            return a.to(dtype), b.to(dtype)
        made = self._cast
        if made is None or not (made[0].holds_for(a) and made[1].holds_for(b)):
            if is_captured(a.device):
                return a.to(dtype), b.to(dtype)
            with torch.inference_mode(False), torch.no_grad():
                made = Source(a), Source(b), a.to(dtype), b.to(dtype)
            wait_for(a.device)
            self._cast = made
        return made[2], made[3]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._cast = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cast = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cast": None, "_few": None}

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """A (rank, in) and B (out, rank) of each expert, as views."""
        ranks = list(self.site.ranks)
        return list(zip(self.A.split(ranks), self.B.mT.split(ranks, dim=1), strict=True))

    def forward(self, x: Tensor, coefficients: Tensor, kept: int | None = None) -> Tensor:
        """(…, in) and (…, experts), or (experts,), to the update (…, out).

        `kept`: at most so many coefficients of a token are not 0.
        """
        # Coefficients and scalings are small: they are multiplied here, not with the hidden states.
        scaled = coefficients * self.scalings(coefficients.dtype, coefficients.device)
        update = self._mixed(x, coefficients, scaled, kept)
        if self.site.has_biases:
            update = update + scaled.to(self.biases.dtype) @ self.biases
        return update

    def _mixed(self, x: Tensor, coefficients: Tensor, scaled: Tensor, kept: int | None) -> Tensor:
        """The update (…, out) without biases; `scaled` are the coefficients times the scalings."""
        a, b = self.factors_in(x.dtype)
        if not self.is_of_one_rank:
            return mixing.dense_of_mixed_ranks(x, a, b, scaled, self.owners)
        weigh = mixing.full if self.mixing == "full" else mixing.low_rank
        arguments = x, a, b, coefficients, scaled, weigh
        if kept is None:
            return mixing.dense(*arguments)
        # Where few experts are chosen, touching only these may be faster; measured costs decide.
        gradients = torch.is_grad_enabled() and (x.requires_grad or coefficients.requires_grad)
        way = mixing.cheapest(x, a, b, len(self.site.ranks), kept, gradients=gradients)
        if way == "dense":
            return mixing.dense(*arguments)
        return mixing.of_chosen(*arguments, kept, way)

    def of_one_each(self, x: Tensor, chosen: given.ChosenExperts, has_rows: bool) -> Tensor:
        """The update (…, out) where each row of x (…, in) has one expert, or all have the same.

        Each expert is computed for its own rows alone.
        """
        rows = x if has_rows else x[None]
        order, groups = chosen.groups(len(rows), x.device)
        a, b = self.factors_in(x.dtype)
        sorted_rows = rows if order is None else rows.index_select(0, order)
        updates = []
        start = 0
        for expert, coefficient, count in groups:
            first = sum(self.site.ranks[:expert])
            of_expert = slice(first, first + self.site.ranks[expert])
            factor = coefficient * self.site.scalings[expert]
            if self.mixing == "low_rank":
                factor *= coefficient  # once for each of the two factors
            z = sorted_rows[start : start + count] @ a[of_expert].T
            updates.append((z * factor) @ b[of_expert])
            start += count
        if order is None:
            return updates[0] if has_rows else updates[0][0]
        update = rows.new_zeros(*rows.shape[:-1], b.shape[1])
        if updates:
            update = update.index_copy(0, order, torch.cat(updates))
        return update if has_rows else update[0]

    def of_few(self, x: Tensor, coefficients: Tensor, experts: Sequence[int]) -> Tensor:
        """The update (…, out) of x (…, in), where of the coefficients (…, all experts) only those
        of these experts are not 0.
        """
        chosen, slots, owners = self._places_of(experts, x.device)
        a, b = self.factors_in(x.dtype)
        a = a.index_select(0, slots)
        b = b.index_select(0, slots)
        coefficients = coefficients.index_select(-1, chosen)
        scalings = self.scalings(coefficients.dtype, coefficients.device)
        scaled = coefficients * scalings.index_select(0, chosen)
        if self.mixing == "full":
            return mixing.dense_of_mixed_ranks(x, a, b, scaled, owners)
        return mixing.dense(x, a, b, coefficients, scaled, mixing.low_rank)

    def _places_of(self, experts: Sequence[int], device: torch.device) -> list[Tensor]:
        """The numbers of these experts, of their rows of A and B, and for each of these rows whose
        it is of these experts.
        """
        key = tuple(experts), device
        if self._few is None or self._few[0] != key:
            slots = []
            owners = []
            for place, owner in enumerate(self._owners):
                if owner in experts:
                    slots.append(place)
                    owners.append(list(experts).index(owner))
            with torch.inference_mode(False):
                places = [
                    torch.tensor(numbers, dtype=torch.long, device=device)
                    for numbers in (list(experts), slots, owners)
                ]
            self._few = key, places
        return self._few[1]

    @torch.no_grad()
    def merged_factors(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of the one update, in float32 or wider.

        The coefficients are (experts,).
        """
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        a = self.A.to(dtype)
        b = self.B.mT.to(dtype)
        coefficients = coefficients.to(dtype)
        scaled = coefficients * self.scalings(dtype, coefficients.device)
        if self.mixing == "full":
            return a, b * scaled[self.owners]
        count = len(self.site.ranks)
        a = (a.unflatten(0, (count, -1)) * coefficients[:, None, None]).sum(dim=0)
        return a, (b.unflatten(1, (count, -1)) * scaled[:, None]).sum(dim=1)

    @torch.no_grad()
    def merged_bias(self, coefficients: Tensor) -> Tensor:
        """(out,), in float32 or wider, for coefficients (experts,)."""
        dtype = torch.promote_types(self.biases.dtype, torch.float32)
        coefficients = coefficients.to(dtype)
        return (coefficients * self.scalings(dtype, coefficients.device)) @ self.biases.to(dtype)

    @torch.no_grad()
    def delta_weight(self, coefficients: Tensor) -> Tensor:
        """(out, in), in float32 or wider, for coefficients (experts,)."""
        a, b = self.merged_factors(coefficients)
        return b @ a


def with_general(coefficients: Tensor, general: int) -> Tensor:
    """(…, experts) to (…, experts + general), so that the general experts' mean is subtracted.

    sum of c_i (U_i - mean of G_j) is sum of c_i U_i - sum of (sum of c_i / general) G_j.
    """
    if not general:
        return coefficients
    of_each = -coefficients.sum(dim=-1, keepdim=True) / general
    return torch.cat([coefficients, of_each.expand(*of_each.shape[:-1], general)], dim=-1)


def updates(
    factors: Sequence[tuple[Tensor, Tensor]], site: Site
) -> tuple[Sequence[tuple[Tensor, Tensor]], Sequence[float]]:
    """A, B and the scaling of each expert's update, less the mean of the general experts'."""
    if not site.general:
        return factors, site.scalings
    scaled = []
    for (a, b), scaling in zip(factors, site.scalings, strict=True):
        scaled.append((a.double(), b.double() * scaling))
    routed = scaled[: -site.general]
    general = scaled[-site.general :]
    # A difference of updates is one update again, whose factors are theirs beside each other:
    # B A - B' A' is [B, -B'] times A above A'.
    general_a = [a for a, _ in general]
    minus_general_b = [-b / site.general for _, b in general]
    differences = []
    for a, b in routed:
        joined_a = torch.cat([a, *general_a])
        joined_b = torch.cat([b, *minus_general_b], dim=1)
        differences.append((joined_a, joined_b))
    return differences, [1.0] * len(differences)


def warn_if_trained(router: Any) -> None:
    """Say of a router that does not learn that training is in vain, if it is to be trained."""
    if any(parameter.requires_grad for parameter in router.parameters()):
        warnings.warn(router.why_it_learns_nothing, stacklevel=2)


class RoutedLoraLayer(BaseTunerLayer):
    """What PEFT finds, freezes, moves, saves and deletes: experts are frozen, routers trained."""

    adapter_layer_names: tuple[str, ...] = ("routed_lora_router",)
    other_param_names: tuple[str, ...] = ("routed_lora_experts",)
    get_base_layer: Callable[[], Any]
    _get_base_layer_device_and_dtype: Callable[[Any], tuple[Any, Any]]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, key: str) -> None:
        self.base_layer = base_layer
        self.key = key
        self.reads: Reads = "text"  # unless the tuner, which knows the whole model, says otherwise
        self.routed_lora_router = nn.ModuleDict()
        self.routed_lora_experts = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        # The weight that the base layer shares with other modules, while it has one of its own. In
        # a tuple, so that it is not this module's parameter.
        self._shared_weight: tuple[nn.Parameter, ...] = ()

    def update_layer(self, adapter_name: str, config: RoutedLoraConfig, router: nn.Module) -> None:
        """Make room for an adapter's experts here, and put its router beside them."""
        follows_base = config.expert_dtype == "auto"
        dtype = torch.promote_types(self._base_dtype(), torch.float32)
        experts = Experts(
            config.sites[self.key],
            self.in_features,
            self.out_features,
            config.mixing or "full",
            dtype if follows_base else getattr(torch, config.expert_dtype),
        )
        experts.follows_base = follows_base
        self.routed_lora_experts[adapter_name] = experts
        self.routed_lora_router[adapter_name] = router
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._forget()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def router_of(self, adapter: str) -> Any:
        """The adapter's router for this module, which may lie at another."""
        router = self.routed_lora_router[adapter]
        return router.owner if isinstance(router, SharedRouter) else router

    def experts_of(self, adapter: str) -> Any:
        return self.routed_lora_experts[adapter]

    def _base_dtype(self) -> torch.dtype:
        """The dtype that PEFT gives a LoRA of this module; float32 for integers, as PEFT's."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype in _CAN_BE_ADDED_TO else torch.float32

    def cast_adapter(self, adapter_name: str, *, to_base: bool) -> None:
        """Cast an adapter to the dtype of the base layer, or out of half precision.

        Experts with a dtype of their own keep it.
        """
        experts = self.experts_of(adapter_name)
        own = list(self.routed_lora_router[adapter_name].parameters())
        if experts.follows_base:
            own += experts.parameters()
        for parameter in own:
            if to_base:
                parameter.data = parameter.data.to(self._base_dtype())
            elif parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """A move to the device alone: `cast_adapter` is told which dtype."""
        base = self.get_base_layer()
        device = device or next((t.device for t in (*base.parameters(), *base.buffers())), None)
        for adapters in (self.routed_lora_experts, self.routed_lora_router):
            if adapter_name in adapters and device is not None and device.type != "meta":
                module = adapters[adapter_name]
                if not any(p.is_meta for p in module.parameters()):
                    module.to(device)

    def check_constant(self, adapter: str) -> None:
        """`UserError` if coefficients depend on the input."""
        router = self.router_of(adapter)
        if router.depends_on_input:
            raise UserError(
                f"adapter {adapter!r} cannot be merged: the coefficients of router={router.name!r} "
                "depend on the input, and a weight does not. Keep it as an adapter, or use "
                "uniform, fixed, global or layer"
            )

    def constant_coefficients(self, adapter: str) -> Tensor:
        """(experts,), the general ones included. `UserError` if they depend on the input."""
        self.check_constant(adapter)
        experts = self.experts_of(adapter)
        # A router that does not look at its input takes anything of its width and device.
        hidden = experts.A
        coefficients = self.router_of(adapter)(hidden).to(hidden.device)
        return with_general(coefficients, experts.site.general)

    def check_mergeable(self, adapter: str) -> None:
        """`UserError` if there is no one update, or no plain weight to add it to."""
        self.check_constant(adapter)
        base = self.get_base_layer()
        # GPTQ and AWQ have none, and torchao's says that it is floating-point.
        weight = getattr(base, "weight", None)
        if type(weight) is not nn.Parameter or weight.dtype not in _CAN_BE_ADDED_TO:
            raise UserError(
                f"adapter {adapter!r} cannot be merged: {self.key} is a {type(base).__name__} "
                "without a plain weight, as quantised ones are. Keep it as an adapter, or merge "
                "it into the base model before that is quantised"
            )
        if self.experts_of(adapter).site.has_biases and base.bias is None:
            raise UserError(
                f"adapter {adapter!r} cannot be merged: its experts have a bias at {self.key}, "
                "which has none itself. Keep it as an adapter"
            )

    def untie(self) -> None:
        """Give the base layer a weight of its own, until the last adapter is unmerged."""
        base = self.get_base_layer()
        self._shared_weight = (base.weight,)
        own = base.weight.detach().clone()
        base.weight = nn.Parameter(own, requires_grad=base.weight.requires_grad)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update, in the shape of the base layer's weight. `UserError` if it depends on the
        input.
        """
        delta = self.experts_of(adapter).delta_weight(self.constant_coefficients(adapter))
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def _add_bias(self, adapter: str, sign: int) -> None:
        """Add the experts' merged bias to that of the base layer, or take it out (sign -1)."""
        experts = self.experts_of(adapter)
        if not experts.site.has_biases:
            return
        bias = self.get_base_layer().bias
        delta = experts.merged_bias(self.constant_coefficients(adapter))
        bias.data = (bias.data + sign * delta.to(bias.device)).to(bias.dtype)


@dataclass(frozen=True)
class Adapter:
    """An active adapter at a module; `fused` is the short way, where there is one.

    `router_here` is the router, or what stands here for that of another module.
    """

    name: str
    experts: Experts
    router: Any
    router_here: Any
    fused: Fused | None


class RoutedLoraLinear(nn.Module, RoutedLoraLayer):
    """`nn.Linear`, `Conv1D`, or what a quantised model has in their place."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RoutedLoraConfig,
        key: str,
        router: nn.Module,
    ) -> None:
        super().__init__()
        RoutedLoraLayer.__init__(self, base_layer, key)
        self._active_adapter = adapter_name
        # The active adapters, and where they lay, when they were looked up last.
        self._active_before: Any = None
        self._known: list[Adapter] = []
        self.update_layer(adapter_name, config, router)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base weight.

        `UserError` if it depends on the input, before anything is changed.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.routed_lora_experts]
        for name in names:
            self.check_mergeable(name)
        deltas = {name: self.get_delta_weight(name) for name in names}
        weight = self.get_base_layer().weight
        for name, delta in deltas.items():
            merged = weight.data + delta.to(weight.device)
            if safe_merge and not merged.isfinite().all():
                raise UserError(f"merging adapter {name!r} into {self.key} gives NaN or infinity")
            weight.data = merged.to(weight.dtype)
            self._add_bias(name, sign=1)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the updates out of the base weight again, and share it again where it was shared."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            delta = self.get_delta_weight(name)
            weight.data = (weight.data - delta.to(weight.device)).to(weight.dtype)
            self._add_bias(name, sign=-1)
        if self._shared_weight:
            self.get_base_layer().weight, *_ = self._shared_weight
            self._shared_weight = ()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            given.refuse_merged(self.merged_adapters)
        base_layer: Any = self._modules["base_layer"]  # as in `_are_here`
        result = base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        # As in PEFT's LoRA the sum is in the wider dtype of the two, and rounded at the end.
        is_plain = given.current() is None
        for adapter in self._here():
            added = None
            if is_plain and adapter.fused:
                added = adapter.fused.added_to(result, x, base_layer)
            result = result + self._update(adapter, x, result) if added is None else added
        return result if result.dtype == dtype else result.to(dtype)

    def _here(self) -> list["Adapter"]:
        """The active adapters that lie here, looked up anew where anything has changed."""
        if torch.compiler.is_compiling():
            return self._look_up()
        if self._active_before != self._active_adapter or not self._are_here(self._known):
            self._known = self._look_up()
            self._active_before = copy.copy(self._active_adapter)
        return self._known

    def _are_here(self, adapters: list["Adapter"]) -> bool:
        """Whether these adapters' modules are those that lie here now."""
        modules = self._modules  # PyTorch's own way to a module takes several times as long
        experts: Any = modules["routed_lora_experts"]
        routers: Any = modules["routed_lora_router"]
        for adapter in adapters:
            if experts._modules.get(adapter.name) is not adapter.experts:
                return False
            if routers._modules.get(adapter.name) is not adapter.router_here:
                return False
        return True

    def _forget(self) -> None:
        """Have the adapters looked up anew, and hold none that was taken out."""
        self._active_before = None
        self._known = []

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter here, as PEFT does, and the memory that it takes."""
        super().delete_adapter(adapter_name)
        self._forget()

    def _look_up(self) -> list["Adapter"]:
        adapters = []
        for name in self.active_adapters:
            if name in self.routed_lora_experts:
                experts = self.experts_of(name)
                router = self.router_of(name)
                fused = Fused(experts, router) if Fused.fits(experts, router) else None
                here = self.routed_lora_router[name]
                adapters.append(Adapter(name, experts, router, here, fused))
        return adapters

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is looked up, of which a copy has its own."""
        return {**self.__dict__, "_active_before": None, "_known": []}

    def _update(self, adapter: "Adapter", x: Tensor, result: Tensor) -> Tensor:
        """An adapter's update (…, out) of the hidden states (…, in), to be added to the result."""
        instead = given.current()
        if instead is not None:
            return self._update_by_given(instead, adapter, x, result)
        experts = adapter.experts
        router = adapter.router
        general = experts.site.general
        weights = coefficients_at(self, router, x, adapter.name)
        # Whatever loop trains it, this is where a gradient arrives that is always 0.
        if weights.requires_grad and not router.learns and not torch.compiler.is_compiling():
            weights.register_hook(lambda _: warn_if_trained(router))
        kept = None if router.kept is None else router.kept + general
        x = self._cast_input_dtype(x, experts.dtype_of_products(x, result))
        return experts(x, with_general(weights, general), kept)

    def _update_by_given(
        self, instead: given.Given, adapter: "Adapter", x: Tensor, result: Tensor
    ) -> Tensor:
        """What `_update` gives where coefficients were handed in, in place of the router's."""
        experts = adapter.experts
        general = experts.site.general
        weights = instead.over(x, adapter.name, adapter.router.experts)
        x = self._cast_input_dtype(x, experts.dtype_of_products(x, result))
        chosen = None if torch.compiler.is_compiling() else instead.chosen
        # Only the experts that have a coefficient are computed, where it is known which these are
        # and nothing else is to be computed or told of them.
        if chosen is None or experts.site.has_biases or is_watched(experts):
            return experts(x, with_general(weights, general))
        if chosen.is_one_each and not general:
            return experts.of_one_each(x, chosen, has_rows=weights.ndim > 1)
        count = len(adapter.router.experts)
        with_all_general = [*chosen.experts, *range(count, count + general)]
        return experts.of_few(x, with_general(weights, general), with_all_general)

    def __repr__(self) -> str:
        return "routed_lora." + super().__repr__()
