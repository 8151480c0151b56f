"""The Triton kernels of a routed layer against float64, and against PyTorch's operations.

On a machine without a GPU, Triton's interpreter runs it: `pip install triton`, and set
TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

from peft_routing import fused, kernel, kernel_few, kernel_op, kernel_trial  # noqa: E402
from tests.peft_routing.test_fused import (  # noqa: E402
    IN,
    OUT,
    generally,
    make_layer,
    shortly,
    written_by_address,
)

HALF = torch.bfloat16
MORE = fused._FEW_TOKENS + 1  # tokens than are a few


@pytest.fixture(autouse=True)
def half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16, where a GPU multiplies the values."""
    if DEVICE == "cuda":
        return
    import numpy
    from triton import language
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != language.bfloat16:
            return handle
        bits = handle.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), language.float32)

    def of_values(builder: Any, first: Any, second: Any, *others: Any) -> Any:
        return dot(builder, widened(first), widened(second), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", of_values)


def weighed_in_a_loop(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    scalings: torch.Tensor,
    *,
    k: int,
    temperature: float,
    absolute: bool,
    is_low_rank: bool,
    is_estimated: bool = False,
) -> torch.Tensor:
    """What the kernel is to compute, in float64, token by token and expert by expert.

    `is_estimated`: the chosen expert's 1 has the gradient of its probability among all experts.
    """
    count = len(weight)
    rank = z.shape[1] // count
    rows = []
    for token, state in enumerate(hidden.double()):
        scores = weight.double() @ state
        scores = (scores.abs() if absolute else scores) / temperature
        chosen = sorted(range(count), key=lambda expert: -scores[expert].item())[:k]
        total = sum(scores[expert].exp() for expert in chosen)
        coefficients = {expert: scores[expert].exp() / total for expert in chosen}
        if is_estimated:
            probability = scores[chosen[0]].exp() / scores.exp().sum()
            coefficients = {chosen[0]: 1 + probability - probability.detach()}
        of_token = z[token].double().view(count, rank)
        mean = sum(coefficients[expert] * of_token[expert] for expert in chosen)
        row = torch.zeros(count, rank, dtype=torch.float64, device=z.device)
        for expert in chosen:
            value = mean if is_low_rank else of_token[expert]
            row[expert] = coefficients[expert] * scalings[expert].double() * value
        rows.append(row.flatten())
    return torch.stack(rows)


def inputs_of(
    count: int, rank: int, tokens: int, width: int, dtype: torch.dtype = HALF
) -> list[torch.Tensor]:
    """Random hidden states, weight of a router, z and scalings."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(count, width, generator=generator).to(DEVICE) / 8
    z = torch.randn(tokens, count * rank, generator=generator).to(DEVICE, dtype)
    return [hidden, weight, z, torch.rand(count, generator=generator).to(DEVICE) + 0.5]


def of_a_few_tokens(
    count: int, rank: int, tokens: int, width: int, out: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What `kernel_few.added` takes: a base layer's output, hidden states, a router's rows, A, B
    and scalings.
    """
    generator = torch.Generator().manual_seed(count + tokens)
    made = []
    for shape, of_what in (
        ((tokens, out), dtype),
        ((tokens, width), dtype),
        ((count, width), torch.float32),
        ((count * rank, width), torch.float32),
        ((count * rank, out), torch.float32),
    ):
        made.append(torch.randn(shape, generator=generator).to(DEVICE, of_what))
    return [*made, torch.rand(count, generator=generator).to(DEVICE) + 0.5]


def alike_or_not(
    scalings: torch.Tensor, is_alike: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Scalings as a kernel takes them beside a scaling of 1.5, and what they are then."""
    if is_alike:
        return None, torch.full_like(scalings, 1.5)
    return scalings, 1.5 * scalings


SIZES = [(1, 4, 1, 3, 64), (3, 5, 2, 16, 70), (20, 8, 4, 35, 200), (70, 4, 70, 17, 130)]


@pytest.mark.parametrize("is_low_rank", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("count", "rank", "k", "tokens", "width"), SIZES)
def test_the_kernel_is_the_loop(
    count: int, rank: int, k: int, tokens: int, width: int, absolute: bool, is_low_rank: bool
) -> None:
    hidden, weight, z, scalings = inputs_of(count, rank, tokens, width)
    options = {"k": k, "temperature": 0.7, "absolute": absolute, "is_low_rank": is_low_rank}
    given, exactly = alike_or_not(scalings, is_alike=absolute != is_low_rank)
    weighed = kernel.weigh(hidden, kernel.split(weight), z, given, **options, scaling=1.5)
    exact = weighed_in_a_loop(hidden, weight, z, exactly, **options)
    assert (weighed.double() - exact).norm() < 0.006 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("is_low_rank", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    ("count", "rank", "k", "tokens", "width"), [*SIZES[:-1], (7, 3, 1, 5, 33), (64, 2, 9, 6, 96)]
)
def test_the_gradients_are_the_loops(
    count: int,
    rank: int,
    k: int,
    tokens: int,
    width: int,
    absolute: bool,
    is_low_rank: bool,
    dtype: torch.dtype,
) -> None:
    inputs = inputs_of(count, rank, tokens, width, dtype)
    options = {
        "k": k,
        "temperature": 0.7,
        "absolute": absolute,
        "is_low_rank": is_low_rank,
        "is_estimated": k == 1 and count > 1,
    }
    given = [each.clone().requires_grad_() for each in inputs[:3]]
    given_exactly = [each.double().requires_grad_() for each in inputs[:3]]
    scalings, scalings_exactly = alike_or_not(inputs[3], is_alike=absolute != is_low_rank)
    weighed = kernel_op.weigh(*given, scalings, **options, scaling=1.5)
    exact = weighed_in_a_loop(*given_exactly, scalings_exactly, **options)
    # Expanded, as `sum` gives it: not in the layout that kernels read.
    arriving = torch.linspace(-1, 2, tokens, device=DEVICE).to(dtype)[:, None].expand_as(exact)
    weighed.backward(arriving)
    exact.backward(arriving.double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert (weighed.double() - exact).norm() <= tolerance * exact.norm()
    for tensor, tensor_exactly in zip(given, given_exactly, strict=True):
        assert tensor.grad is not None and tensor_exactly.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        difference = tensor.grad.double() - tensor_exactly.grad
        # With one expert the gradients are 0, but for how a GPU divides.
        assert difference.norm() <= tolerance * tensor_exactly.grad.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("is_low_rank", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    ("count", "rank", "k", "tokens", "width", "out"),
    [
        (1, 4, 1, 3, 64, 48),
        (3, 5, 2, 16, 70, 300),
        (20, 8, 4, 1, 1100, 33),
        (70, 4, 16, 2, 96, 64),
        (9, 24, 5, 2, 64, 48),  # two experts at once, and one is left
        (4, 70, 3, 1, 64, 40),  # one at a time
    ],
)
def test_the_update_of_a_few_tokens_is_the_loop(
    count: int,
    rank: int,
    k: int,
    tokens: int,
    width: int,
    out: int,
    absolute: bool,
    is_low_rank: bool,
    dtype: torch.dtype,
) -> None:
    inputs = of_a_few_tokens(count, rank, tokens, width, out, dtype)
    result, hidden, weight, a, b, scalings = inputs
    # A temperature at which not all but one coefficient are nearly 0.
    options = {"k": k, "temperature": 9.0, "absolute": absolute, "is_low_rank": is_low_rank}
    given, exactly = alike_or_not(scalings, is_alike=absolute != is_low_rank)
    output = kernel_few.added(*inputs[:-1], given, **options, scaling=1.5)
    z = hidden.double() @ a.double().T
    exact = weighed_in_a_loop(hidden, weight, z, exactly, **options) @ b.double()
    exact += result.double()
    assert output.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, HALF: 0.006}[dtype]
    assert (output.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("place", [1, 2, 3])
def test_nan_is_to_be_seen_in_the_update_of_its_token(place: int) -> None:
    inputs = of_a_few_tokens(6, 3, 4, 32, 40, torch.float32)
    damaged = inputs[place]
    damaged[1 if place == 1 else slice(None), 5] = float("nan")  # of one token, or of all rows
    options = {"k": 2, "temperature": 1.0, "absolute": True, "is_low_rank": False}
    is_nan = kernel_few.added(*inputs, **options, scaling=1.0).isnan()
    assert is_nan[1].all()
    assert is_nan[0].all() == (place > 1)


def test_pytorch_finds_the_operation_for_a_few_tokens_in_order() -> None:
    inputs = of_a_few_tokens(5, 3, 4, 32, 24, torch.float32)
    torch.library.opcheck(kernel_op.add_to_few, (*inputs, 2, 0.7, True, False, 1.5))


def test_only_the_gradients_that_are_needed() -> None:
    hidden, weight, z, scalings = inputs_of(5, 3, 4, 32)
    options = {"k": 2, "temperature": 1.0, "absolute": True, "is_low_rank": False}
    weight.requires_grad_()
    kernel_op.weigh(
        hidden, weight, z, scalings, **options, is_estimated=False, scaling=1.0
    ).sum().backward()
    assert weight.grad is not None and hidden.grad is None and z.grad is None


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, z, scalings = inputs_of(5, 3, 4, 32, torch.float32)
    options = {"k": 2, "temperature": 1.0, "absolute": True, "is_low_rank": False}
    weight.requires_grad_()
    weighed = kernel_op.weigh(
        hidden, weight, z, scalings, **options, is_estimated=False, scaling=1.0
    )
    (gradient,) = torch.autograd.grad(weighed.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_pytorch_finds_the_operations_in_order(dtype: torch.dtype) -> None:
    hidden, weight, z, scalings = inputs_of(5, 3, 4, 32, dtype)
    options = 2, 0.7, True, False, False, 1.5
    _, scores = kernel_op._weigh_with_scores(hidden, weight, z, scalings, *options)
    torch.library.opcheck(kernel_op._gradients, (z, scores, z, scalings, *options))
    for each in (hidden, weight, z):
        each.requires_grad_()
    torch.library.opcheck(kernel_op._weigh_with_scores, (hidden, weight, z, scalings, *options))


def kernels_are_used(monkeypatch: pytest.MonkeyPatch, for_few: bool = False) -> list[str]:
    """A list to which each call of a kernel adds its name; no device is tried. Those for a few
    tokens are used if `for_few`.
    """
    monkeypatch.setattr(fused, "works", lambda device, *use: for_few or not use[-1])
    calls = []

    def counted(module: Any, name: str) -> None:
        compute = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return compute(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(kernel, "weigh")
    counted(kernel, "unweigh")
    counted(kernel_few, "added")
    return calls


def in_half_precision(**options: Any) -> Any:
    return make_layer(dtype=HALF, expert_dtype="bfloat16", **options).to(DEVICE)


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("scalings", [(2.0,) * 6, (1.0, 2.0, 0.5, 3.0, 1.5, 0.1)])
def test_a_module_by_the_kernel(
    mixing: str, scalings: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"mixing": mixing, "scalings": scalings, "top_k": 2, "router_temperature": 3.0}
    layer = in_half_precision(**options)
    exact = make_layer(expert_dtype="float64", **options).to(DEVICE)
    exact.load_state_dict({name: each.double() for name, each in layer.state_dict().items()})
    x = torch.randn(2, 11, IN + 3).to(DEVICE, HALF)[..., 3:]  # rows that lie apart
    calls = kernels_are_used(monkeypatch)
    for change in (1.0, -0.5):
        with torch.no_grad():  # a changed router is noticed
            layer.routed_lora_router["default"].weight.mul_(change)
            exact.routed_lora_router["default"].weight.mul_(change)
        by_kernel = shortly(layer, x, monkeypatch).double()
        by_operations = shortly(exact, x.double(), monkeypatch)
        assert by_kernel.shape == (2, 11, OUT)
        assert (by_kernel - by_operations).norm() < 0.01 * by_operations.norm()
    assert calls == ["weigh"] * 2


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize("scalings", [(2.0,) * 6, (1.0, 2.0, 0.5, 3.0, 1.5, 0.1)])
def test_a_few_tokens_in_a_module(
    scalings: tuple[float, ...],
    mixing: str,
    dtype: torch.dtype,
    is_compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"mixing": mixing, "scalings": scalings, "top_k": 2, "router_temperature": 3.0}
    layer = make_layer(dtype=dtype, **options).to(DEVICE)
    exact = make_layer(expert_dtype="float64", **options).to(DEVICE)
    exact.load_state_dict({name: each.double() for name, each in layer.state_dict().items()})
    calls = kernels_are_used(monkeypatch, for_few=True)
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if is_compiled else layer
    with torch.no_grad():
        for change in (1.0, -0.5):  # what is changed in place is noticed
            for each in (layer, exact):
                each.routed_lora_router["default"].weight.mul_(change)
                each.experts_of("default").A.mul_(change)
            for tokens in (1, 1, MORE - 1):
                x = torch.randn(1, tokens, IN).to(DEVICE, dtype)
                found = call(x).double()
                expected = shortly(exact, x.double(), monkeypatch)
                assert found.shape == (1, tokens, OUT)
                tolerance = 1e-5 if dtype == torch.float32 else 0.006
                assert (found - expected).norm() < tolerance * expected.norm()
        assert set(calls) == {"added"}
        before = len(calls)
        call(torch.randn(1, MORE, IN).to(DEVICE, dtype))
    assert set(calls[before:]) <= {"weigh"}


def test_a_router_that_is_trained_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = in_half_precision(top_k=2)
    layer.router_of("default").weight.requires_grad_()
    x = torch.randn(5, IN).to(DEVICE, HALF)
    calls = kernels_are_used(monkeypatch)
    before = shortly(layer, x, monkeypatch)
    written_by_address(layer)
    after = shortly(layer, x, monkeypatch)
    assert calls == ["weigh"] * 2
    monkeypatch.setattr(fused, "works", lambda device, *use: False)
    assert not torch.allclose(before, after, rtol=0.1)
    expected = generally(layer, x)
    assert (after - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("mixing", ["full", "low_rank"])
@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("arrow", {"top_k": 2}),
        ("linear", {}),
        ("linear", {"top_k": 1}),
        ("linear", {"top_k": 3, "init": "arrow", "router_temperature": 2.0}),
    ],
)
def test_training_by_the_kernel(
    router: str,
    options: dict[str, Any],
    mixing: str,
    is_compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = in_half_precision(router=router, mixing=mixing, **options)
    exact = make_layer(expert_dtype="float64", router=router, mixing=mixing, **options).to(DEVICE)
    exact.load_state_dict({name: each.double() for name, each in layer.state_dict().items()})
    exact.router_of("default").double()
    x = torch.randn(2, 11, IN).to(DEVICE, HALF)
    calls = kernels_are_used(monkeypatch)
    computed: list[list[torch.Tensor]] = []
    for each in (exact, layer):
        torch._dynamo.reset()
        hidden = x.to(each.base_layer.weight.dtype, copy=True).requires_grad_()
        each.router_of("default").weight.requires_grad_()
        call = each
        if is_compiled:
            # Not to code for the machine, which takes long.
            call = torch.compile(each, fullgraph=True, backend="aot_eager")
        output = call(hidden)
        output.backward(torch.ones_like(output) / 8)
        computed.append([output.detach(), hidden.grad, each.router_of("default").weight.grad])
    if is_compiled:  # on a GPU the compiler calls them as it reads them
        calls = sorted(set(calls), reverse=True)
    assert calls == ["weigh", "unweigh"]
    for expected, by_kernel in zip(*computed, strict=True):
        assert (by_kernel.double() - expected).norm() < 0.02 * expected.norm()


def test_a_compiled_module_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = in_half_precision(top_k=2, scalings=(1.0, 2.0, 0.5, 3.0, 1.5, 0.1))
    x = torch.randn(2, 11, IN).to(DEVICE, HALF)
    calls = kernels_are_used(monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        by_compiler = compiled(x)
        assert set(calls) == {"weigh"}
        torch.testing.assert_close(by_compiler, layer(x))


def test_autocast_and_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = in_half_precision(top_k=2)
    weight = layer.router_of("default").weight.requires_grad_()
    x = torch.randn(2, 11, IN).to(DEVICE, HALF)
    calls = kernels_are_used(monkeypatch)
    layer(x).sum().backward()
    expected = weight.grad.clone()
    weight.grad = None
    with torch.autocast(DEVICE, HALF):
        output = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    output.sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    assert calls == ["weigh", "unweigh", "weigh", "weigh", "unweigh"]


@pytest.mark.parametrize("case", ["factors", "one expert", "float32", "balanced"])
def test_what_is_trained_without_the_kernel(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1 if case == "one expert" else 6
    options = {"router_aux_loss_coef": 0.1} if case == "balanced" else {}
    layer = in_half_precision(count=count, router="linear", **options).train()
    if case == "float32":
        layer = make_layer(router="linear", dtype=torch.float32).to(DEVICE)
    if case == "factors":
        layer.experts_of("default").requires_grad_()
    layer.router_of("default").requires_grad_()
    calls = kernels_are_used(monkeypatch)
    x = torch.randn(5, IN).to(DEVICE, layer.base_layer.weight.dtype)
    expected_warning = pytest.warns(UserWarning) if case == "one expert" else nullcontext()
    with expected_warning:
        layer(x).sum().backward()
    assert layer.router_of("default").weight.grad is not None
    if case == "factors":
        assert layer.experts_of("default").A.grad is not None
    assert not calls


def use_of(
    count: int,
    rank: int,
    k: int = 2,
    *,
    is_low_rank: bool = False,
    differ: bool = False,
    as_operation: bool = False,
    is_few: bool = False,
) -> kernel_trial.Use:
    return kernel_trial.Use(HALF, count, rank, True, is_low_rank, k, differ, as_operation, is_few)


@pytest.mark.parametrize("is_few", [False, True])
@pytest.mark.parametrize("as_operation", [False, True])
@pytest.mark.parametrize("is_low_rank", [False, True])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (8, 4)])
def test_kernels_are_tried(
    count: int, k: int, is_low_rank: bool, as_operation: bool, is_few: bool
) -> None:
    for differ in (False, True):
        use = use_of(
            count,
            3,
            k,
            is_low_rank=is_low_rank,
            differ=differ,
            as_operation=as_operation,
            is_few=is_few,
        )
        assert kernel_trial.compute_alike(torch.device(DEVICE), use)


@pytest.mark.parametrize("count", [64, 256, 512])
def test_kernels_for_many_experts_are_tried(count: int) -> None:
    use = use_of(count, 16)
    assert kernel_trial.compute_alike(torch.device(DEVICE), use)


@pytest.mark.parametrize("is_few", [False, True])
@pytest.mark.parametrize("as_operation", [False, True])
def test_a_trial_depends_on_no_defaults(as_operation: bool, is_few: bool) -> None:
    use = use_of(8, 3, as_operation=as_operation, is_few=is_few)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                assert kernel_trial.compute_alike(torch.device(DEVICE), use)
        finally:
            torch.set_default_dtype(torch.float32)


def test_nothing_is_tried_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = []

    def tried(device: torch.device, use: Any) -> bool:
        uses.append(use)
        if len(uses) == 1:
            raise torch.cuda.OutOfMemoryError
        return True

    monkeypatch.setattr(kernel_trial, "_tried", tried)
    monkeypatch.setattr(kernel_trial, "_known", {})
    arguments = torch.device("cuda", 0), *use_of(8, 3)
    for is_captured, expected, trials in (
        (True, False, 0),
        (False, False, 1),  # there was no memory for it
        (False, True, 2),
        (True, True, 2),
    ):
        monkeypatch.setattr(kernel_trial, "is_captured", lambda device, now=is_captured: now)
        assert kernel_trial.works(*arguments) is expected
        assert len(uses) == trials


@pytest.mark.parametrize("name", ["weigh", "unweigh"])
def test_kernels_that_are_wrong_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = getattr(kernel, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        computed = compute(*arguments, **options)
        first = computed[1] if isinstance(computed, tuple) else computed
        first.mul_(1.1)
        return computed

    monkeypatch.setattr(kernel, name, wrong)
    use = use_of(8, 3, as_operation=True)
    assert not kernel_trial.compute_alike(torch.device(DEVICE), use)
    with pytest.warns(UserWarning, match="other results .* with 8 experts of rank 3"):
        assert not kernel_trial._tried(torch.device(DEVICE), use)


def test_a_gpu_without_the_memory_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(kernel, "weigh", fail)
    use = use_of(8, 3)
    with pytest.warns(UserWarning, match="out of resource"):
        assert not kernel_trial._tried(torch.device(DEVICE), use)


def test_what_the_kernel_does_not_take(recwarn: pytest.WarningsRecorder) -> None:
    assert kernel.fits(256, 16)
    assert not kernel.fits(256, 64)
    use = use_of(256, 64)
    assert not kernel_trial._tried(torch.device(DEVICE), use)
    assert not recwarn.list
