"""One routed module against PEFT's Arrow on the same adapters, one plain LoRA, and the bare base layer.

    python benchmarks/routed_lora.py                # CPU, some minutes
    python benchmarks/routed_lora.py --device cuda

All in one process. Seconds are the best of up to thirty runs after a warm-up; memory is the peak beyond what is held
before. Both routers are Arrow's, with the same top k. PEFT's makes a tensor of (tokens, experts, out); where that
alone is over `--limit` GB it is not run.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from measuring import best_seconds, peak_extra_bytes
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ArrowConfig, create_arrow_model
from safetensors.torch import save_file
from torch import nn

from peft_routing import RoutedLoraConfig

TOKENS = (1, 16, 512)
PEFTS = "PEFT's Arrow"


class Base(nn.Module):
    """One linear module, as PEFT wants it: inside another."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@contextmanager
def adapters(count: int, rank: int, in_features: int, out_features: int) -> Iterator[list[str]]:
    """Directories of random LoRA adapters for `Base`."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        for index in range(count):
            folder = Path(root) / f"expert{index}"
            folder.mkdir()
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["linear"]}
            (folder / "adapter_config.json").write_text(json.dumps(config))
            factors = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
            save_file(
                {
                    f"base_model.model.linear.{name}.weight": torch.randn(shape, generator=generator) * 0.05
                    for name, shape in factors.items()
                },
                folder / "adapter_model.safetensors",
            )
        yield [str(Path(root) / f"expert{index}") for index in range(count)]


def competitors(
    paths: list[str], rank: int, in_features: int, out_features: int, k: int, device: str
) -> dict[str, Callable[[], Any]]:
    """What makes each of them."""
    base = Base(in_features, out_features).to(device).requires_grad_(False)

    def fresh() -> Base:
        copy = Base(in_features, out_features).to(device).requires_grad_(False)
        copy.load_state_dict(base.state_dict())
        return copy

    plain = LoraConfig(r=rank, target_modules=["linear"], init_lora_weights=False)
    return {
        "base layer": fresh,
        "one plain LoRA": lambda: get_peft_model(fresh(), plain),
        "routed": lambda: get_peft_model(fresh(), RoutedLoraConfig(experts=paths, router="arrow", top_k=k)),
        PEFTS: lambda: create_arrow_model(fresh(), paths, ArrowConfig(top_k=k)),
    }


def forward(model: Any, x: torch.Tensor) -> None:
    with torch.no_grad():  # not inference_mode: PEFT would keep its prototypes as inference tensors
        model(x)


def forward_and_backward(model: Any, x: torch.Tensor) -> None:
    model(x).sum().backward()


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--shape", "shapes", type=(int, int), multiple=True, default=[(2048, 2048), (2048, 8192)])
@click.option("--experts", "counts", type=int, multiple=True, default=[4, 10, 64, 256], show_default=True)
@click.option("--rank", "ranks", type=int, multiple=True, default=[4, 16], show_default=True)
@click.option("--limit", default=3.0, show_default=True, help="GB of PEFT's largest tensor.")
def main(device: str, shapes: Any, counts: Any, ranks: Any, limit: float) -> None:
    """Print a table: seconds, ratios to one plain LoRA and to PEFT's Arrow, and memory."""
    click.echo(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32, k = 4")
    click.echo(
        f"{'in x out':>12} {'r':>3} {'E':>4} {'tokens':>6} {'work':>9} {'base ms':>8} {'LoRA ms':>8} {'ours ms':>8} "
        f"{'Arrow ms':>9} {'/ LoRA':>7} {'Arrow/':>7} {'ours MB':>8} {'Arrow MB':>9}"
    )
    for in_features, out_features in shapes:
        for rank in ranks:
            for count in counts:
                with adapters(count, rank, in_features, out_features) as paths:
                    made = competitors(paths, rank, in_features, out_features, 4, device)
                    models = {name: make().train() for name, make in made.items()}
                    _compare(models, (in_features, out_features, rank, count), device, limit)


def _compare(models: dict[str, Any], case: tuple[int, int, int, int], device: str, limit: float) -> None:
    in_features, out_features, rank, count = case
    for tokens in TOKENS:
        x = torch.randn(1, tokens, in_features, device=device)
        for work in (forward, forward_and_backward):
            needed = x.clone().requires_grad_(work is forward_and_backward)
            seconds, extra = {}, {}
            for name, model in models.items():
                if name == PEFTS and tokens * count * out_features * 4 > limit * 1e9:
                    continue
                extra[name] = peak_extra_bytes(partial(work, model, needed), device)
                seconds[name] = best_seconds(partial(work, model, needed), device, runs=30)
            ours, lora, arrow = seconds["routed"], seconds["one plain LoRA"], seconds.get(PEFTS)
            click.echo(
                f"{in_features:>5} x {out_features:<4} {rank:>3} {count:>4} {tokens:>6} "
                f"{'forward' if work is forward else '+backward':>9} {seconds['base layer'] * 1e3:>8.2f} "
                f"{lora * 1e3:>8.2f} {ours * 1e3:>8.2f} {f'{arrow * 1e3:.2f}' if arrow else '-':>9} "
                f"{ours / lora:>7.2f} {f'{arrow / ours:.1f}' if arrow else '-':>7} {extra['routed'] / 1e6:>8.1f} "
                f"{extra.get(PEFTS, 0) / 1e6:>9.1f}"
            )


if __name__ == "__main__":
    main()
