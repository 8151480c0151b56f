"""The short way through a module, which has no gradients, is the general one."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from peft_routing.config import RoutedLoraConfig, Site
from peft_routing.layer import Experts, RoutedLoraLinear
from peft_routing.routers.linear import ArrowRouter, LinearRouter

IN, OUT = 12, 20


def make_layer(
    count: int = 6,
    rank: int = 3,
    *,
    router: str = "arrow",
    mixing: Any = "full",
    scalings: tuple[float, ...] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> RoutedLoraLinear:
    """A module with random experts and router."""
    torch.manual_seed(0)
    names = {f"e{index}": f"e{index}" for index in range(count)}
    config = RoutedLoraConfig(experts=names, router=router, mixing=mixing, **options)
    config.sites = {"linear": Site((rank,) * count, scalings or (2.0,) * count)}
    made = config.router_class(config, config.names, IN)
    base = nn.Linear(IN, OUT).to(dtype)
    layer = RoutedLoraLinear(base, "default", config, "linear", made)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.requires_grad_(False).eval()


def generally(layer: RoutedLoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The module's output by the way that has gradients."""
    with torch.enable_grad():
        return layer(x.clone().requires_grad_()).detach()


def shortly(layer: RoutedLoraLinear, x: torch.Tensor, monkeypatch: Any) -> torch.Tensor:
    """The module's output without gradients, where the general way is closed."""
    with monkeypatch.context() as context, torch.no_grad():
        context.setattr(RoutedLoraLinear, "_update", None)
        return layer(x)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (2, 1, 2), (0, 3)])
@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("scalings", [None, (0.5, 1.0, 2.0, 0.1, 3.0, -1.0)])
@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("arrow", {}),
        ("arrow", {"top_k": 6, "router_temperature": 2.0}),
        ("linear", {}),
        ("linear", {"top_k": 2}),
        ("linear", {"top_k": 1, "router_temperature": 0.5}),
    ],
)
def test_it_is_the_general_way(
    monkeypatch: Any, router: str, options: Any, scalings: Any, mixing: str, shape: Any
) -> None:
    layer = make_layer(router=router, mixing=mixing, scalings=scalings, **options)
    layer.router_of("default").double()
    x = torch.randn(*shape, IN, dtype=torch.float64)
    expected = generally(layer, x)
    for _ in range(2):
        assert torch.allclose(shortly(layer, x, monkeypatch), expected, atol=1e-10)


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("count", [32, 100])
def test_of_many_experts(monkeypatch: Any, count: int, tokens: int, mixing: str) -> None:
    layer = make_layer(count, 4, mixing=mixing, dtype=torch.float32)
    x = torch.randn(tokens, IN)
    for way in ("dense", "gathered", "grouped"):
        monkeypatch.setattr("peft_routing.mixing.cheapest", lambda *_, way=way, **__: way)
        layer._active_before = None
        found, expected = shortly(layer, x, monkeypatch), generally(layer, x)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stated", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("router", ["arrow", "linear"])
def test_in_every_dtype(monkeypatch: Any, router: str, stated: str, of_x: torch.dtype) -> None:
    layer = make_layer(router=router, top_k=2, dtype=of_x, expert_dtype=stated)
    x = torch.randn(7, IN).to(of_x)
    found, expected = shortly(layer, x, monkeypatch), generally(layer, x)
    assert found.dtype == expected.dtype == of_x
    halves = torch.bfloat16 in (of_x, layer.experts_of("default").A.dtype)
    tolerance = 0.1 if halves else 1e-4 if of_x == torch.float32 else 0.01
    assert (found - expected).norm() <= tolerance * expected.norm()


def changed_in_place(layer: RoutedLoraLinear) -> None:
    with torch.no_grad():
        layer.router_of("default").weight.add_(1)
        layer.experts_of("default").A.mul_(2)
        layer.experts_of("default").B.mul_(3)


def trained_unseen(layer: RoutedLoraLinear) -> None:
    """As optimisers do that write by an address: torch does not count it."""
    weight = layer.router_of("default").weight.requires_grad_()
    layer(torch.ones(1, IN, dtype=torch.float64)).sum().backward()
    weight.data.add_(1)
    weight.requires_grad_(False)


def loaded(layer: RoutedLoraLinear) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def loaded_by_assignment(layer: RoutedLoraLinear) -> None:
    changed = {name: value + 1 for name, value in layer.state_dict().items()}
    layer.load_state_dict(changed, assign=True)


def replaced(layer: RoutedLoraLinear) -> None:
    layer.routed_lora_router["default"] = copy.deepcopy(layer.router_of("default"))
    layer.router_of("default").weight.data.neg_().add_(0.5)


def set_routing(layer: RoutedLoraLinear) -> None:
    layer.router_of("default").k = 1
    layer.router_of("default").temperature = 3.0


def cast_there_and_back(layer: RoutedLoraLinear) -> None:
    layer.to(torch.bfloat16).double()


def disabled(layer: Any) -> None:
    layer.enable_adapters(False)


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        trained_unseen,
        loaded,
        loaded_by_assignment,
        replaced,
        set_routing,
        cast_there_and_back,
        disabled,
    ],
)
def test_what_changes_between_calls_is_seen(change: Any) -> None:
    layer = make_layer()
    layer.router_of("default").double()
    x = torch.randn(5, IN, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        found = layer(x)
    assert torch.allclose(found, generally(layer, x), atol=1e-10)
    assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own(duplicate: Any) -> None:
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(5, IN)
    with torch.no_grad():
        before = layer(x)
        other = duplicate(layer)
        changed_in_place(layer)
        assert torch.equal(other(x), before)
        assert not torch.allclose(layer(x), before)


def test_nothing_is_held_twice() -> None:
    layer = make_layer(dtype=torch.float32)
    with torch.no_grad():
        layer(torch.randn(5, IN))
    experts: Experts = layer.experts_of("default")
    rows = len(experts.A) + len(layer.router_of("default").weight)
    assert experts.A.untyped_storage().nbytes() == rows * IN * 4
    assert experts.A.is_contiguous()


def operations(module: nn.Module, x: torch.Tensor) -> int:
    """The number of torch's operations in a call, those inside of others included."""
    with torch.no_grad():
        module(x)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            module(x)
    return sum(event.name.startswith("aten::") for event in record.events())


@pytest.mark.parametrize("shape", [(1, 1), (2, 8), (16,)])
@pytest.mark.parametrize("count", [2, 8, 32])
@pytest.mark.parametrize("router", ["arrow", "linear"])
def test_it_takes_at_most_three_operations_more_than_a_lora(
    router: str, count: int, shape: tuple[int, ...]
) -> None:
    base = nn.ModuleDict({"linear": nn.Linear(IN, OUT)})
    lora: Any = get_peft_model(base, LoraConfig(r=3, target_modules=["linear"])).eval()
    layer = make_layer(count, router=router, top_k=min(3, count), dtype=torch.float32)
    x = torch.randn(*shape, IN)
    of_lora = operations(lora.base_model.model["linear"], x)
    assert operations(layer, x) <= of_lora + 3


def test_which_routers_go_this_way() -> None:
    class Louder(LinearRouter):
        def scores(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().scores(hidden)

    layer = make_layer()
    config = RoutedLoraConfig(experts={"a": "a", "b": "b"}, router="linear", top_k=1)
    for kind, expected in ((ArrowRouter, True), (LinearRouter, True), (Louder, False)):
        layer.routed_lora_router["default"] = kind(config, config.names, IN)
        (adapter,) = layer._here()
        assert (adapter.fused is not None) is expected


@pytest.mark.parametrize("part", ["experts_of", "router_of"])
def test_a_hook_sees_every_call(part: str) -> None:
    layer = make_layer()
    x = torch.randn(5, IN, dtype=torch.float64)
    calls: list[object] = []
    with torch.no_grad():
        layer(x)
        watched = getattr(layer, part)("default")
        handle = watched.register_forward_pre_hook(lambda *_arguments: calls.append(1))
        layer(x)
        handle.remove()
        layer(x)
    assert len(calls) == 1
