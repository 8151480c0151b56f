"""What Triton and PyTorch compile the kernels of a routed layer to, for a GPU that is not there.

Triton needs no GPU to compile for one: `pip install triton`. What the kernels compute is tested in
`test_kernel`, by an interpreter, which knows less of types than the compiler does.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets, and compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from peft_routing import kernel, kernel_few, kernel_op  # noqa: E402

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compiled_for_a_gpu(
    function: Any,
    arguments: dict[str, Any],
    generation: int,
    warps: int,
    stages: int = 3,
    aligned: Sequence[str] = (),
) -> Any:
    """A kernel that is compiled for arguments: types of what varies, values of the constants.

    `aligned` names addresses and sizes that are multiples of 16, as PyTorch's mostly are: nothing
    else is read ahead.
    """
    signature = {}
    constants = {}
    attributes = {}
    for place, name in enumerate(function.arg_names):
        argument = arguments[name]
        is_type = isinstance(argument, str)
        signature[name] = argument if is_type else "constexpr"
        if not is_type:
            constants[(place,)] = argument
        if name in aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", generation, 32)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "is_low_rank", "keeps_scores", "count"),
    [
        (torch.bfloat16, False, False, 8),
        (torch.bfloat16, True, True, 64),
        (torch.float32, False, True, 16),
    ],
)
def test_the_kernels_compile(
    dtype: torch.dtype, is_low_rank: bool, keeps_scores: bool, count: int, generation: int
) -> None:
    sizes = {
        "absolute": True,
        "is_low_rank": is_low_rank,
        "experts": count,
        "rank": 5,
        "padded": kernel.padded_experts(count),
        "padded_rank": 8,
    }
    of_dtype = dict.fromkeys(
        ("hidden", "rows", "z", "weighed", "gradient", "of_z"), POINTERS[dtype]
    )
    exact = dict.fromkeys(("scalings", "scores", "of_scores"), "*fp32")
    numbers = dict.fromkeys(("tokens", "width", "k"), "i32")
    # Triton hands a number over in float32, and what PyTorch's compiler writes in float64.
    reals = dict.fromkeys(("temperature", "scaling"), "fp64" if keeps_scores else "fp32")
    varying = {**of_dtype, **exact, **numbers, **reals}
    constants = {
        "differ": keeps_scores,
        "keeps_scores": keeps_scores,
        "parts": 2 if dtype == torch.bfloat16 else 1,
        "block": 16,
        "columns": 64,
        "is_estimated": is_low_rank,
    }
    for function in (kernel._weigh, kernel._unweigh):
        made = compiled_for_a_gpu(function, varying | sizes | constants, generation, warps=4)
        assert made.asm["cubin"]
        in_float64 = re.findall(r"\b(?:add|sub|mul|div|fma|setp|max)\.\S*f64", made.asm["ptx"])
        assert not in_float64


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_low_rank", [False, True])
def test_the_kernels_for_a_few_tokens_compile(
    is_low_rank: bool, of_base: torch.dtype, generation: int
) -> None:
    of_tokens = dict.fromkeys(("hidden", "results", "outputs"), POINTERS[of_base])
    exact = dict.fromkeys(("weight", "a", "b", "products", "scalings"), "*fp32")
    numbers = dict.fromkeys(("temperature", "scaling"), "fp64" if is_low_rank else "fp32")
    sizes = {"experts": 8, "rank": 5, "padded": 16, "padded_rank": 8, "width": 300}
    choices = {"absolute": True, "is_low_rank": is_low_rank, "ranks": 40, "of_router": 2}
    choices |= {"k": 5, "at_once": kernel_few.experts_at_once(5, 5), "differ": is_low_rank}
    for function, columns, warps in (
        (kernel_few._project, kernel_few._READ, kernel_few._WARPS),
        (kernel_few._add, kernel_few._COLUMNS, kernel_few.warps_of_add(5, is_low_rank)),
    ):
        arguments = of_tokens | exact | numbers | sizes | choices
        arguments |= {"block": kernel_few._ROWS, "columns": columns}
        made = compiled_for_a_gpu(function, arguments, generation, warps)
        assert made.asm["cubin"]
        in_float64 = re.findall(r"\b(?:add|sub|mul|div|fma|setp|max)\.\S*f64", made.asm["ptx"])
        assert not in_float64


@pytest.mark.parametrize("shared_memory", [227 * 1024, 99 * 1024])
@pytest.mark.parametrize("count", [8, 64, 256, 512, 1024])
def test_what_is_read_ahead_fits_into_shared_memory(
    count: int, shared_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as a program has on GPUs of data centres, and on others."""
    monkeypatch.setattr(kernel, "_shared_memory", lambda device: shared_memory)
    padded = kernel.padded_experts(count)
    device = torch.device("cuda")
    columns, stages = kernel.columns_and_stages.__wrapped__(padded, 2, 2, device)  # not kept
    arguments = {
        **dict.fromkeys(("hidden", "rows", "z", "weighed"), "*bf16"),
        **dict.fromkeys(("scalings", "scores"), "*fp32"),
        **dict.fromkeys(("tokens", "width", "k"), "i32"),
        **dict.fromkeys(("temperature", "scaling"), "fp32"),
        **{
            "differ": True,
            "absolute": True,
            "is_low_rank": False,
            "keeps_scores": False,
            "parts": 2,
        },
        **{"experts": count, "rank": 8, "padded": padded, "padded_rank": 8},
        **{"block": 16, "columns": columns},
    }
    aligned = ("hidden", "rows", "z", "weighed", "scalings", "scores", "width")
    warps = 8 if padded > 64 else 4
    made = compiled_for_a_gpu(kernel._weigh, arguments, 90, warps, stages, aligned)
    read_ahead = (stages - 1) * columns * 2 * (2 * padded + 16)
    assert read_ahead <= made.metadata.shared <= shared_memory


@pytest.fixture
def gpu_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that Triton takes for the current one; it can start nothing there."""

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    # Not by `set_active`, which cannot be undone where there is no GPU.
    driver = triton.runtime.driver
    name = "_active" if hasattr(driver, "_active") else "active"  # the latter in Triton 3.4
    monkeypatch.setattr(driver, name, Driver())


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_a_compiler_sees_the_kernels_and_what_they_write(
    is_dynamic: bool, gpu_to_compile_for: None
) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    def weigh(*inputs: torch.Tensor) -> torch.Tensor:
        options = {"k": 2, "temperature": 0.7, "absolute": True, "is_low_rank": False}
        return kernel_op.weigh(*inputs, **options, is_estimated=False, scaling=1.0)

    # On a CPU, since autograd asks a GPU even for tensors that are not there.
    hidden = torch.empty(19, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(8, 64, requires_grad=True)
    z = torch.empty(19, 32, dtype=torch.bfloat16, requires_grad=True)
    # With an environment of shapes their sizes may vary from call to call.
    with FakeTensorMode(shape_env=ShapeEnv() if is_dynamic else None) as mode:
        inputs = [mode.from_tensor(each) for each in (hidden, weight, z, torch.empty(8))]
        traced = aot_function(weigh, fw_compiler=keep, bw_compiler=keep)
        weighed = traced(*inputs)
        assert (weighed.shape, weighed.dtype) == (inputs[2].shape, z.dtype)
        assert isinstance(weighed.shape[0], torch.SymInt) is is_dynamic
        weighed.sum().backward()
    kernels = []
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.op == "call_function" and "triton_kernel" in str(node.target):
                kernels.append(node.kwargs["tensors_to_clone"])
    assert kernels == [["weighed", "scores"], ["of_z", "of_scores"]]


def test_a_compiler_sees_the_kernels_for_a_few_tokens(gpu_to_compile_for: None) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    def add(*inputs: torch.Tensor) -> torch.Tensor:
        return kernel_op.add_to_few(*inputs, 2, 0.7, True, False, 1.0)

    shapes = [(1, 48), (1, 64), (8, 64), (32, 64), (32, 48), (8,)]
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(torch.empty(shape)) for shape in shapes]
        assert aot_function(add, fw_compiler=keep)(*inputs).shape == (1, 48)
    (graph,) = graphs
    kernels = []
    for node in graph.graph.nodes:
        if node.op == "call_function" and "triton_kernel" in str(node.target):
            kernels.append(node.kwargs["tensors_to_clone"])
    assert kernels == [["products"], ["outputs"]]
