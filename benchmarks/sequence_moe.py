"""Time prefill and decoding of a sequence MoE against its own experts, each alone.

    python benchmarks/sequence_moe.py                # CPU, a few minutes
    python benchmarks/sequence_moe.py --device cuda

Four random Llamas become one model with `embedding: separate`. The limit of a prefill with
perplexity routing is one prefill of each source, with logits of the whole prompt, since every
expert has to score it; ours then gives logits of the last token, as in `generate`. The limit of
decoding is a step of every source that a prompt of the batch chose, on the prompts that chose it;
random experts are chosen about equally often, which is the hardest case. Competitors take turns,
and the best of their runs counts; memory is the peak beyond what is held before. `operations` are
those that Python starts in one call.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from measuring import best_seconds, operations, peak_extra_bytes
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mergekit_moe_ext  # noqa: F401  (registers the methods)

EXPERTS = ("base", "math", "code", "law")


class Figures(NamedTuple):
    """The cost of one run: seconds, bytes beyond what was held before, and operations."""

    seconds: float
    extra: int
    operations: int


def make_sources(root: Path, layers: int) -> None:
    """Writes four random Llamas."""
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    for seed, name in enumerate(EXPERTS):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(root / name)


def merge(root: Path, routing: str, chosen: int) -> Path:
    """The sequence MoE of all sources, which chooses so many experts."""
    from mergekit.merge import run_merge

    config = MergeConfiguration.model_validate(
        {
            "merge_method": "seq_moe",
            "base_model": str(root / "base"),
            "models": [{"model": str(root / name)} for name in EXPERTS],
            "parameters": {
                "routing": routing,
                "embedding": "separate",
                "experts_per_sequence": chosen,
            },
        }
    )
    out = root / f"{routing}-{chosen}"
    run_merge(config, str(out), MergeOptions(quiet=True))
    return out


def load(path: Path, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).to(device).eval()


def measure(
    ours: Callable[[], object], limit: Callable[[], object], device: str, rounds: int
) -> dict[str, Figures]:
    """What each costs: the best of some runs, taking turns."""
    works = {"ours": ours, "limit": limit}
    figures = {}
    for name, work in works.items():
        extra = peak_extra_bytes(work, device)
        figures[name] = Figures(float("inf"), extra, operations(work, device))
    for _ in range(rounds):
        for name, work in works.items():
            best = min(figures[name].seconds, best_seconds(work, device, runs=1))
            figures[name] = figures[name]._replace(seconds=best)
    return figures


def decoding(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """A function that takes one step after the prompt; the cache grows by a token per run."""
    state: dict[str, Any] = {}
    token = ids[:, -1:]

    def step() -> None:
        if not state:
            state["cache"] = model(ids, use_cache=True).past_key_values
        model(token, past_key_values=state["cache"], use_cache=True)

    step()
    return step


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--device", default="cpu", show_default=True, help="Device to compute on, as torch names it."
)
@click.option("--layers", default=8, show_default=True, help="Number of layers of each source.")
@click.option("--batch", default=4, show_default=True, help="Number of prompts in a batch.")
@click.option("--prompt", default=256, show_default=True, help="Number of tokens of each prompt.")
@click.option("--rounds", default=5, show_default=True, help="Number of runs of each.")
def main(device: str, layers: int, batch: int, prompt: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        root = Path(folder)
        make_sources(root, layers)
        sources = [load(root / name, device) for name in EXPERTS]
        ids = torch.randint(
            0, 16_000, (batch, prompt), generator=torch.Generator().manual_seed(0)
        ).to(device)
        click.echo(
            f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32"
        )
        click.echo(
            f"{len(EXPERTS)} experts of {sources[0].num_parameters() / 1e6:.0f} M, {batch} x "
            f"{prompt} tokens"
        )
        click.echo(
            f"{'':34}{'ms':>9}{'limit ms':>10}{'/ limit':>9}{'MB':>8}{'limit MB':>10}"
            f"{'operations':>12}{'limit':>8}"
        )
        for routing, chosen in (("perplexity", 1), ("perplexity", 2), ("task_vector", 1)):
            model = load(merge(root, routing, chosen), device)
            prefills = [partial(source, ids, use_cache=True) for source in sources]
            limit = partial(run_all, prefills)
            figures = measure(partial(prefill, model, ids), limit, device, rounds)
            show(f"prefill, {routing}, K = {chosen}", figures)
            if routing == "perplexity":
                limit = partial(run_all, steps_of_sources(model, sources, ids))
                figures = measure(decoding(model, ids), limit, device, rounds * 4)
                show(f"decoding, K = {chosen}", figures)


def steps_of_sources(
    model: Any, sources: Sequence[Any], ids: torch.Tensor
) -> list[Callable[[], None]]:
    """A step of every source that a prompt chose, on the prompts that chose it."""
    coefficients = model(ids, use_cache=True).coefficients
    steps = []
    for source, weights in zip(sources, coefficients.unbind(dim=1), strict=True):
        rows = weights.nonzero()[:, 0].to(ids.device)
        if len(rows):
            steps.append(decoding(source, ids[rows]))
    return steps


def prefill(model: Any, ids: torch.Tensor) -> None:
    """Reads the prompt as `generate` does, for the logits of its last token."""
    cache_class = sys.modules[type(model).__module__].SequenceMoECache
    model(ids, past_key_values=cache_class(), logits_to_keep=1)


def run_all(works: Sequence[Callable[[], object]]) -> None:
    for work in works:
        work()


def show(what: str, figures: dict[str, Figures]) -> None:
    ours = figures["ours"]
    limit = figures["limit"]
    click.echo(
        f"{what:34}{ours.seconds * 1e3:9.1f}{limit.seconds * 1e3:10.1f}"
        f"{ours.seconds / limit.seconds:9.2f}{ours.extra / 1e6:8.0f}{limit.extra / 1e6:10.0f}"
        f"{ours.operations:12}{limit.operations:8}"
    )


if __name__ == "__main__":
    main()
