"""Repeat MergeME's Tables 2 to 4 at small scale: whole models as experts, chosen per sequence.

    python examples/mergeme_sequence.py -o sequence.json --plot sequence.png
    python examples/mergeme_sequence.py --base small -o small.json
    python examples/mergeme_sequence.py --base adapters --only "merged attention" --time
    python examples/mergeme_sequence.py --hetero -o hetero.json --plot hetero.png

Without `--hetero` these are Tables 2 and 3, with it Table 4. The base and the three experts are
those of `mergeme_homogeneous.py`, trained once and kept. With `--base adapters` the experts are
those of `demo.py`, LoRA adapters that are merged into copies of the base. With `--base small` they
are the Llamas of one million parameters of `mergeme_small.py`, others for every seed: all are
trained here, in some minutes for each seed. `--base quick` is the same after two steps of training,
to see that it runs.

Both runs print the held-out loss of each model per domain, and which expert each domain is routed
to. `--output` keeps these numbers and `--plot` draws the routing.

Without `--hetero` nothing is trained. The rows are dense merges, the averaged mixture with random
gates, and `seq_moe` with each heuristic, its attention separate or merged, and with FFN outputs
mixed in every layer. `--time` adds what a token costs each `seq_moe`.

With `--hetero` the music expert is another one: a small GPT-2, trained from scratch on music alone,
with a tokenizer that knows no other words. `hetero_moe` makes one model of it, the base and the
bible and code experts. That is trained for a few steps, beside two controls: a mixture of the other
three, trained on the same texts or on all but the music.

A sequence chooses by its first 32 tokens, so every loss here, of dense models too, is that of the
tokens after them.
"""

import hashlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
from demo import BLOCK, DOMAINS, blocks, make_sources, table
from demo import Recipe as ExpertRecipe
from demo import train as train_dense
from mergeme_homogeneous import BATCH, make_experts, means, run_mergekit, write_texts
from mergeme_small import SCALES, make_models
from peft import PeftModel
from real_data import Domain, cache_dir, domains, smollm2, written_at_once
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from mergekit_moe_ext import Reading, Recipe, train
from mergekit_moe_ext.analysis import (
    check_new_figure,
    check_new_file,
    coefficients_of_sequences,
    format_table,
    heat_map,
    pyplot,
)

PREFIX = 32  # tokens; as `routing_tokens` has it
ROUTED = 16  # sequences per domain whose routing is drawn; it is cheaper than their loss
ROUNDS = 3  # in which mixtures are timed
FURTHER = 10  # tokens, of which the mean time is taken
PAPER = {"density": 0.8, "weight": 1.0, "lambda": 1 / 3}  # appendix A
PLAIN: dict[str, dict[str, Any]] = {
    "Dare dense": {"merge_method": "dare", "parameters": PAPER},
    "Ties dense": {"merge_method": "fast_ties", "parameters": {**PAPER, "normalize": False}},
    "Random routing": {"merge_method": "moe_linear"},
}
SEQUENCE: dict[str, dict[str, str]] = {
    "merged attention": {"attention": "merged"},
    "merged attention, FFNs mixed": {"attention": "merged", "mix": "ffn"},
    "separate attention": {"attention": "separate"},
    "all separate": {"attention": "separate", "embedding": "separate"},
}
# by way of merging and routing: how many experts a sequence chooses
HEURISTICS: dict[str, dict[str, tuple[int, ...]]] = {
    "merged attention": {"task_vector": (2, 1), "perplexity": (3, 2, 1)},
    # with one expert it makes no difference
    "merged attention, FFNs mixed": {"task_vector": (2,), "perplexity": (3, 2)},
    "separate attention": {"task_vector": (2, 1), "perplexity": (2, 1)},
    "all separate": {"perplexity": (2, 1), "uniform": (4,)},
    "own embeddings": {"perplexity": (2, 1)},
}
HETERO: dict[str, dict[str, str]] = {
    "random projectors": {},  # as in the paper
    "identity projectors": {"projector_init": "identity"},
    "own embeddings": {"embedding": "separate"},
}
# the texts that each control is trained on
CONTROLS = {
    "3 experts": DOMAINS,
    "3 experts, no music": ["bible", "code"],
}
READING = Reading(max_length=BLOCK, quiet=True)
MUSIC = ExpertRecipe(steps=400, batch=8, learning_rate=1e-3)
GPT2 = {"n_layer": 6, "n_embd": 256, "n_head": 8, "n_positions": 512}


def cut_tokenizer(base: Path, documents: list[str]) -> PreTrainedTokenizerFast:
    """The base's tokenizer without the tokens that it never makes of the documents, which it splits
    as before.
    """
    whole = AutoTokenizer.from_pretrained(base)
    state = json.loads((base / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    merges = state["model"]["merges"]
    used_ids = set(itertools.chain.from_iterable(whole(documents)["input_ids"]))
    tokens = {token["content"] for token in state["added_tokens"]}
    tokens |= {token for token, index in vocabulary.items() if index in used_ids or len(token) == 1}
    # A token is made of two that were made before it, so from the last merge to the first every
    # part that is still needed is met.
    for first, second in reversed(merges):
        if first + second in tokens:
            tokens |= {first, second}
    in_order = [token for token in vocabulary if token in tokens]
    state["model"]["vocab"] = {token: index for index, token in enumerate(in_order)}
    state["model"]["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= tokens]
    special = ("bos_token", "eos_token", "pad_token", "unk_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **{name: getattr(whole, name) for name in special},
    )


def make_music_expert(base: Path, documents: list[str]) -> Path:
    """A GPT-2 of 5 million parameters that has seen nothing but music."""
    key = hashlib.sha256(json.dumps([asdict(MUSIC), GPT2, BLOCK]).encode()).hexdigest()[:12]
    folder = cache_dir() / f"mergeme-gpt2-{key}" / "music"
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    tokenizer = cut_tokenizer(base, documents)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **ends, **GPT2))
    data = blocks(tokenizer, documents, MUSIC.steps * MUSIC.batch)
    with (
        written_at_once(folder) as partial,
        tqdm(total=MUSIC.steps, desc="music from scratch") as bar,
    ):
        train_dense(model, data, MUSIC, bar)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def merge_adapters(base: Path, texts: dict[str, Domain], folder: Path) -> dict[str, Path]:
    """The base, and in a folder a copy of it for each of the demo's adapters, merged into it."""
    models = {"base": base}
    adapters = make_sources(base, texts, quiet=False)
    for name in DOMAINS:
        models[name] = folder / name
        model: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapters[name]
        )
        model.merge_and_unload().save_pretrained(models[name])
        AutoTokenizer.from_pretrained(base).save_pretrained(models[name])
    return models


@dataclass
class Results:
    """The results per row and seed: held-out losses by domain, and by domain the mean coefficient
    of each expert. By mixture there may be the milliseconds that a token takes.
    """

    losses: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    routing: dict[str, list[dict[str, list[float]]]] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)

    @torch.inference_mode()
    def measure(
        self,
        row: str,
        model: Any,
        held_out: dict[str, Tensor],
        coefficients: dict[str, Tensor] | None = None,
    ) -> None:
        """Adds a model's losses after the prefix, computed one sequence at a time, to a row.

        `coefficients` are a sequence MoE's, by domain, (sequences, experts). The routing is the
        mean over all sequences that there are coefficients for.
        """
        model.eval()
        losses = {}
        for name, sequences in held_out.items():
            labels = sequences.clone()
            labels[:, :PREFIX] = -100
            of_sequences = []
            for index, ids in enumerate(sequences):
                options = {}
                if coefficients:
                    options["coefficients"] = coefficients[name][index, None]
                target = labels[index, None]
                output = model(input_ids=ids[None], labels=target, use_cache=False, **options)
                of_sequences.append(output.loss.item())
            losses[name] = statistics.mean(of_sequences)
        line = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        tqdm.write(f"{row}: {line}", file=sys.stderr)
        self.losses.setdefault(row, []).append(losses)
        if coefficients:
            routing = {
                name: of_domain.mean(dim=0).tolist() for name, of_domain in coefficients.items()
            }
            self.routing.setdefault(row, []).append(routing)

    def mean_losses(self) -> dict[str, dict[str, float]]:
        """The losses of each row by domain, as means over seeds."""
        rows: dict[str, dict[str, float]] = {}
        for row, of_seeds in self.losses.items():
            rows[row] = {}
            for name in DOMAINS:
                rows[row][name] = statistics.mean(losses[name] for losses in of_seeds)
        return rows

    def mean_routing(self) -> dict[str, dict[str, list[float]]]:
        """The coefficients of each row by domain and expert, as means over seeds."""
        rows: dict[str, dict[str, list[float]]] = {}
        for row, of_seeds in self.routing.items():
            rows[row] = {}
            for name in DOMAINS:
                rows[row][name] = means([routing[name] for routing in of_seeds])
        return rows

    def text(self, experts: Sequence[str]) -> str:
        """The losses, the means seed by seed, and the routing of each row that chooses."""
        parts = [table(self.mean_losses())]
        repeated = {row: of_seeds for row, of_seeds in self.losses.items() if len(of_seeds) > 1}
        width = max(map(len, repeated), default=0)
        lines = []
        for row, of_seeds in repeated.items():
            over_domains = [statistics.mean(losses.values()) for losses in of_seeds]
            lines.append(f"{row:{width}}" + "".join(f"{value:9.3f}" for value in over_domains))
        if lines:
            parts.append("\n".join(["Mean over domains, seed by seed:", *lines]))
        if self.times:
            width = max(map(len, self.times))
            lines = [f"{mixture:{width}}{value:9.1f}" for mixture, value in self.times.items()]
            parts.append("\n".join(["Milliseconds of a token:", *lines]))
        for row, routing in self.mean_routing().items():
            parts.append(f"{row}\n{format_table(experts, routing)}")
        return "\n\n".join(parts)


@torch.inference_mode()
def choices(model: Any, routed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The coefficients that a sequence MoE chooses, by domain: (sequences, experts)."""
    model.eval()
    coefficients = {}
    for name, sequences in routed.items():
        batches = [{"input_ids": ids} for ids in sequences.split(4)]
        coefficients[name] = torch.cat(
            [coefficients_of_sequences(model, batch) for batch in batches]
        )
    return coefficients


def largest(coefficients: Tensor, k: int) -> Tensor:
    """The softmax over the k largest scores, from the softmax over all: (sequences, experts)."""
    values, experts = coefficients.topk(k, dim=-1)
    return torch.zeros_like(coefficients).scatter(
        -1, experts, values / values.sum(dim=-1, keepdim=True)
    )


def load(folder: Path) -> Any:
    """The model in a directory, which is deleted: a mixture takes some gigabytes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    return model


def measure_dense(results: Results, models: dict[str, Path], held_out: dict[str, Tensor]) -> None:
    """Measures the base and the experts, each alone."""
    for name, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path)
        results.measure(name if name == "base" else f"{name} expert", model, held_out)


def without_training(
    results: Results,
    models: dict[str, Path],
    held_out: dict[str, Tensor],
    routed: dict[str, Tensor],
    seeds: Sequence[int],
    only: Sequence[str],
    timed: bool,
) -> None:
    """Measures Table 3, and Table 2 with figure 9: the dense models, and these merges, whose time
    per token is measured if they are to be timed.
    """
    base = models["base"]
    measure_dense(results, models, held_out)
    one_by_one = []
    for row in PLAIN:
        if row in only:
            of_row = seeds[:1] if row == "Ties dense" else seeds  # TIES draws nothing
            one_by_one += [(row, seed) for seed in of_row]
    sequence_moes = {kind: options for kind, options in SEQUENCE.items() if kind in only}
    total = len(one_by_one) + len(sequence_moes)
    to_time = {}
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=total, desc="merges") as bar:
        merged = Path(scratch) / "merged"
        for row, seed in one_by_one:
            run_mergekit(PLAIN[row], list(models.values()), base, merged, seed)
            results.measure(row, load(merged), held_out)
            bar.update()
        for kind, options in sequence_moes.items():
            method = {"merge_method": "seq_moe", "parameters": {"shared": "linear", **options}}
            run_mergekit(method, list(models.values()), base, merged)
            model = load(merged)
            measure_heuristics(results, kind, model, held_out, routed)
            if timed:
                to_time[kind] = model
            del model
            bar.update()
    if to_time:
        results.times = times_of_a_token(to_time, held_out[DOMAINS[0]][:1, :PREFIX])
    oracle = {name: results.losses[f"{name} expert"][-1][name] for name in DOMAINS}
    results.losses.setdefault("Oracle: own expert", []).append(oracle)


def measure_heuristics(
    results: Results, kind: str, model: Any, held_out: dict[str, Tensor], routed: dict[str, Tensor]
) -> None:
    """Measures each heuristic, which chooses among all experts once, whatever K."""
    model.config.experts_per_sequence = len(model.experts)
    for routing, numbers in HEURISTICS[kind].items():
        model.config.routing = routing
        of_all = choices(model, routed)
        for k in numbers:
            largest_k = {name: largest(coefficients, k) for name, coefficients in of_all.items()}
            row = f"{kind}, {routing.replace('_', ' ')}, K={k}"
            results.measure(row, model, held_out, largest_k)


@torch.inference_mode()
def times_of_a_token(mixtures: dict[str, Any], prompt: Tensor) -> dict[str, float]:
    """The milliseconds of a further token, for each mixture with one, two and three experts.

    `prompt` is one sequence, (1, tokens). Mixtures take turns; the least time of the rounds counts.
    """
    runs = [(kind, k) for kind in mixtures for k in (1, 2, 3)]
    least: dict[tuple[str, int, int], float] = {}
    for _ in range(ROUNDS):
        for kind, k in runs:
            coefficients = torch.zeros(1, len(mixtures[kind].experts))
            coefficients[:, :k] = 1 / k
            for length in (1, 1 + FURTHER):
                begin = time.perf_counter()
                mixtures[kind].generate(
                    prompt, coefficients=coefficients, min_new_tokens=length, max_new_tokens=length
                )
                seconds = time.perf_counter() - begin
                run = (kind, k, length)
                least[run] = min(seconds, least.get(run, seconds))
    times = {}
    for kind, k in runs:
        further = least[kind, k, 1 + FURTHER] - least[kind, k, 1]
        times[f"{kind}, K={k}"] = 1000 * further / FURTHER
    return times


def heterogeneous(
    models: dict[str, Path],
    tokenizer: Any,
    texts: dict[str, Domain],
    held_out: dict[str, Tensor],
    routed: dict[str, Tensor],
    seeds: int,
    steps: int,
) -> Results:
    """The results of Table 4, and of figures 6 and 8."""
    results = Results()
    base = models["base"]
    others = {name: path for name, path in models.items() if name != "music"}
    measure_dense(results, others, held_out)
    runs = list(itertools.product(range(seeds), [*HETERO, *CONTROLS]))
    with tempfile.TemporaryDirectory() as scratch, tqdm(runs, desc="mixtures") as bar:
        # Enough for a mixture that reads two of the three domains.
        data = write_texts(Path(scratch), tokenizer, texts, 2 * steps)["train"]
        for seed, row in bar:
            merged = Path(scratch) / "merged"
            if row in HETERO:
                method = {"merge_method": "hetero_moe", "parameters": HETERO[row]}
                run_mergekit(method, list(models.values()), base, merged, seed)
            else:
                run_mergekit(
                    {"merge_method": "moe_linear"}, list(others.values()), base, merged, seed
                )
            model = AutoModelForCausalLM.from_pretrained(merged)
            if row == "own embeddings" and seed == 0:
                measure_untrained(results, model, list(models), held_out, routed)
            coefficients = choices(model, routed) if row in HETERO else None
            results.measure(f"{row}, before", model, held_out, coefficients)
            del model
            model = fine_tuned(merged, row, data, steps, seed)
            coefficients = choices(model, routed) if row in HETERO else None
            results.measure(f"{row}, after", model, held_out, coefficients)
    return results


def measure_untrained(
    results: Results,
    model: Any,
    experts: list[str],
    held_out: dict[str, Tensor],
    routed: dict[str, Tensor],
) -> None:
    """Measures what needs no router: the music expert alone, through the base's tokenizer, and
    routing by perplexity.
    """
    only_music = torch.tensor([float(name == "music") for name in experts])
    alone = {name: only_music.expand(len(sequences), -1) for name, sequences in held_out.items()}
    results.measure("music expert (GPT-2)", model, held_out, alone)
    del results.routing["music expert (GPT-2)"]  # which was no choice
    learned_routing = model.config.routing
    experts_per_sequence = model.config.experts_per_sequence
    measure_heuristics(results, "own embeddings", model, held_out, routed)
    model.config.routing = learned_routing
    model.config.experts_per_sequence = experts_per_sequence


def fine_tuned(merged: Path, row: str, data: Sequence[str], steps: int, seed: int) -> Any:
    """A mixture whose parameters are all trained, as in the paper, on the texts of a row; the
    directory that it was merged into is deleted.

    The router, or the gates, and projectors start at random and learn faster than what comes from
    the sources.
    """
    names = CONTROLS.get(row, DOMAINS)
    has_projectors = row in HETERO and HETERO[row].get("embedding") != "separate"
    recipe = Recipe(
        learning_rate=1e-4,
        router_learning_rate=1e-2,
        projector_learning_rate=1e-3 if has_projectors else None,
        lr_scheduler_type="cosine",
        warmup_steps=min(3, steps - 1),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        held_out=0,
        seed=seed,
    )
    read = [source for source in data if source.partition("=")[0] in names]
    trained = merged.with_name("trained")
    train(str(merged), read, "all", output=str(trained), recipe=recipe, reading=READING)
    shutil.rmtree(merged)
    return load(trained)


def draw(
    mean_routing: dict[str, dict[str, list[float]]], experts: Sequence[str], path: Path
) -> None:
    """Draws figure 9: a heat map of the mean coefficients for every row that chooses."""
    plt = pyplot()
    rows = {row: routing for row, routing in mean_routing.items() if "uniform" not in row}
    across = min(4, len(rows))
    down = -(-len(rows) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(2.9 * across, 1.9 * down), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, (row, routing) in zip(panels.flat, rows.items(), strict=False):
        shares = [routing[name] for name in DOMAINS]
        heat_map(axes, shares, 1)
        axes.set_title(row, fontsize=8)
        axes.set_xticks(range(len(experts)), experts)
        axes.set_yticks(range(len(DOMAINS)), DOMAINS)
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                colour = "white" if share > 0.6 else "black"
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("text", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--base",
    "size",
    type=click.Choice(["smollm2", "adapters", *SCALES]),
    default="smollm2",
    show_default=True,
    help="Base that the experts are made from; adapters: SmolLM2, and the adapters of the demo; "
    "small: those of mergeme_small.py; quick: such ones after two steps.",
)
@click.option(
    "--hetero",
    is_flag=True,
    help="Repeat Table 4: a music expert of another architecture, and a short fine-tuning.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the losses and the routing: *.json.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for a figure of the routing: *.png, *.pdf or *.svg.",
)
@click.option(
    "--only",
    type=click.Choice([*PLAIN, *SEQUENCE]),
    multiple=True,
    help="Merge to measure, without --hetero. May be repeated. [default: all]",
)
@click.option(
    "--time", "timed", is_flag=True, help="Time a token of every sequence MoE, without --hetero."
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of seeds of what is drawn at random or trained.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=9,
    show_default=True,
    help="Number of training steps of each mixture; with --hetero.",
)
@click.option(
    "--held-out",
    "count",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help=f"Number of sequences of {BLOCK} tokens to measure on, per domain.",
)
def main(
    size: str,
    hetero: bool,
    output: Path | None,
    plot: Path | None,
    only: tuple[str, ...],
    timed: bool,
    seeds: int,
    steps: int,
    count: int,
) -> None:
    if output:
        check_new_file(output)
    if plot:
        check_new_figure(plot)
    if hetero and (only or timed or size != "smollm2"):
        raise click.UsageError("--only, --time and other bases are of the run without --hetero")
    texts = domains()
    results = Results()
    with tempfile.TemporaryDirectory() as scratch:
        # Experts of SmolLM2 are trained once. The small ones are trained anew for each seed.
        of_seeds: list[tuple[dict[str, Path], Sequence[int]]] = []
        if size in SCALES:
            for seed in range(seeds):
                of_seeds.append((make_models(texts, SCALES[size], seed), [seed]))
        elif size == "adapters":
            of_seeds.append((merge_adapters(smollm2(), texts, Path(scratch)), range(seeds)))
        else:
            of_seeds.append((make_experts(smollm2(), texts), range(seeds)))
        for models, drawn in of_seeds:
            base = models["base"]
            tokenizer = AutoTokenizer.from_pretrained(base)
            number = max(ROUTED, count) if plot else count
            routed = {name: blocks(tokenizer, texts[name].held_out, number) for name in DOMAINS}
            held_out = {name: sequences[:count] for name, sequences in routed.items()}
            if hetero:
                models["music"] = make_music_expert(base, texts["music"].train)
                results = heterogeneous(models, tokenizer, texts, held_out, routed, seeds, steps)
            else:
                chosen = only or [*PLAIN, *SEQUENCE]
                without_training(results, models, held_out, routed, drawn, chosen, timed)
    click.echo(results.text(list(models)))
    if output:
        output.write_text(json.dumps({"experts": list(models), **asdict(results)}, indent=1) + "\n")
    if plot:
        draw(results.mean_routing(), list(models), plot)


if __name__ == "__main__":
    main()
