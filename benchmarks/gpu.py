"""Print what our layers, models and kernels cost on a GPU, beside what a user would run instead.

    python benchmarks/gpu.py                        # an NVIDIA GPU, under five minutes
    python benchmarks/gpu.py --device cpu --small   # tries the script where there is none

One table: milliseconds, operations and memory of ours and of the measure beside it, in one
process, in turn, the best of several rounds. Operations are kernels and copies on a GPU, else what
Python starts. Memory is the peak beyond what is held before. Models are random; everything is
eager, unless said, and in bfloat16, as models are run on a GPU, unless said.
"""

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import sequence_moe
import torch
import wemoe
from measuring import best_in_turn, operations, peak_extra_bytes
from mergekit.merge_methods import merge_tensors
from peft import LoraConfig, get_peft_model
from random_adapters import linear_modules, random_adapters
from routed_lora import Base
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from peft_routing import RoutedLoraConfig

Work = Callable[[], object]
RANK = 16
TOP_K = 4


class Comparison(NamedTuple):
    """A row of the table: ours, and the measure that it is held against."""

    what: str
    measure_name: str
    measure: Work
    ours: Work


def adapted(
    base: Callable[[], Any], paths: list[str], targets: list[str], dtype: torch.dtype
) -> tuple[Any, Any]:
    """One plain LoRA on a base, and a routed adapter on the same base, both computing in a
    dtype.
    """
    plain = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    lora = get_peft_model(base(), plain, autocast_adapter_dtype=dtype == torch.float32)
    # As `PeftModel.from_pretrained` loads it: a router that is being trained goes another way.
    routed = RoutedLoraConfig(experts=paths, router="arrow", top_k=TOP_K, inference_mode=True)
    return lora.to(dtype).eval(), get_peft_model(base(), routed).eval()


def routed_layers(device: str, small: bool) -> Iterator[Comparison]:
    width = 64 if small else 4096

    def base(dtype: torch.dtype) -> Base:
        return Base(width, width).to(device, dtype).requires_grad_(False)

    for count in (8, 64) if small else (8, 64, 256):
        with random_adapters(Base(width, width), count, RANK, scale=0.05) as paths:
            for dtype in (torch.bfloat16, torch.float32):
                lora, routed = adapted(partial(base, dtype), paths, ["linear"], dtype)
                for tokens in (1, 2048):
                    x = torch.randn(1, tokens, width, device=device, dtype=dtype)
                    name = str(dtype).removeprefix("torch.")
                    what = f"routed layer {width}², {name}, E = {count}, {tokens} tokens"
                    yield Comparison(what, "one LoRA", partial(lora, x), partial(routed, x))


def llama(device: str, small: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000 if small else 32_000,
        hidden_size=64 if small else 2048,
        intermediate_size=128 if small else 5632,
        num_hidden_layers=2 if small else 16,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=4,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def step(model: Any, ids: torch.Tensor) -> Work:
    """A function that takes one step after a prompt, with a cache that grows."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return partial(model, input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)


def compiled_generation(model: Any, ids: torch.Tensor) -> Work:
    return partial(
        model.generate,
        input_ids=ids,
        min_new_tokens=64,
        max_new_tokens=64,
        do_sample=False,
        cache_implementation="static",
    )


def routed_models(device: str, small: bool) -> Iterator[Comparison]:
    base = llama("meta", small)
    targets = sorted({name.rpartition(".")[2] for name in linear_modules(base)})
    ids = torch.randint(2, base.config.vocab_size, (1, 512), device=device)
    for count in (8, 32):
        with random_adapters(base, count, RANK) as paths:
            lora, routed = adapted(partial(llama, device, small), paths, targets, torch.bfloat16)
        what = f"routed Llama, {sum(each.numel() for each in base.parameters()) / 1e9:.1f} B"
        yield Comparison(
            f"{what}, E = {count}, prefill 512",
            "one LoRA",
            partial(lora, input_ids=ids, logits_to_keep=1),
            partial(routed, input_ids=ids, logits_to_keep=1),
        )
        yield Comparison(
            f"{what}, E = {count}, decode", "one LoRA", step(lora, ids), step(routed, ids)
        )
        if device == "cuda" and count == 8:
            # `generate` compiles for a static cache by itself, once.
            yield Comparison(
                f"{what}, E = {count}, 64 tokens, static cache, compiled",
                "one LoRA",
                compiled_generation(lora, ids),
                compiled_generation(routed, ids),
            )


def sequence_moes(device: str, small: bool) -> Iterator[Comparison]:
    """A step of decoding against a step of each chosen expert on its rows, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sequence_moe.make_sources(root, layers=1 if small else 8)
        sources = [sequence_moe.load(root / name, device) for name in sequence_moe.EXPERTS]
        model = sequence_moe.load(sequence_moe.merge(root, "perplexity", 1), device)
    for rows in (1, 4):
        ids = torch.randint(0, 16_000, (rows, 256), device=device)
        steps = sequence_moe.steps_of_sources(model, sources, ids)
        yield Comparison(
            f"sequence MoE, K = 1, {rows} rows, decode",
            "its experts",
            partial(sequence_moe.run_all, steps),
            sequence_moe.decoding(model, ids),
        )


def weight_ensembling(device: str, small: bool) -> Iterator[Comparison]:
    layers = 1 if small else 4
    plain = ViTModel(ViTConfig(num_hidden_layers=layers, patch_size=32)).to(device).eval()
    plain.requires_grad_(False)
    dense = wemoe.ensembled(plain, 8)
    sparse = wemoe.ensembled(plain, 8, sparse=True)
    loop = wemoe.looped(plain, dense)
    for rows in (1, 16):
        images = torch.randn(rows, 3, 224, 224, device=device)
        what = f"WEMoE, {layers} blocks of ViT-B/32, {rows} images, float32"
        yield Comparison(what, "a loop", partial(loop, images), partial(dense, images))
        yield Comparison(
            f"{what}, sparse", "dense vectors", partial(dense, images), partial(sparse, images)
        )
    sizes = {"vocab_size": 8000, "hidden_size": 576, "intermediate_size": 1536}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_hidden_layers=layers)
    decoder = LlamaForCausalLM(config).to(device).eval()
    dense = wemoe.ensembled(decoder, 3)
    for rows in (1, 4):
        ids = torch.randint(0, 8000, (rows, 256), device=device)
        what = f"WEMoE, {layers} blocks of a decoder, {rows} rows, float32"
        loop = wemoe.looped(decoder, dense)
        yield Comparison(f"{what}, prefill 256", "a loop", partial(loop, ids), partial(dense, ids))
        yield Comparison(
            f"{what}, decode", "the base", wemoe.decoding(decoder, ids), wemoe.decoding(dense, ids)
        )


def tensor_methods(device: str, small: bool) -> Iterator[Comparison]:
    shape = (64, 64) if small else (4096, 11008)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.randn(shape, device=device).to(dtype) for _ in range(4)]
        for ours, theirs in (("fast_ties", "ties"), ("dare", "dare_linear")):
            works = {}
            for method in (ours, theirs):
                works[method] = partial(
                    merge_tensors,
                    tensors,
                    method,
                    base_index=0,
                    parameters={"weight": 1.0, "density": 0.8},
                )
            name = str(dtype).removeprefix("torch.")
            yield Comparison(
                f"{ours}, 3 sources of {shape[0]} x {shape[1]}, {name}",
                f"mergekit's {theirs}",
                works[theirs],
                works[ours],
            )


PARTS = {
    "layers": routed_layers,
    "models": routed_models,
    "sequence": sequence_moes,
    "wemoe": weight_ensembling,
    "tensors": tensor_methods,
}


def show(row: Comparison, device: str, seconds: float) -> None:
    works = {"measure": row.measure, "ours": row.ours}
    counts = {name: operations(work, device) for name, work in works.items()}
    extra = {name: peak_extra_bytes(work, device) / 1e6 for name, work in works.items()}
    best = best_in_turn(works, device, seconds)
    click.echo(
        f"| {row.what} | {row.measure_name} | {best['measure'] * 1e3:.3f} | "
        f"{best['ours'] * 1e3:.3f} | {best['ours'] / best['measure']:.2f} | {counts['measure']} | "
        f"{counts['ours']} | {extra['measure']:.0f} | {extra['ours']:.0f} |"
    )
    sys.stdout.flush()


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--device", default="cuda", show_default=True, help="Device to compute on.")
@click.option("--small", is_flag=True, help="Take tiny sizes, to try the script.")
@click.option("--seconds", default=1.0, show_default=True, help="Seconds to spend on each row.")
@click.option(
    "--only",
    "names",
    type=click.Choice(list(PARTS)),
    multiple=True,
    help="Part of the table to print; several may be given.  [default: all]",
)
def main(device: str, small: bool, seconds: float, names: tuple[str, ...]) -> None:
    where = torch.cuda.get_device_name() if device == "cuda" else device
    click.echo(f"torch {torch.__version__}, {where}, rank {RANK}, top {TOP_K}\n")
    click.echo(
        "| | the measure | its ms | ours, ms | ours / measure | its operations | ours | its MB | "
        "ours |\n|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    with torch.no_grad():
        for name in names or PARTS:
            for row in PARTS[name](device, small):
                show(row, device, seconds)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
