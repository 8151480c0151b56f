"""What Triton compiles the kernels for sparse task vectors to, for a GPU that is not there.

Triton needs no GPU to compile for one: `pip install triton`. What the kernels compute is tested in
`test_wemoe_kernel`, by an interpreter, which knows less of types than the compiler does.
"""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets, and compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mergekit_moe_ext.modeling import wemoe_kernel  # noqa: E402

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@pytest.mark.parametrize("name", ["_merge", "_spread"])
@pytest.mark.parametrize("of_columns", ["*u16", "*i32"])
@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_the_kernels_compile(
    dtype: torch.dtype, generation: int, of_columns: str, name: str
) -> None:
    kernel = getattr(wemoe_kernel, name)
    types = {
        **dict.fromkeys(("coefficients", "weight", "values"), POINTERS[dtype]),
        **{"columns": of_columns, "row_ends": "*i32", "block": "constexpr"},
        "result": "*fp32" if name == "_merge" else POINTERS[dtype],
        **dict.fromkeys(("samples", "rows", "width", "experts", "kept"), "i32"),
    }
    signature = {argument: types[argument] for argument in kernel.arg_names}
    place_of_block = len(signature) - 1
    constants = {(place_of_block,): wemoe_kernel._BLOCK}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", generation, 32)
    made = triton.compile(source, target=target, options=wemoe_kernel._OPTIONS)
    assert made.asm["cubin"]
    ptx = made.asm["ptx"]
    assert ".local" not in ptx  # registers suffice
    assert not re.findall(r"\b(?:add|sub|mul|div|fma|setp|max)\.\S*f64", ptx)
    # The threads of a program wait for each other's writes, and read what is in memory, not what a
    # cache for constants holds.
    assert "bar.sync" in ptx and "ld.global.nc" not in ptx


def test_it_is_compiled_for_no_size_or_alignment() -> None:
    """A kernel that was compiled for one call is started for all others, by addresses alone."""
    for parameter in (*wemoe_kernel._merge.params, *wemoe_kernel._spread.params):
        assert parameter.is_constexpr or parameter.do_not_specialize
