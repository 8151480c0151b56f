"""What Triton compiles the kernels of TIES and DARE to, for a GPU that is not there.

Triton needs no GPU to compile for one: `pip install triton`. What the kernels compute is tested in
`test_fused`, by an interpreter, which knows less of types than the compiler does.
"""

import os
import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets, and compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mergekit_moe_ext.tensor.kernels import fused  # noqa: E402

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def compiled_for_a_gpu(function: Any, arguments: dict[str, Any], generation: int) -> Any:
    """A kernel that is compiled for arguments: types of what varies, values of the constants."""
    signature = {}
    constants = {}
    for place, name in enumerate(function.arg_names):
        argument = arguments[name]
        is_type = isinstance(argument, (str, tuple))
        signature[name] = argument if is_type else "constexpr"
        if not is_type:
            constants[(place,)] = argument
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": fused._COUNTING_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)


@pytest.mark.parametrize(("sources", "numel", "generation"), [(1, "i32", 80), (3, "i64", 90)])
@pytest.mark.parametrize("dtype", POINTERS)
def test_the_kernels_compile(dtype: torch.dtype, sources: int, numel: str, generation: int) -> None:
    of_dtype = dict.fromkeys(("bases", "result"), POINTERS[dtype])
    integers = ("states", "counts", "blocks", "rules", "keys", "bounds")
    varying = {
        **of_dtype,
        **dict.fromkeys(integers, "*i64"),
        **dict.fromkeys(("weights", "factors"), "*fp32"),
        **dict.fromkeys(("shift", "count", "infinity"), "i32"),
        "tensors": (POINTERS[dtype],) * sources,
        "numel": numel,
        "scale": "fp32",
    }
    of_counting = {
        "few": fused._FEW,
        "padded": triton.next_power_of_2(sources),
        "block": fused._COUNTED_BLOCK,
    }
    of_merging = {"block": fused._BLOCK, "normalize": True, "elect_sign": True}
    for function, constants in (
        (fused._count_digits, of_counting),
        (fused._choose_digit, of_counting),
        (fused._count_equal, of_counting | {"equal": "*i32"}),
        (fused._make_rules, of_counting | {"equal": "*i64"}),
        (fused._ties, of_merging),
        (fused._dare, of_merging),
    ):
        made = compiled_for_a_gpu(function, varying | constants, generation)
        assert made.asm["cubin"]
        assert not re.findall(r"\b(?:add|sub|mul|div|fma|setp|max)\.\S*f64", made.asm["ptx"])
