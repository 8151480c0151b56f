"""Weight-ensembling MLPs against a loop over samples, as the papers' public code has it, and against a plain MLP.

    python benchmarks/wemoe.py                # CPU, some minutes
    python benchmarks/wemoe.py --device cuda

First the blocks of a ViT-B (hidden 768, eight tasks) on 50 tokens per image, batches of 1, 16 and 64: the loop merges
the weights of each sample's MLP, task vector by task vector, and calls it on that sample. Then a decoder of hidden
size 576: prefill, and one token after it, when coefficients are frozen. Last what the choice between the two ways of
`EnsembledLinear` rests on. Competitors take turns, the best of their runs counts, and memory is the peak beyond what
is held before.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click
import torch
from measuring import best_in_turn, peak_extra_bytes
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from mergekit_moe_ext.ensembling import ensembled_groups
from mergekit_moe_ext.modeling.configuration_wemoe import Ensembling, config_class
from mergekit_moe_ext.modeling.modeling_wemoe import Current, EnsembledLinear, model_class

TASKS = [f"task{index}" for index in range(8)]


class Looped(nn.Module):
    """A block's MLP whose weights are merged anew for every sample of a batch."""

    def __init__(self, ensembled: Any, stock: nn.Module, router: nn.Module) -> None:
        super().__init__()
        self.stock, self.router = stock, router
        self.linears = {name: part for name, part in ensembled.named_modules() if isinstance(part, EnsembledLinear)}

    def forward(self, hidden: Tensor) -> Tensor:
        coefficients = self.router(hidden).mean(dim=1)
        return torch.stack([self._one(*each) for each in zip(hidden, coefficients, strict=True)])

    def _one(self, sample: Tensor, coefficients: Tensor) -> Tensor:
        merged: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            for part, vectors in (("weight", "vectors"), ("bias", "bias_vectors")):
                if (total := getattr(linear, part)) is None:
                    continue
                for index, coefficient in enumerate(coefficients):
                    total = total + coefficient * getattr(linear, vectors)[index]
                merged[f"{name}.{part}"] = total
        return functional_call(self.stock, merged, (sample,))


def make(base: Any, config: Any, device: str, **settings: Any) -> tuple[Any, Any]:
    """The plain model, and the same with random task vectors on its MLPs."""
    torch.manual_seed(0)
    plain = base(config).to(device).eval()
    ensembling = Ensembling(experts=TASKS, groups=ensembled_groups(plain, "mlp", None), **settings)
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    made: Any = config_class(type(config))  # type: ignore[arg-type]
    ensembled: Any = model_class(base)(made(**values, ensembling=ensembling.as_dict()))
    for module in ensembled.modules():
        if isinstance(module, EnsembledLinear):
            module.vectors.normal_(std=0.002)
    return plain, ensembled.to(device).eval()


def looped(plain: Any, ensembled: Any) -> Any:
    """The plain model with its MLPs replaced by the loop."""
    model = copy.deepcopy(plain)
    for index, name in enumerate(ensembled.ensembling.groups):
        parent, _, last = name.rpartition(".")
        stock = plain.get_submodule(name)
        loop = Looped(ensembled.get_submodule(name), stock, ensembled.routers[str(index)])
        setattr(model.get_submodule(parent), last, loop)
    return model


def decoding(model: Any, ids: Tensor) -> Callable[[], object]:
    """One step after the prompt; the cache grows by a token per run."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return partial(model, ids[:, -1:], past_key_values=cache)


def show(what: str, works: Mapping[str, Callable[[], object]], device: str, seconds: float) -> None:
    extra = {name: peak_extra_bytes(work, device) for name, work in works.items()}
    best = best_in_turn(works, device, seconds)
    ours = best["ours"]
    click.echo(
        f"{what:34}"
        + "  ".join(f"{name} {best[name] * 1e3:9.2f} ms {extra[name] / 1e6:6.0f} MB" for name in works)
        + "  "
        + ", ".join(f"{name} / ours {best[name] / ours:.2f}" for name in works if name != "ours")
    )


def show_rule(device: str, seconds: float) -> None:
    """Both ways of one linear map, against the number of tokens that share coefficients."""
    base = nn.Linear(768, 3072).to(device)
    for kept in (None, int(0.1 * 768 * 3072)):
        linear = EnsembledLinear(base, len(TASKS), kept, "", Current())
        for samples in (1, 16):
            for tokens in (1, 2, 4, 8, 16):
                x, c = torch.randn(samples, tokens, 768, device=device), torch.rand(samples, len(TASKS), device=device)
                ways = {"merged": partial(linear._samples, x, c), "one by one": partial(linear._one_by_one, x, c)}
                best = best_in_turn(ways, device, seconds)
                click.echo(
                    f"{'dense' if kept is None else 'sparse':7}{samples:3} samples x {tokens:2} tokens  "
                    + "  ".join(f"{name} {best[name] * 1e3:8.2f} ms" for name in ways)
                )


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--device", default="cpu", show_default=True)
@click.option("--layers", default=2, show_default=True, help="Blocks of both models.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each comparison.")
@click.option("--batch", "batches", type=int, multiple=True, default=[1, 16, 64], show_default=True)
@torch.inference_mode()
def main(device: str, layers: int, seconds: float, batches: tuple[int, ...]) -> None:
    click.echo(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32, {len(TASKS)} tasks")
    plain, ours = make(ViTModel, ViTConfig(num_hidden_layers=layers, patch_size=32), device)
    loop = looped(plain, ours)
    for batch in batches:
        images = torch.randn(batch, 3, 224, 224, device=device)
        works = {"ours": partial(ours, images), "loop": partial(loop, images), "plain": partial(plain, images)}
        show(f"ViT-B/32, {layers} blocks, batch {batch}", works, device, seconds)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9
    )
    plain, ours = make(LlamaForCausalLM, config, device)
    ids = torch.randint(0, 8000, (1, 256), device=device)
    works = {"ours": partial(ours, ids), "loop": partial(looped(plain, ours), ids), "plain": partial(plain, ids)}
    show(f"decoder, {layers} blocks, 256 tokens", works, device, seconds)
    show("decoder, one token", {"ours": decoding(ours, ids), "plain": decoding(plain, ids)}, device, seconds)
    show_rule(device, min(seconds, 2.0))


if __name__ == "__main__":
    main()
