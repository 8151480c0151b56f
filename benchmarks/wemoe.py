"""Time weight-ensembling MLPs against a loop over samples, as in the papers' code, and plain MLPs.

    python benchmarks/wemoe.py                # CPU, some minutes
    python benchmarks/wemoe.py --real         # a whole SmolLM2-135M in place of a small decoder
    python benchmarks/wemoe.py --device cuda

First the blocks of a ViT-B (hidden 768, eight tasks) on 50 tokens per image: the loop merges the
weights of each sample's MLP, task vector by task vector, and calls it on that sample; `sparse`
keeps a tenth of each vector. Then the same with gradients of the routers. Then a decoder, three
tasks: prefill, and one token after it, when coefficients are frozen; what vectors take on disk.
Last what the choice between the ways of `EnsembledLinear` rests on. Task vectors are random.
Competitors take turns, the best of their runs counts, and memory is the peak beyond what is held
before.
"""

import copy
import itertools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from measuring import best_in_turn, peak_extra_bytes
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from mergekit_moe_ext.modeling import wemoe_tiles
from mergekit_moe_ext.modeling.configuration_wemoe import Ensembling, config_class
from mergekit_moe_ext.modeling.modeling_wemoe import model_class
from mergekit_moe_ext.modeling.wemoe_calls import Current
from mergekit_moe_ext.modeling.wemoe_products import EnsembledLinear
from mergekit_moe_ext.modeling.wemoe_tiles import rule_of
from mergekit_moe_ext.wemoe.groups import ensembled_groups

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from real_data import smollm2

KEPT = 0.1  # of a sparse vector
STORED = (".vectors", ".values", ".columns", ".row_ends")


class Looped(nn.Module):
    """An MLP whose weights are merged anew for every sample of a batch."""

    def __init__(self, ensembled: Any, stock: nn.Module, router: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self.router = router
        self.linears = {
            name: part
            for name, part in ensembled.named_modules()
            if isinstance(part, EnsembledLinear)
        }

    def forward(self, hidden: Tensor) -> Tensor:
        coefficients = self.router(hidden).mean(dim=1)
        return torch.stack([self._one(*each) for each in zip(hidden, coefficients, strict=True)])

    def _one(self, sample: Tensor, coefficients: Tensor) -> Tensor:
        merged: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            for part, vectors in (("weight", "vectors"), ("bias", "bias_vectors")):
                total = getattr(linear, part)
                if total is None:
                    continue
                for index, coefficient in enumerate(coefficients):
                    total = total + coefficient * getattr(linear, vectors)[index]
                merged[f"{name}.{part}"] = total
        return functional_call(self.stock, merged, (sample,))


def looped(plain: Any, ensembled: Any) -> Any:
    """The plain model with its MLPs replaced by the loop."""
    model = copy.deepcopy(plain)
    for index, name in enumerate(ensembled.ensembling.groups):
        parent, _, last = name.rpartition(".")
        loop = Looped(
            ensembled.get_submodule(name), model.get_submodule(name), ensembled.routers[str(index)]
        )
        setattr(model.get_submodule(parent), last, loop)
    return model


def draw(module: EnsembledLinear) -> None:
    """Fills a module's task vectors with random numbers."""
    if module.kept is None:
        module.vectors.normal_(std=0.002)
        return
    module.values.normal_(std=0.002)
    rows, width = module.weight.shape
    for index in range(len(module.values)):
        places = torch.randperm(rows * width)[: module.kept].sort().values
        module.columns[index] = (places % width).to(module.columns.dtype)
        module.row_ends[index] = torch.searchsorted(places, torch.arange(1, rows + 1) * width).int()


def ensembled(plain: Any, tasks: int, sparse: bool = False) -> Any:
    """The same model with task vectors on its MLPs; only its routers are trained."""
    groups = ensembled_groups(plain, "mlp", None)
    sizes = {}
    for name in itertools.chain.from_iterable(groups.values()):
        sizes[name] = plain.get_submodule(name).weight.numel()
    kept = {name: round(KEPT * size) for name, size in sizes.items()} if sparse else {}
    experts = [f"task{index}" for index in range(tasks)]
    values = {key: value for key, value in plain.config.to_dict().items() if key != "model_type"}
    config_type: Any = config_class(type(plain.config))  # type: ignore[arg-type]
    ensembling = Ensembling(experts=experts, groups=groups, kept=kept).as_dict()
    config = config_type(**values, ensembling=ensembling)
    model: Any = model_class(type(plain))(config)  # type: ignore[arg-type]
    model.load_state_dict(plain.state_dict(), strict=False)
    for module in model.modules():
        if isinstance(module, EnsembledLinear):
            draw(module)
    model.requires_grad_(False).routers.requires_grad_(True)
    return model.to(plain.device).eval()


def decoding(model: Any, ids: Tensor) -> Callable[[], object]:
    """A function that takes one step after the prompt; the cache grows by a token per run."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    step = partial(model, ids[:, -1:], past_key_values=cache)
    step()  # the first merges the weights that are kept
    return step


@torch.enable_grad()
def train(model: Any, images: Tensor) -> None:
    model(images).pooler_output.square().mean().backward()


def show(what: str, works: Mapping[str, Callable[[], object]], device: str, seconds: float) -> None:
    extra = {name: peak_extra_bytes(work, device) for name, work in works.items()}
    best = best_in_turn(works, device, seconds)
    for name in works:
        times = "" if name == "ours" else f"{best[name] / best['ours']:6.2f} times ours"
        click.echo(
            f"{what:34}{name:8}{best[name] * 1e3:10.2f} ms {extra[name] / 1e6:7.0f} MB{times}"
        )


def show_images(device: str, layers: int, seconds: float, batches: tuple[int, ...]) -> None:
    plain = (
        ViTModel(ViTConfig(num_hidden_layers=layers, patch_size=32))
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    ours = ensembled(plain, 8)
    models = {
        "ours": ours,
        "sparse": ensembled(plain, 8, sparse=True),
        "loop": looped(plain, ours),
        "plain": plain,
    }
    for batch in batches:
        images = torch.randn(batch, 3, 224, 224, device=device)
        works = {name: partial(model, images) for name, model in models.items()}
        show(f"ViT-B/32, {layers} blocks, batch {batch}", works, device, seconds)
    models.pop("plain")
    images = torch.randn(16, 3, 224, 224, device=device)
    works = {name: partial(train, model, images) for name, model in models.items()}
    show("with gradients, batch 16", works, device, seconds)


def show_decoder(plain: Any, device: str, seconds: float) -> None:
    ours = ensembled(plain, 3)
    sparse = ensembled(plain, 3, sparse=True)
    ids = torch.randint(0, plain.config.vocab_size, (1, 256), device=device)
    models = {"ours": ours, "sparse": sparse, "loop": looped(plain, ours), "plain": plain}
    what = f"decoder, {plain.config.num_hidden_layers} blocks"
    show(
        f"{what}, 256 tokens",
        {name: partial(model, ids) for name, model in models.items()},
        device,
        seconds,
    )
    models.pop("loop")
    show(
        f"{what}, one more",
        {name: decoding(model, ids) for name, model in models.items()},
        device,
        seconds,
    )
    dense_bytes = vector_bytes(ours)
    sparse_bytes = vector_bytes(sparse)
    click.echo(
        f"vectors {dense_bytes / 1e6:.0f} MB, sparse {sparse_bytes / 1e6:.0f} MB, "
        f"{sparse_bytes / dense_bytes:.1%}"
    )


def vector_bytes(model: Any) -> int:
    """The bytes that the task vectors of a model take on disk."""
    tensors = model.state_dict()
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(STORED))


def way(linear: EnsembledLinear, x: Tensor, c: Tensor, most: int) -> Tensor:
    """The module's output by one of its two ways."""
    # nothing is merged, and sparse vectors stay so, for up to `most` tokens
    kind = x.device.type
    wemoe_tiles.RULES[kind] = rule_of(x.device)._replace(merging=most, sparse=most)
    return linear._by_sample(x, c)


def show_rule(device: str, seconds: float) -> None:
    """Times the ways of one linear map, against the number of tokens that share coefficients, and
    prints what the table of rules should say of the device.
    """
    merging = 1
    sparse = 0
    for kept in (None, int(KEPT * 768 * 3072)):
        linear = EnsembledLinear(nn.Linear(768, 3072).to(device), 8, kept, "", Current())
        draw(linear)
        for samples, tokens in itertools.product((1, 16), (1, 2, 4, 8, 16)):
            x = torch.randn(samples, tokens, 768, device=device)
            c = torch.rand(samples, 8, device=device)
            ways = {
                "merged": partial(way, linear, x, c, 0),
                "products": partial(way, linear, x, c, 10**6),
            }
            best = best_in_turn(ways, device, seconds)
            if best["products"] < best["merged"]:
                if kept is None:
                    merging = max(merging, tokens + 1)
                else:
                    sparse = max(sparse, samples * tokens)
            times = "  ".join(f"{name} {best[name] * 1e3:8.2f} ms" for name in best)
            click.echo(
                f"{'dense' if kept is None else 'sparse':7}{samples:3} samples x {tokens:2} "
                f"tokens  {times}"
            )
    tile = rule_of(torch.device(device)).tile
    click.echo(f'"{torch.device(device).type}": Rule({merging=}, {sparse=}, {tile=})')


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--device", default="cpu", show_default=True, help="Device to compute on, as torch names it."
)
@click.option(
    "--layers",
    default=2,
    show_default=True,
    help="Number of blocks of the models that are not real.",
)
@click.option(
    "--real",
    is_flag=True,
    help="Measure SmolLM2-135M and nothing else; it is fetched if it is not there.",
)
@click.option(
    "--rule", is_flag=True, help="Measure what the table of rules holds, and nothing else."
)
@click.option(
    "--seconds", default=10.0, show_default=True, help="Seconds to spend on each comparison."
)
@click.option(
    "--batch",
    "batches",
    type=int,
    multiple=True,
    default=[1, 16, 64],
    show_default=True,
    help="Number of images in a batch; several may be given.",
)
def main(
    device: str, layers: int, real: bool, rule: bool, seconds: float, batches: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    click.echo(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32")
    with torch.no_grad():
        if rule:
            show_rule(device, seconds)
            return
        if real:
            show_decoder(
                AutoModelForCausalLM.from_pretrained(smollm2()).to(device).eval(), device, seconds
            )
            return
        show_images(device, layers, seconds, batches)
        sizes = {
            "vocab_size": 8000,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
        }
        config = LlamaConfig(**sizes, num_hidden_layers=layers)
        show_decoder(LlamaForCausalLM(config).to(device).eval(), device, seconds)
        show_rule(device, min(seconds, 2.0))


if __name__ == "__main__":
    main()
