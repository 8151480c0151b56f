"""Time a library of many adapters, and say whether it finds what is known to be in it.

    python benchmarks/library.py                   # 32 adapters, and 256
    python benchmarks/library.py --adapters 64

A small Llama is trained on the texts of eight tasks, and a LoRA on each of them: the eight roots.
All other adapters are made of the roots, so that it is known what they are:

- copies of a root: its update scaled, or with other factors of the same product, or with a tenth
  of noise. `dedupe` should name these, and no other;
- relatives of a root: its update with as much noise as there is update, or half as much, or
  interpolated to another root. `cluster` should put them with their root.

Each adapter has texts of its root's task as its data. `select` should take adapters of eight
different roots for the eight tasks, and `route` name one of the right root for a text.

Seconds are processor time of one thread, so that other work on the machine does not count, and MB
the peak of resident memory beyond what was held before; files that are mapped into memory count
there.
"""

import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from measuring import peak_extra_bytes
from peft import LoraConfig, get_peft_model
from random_adapters import linear_modules
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from _mergekit_moe_ext_common.loading import silence
from peft_routing import Reading, library

READING = Reading(quiet=True)
ROOTS = 8
MOST = 43 * ROOTS  # adapters: more would be interpolated between the same two roots again
RANK = 8
WORDS = 256
WORDS_OF_TASK = 48  # so that tasks have a third of their words in common with the next
LENGTH = 32  # tokens of a text
PREFIX = "base_model.model."
Factors = dict[str, tuple[Tensor, Tensor]]  # A and B by module


@dataclass(frozen=True)
class Adapter:
    """An adapter of the library: the number of its root, and whether it is a copy of it."""

    name: str
    root: int
    is_copy: bool
    factors: Factors


class Texts:
    """Texts of eight tasks. Each has its own words, and one of three words follows each of them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._followers = []
        for task in range(ROOTS):
            own = (torch.arange(WORDS_OF_TASK) + task * WORDS // ROOTS) % WORDS
            chosen = torch.randint(WORDS_OF_TASK, (WORDS, 3), generator=generator)
            self._followers.append(own[chosen])

    def draw(self, task: int, count: int, generator: torch.Generator) -> Tensor:
        """(count, 32): the numbers of words."""
        followers = self._followers[task]
        words = [followers[torch.randint(WORDS, (count,), generator=generator), 0]]
        for _ in range(LENGTH - 1):
            choices = torch.randint(3, (count,), generator=generator)
            words.append(followers[words[-1], choices])
        return torch.stack(words, dim=1)

    def write(self, path: Path, rows: Tensor) -> str:
        lines = []
        for row in rows.tolist():
            lines.append(json.dumps({"text": " ".join(f"w{word}" for word in row)}) + "\n")
        path.write_text("".join(lines))
        return str(path)


def save_base(path: Path, texts: Texts) -> LlamaForCausalLM:
    """The base model: trained for seconds on all tasks, and saved with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=WORDS,
        bos_token_id=None,
        eos_token_id=WORDS,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(2)

    def batch() -> Tensor:
        return torch.cat([texts.draw(task, 2, generator) for task in range(ROOTS)])

    train(model, batch, steps=60, learning_rate=2e-3)
    model.save_pretrained(path)
    vocabulary = {f"w{word}": word for word in range(WORDS)} | {"</s>": WORDS, "<unk>": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return model.eval()


def train(model: nn.Module, batch: Callable[[], Tensor], steps: int, learning_rate: float) -> None:
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    model.train()
    for _ in range(steps):
        ids = batch()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_root(base: LlamaForCausalLM, texts: Texts, task: int) -> Factors:
    """The factors of a LoRA that was trained on a task, with its scaling of 2 in B."""
    torch.manual_seed(3)  # all start from one A, as adapters of one trainer do
    modules = linear_modules(base)
    targets = sorted({name.rpartition(".")[2] for name in modules})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(100 + task)
    train(model, lambda: texts.draw(task, 16, generator), steps=40, learning_rate=5e-3)
    state = model.state_dict()
    factors = {}
    for name in modules:
        a = state[f"{PREFIX}{name}.lora_A.default.weight"].clone()
        b = state[f"{PREFIX}{name}.lora_B.default.weight"].clone()
        factors[name] = (a, 2 * b)
    model.unload()
    return factors


def norm(factors: Factors) -> float:
    """The norm of the update B A of all modules together."""
    total = 0.0
    for a, b in factors.values():
        total += ((b.T @ b) * (a @ a.T)).sum().item()
    return total**0.5


def scaled(factors: Factors, by: float) -> Factors:
    return {name: (a, by * b) for name, (a, b) in factors.items()}


def added(first: Factors, second: Factors) -> Factors:
    """The sum of two updates, whose rank is the sum of theirs."""
    both = {}
    for name, (a, b) in first.items():
        other_a, other_b = second[name]
        both[name] = (torch.cat([a, other_a]), torch.cat([b, other_b], dim=1))
    return both


def refactored(factors: Factors, generator: torch.Generator) -> Factors:
    """The same update by other factors: B R and R⁻¹ A."""
    other = {}
    for name, (a, b) in factors.items():
        between = torch.randn(len(a), len(a), generator=generator) + 3 * torch.eye(len(a))
        other[name] = (torch.linalg.solve(between, a), b @ between)
    return other


def noisy(factors: Factors, share: float, generator: torch.Generator) -> Factors:
    """The update and noise, whose norm is that share of the update's."""
    noise = {}
    for name, (a, b) in factors.items():
        noise[name] = (
            torch.randn(a.shape, generator=generator),
            torch.randn(b.shape, generator=generator),
        )
    return added(factors, scaled(noise, share * norm(factors) / norm(noise)))


def interpolated(factors: Factors, other: Factors) -> Factors:
    """Three tenths of the way to another root, which is made as long first."""
    to = scaled(other, norm(factors) / norm(other))
    return added(scaled(factors, 0.7), scaled(to, 0.3))


def adapters_of(roots: Sequence[Factors], count: int) -> list[Adapter]:
    """So many adapters: the roots, and then as many of each root in turn, of each kind in turn."""
    generator = torch.Generator().manual_seed(4)
    adapters = [Adapter(f"root{root}", root, False, each) for root, each in enumerate(roots)]
    for number in range(count - len(roots)):
        root = number % len(roots)
        place = number // len(roots)  # among those of this root
        own = roots[root]
        kind = ("scaled", "noisy", "interpolated", "refactored", "half noisy", "nearly")[place % 6]
        if kind == "scaled":
            factors = scaled(own, 0.5 + 0.1 * place)
        elif kind == "refactored":
            factors = refactored(own, generator)
        elif kind == "nearly":
            factors = noisy(own, 0.1, generator)
        elif kind == "noisy":
            factors = noisy(own, 1.0, generator)
        elif kind == "half noisy":
            factors = noisy(own, 0.5, generator)
        else:
            # Another root each time, so that no two of these are alike.
            other = roots[(root + 1 + place // 6) % len(roots)]
            factors = interpolated(own, other)
        is_copy = kind in ("scaled", "refactored", "nearly")
        adapters.append(Adapter(f"{kind.replace(' ', '-')}{number}", root, is_copy, factors))
    return adapters


def save_adapter(adapter: Adapter, directory: Path) -> str:
    """Saves an adapter for PEFT, with a scaling of 1."""
    directory.mkdir(parents=True)
    rank = len(next(iter(adapter.factors.values()))[0])
    targets = sorted({name.rpartition(".")[2] for name in adapter.factors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (a, b) in adapter.factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, directory / "adapter_model.safetensors")
    return str(directory)


def measured(name: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of the work and its seconds, which are printed with its memory."""
    results: list[Any] = []
    started = time.process_time()
    extra = peak_extra_bytes(lambda: results.append(work()), "cpu")
    seconds = time.process_time() - started
    click.echo(f"  {name:<34} {seconds:>8.1f} s {extra / 1e6:>8.0f} MB")
    return results[0], seconds


def truth(name: str, value: str) -> None:
    click.echo(f"  {'':<6}{name}: {value}")


def one_library(
    root: Path, base: str, texts: Texts, adapters: Sequence[Adapter], numbers: Sequence[int]
) -> None:
    """Makes a library of these adapters, and does with it all that can be done."""
    generator = torch.Generator().manual_seed(5)
    experts = {}
    data = {}
    for adapter in adapters:
        experts[adapter.name] = save_adapter(adapter, root / "adapters" / adapter.name)
        rows = texts.draw(adapter.root, 8, generator)
        data[adapter.name] = texts.write(root / f"{adapter.name}.jsonl", rows)
    root_of = {adapter.name: adapter.root for adapter in adapters}
    at = str(root / "library")
    click.echo(f"{len(adapters)} adapters")
    measured("add", lambda: library.add(at, experts, READING, base=base, data=data))
    size = sum(file.stat().st_size for file in (root / "library").rglob("*") if file.is_file())
    click.echo(f"  {'its files':<34} {'':>10} {size / 1e6:>8.1f} MB")

    find_duplicates(at, adapters, root_of)
    find_clusters(at, root_of)
    select_for_tasks(at, root, texts, root_of, generator)
    route_texts(at, root, texts, root_of, generator, numbers)


def find_duplicates(at: str, adapters: Sequence[Adapter], root_of: Mapping[str, int]) -> None:
    """Says how many copies `dedupe` names, and of which root."""
    duplicates, _ = measured("dedupe", lambda: library.dedupe(at, READING))
    named = {each.name for each in duplicates}
    copies = {adapter.name for adapter in adapters if adapter.is_copy}
    of_right_root = sum(root_of[each.name] == root_of[each.of] for each in duplicates)
    truth(
        "copies that are named",
        f"{len(named & copies)} of {len(copies)}, and {len(named - copies)} others; "
        f"{of_right_root} of {len(named)} of the right root",
    )


def find_clusters(at: str, root_of: Mapping[str, int]) -> None:
    """Says how many adapters `cluster` puts with most of their root."""
    for method in ("average", "kmeans"):
        clusters, _ = measured(
            f"cluster, {method}",
            functools.partial(library.cluster_library, at, READING, method=method),
        )
        right = 0
        for members in clusters.members.values():
            right += Counter(root_of[name] for name in members).most_common(1)[0][1]
        truth(
            "clusters",
            f"{len(clusters.members)} of {ROOTS}, {right} of {len(root_of)} adapters with most of "
            f"their root, silhouette {clusters.silhouette:.2f}",
        )


def select_for_tasks(
    at: str, root: Path, texts: Texts, root_of: Mapping[str, int], generator: torch.Generator
) -> None:
    """Says of how many roots the adapters are that `select` takes for the tasks of all roots."""
    tasks = {}
    for task in range(ROOTS):
        rows = texts.draw(task, 16, generator)
        tasks[f"task{task}"] = texts.write(root / f"task{task}.jsonl", rows)
    chosen, _ = measured(f"select {ROOTS}", lambda: library.select(at, tasks, ROOTS, READING))
    found = {root_of[name] for name in chosen.names}
    truth(
        "roots of what is selected",
        f"{len(found)} of {ROOTS}, test loss {chosen.test[0]:.3f} to {chosen.test[-1]:.3f}",
    )


def route_texts(
    at: str,
    root: Path,
    texts: Texts,
    root_of: Mapping[str, int],
    generator: torch.Generator,
    numbers: Sequence[int],
) -> None:
    """Says for how many texts `route` names an adapter of the right root, for each number of texts,
    and what a further text costs.
    """
    times = []
    for number in numbers:
        requests = torch.cat(
            [texts.draw(task, number // ROOTS, generator) for task in range(ROOTS)]
        )
        source = texts.write(root / f"requests{number}.jsonl", requests)
        output = str(root / f"names{number}.jsonl")
        routed, seconds = measured(
            f"route {number} texts",
            functools.partial(library.route, at, source, output, READING),
        )
        times.append(seconds)
        right = 0
        passes = 0
        for place, request in enumerate(routed):
            passes += len(request.losses)
            right += root_of.get(request.name) == place // (number // ROOTS)
        truth("names of the right root", f"{right} of {number}, {passes / number:.0f} passes each")
    if len(numbers) > 1:
        each = (times[-1] - times[0]) / (numbers[-1] - numbers[0])
        truth("seconds per further text", f"{each:.4f}")


@click.command()
@click.option(
    "--adapters",
    "counts",
    type=click.IntRange(ROOTS, MOST),
    multiple=True,
    default=(32, 256),
    show_default=True,
    help="Number of adapters of a library. May be repeated.",
)
@click.option(
    "--texts",
    "numbers",
    type=click.IntRange(min=ROOTS),
    multiple=True,
    default=(256, 1024),
    show_default=True,
    help="Number of texts to route. May be repeated.",
)
def main(counts: tuple[int, ...], numbers: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    silence(READING)
    texts = Texts()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        base = save_base(root / "base", texts)
        roots = [trained_root(base, texts, task) for task in range(ROOTS)]
        for count in counts:
            adapters = adapters_of(roots, count)
            one_library(root / str(count), str(root / "base"), texts, adapters, numbers)


if __name__ == "__main__":
    main()
