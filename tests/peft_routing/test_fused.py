"""The short way through a module, which has no gradients, is the general one."""

import copy
import pickle
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import peft_routing
from peft_routing import fused, given_coefficients
from peft_routing import layer as layers
from peft_routing.config import RoutedLoraConfig, Site
from peft_routing.layer import RoutedLoraLinear
from peft_routing.routers.linear import ArrowRouter, LinearRouter

IN, OUT = 12, 20
VIEWS = {"aten::view", "aten::reshape", "aten::unsqueeze", "aten::squeeze", "aten::alias"}


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


class Watching(nn.Linear):
    """A linear layer of somebody else's, who keeps its outputs."""

    def __init__(self, other: nn.Linear, kept: list[torch.Tensor]) -> None:
        super().__init__(IN, OUT, dtype=other.weight.dtype)
        self.load_state_dict(other.state_dict())
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(super().forward(x))
        return self.kept[-1]


CASES = ["hook", "global hook", "own forward", "own class", "patched", "dispatch", "function"]


class Keeping(TorchDispatchMode):
    """Keeps the first output of an `addmm`, as selective checkpointing does."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default and not self.kept:
            self.kept.append(output)
        return output


class KeepingFunctions(TorchFunctionMode):
    """Keeps what `functional.linear` gives the base layer."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and not self.kept:
            self.kept.append(output)
        return output


@pytest.mark.parametrize("case", CASES)
def test_what_others_hold_of_the_base_layer_is_not_written_to(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer()
    base: Any = layer.base_layer
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if module is base:
            kept.append(output)

    handle = None
    mode: Any = nullcontext()
    if case == "hook":
        base.register_forward_hook(keep)
    elif case == "dispatch":
        mode = Keeping(kept)
    elif case == "function":
        mode = KeepingFunctions(kept)
    elif case == "patched":
        stock = nn.Linear.forward

        def patched(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
            kept.append(stock(module, x))
            return kept[-1]

        monkeypatch.setattr(nn.Linear, "forward", patched)
    elif case == "global hook":
        handle = nn.modules.module.register_module_forward_hook(keep)
    elif case == "own forward":
        plain = base.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            kept.append(plain(x))
            return kept[-1]

        base.forward = forward
    else:
        layer.base_layer = Watching(base, kept)
    x = torch.randn(5, IN, dtype=torch.float64)
    try:
        with torch.no_grad(), mode:
            output = layer(x)
    finally:
        if handle is not None:
            handle.remove()
    (held,) = kept
    monkeypatch.undo()
    assert torch.equal(held, nn.functional.linear(x, base.weight, base.bias))
    torch.testing.assert_close(output, generally(layer, x))


def test_the_update_is_added_in_place_where_nobody_sees_it() -> None:
    layer = make_layer()
    base: Any = layer.base_layer
    results = []
    added_to = fused.Fused.added_to

    def observed(self: Any, result: torch.Tensor, *others: Any) -> torch.Tensor | None:
        output = added_to(self, result, *others)
        results.append(output is result)
        return output

    x = torch.randn(2, 5, IN, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as context, torch.no_grad():
        context.setattr(fused.Fused, "added_to", observed)
        output = layer(x)
        layer(x.mT.contiguous().mT)
        with torch.enable_grad():
            base.weight.requires_grad_()
            layer(x)
        base.weight.requires_grad_(False)
        base.compile(backend="eager")
        layer(x)
    torch.testing.assert_close(output, generally(layer, x))
    # A graph of gradients may hold the output of a layer that is trained; a compiled layer's may be
    # memory of a CUDA graph.
    assert results == [True, True, False, False]


def test_a_layer_within_selective_checkpointing() -> None:
    layer = make_layer()
    head = nn.Linear(OUT, 1, dtype=torch.float64)
    kept = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)

    def both(x: torch.Tensor) -> torch.Tensor:
        return head(layer(x)).square().sum()

    x = torch.randn(5, IN, dtype=torch.float64)
    both(x).backward()
    expected = head.weight.grad
    head.weight.grad = None
    checkpoint(both, x, use_reentrant=False, context_fn=contexts).backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_factors_that_are_no_parameters() -> None:
    """As in a replica for data parallelism, and where a parametrization computes them."""
    layer = make_layer()
    x = torch.randn(5, IN, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        experts = copy.copy(layer.experts_of("default"))
        experts._parameters = dict(experts._parameters)
        for name in ("A", "B"):
            setattr(experts, name, experts._parameters.pop(name).clone())
        layer.routed_lora_experts["default"] = experts
        torch.testing.assert_close(layer(x), expected)


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
    written_by_address(layer)
    weight.requires_grad_(False)


def written_by_address(layer: RoutedLoraLinear) -> None:
    layer.router_of("default").weight.data.add_(1)


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
        written_by_address,
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


def launches(module: nn.Module, x: torch.Tensor) -> int:
    """The number of operations in a call that compute something, as a GPU would start them."""
    with torch.no_grad():
        module(x)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            module(x)
    count = 0
    for event in record.events():
        parent = event.cpu_parent
        is_within_another = parent is not None and parent.name.startswith("aten::")
        is_operation = event.name.startswith("aten::") and event.name not in VIEWS
        count += is_operation and not is_within_another
    return count


@pytest.mark.parametrize("shape", [(1, 1), (2, 8), (16,)])
@pytest.mark.parametrize("count", [2, 8, 32])
@pytest.mark.parametrize("router", ["arrow", "linear"])
def test_it_takes_at_most_four_launches_more_than_a_lora(
    router: str, count: int, shape: tuple[int, ...]
) -> None:
    base = nn.ModuleDict({"linear": nn.Linear(IN, OUT)})
    lora: Any = get_peft_model(base, LoraConfig(r=3, target_modules=["linear"])).eval()
    layer = make_layer(count, router=router, top_k=min(3, count), dtype=torch.float32)
    x = torch.randn(*shape, IN)
    assert launches(layer, x) <= launches(lora.base_model.model["linear"], x) + 4


def test_a_compiled_module_asks_for_the_kernel_without_a_break() -> None:
    layer = make_layer(dtype=torch.bfloat16, expert_dtype="bfloat16", top_k=2)
    x = torch.randn(5, IN).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = layer(x)
        assert (compiled(x) - expected).norm() < 0.02 * expected.norm()


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


@pytest.mark.parametrize("one_hot", [False, True])
def test_offloaded_parameters_are_brought(one_hot: bool) -> None:
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(5, IN)
    coefficients = torch.eye(6)[2]
    context = given_coefficients(coefficients) if one_hot else nullcontext()
    with torch.no_grad(), context:
        expected = layer(x)
        offloaded = cpu_offload(layer, execution_device=torch.device("cpu"))
        assert layer.experts_of("default").A.is_meta
        for _ in range(2):
            assert torch.allclose(offloaded(x), expected, atol=1e-5)


@pytest.mark.parametrize("stated", ["bfloat16", "float16"])
def test_narrow_experts_do_not_narrow_the_base(monkeypatch: Any, stated: str) -> None:
    layer = make_layer(dtype=torch.float32, expert_dtype=stated)
    with torch.no_grad():
        layer.experts_of("default").B.zero_()
        layer.base_layer.weight.mul_(1e5)
    x = torch.randn(5, IN)
    assert torch.equal(shortly(layer, x, monkeypatch), layer.base_layer(x))


def test_factors_that_are_trained_get_their_gradients() -> None:
    layer = make_layer(dtype=torch.float32)
    experts = layer.experts_of("default").requires_grad_()
    layer(torch.randn(5, IN)).sum().backward()
    assert experts.A.grad is not None and experts.B.grad is not None


def test_meta_tensors() -> None:
    layer = make_layer(dtype=torch.float32).to("meta")
    with torch.no_grad():
        assert layer(torch.randn(5, IN, device="meta")).shape == (5, OUT)


def test_a_compiler_asks_for_the_kernels_of_the_module(monkeypatch: Any) -> None:
    asked = []

    @torch.compiler.assume_constant_result
    def works(device: torch.device, *use: Any) -> bool:
        asked.append((device.type, *use))
        return False

    monkeypatch.setattr(fused, "works", works)
    layer = make_layer(dtype=torch.bfloat16, expert_dtype="bfloat16", top_k=2)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend="eager")(torch.ones(5, IN).bfloat16())
    of_module = ("cpu", torch.bfloat16, 6, 3, True, False, 2, False)
    assert asked == [(*of_module, True, True), (*of_module, True, False)]


def kernels_seem_to_work(monkeypatch: Any) -> None:
    """Kernels for a few tokens are said to work, and nothing may use them."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a kernel is used")

    @torch.compiler.assume_constant_result
    def works(*use: Any) -> bool:
        return bool(use[-1])

    stand_in = SimpleNamespace(added=refuse, add_to_few=refuse)
    monkeypatch.setattr(fused, "works", works)
    for name in ("kernel_few", "kernel_op"):
        monkeypatch.setitem(sys.modules, f"peft_routing.{name}", stand_in)
        monkeypatch.setattr(peft_routing, name, stand_in, raising=False)


def test_what_depends_on_a_trained_base_layer_has_its_gradient(monkeypatch: Any) -> None:
    kernels_seem_to_work(monkeypatch)
    layer = make_layer(dtype=torch.float32, router="linear", top_k=2)
    layer.base_layer.weight.requires_grad_()
    layer(torch.randn(3, IN)).sum().backward()
    assert layer.base_layer.weight.grad is not None


def test_a_trace_has_no_kernels(monkeypatch: Any) -> None:
    kernels_seem_to_work(monkeypatch)
    layer = make_layer(dtype=torch.float32, top_k=2)
    x = torch.randn(3, IN)
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(3, IN), check_trace=False)
        torch.testing.assert_close(traced(x), generally(layer, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_products_in_float64_stay_so(dtype: torch.dtype, monkeypatch: Any) -> None:
    kernels_seem_to_work(monkeypatch)
    layer = make_layer(dtype=dtype, expert_dtype="float64", top_k=2)
    with torch.no_grad():
        layer(torch.randn(3, IN, dtype=dtype))


def test_an_export_has_any_number_of_tokens() -> None:
    layer = make_layer(dtype=torch.float32, top_k=2)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(
            layer, (torch.randn(12, IN),), dynamic_shapes=({0: tokens},), strict=True
        )
        for number in (3, 20):
            x = torch.randn(number, IN)
            torch.testing.assert_close(exported.module()(x), layer(x))


def test_what_is_made_in_a_cuda_graph_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in the graph's memory, and is not there before the graph is replayed."""
    layer = make_layer(dtype=torch.float32)
    experts = layer.experts_of("default")
    (adapter,) = layer._here()
    x = torch.randn(5, IN)
    with torch.no_grad():
        expected = layer(x)
        adapter.fused._plans.clear()
        for module in (fused, layers):
            monkeypatch.setattr(module, "is_captured", lambda device: True)
        assert torch.equal(layer(x), expected)
        a, _ = experts.factors_in(torch.bfloat16)
    assert torch.equal(a, experts.A.to(torch.bfloat16))
    assert experts._cast is None and not adapter.fused._plans


def test_transforms_of_a_module_go_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    expected = torch.stack([generally(layer, each) for each in x])
    monkeypatch.setattr(fused.Fused, "_plan", None)
    with torch.no_grad():
        assert torch.allclose(torch.func.vmap(layer)(x), expected)

    def total(each: torch.Tensor) -> torch.Tensor:
        return layer(each).square().sum()

    gradients = torch.func.vmap(torch.func.grad(total))(x)
    for each, gradient in zip(x, gradients, strict=True):
        leaf = each.clone().requires_grad_()
        total(leaf).backward()
        assert torch.allclose(gradient, leaf.grad)


def test_forward_mode_goes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x, direction = torch.randn(2, 5, IN, dtype=torch.float64)
    _, expected = torch.autograd.functional.jvp(lambda each: layer(each), x, direction)
    monkeypatch.setattr(fused.Fused, "_plan", None)
    with torch.no_grad(), forward_ad.dual_level():
        output = layer(forward_ad.make_dual(x, direction))
        _, tangent = forward_ad.unpack_dual(output)
    assert torch.allclose(tangent, expected)
    # The same where the parameters alone are transformed.
    weights = torch.randn(3, *layer.base_layer.weight.shape, dtype=torch.float64)

    def with_weight(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"base_layer.weight": weight}, (x,))

    with torch.no_grad():
        outputs = torch.func.vmap(with_weight)(weights)
    assert outputs.shape == (3, 5, OUT) and not torch.allclose(outputs[0], outputs[1])
