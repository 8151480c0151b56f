"""Repeat figure 2 of the Trade-offs paper at small scale: merge and route LoRA experts.

    python examples/tradeoffs_routers.py --output tradeoffs/

1. Train LoRA experts of SmolLM2-135M-Instruct, one per domain of text, all from the same
   initialisation, and the paper's shared expert: one LoRA on all domains, with as many steps as one
   expert (with `--long` also one with as many as all of them). They are trained once and kept.
2. Compose the experts with each router of `peft_routing` (`ROUTED_LORA`). Train the routers that
   learn on a mixture of all domains, without saying which text is of which domain.
3. Write the losses on held-out text (`results.json`, `table.md`) and a figure of their means
   (`figure2.png`). Print the losses and which of the paper's orderings hold.

A second run with the same settings goes on where the first ended. What differs from the paper: the
model (135 M parameters, dequantised from 4 bits; the paper's is Phi-2), the tasks (6 domains of
running text, not 256 tasks of Flan), private experts instead of MBC's, minutes of training at one
learning rate per kind of router, and no ensembles. `mlp` is not in the paper (it is WEMoE's
router); it mixes whole updates, not factors. The range is over seeds, which set the order of the
router's training data and the start of `mlp`; experts and texts stay the same.

All takes an estimated 40 minutes on two idle cores, `--domains 4 --steps 10` about half of that;
`--domains 2 --steps 1 --seeds 1 --expert-steps 2` shows that it runs.
"""

import hashlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
from demo import BLOCK, LORA, SEED, blocks, start_worker, write_blocks
from demo import Recipe as ExpertRecipe
from demo import train as train_lora
from peft import LoraConfig, PeftModel, get_peft_model
from real_data import (
    SMOLLM2,
    Domain,
    Unavailable,
    cache_dir,
    debian_version,
    domains,
    smollm2,
    written_at_once,
)
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from verdicts import judge

from mergekit_moe_ext import UserError
from mergekit_moe_ext.analysis import pyplot
from peft_routing import Reading, Recipe, compose, train

DOMAINS = ("bible", "math", "news", "french", "dictionary", "code")
LEARNING_RATE = 2e-3  # of the experts
BATCH = 2  # blocks per step, of experts and routers
HELD_OUT_BLOCKS = 4  # per domain
READING = Reading(max_length=BLOCK, quiet=True)
SHARED = "shared expert"
SHARED_LONG = "shared expert, long"
Losses = dict[str, float]


@dataclass(frozen=True)
class Method:
    """A router with its options, and how fast it learns."""

    family: str  # for the figure's colours
    options: dict[str, Any]  # of RoutedLoraConfig
    learning_rate: float | None = None  # None: nothing is learned


# Rates were tried by hand, once, with two experts, 10 steps and other held-out blocks than those
# that are measured: linear 1e-3 gave 2.821, 1e-2 2.700; layer 1e-2 2.861, 1e-1 2.793; mlp 1e-4
# 7.237, 1e-3 3.499, 1e-2 2.815 (8.731 untrained, where uniform merging has 2.870). The others have
# the rates of their kind.
METHODS = {
    "uniform": Method("merging", {"router": "uniform", "mixing": "low_rank"}),
    "uniform, full": Method("merging", {"router": "uniform", "mixing": "full"}),
    "global": Method("merging", {"router": "global"}, 1e-1),
    "layer": Method("merging", {"router": "layer"}, 1e-1),
    "Arrow, top 1": Method("Arrow", {"router": "arrow", "top_k": 1}),
    "Arrow, top 4": Method("Arrow", {"router": "arrow", "top_k": 4}),
    "Arrow, all": Method("Arrow", {"router": "arrow", "top_k": len(DOMAINS)}),
    "Arrow, low rank": Method("Arrow", {"router": "linear", "init": "arrow"}),
    "HC": Method("routing", {"router": "hierarchical"}, 1e-2),
    "Arrow HC": Method("routing", {"router": "hierarchical", "init": "arrow"}, 1e-2),
    "linear": Method("routing", {"router": "linear"}, 1e-2),
    "linear, full": Method("routing", {"router": "linear", "mixing": "full"}, 1e-2),
    "linear from Arrow": Method("routing", {"router": "linear", "init": "arrow"}, 1e-2),
    "mlp": Method("routing", {"router": "mlp", "mlp_layers": 1, "mixing": "full"}, 1e-2),
}
# The first is better than the second, as the section of the paper says.
CLAIMS = [
    ("oracle", "linear", "2.4: the oracle is the bound"),
    ("linear", "global", "4.4: routing beats global merging"),
    ("linear", "layer", "4.4: routing beats merging per layer"),
    ("linear", "Arrow, top 4", "4.4: learned routing beats Arrow"),
    ("linear from Arrow", "Arrow, top 4", "4.4: learned routing beats Arrow"),
    ("linear", "HC", "5.3: routing over all experts beats hierarchical clustering"),
    ("Arrow HC", "HC", "5.3: Arrow is the better start for hierarchical clustering"),
    ("Arrow HC", "global", "5.3: Arrow HC beats all merging"),
    ("Arrow HC", "layer", "5.3: Arrow HC beats all merging"),
    ("global", "layer", "4.3: global merging beats merging per layer"),
    ("global", "uniform", "4.3: learned merging beats uniform merging"),
    ("layer", "uniform", "4.3: learned merging beats uniform merging"),
    ("Arrow, top 4", "uniform", "4.1: uniform merging loses to the baselines …"),
    ("uniform", SHARED, "4.1: … except for the shared expert"),
    ("linear", SHARED, "4.4: routing beats the shared expert"),
    ("linear", SHARED_LONG, "4.4: … also one that was trained on as much as all experts"),
    (
        "uniform, full",
        "uniform",
        "B.2: merging whole updates is a little better than merging factors",
    ),
    ("Arrow, top 4", "Arrow, top 1", "B.4: Arrow needs more than one expert"),
]
COLOURS = {"merging": "#4c78a8", "Arrow": "#b8701c", "routing": "#3f8f5f"}


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter to be trained on blocks of text."""

    name: str
    steps: int
    data: torch.Tensor

    @property
    def folder(self) -> Path:
        """The directory where the adapter is kept, named by all that it depends on."""
        recipe = ExpertRecipe(self.steps, BATCH, LEARNING_RATE)
        settings = [SMOLLM2.sha256, SEED, LORA, asdict(recipe), self.data.tolist()]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        return cache_dir() / "tradeoffs" / f"{self.name.replace(', ', '-').replace(' ', '-')}-{key}"


def loras(
    tokenizer: Any, texts: dict[str, Domain], steps: int, long: bool
) -> tuple[list[Lora], list[Lora]]:
    """The experts, each of its own domain, and the shared ones, of all domains."""
    own = {name: blocks(tokenizer, text.train, steps * BATCH) for name, text in texts.items()}
    # a block of each domain in turn
    together = torch.stack(list(own.values()), dim=1).flatten(0, 1)
    shared = [Lora(SHARED, steps, together[: steps * BATCH])]
    if long:
        shared.insert(0, Lora(SHARED_LONG, steps * len(texts), together))
    return [Lora(name, steps, data) for name, data in own.items()], shared


def make_lora(base: Path, lora: Lora) -> None:
    """Trains an adapter, unless it is there. This runs in a process of its own, as the measurements
    do.
    """
    if lora.folder.is_dir():
        return
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(SEED)  # all experts start from the same factors
    model = get_peft_model(model, LoraConfig(**LORA))
    with written_at_once(lora.folder) as partial, tqdm(disable=True) as bar:
        train_lora(model, lora.data, ExpertRecipe(lora.steps, BATCH, LEARNING_RATE), bar)
        model.save_pretrained(partial)


@torch.inference_mode()
def held_out_losses(base: Path, adapter: Path | None, held_out: dict[str, torch.Tensor]) -> Losses:
    """The loss per token of each domain, by which every row of the table is measured."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    losses = {}
    for name, rows in held_out.items():
        of_rows = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
        losses[name] = statistics.mean(of_rows)
    return losses


def measure_base(base: Path, held_out: dict[str, torch.Tensor]) -> tuple[Losses, float]:
    """The losses of the base model, and the seconds of training a router: none here."""
    return held_out_losses(base, None, held_out), 0.0


def measure_lora(base: Path, lora: Lora, held_out: dict[str, torch.Tensor]) -> tuple[Losses, float]:
    """The losses of one adapter, and the seconds of training a router: none here."""
    make_lora(base, lora)
    return held_out_losses(base, lora.folder, held_out), 0.0


def measure_routed(
    base: Path,
    experts: dict[str, Path],
    method: Method,
    clusters: dict[str, int],
    held_out: dict[str, torch.Tensor],
    data: Sequence[str],
    steps: int,
    seed: int,
) -> tuple[Losses, float]:
    """Composes the experts with the router, trains it if it learns, and measures. Returns the
    losses, and the seconds of training the router.
    """
    options = dict(method.options)
    if options.get("top_k"):
        options["top_k"] = min(options["top_k"], len(experts))
    if options["router"] == "hierarchical":
        options["clusters"] = clusters
    with tempfile.TemporaryDirectory(prefix="tradeoffs-") as scratch:
        adapter = Path(scratch) / "composed"
        directories = {name: str(path) for name, path in experts.items()}
        compose(str(base), directories, str(adapter), seed=seed, **options)
        if method.learning_rate is None:
            return held_out_losses(base, adapter, held_out), 0.0
        recipe = Recipe(
            lr_scheduler_type="cosine",
            warmup_steps=min(3, steps - 1),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            held_out=0,
            seed=seed,
        )
        trained = adapter.with_name("trained")
        start = time.perf_counter()
        train(
            str(adapter),
            data,
            output=str(trained),
            recipe=recipe,
            reading=READING,
            learning_rates=[method.learning_rate],
            base=str(base),
        )
        seconds = time.perf_counter() - start
        return held_out_losses(base, trained, held_out), seconds


def write_texts(folder: Path, tokenizer: Any, texts: dict[str, Domain], steps: int) -> list[str]:
    """Writes files for the routers to train on, of documents that no expert has read. Returns the
    `data` of `train`.
    """
    named = []
    for name, text in texts.items():
        rows = blocks(tokenizer, text.train[::-1], -(-steps * BATCH // len(texts)))
        path = folder / f"{name}.jsonl"
        write_blocks(path, tokenizer, rows)
        named.append(f"{name}={path}")
    return named


def cluster(experts: dict[str, Path]) -> dict[str, int]:
    """The cluster of each expert. Clusters are pairs, the most similar ones first, by the cosine of
    all LoRA parameters (the paper's 5.3).
    """
    vectors = {}
    for name, path in experts.items():
        tensors = load_file(path / "adapter_model.safetensors")
        vectors[name] = torch.cat([tensors[key].flatten() for key in sorted(tensors)])

    def similarity(pair: tuple[str, str]) -> float:
        first, second = pair
        return torch.cosine_similarity(vectors[first], vectors[second], dim=0).item()

    pairs = sorted(itertools.combinations(sorted(vectors), 2), key=similarity, reverse=True)
    clusters: dict[str, int] = {}
    for pair in pairs:
        if not clusters.keys() & set(pair):
            clusters |= dict.fromkeys(pair, len(clusters) // 2)
    # of an odd number, one expert is left alone
    return {name: clusters.get(name, len(clusters) // 2) for name in experts}


class Results:
    """The measurements so far, in a file that is written after each."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        methods = {name: asdict(method) for name, method in METHODS.items()}
        self.content: dict[str, Any] = {
            "settings": settings,
            "methods": methods,
            "losses": {},
            "training_seconds": {},
        }
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != settings:
                raise UserError(
                    f"{path} is of other settings. Remove it, or name another --output."
                )
            for name, before in self.content["methods"].items():
                if before != methods.get(name):
                    self.content["losses"].pop(name, None)
            self.content["methods"] = methods

    def has(self, name: str, seed: int) -> bool:
        return str(seed) in self.content["losses"].get(name, {})

    def add(self, name: str, seed: int, losses: Losses, seconds: float) -> None:
        self.content["losses"].setdefault(name, {})[str(seed)] = losses
        self.content["training_seconds"].setdefault(name, {})[str(seed)] = round(seconds, 1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1))
        partial.replace(self.path)

    def rows(self, names: Sequence[str], seeds: int) -> dict[str, list[Losses]]:
        """The losses of each seed, or of the one measurement, per method in that order, with the
        oracle in front.
        """
        losses: dict[str, dict[str, Losses]] = self.content["losses"]
        own = {domain: losses[f"{domain} expert"]["0"][domain] for domain in losses["base"]["0"]}
        rows = {"oracle": [own]}
        for name in names:
            measured_seeds = [str(seed) for seed in range(seeds) if str(seed) in losses[name]]
            rows[name] = [losses[name][seed] for seed in measured_seeds]
        return rows


def mean(losses: Losses) -> float:
    """The mean over domains."""
    return statistics.mean(losses.values())


def orderings(rows: dict[str, list[Losses]], seeds: int) -> list[str]:
    """The paper's claims, each with a verdict by the rule of `verdicts.py`."""
    lines = []
    for better, worse, claim in CLAIMS:
        if not {better, worse} <= rows.keys():
            continue
        pairs = zip(
            of_all_seeds(rows[better], seeds), of_all_seeds(rows[worse], seeds), strict=True
        )
        differences = []
        for lower, higher in pairs:
            differences.append([higher[domain] - lower[domain] for domain in lower])
        lines.append(f"{better} < {worse} ({claim}): {judge(differences).text()}")
    return lines


def of_all_seeds(losses: list[Losses], seeds: int) -> list[Losses]:
    """The losses seed by seed; what was measured once counts for every seed."""
    return losses * seeds if len(losses) == 1 else losses


def table(rows: dict[str, list[Losses]]) -> str:
    """The losses in Markdown: means over seeds, with the range where there are several; the best of
    a column is bold.
    """
    columns = [*next(iter(rows.values()))[0], "mean"]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    with_means: dict[str, list[Losses]] = {}
    for name, losses in rows.items():
        with_means[name] = [{**of_seed, "mean": mean(of_seed)} for of_seed in losses]

    def over_seeds(name: str, column: str) -> float:
        return statistics.mean(of_seed[column] for of_seed in with_means[name])

    best = {}
    for column in columns:
        best[column] = min(over_seeds(name, column) for name in with_means)
    for name, losses in with_means.items():
        cells = []
        for column in columns:
            middle = over_seeds(name, column)
            cell = f"**{middle:.3f}**" if middle == best[column] else f"{middle:.3f}"
            if len(losses) > 1:
                lowest = min(of_seed[column] for of_seed in losses)
                highest = max(of_seed[column] for of_seed in losses)
                cell += f" ({lowest:.3f}..{highest:.3f})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: dict[str, list[Losses]], path: Path) -> None:
    """Draws figure 2: mean held-out losses, with a dot per seed; baselines are lines."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(11, 5))
    lines = {}
    for name in ("base", SHARED, SHARED_LONG, "oracle"):
        if name in rows:
            lines[name] = mean(rows[name][0])
    dots = {}
    heights = {}
    for name in METHODS:
        dots[name] = [mean(losses) for losses in rows[name]]
        heights[name] = statistics.mean(dots[name])
    low = min(*heights.values(), *lines.values())
    high = max(lines.values())
    bottom = low - 0.2 * (high - low)
    top = high + 0.08 * (high - low)
    for position, (name, height) in enumerate(heights.items()):
        # a bar that is far above all baselines would leave no room for the others
        end = min(height, top)
        axes.bar(
            position,
            end - bottom,
            0.72,
            bottom=bottom,
            color=COLOURS[METHODS[name].family],
            zorder=2,
        )
        if METHODS[name].learning_rate is not None:
            axes.scatter([position] * len(dots[name]), dots[name], s=12, color="black", zorder=4)
        inside = {
            "textcoords": "offset points",
            "ha": "center",
            "color": "white",
            "fontsize": 9,
            "zorder": 5,
        }
        axes.annotate(f"{height:.3f}", (position, bottom), (0, 3), **inside)
        if height > top:
            axes.annotate("↑", (position, top), (0, -12), **inside)
    label = bottom
    for name, height in sorted(lines.items(), key=lambda line: line[1]):
        axes.axhline(height, color="#555555", linewidth=1, linestyle="--", zorder=3)
        label = max(height, label + 0.045 * (high - bottom))  # so that no two lie on each other
        axes.text(
            1.005,
            label,
            f"{name} {height:.3f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
        )
    axes.set_xticks(
        range(len(heights)), list(heights), rotation=35, ha="right", rotation_mode="anchor"
    )
    axes.set_ylim(bottom, top)
    axes.set_ylabel("mean held-out loss per token (axis cut)")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(
        handles,
        ["merging", "Arrow (not learned)", "learned routing"],
        frameon=False,
        ncols=3,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the results; a run goes on where an earlier one ended.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Number of training steps of each router.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of seeds."
)
@click.option(
    "--domains",
    "number",
    type=click.IntRange(2, len(DOMAINS)),
    default=len(DOMAINS),
    show_default=True,
    help=f"Number of domains, the first of {', '.join(DOMAINS)}.",
)
@click.option(
    "--expert-steps",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Number of training steps of each expert.",
)
@click.option(
    "--long",
    is_flag=True,
    help="Train also a shared expert with as many steps as all experts have together.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Number of processes at a time.",
)
def main(
    output: Path, steps: int, seeds: int, number: int, expert_steps: int, long: bool, workers: int
) -> None:
    names = DOMAINS[:number]
    try:
        base = smollm2()
        texts = domains(names=names)
    except Unavailable as error:
        raise UserError(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(base)
    own, shared = loras(tokenizer, texts, expert_steps, long)
    experts = {lora.name: lora.folder for lora in own}
    held_out = {
        name: blocks(tokenizer, text.held_out, HELD_OUT_BLOCKS) for name, text in texts.items()
    }
    listed_ids = json.dumps([rows.tolist() for rows in held_out.values()])
    versions = {name: debian_version(name) for name in names}
    settings: dict[str, Any] = {
        "steps": steps,
        "batch": BATCH,
        "block": BLOCK,
        "experts": [folder.name for folder in experts.values()],
        "shared": shared[-1].folder.name,
        "held_out": hashlib.sha256(listed_ids.encode()).hexdigest(),
        "debian": {name: version for name, version in versions.items() if version},
    }
    output.mkdir(parents=True, exist_ok=True)
    results = Results(output / "results.json", settings)
    context = get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="tradeoffs-") as scratch,
        ProcessPoolExecutor(workers, context, start_worker, (context.RLock(),)) as pool,
    ):
        data = write_texts(Path(scratch), tokenizer, texts, steps)
        for job in tqdm([pool.submit(make_lora, base, lora) for lora in own], desc="experts"):
            job.result()
        clusters = cluster(experts)
        jobs: dict[Future, tuple[str, int]] = {}
        dense = {lora.name: lora for lora in shared} | {f"{lora.name} expert": lora for lora in own}
        for name, lora in dense.items():
            if not results.has(name, 0):
                jobs[pool.submit(measure_lora, base, lora, held_out)] = name, 0
        if not results.has("base", 0):
            jobs[pool.submit(measure_base, base, held_out)] = "base", 0
        for seed in range(seeds):
            for name, method in METHODS.items():
                if not results.has(name, seed) and (seed == 0 or method.learning_rate is not None):
                    arguments = (base, experts, method, clusters, held_out, data, steps, seed)
                    jobs[pool.submit(measure_routed, *arguments)] = name, seed
        for done in tqdm(as_completed(jobs), total=len(jobs), desc="measurements"):
            results.add(*jobs[done], *done.result())
    rows = results.rows(["base", *dense, *METHODS], seeds)
    claims = orderings(rows, seeds)
    groups = []
    for index in sorted(set(clusters.values())):
        groups.append(", ".join(name for name in names if clusters[name] == index))
    listed_claims = "\n".join(f"- {claim}" for claim in claims)
    text = f"{table(rows)}\n\nClusters: {'; '.join(groups)}\n\n{listed_claims}\n"
    (output / "table.md").write_text(text)
    draw(rows, output / "figure2.png")
    click.echo(text)


if __name__ == "__main__":
    main()
