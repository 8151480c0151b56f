"""Repeat MergeME's Table 4 at small scale: an expert of another architecture and tokenizer.

    python examples/mergeme_hetero.py -o hetero.jsonl --plot hetero.png

A base and its bible and code experts become one model with a music expert of another maker: a small
GPT-2, trained from scratch on music alone, with a SentencePiece tokenizer of its own, whose rules
are Llama's. `hetero_moe` makes it, with the base's tokenizer. Its embeddings and projectors are
made in three ways, and each mixture is trained. Beside them are the paper's controls: the dense
models, and a mixture of the other three experts (BTX), trained on the same texts or on all but the
music.

The base and its experts are those of `mergeme_small.py`, Llamas of one million parameters that are
trained here, so that mixtures can be trained for more than a few steps. The music expert has read
the music that the base and the music expert there have read together. All dense models are trained
once and kept. Mixtures read other documents than these. The learning rates of each row are the best
of some on validation texts, which no model is trained or measured on; then each row is trained with
three seeds and measured on held-out texts.

A sequence chooses by its first 32 tokens, so every loss here, of dense models too, is that of the
text after them. Losses are nats per character, which do not depend on a tokenizer.

Each result is a line of the output file, written when it is there; a run that was interrupted goes
on after the last.
"""

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
import yaml
from demo import BLOCK, DOMAINS, blocks, write_blocks
from demo import Recipe as ExpertRecipe
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergeme_homogeneous import means
from mergeme_sequence import PREFIX, choices, draw, largest, load
from mergeme_small import SCALES, SHARES, Scale, divided, make_models
from mergeme_tokenizers import train_tokenizer
from real_data import Domain, domains
from small_models import ends_of, folder_of, train_from_scratch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from verdicts import judge, single

from mergekit_moe_ext import Reading, Recipe, UserError, train
from mergekit_moe_ext.analysis import check_new_figure, format_table

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
DENSE = ["base", "bible expert", "code expert", "music expert"]
READING = Reading(max_length=BLOCK, quiet=True)
# Of what comes from the sources, of all mixtures; and of projectors, where there are any. Gates and
# routers have the rate that was best for gates alone in `mergeme_small.py`.
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
PROJECTOR_LEARNING_RATES = (1e-3, 1e-2)
ROUTER_LEARNING_RATE = 1e-2
MUSIC_LEARNING_RATE = 2e-3
GPT2 = {"n_layer": 3, "n_embd": 96, "n_head": 4, "n_positions": 512}
MUSIC_TOKENIZER = "llama"
MUSIC_TOKENS = 2000

Losses = dict[str, float]


@dataclass(frozen=True)
class Rates:
    """At which rates a mixture is trained. `projector` is None where there are no projectors."""

    sources: float
    projector: float | None = None

    def __str__(self) -> str:
        if self.projector is None:
            return f"{self.sources:g}"
        return f"{self.sources:g} (projectors {self.projector:g})"


def rates_of(row: str) -> list[Rates]:
    """The rates that are tried for a row."""
    has_projectors = row in HETERO and HETERO[row].get("embedding") != "separate"
    of_projectors = PROJECTOR_LEARNING_RATES if has_projectors else (None,)
    return [Rates(*both) for both in product(LEARNING_RATES, of_projectors)]


def music_recipe(scale: Scale) -> ExpertRecipe:
    """How the music expert is trained: on as much music as the base and a music expert of it."""
    steps = scale.base.steps // len(DOMAINS) + scale.expert.steps
    return ExpertRecipe(steps, scale.expert.batch, MUSIC_LEARNING_RATE)


def make_music_expert(texts: dict[str, Domain], scale: Scale) -> Path:
    """A GPT-2 of half a million parameters that has seen nothing but music, through a tokenizer
    that was trained on music.
    """
    shares = divided(texts)
    documents = [*shares["base"]["music"].train, *shares["experts"]["music"].train]
    recipe = music_recipe(scale)
    settings = [asdict(recipe), GPT2, MUSIC_TOKENIZER, MUSIC_TOKENS, documents]
    folder = folder_of("music", settings)
    if not folder.is_dir():
        tokenizer = train_tokenizer(MUSIC_TOKENIZER, documents, MUSIC_TOKENS)
        config = GPT2Config(vocab_size=len(tokenizer), **ends_of(tokenizer), **GPT2)
        data = blocks(tokenizer, documents, recipe.steps * recipe.batch)
        train_from_scratch(folder, GPT2LMHeadModel, config, tokenizer, data, recipe)
    return folder


@dataclass
class HeldOut:
    """Sequences to measure on, by domain, each (sequences, BLOCK), and the text of each after the
    prefix that chooses.
    """

    ids: dict[str, Tensor]
    texts: dict[str, list[str]]
    prefixes: dict[str, list[str]]

    @classmethod
    def cut(cls, tokenizer: Any, documents: Mapping[str, list[str]], count: int) -> "HeldOut":
        """The first `count` sequences of each domain's documents."""
        ids = {name: blocks(tokenizer, documents[name], count) for name in DOMAINS}
        after = {name: tokenizer.batch_decode(rows[:, PREFIX:]) for name, rows in ids.items()}
        before = {name: tokenizer.batch_decode(rows[:, :PREFIX]) for name, rows in ids.items()}
        return cls(ids, after, before)

    def characters(self, name: str) -> int:
        """The number of characters of a domain that losses are divided by."""
        return sum(map(len, self.texts[name]))


@torch.inference_mode()
def losses_of(
    model: Any, held_out: HeldOut, coefficients: Mapping[str, Tensor] | None = None
) -> Losses:
    """A model's loss after the prefix, in nats per character, by domain.

    `coefficients` are a sequence MoE's, by domain, (sequences, experts).
    """
    model.eval()
    losses = {}
    for name, sequences in held_out.ids.items():
        nats = 0.0
        for index, ids in enumerate(sequences):
            options = {}
            if coefficients:
                options["coefficients"] = coefficients[name][index, None]
            labels = ids.clone()
            labels[:PREFIX] = -100
            output = model(input_ids=ids[None], labels=labels[None], use_cache=False, **options)
            nats += output.loss.item() * (len(ids) - PREFIX)
        losses[name] = nats / held_out.characters(name)
    return losses


@torch.inference_mode()
def own_loss(folder: Path, donor: Any, held_out: HeldOut) -> float:
    """The loss of the music expert on music through its own tokenizer, in nats per character of the
    same text. `donor` is the tokenizer that cut the sequences.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats = 0.0
    prefixes_and_texts = zip(held_out.prefixes["music"], held_out.texts["music"], strict=True)
    for parts in prefixes_and_texts:
        prefix, text = (part.replace(donor.eos_token, tokenizer.eos_token) for part in parts)
        encoded = tokenizer(prefix + text, return_offsets_mapping=True, return_tensors="pt")
        ends = encoded.offset_mapping[0, :, 1]
        labels = encoded.input_ids[0].masked_fill(ends <= len(prefix), -100)
        loss = model(encoded.input_ids, labels=labels[None]).loss.item()
        nats += loss * int((labels != -100).sum())
    return nats / held_out.characters("music")


def _whole_lines(path: Path) -> list[Any]:
    """The lines of a file of JSON, without the half line that a killed run may have left."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


class Results:
    """The results by row, each of a seed, and the validation losses of learning rates, in a file
    with a line for each.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path = path
        self.lines: list[dict[str, Any]] = []
        self.of_rates: dict[str, dict[str, float]] = {}  # by row and rates, the validation loss
        settings_line = json.loads(json.dumps({"settings": settings}))  # as it is read back
        kept = [settings_line]
        if path and path.is_file():
            kept = _whole_lines(path) or kept
            if kept[0] != settings_line:
                raise UserError(f"{path} is of other settings: name another file")
        for line in kept[1:]:
            if "rates" in line:
                self.of_rates.setdefault(line["of"], {})[line["rates"]] = line["validation"]
            else:
                self.lines.append(line)
        if path:
            # The last line of a run that was killed may be half a line.
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def has(self, row: str, seed: int = 0) -> bool:
        return any(line["row"] == row and line["seed"] == seed for line in self.lines)

    def add(
        self, row: str, losses: Losses, routing: Mapping[str, Tensor] | None = None, seed: int = 0
    ) -> None:
        """Adds the losses by domain, and the mean of the coefficients by domain, if there are any,
        unless a run that was interrupted has done so.
        """
        if self.has(row, seed):
            return
        line: dict[str, Any] = {"row": row, "seed": seed, "losses": losses, "routing": None}
        if routing:
            line["routing"] = {name: rows.mean(dim=0).tolist() for name, rows in routing.items()}
        self.lines.append(line)
        self._write(line)

    def add_rates(self, row: str, rates: Rates, loss: float) -> None:
        """Adds the validation loss of a row trained at some rates, the mean over domains."""
        self.of_rates.setdefault(row, {})[str(rates)] = loss
        self._write({"of": row, "rates": str(rates), "validation": loss})

    def _write(self, line: dict[str, Any]) -> None:
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def best_rates(self, row: str) -> Rates:
        """The rates with the lowest loss on validation texts."""
        of_row = self.of_rates[row]
        return min(rates_of(row), key=lambda rates: of_row[str(rates)])

    def losses(self, row: str) -> list[Losses]:
        """The losses of a row, seed by seed."""
        return [line["losses"] for line in self.lines if line["row"] == row]

    def rows(self) -> list[str]:
        return list(dict.fromkeys(line["row"] for line in self.lines))

    def mean_routing(self) -> dict[str, dict[str, list[float]]]:
        """The coefficients of each row that chooses, by domain and expert, as means over seeds."""
        rows: dict[str, dict[str, list[float]]] = {}
        for row in self.rows():
            of_seeds = [line["routing"] for line in self.lines if line["row"] == row]
            if None not in of_seeds:
                rows[row] = {}
                for name in DOMAINS:
                    rows[row][name] = means([routing[name] for routing in of_seeds])
        return rows

    def text(self, experts: Sequence[str]) -> str:
        """The losses of all rates and rows, the orderings, and the routing."""
        parts = [self.table_of_rates(), self.table(), "\n".join(self.orderings())]
        for row, routing in self.mean_routing().items():
            parts.append(f"{row}\n{format_table(experts, routing)}")
        return "\n\n".join(parts)

    def table_of_rates(self) -> str:
        """The validation losses of each row by its learning rates; the best has a star."""
        lines = ["Mean validation loss by learning rate:"]
        width = max(map(len, self.of_rates), default=0)
        for row, of_row in self.of_rates.items():
            best = min(of_row.values())
            cells = [f"{rates}: {loss:.3f}{'*' * (loss == best)}" for rates, loss in of_row.items()]
            lines.append(f"{row:{width}}  {'  '.join(cells)}")
        return "\n".join(lines)

    def table(self) -> str:
        """The losses by row and domain, and their mean over domains: means over seeds, with the
        standard deviation where there are several.
        """
        rows = self.rows()
        width = max(map(len, rows))
        lines = [" " * width + "".join(f"{name:>16}" for name in [*DOMAINS, "mean"])]
        for row in rows:
            of_seeds = self.losses(row)
            cells = []
            for name in DOMAINS:
                cells.append(_cell([losses[name] for losses in of_seeds if name in losses]))
            # The music expert has no loss on other texts, and so no mean.
            whole = [losses for losses in of_seeds if len(losses) == len(DOMAINS)]
            cells.append(_cell([mean_of(losses) for losses in whole]))
            lines.append(f"{row:{width}}" + "".join(f"{cell:>16}" for cell in cells))
        return "\n".join(lines)

    def orderings(self) -> list[str]:
        """What the paper says of its Table 4, for each kind of mixture, with verdicts by the rule
        of `verdicts.py`.
        """
        of_dense = [losses for row in DENSE for losses in self.losses(row)]
        best = {}
        for name in DOMAINS:
            best[name] = min(losses[name] for losses in of_dense if name in losses)
        whole = [losses for losses in of_dense if len(losses) == len(DOMAINS)]
        best_in_mean = min(whole, key=mean_of)
        lines = []
        for row in HETERO:
            mixtures = self.losses(f"{row}, after")
            if not mixtures:
                continue
            for name in DOMAINS:
                verdict = single([best[name] - losses[name] for losses in mixtures])
                lines.append(f"{row} beats every dense model on {name}: {verdict.text()}")
            verdict = judge([lower_by(losses, best_in_mean) for losses in mixtures])
            lines.append(f"{row} beats every dense model in the mean: {verdict.text()}")
            for control in CONTROLS:
                # In a run that goes on, one may have more seeds than the other.
                of_control = self.losses(f"{control}, after")
                pairs = list(zip(mixtures, of_control, strict=False))
                if not pairs:
                    continue
                on_music = single([theirs["music"] - ours["music"] for ours, theirs in pairs])
                in_mean = judge([lower_by(ours, theirs) for ours, theirs in pairs])
                lines.append(f"{row} beats {control} on music: {on_music.text()}")
                lines.append(f"{row} beats {control} in the mean: {in_mean.text()}")
        return lines


def lower_by(losses: Losses, others: Losses) -> list[float]:
    """By how much losses are lower than others, domain by domain."""
    return [others[name] - losses[name] for name in DOMAINS]


def mean_of(losses: Losses) -> float:
    """The mean over domains."""
    return statistics.mean(losses.values())


def _cell(values: Sequence[float]) -> str:
    """The mean, with the standard deviation of several values; nothing for none."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def measure_dense(
    results: Results, models: Mapping[str, Path], donor: Any, held_out: HeldOut
) -> None:
    """Measures the base and the experts, each alone."""
    for name, path in models.items():
        row = name if name == "base" else f"{name} expert"
        if results.has(row):
            continue
        if name == "music":
            results.add(row, {"music": own_loss(path, donor, held_out)})
        else:
            results.add(row, losses_of(AutoModelForCausalLM.from_pretrained(path), held_out))


def measure_untrained(
    results: Results,
    model: Any,
    experts: Sequence[str],
    held_out: HeldOut,
) -> None:
    """Measures what needs no training: the music expert alone, through the base's tokenizer, and
    routing by perplexity, with logits added up or probabilities.
    """
    only_music = torch.tensor([[float(name == "music") for name in experts]])
    alone = {name: only_music.expand(len(rows), -1) for name, rows in held_out.ids.items()}
    results.add("music expert, base's tokenizer", losses_of(model, held_out, alone))
    config = model.config
    usual = {key: getattr(config, key) for key in ("routing", "experts_per_sequence", "combine")}
    config.routing = "perplexity"
    config.experts_per_sequence = len(experts)
    of_all = choices(model, held_out.ids)
    for combine in ("logits", "probabilities"):
        config.combine = combine
        for k in (1, 2):
            if k == 1 and combine == "probabilities":
                continue  # one expert's logits either way
            coefficients = {name: largest(rows, k) for name, rows in of_all.items()}
            row = f"own embeddings, perplexity, K={k}"
            if combine == "probabilities":
                row += ", probabilities"
            results.add(row, losses_of(model, held_out, coefficients), coefficients)
    for key, value in usual.items():
        setattr(config, key, value)


def merge(
    method: Mapping[str, Any], models: Sequence[Path], base: Path, output: Path, seed: int
) -> None:
    """Does what `mergekit-yaml` does, without a process of its own for each of many mixtures."""
    from mergekit.merge import run_merge

    config = {
        **method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        "dtype": "float32",
    }
    options = MergeOptions(random_seed=seed, quiet=True)
    source = yaml.safe_dump(config)
    parsed = MergeConfiguration.model_validate(config)
    run_merge(parsed, str(output), options, config_source=source)


def write_training(
    folder: Path, tokenizer: Any, texts: Mapping[str, Domain], names: Sequence[str], count: int
) -> list[str]:
    """Writes at least `count` rows to train on, as many of each of these domains. Returns the
    `--data` of a training.
    """
    folder.mkdir()
    named = []
    for name in names:
        rows = blocks(tokenizer, texts[name].train, -(-count // len(names)))
        path = folder / f"{name}.jsonl"
        write_blocks(path, tokenizer, rows)
        named.append(f"{name}={path}")
    return named


@dataclass
class Bench:
    """The models and the texts, and what merges and trains the mixture of a row.

    data: by row the `--data` that its mixture is trained on.
    """

    models: dict[str, Path]
    data: Mapping[str, Sequence[str]]
    scale: Scale
    scratch: Path

    def merged(self, row: str, seed: int) -> Path:
        """A new directory with the mixture of a row."""
        output = self.scratch / "merged"
        base = self.models["base"]
        if row in HETERO:
            method = {"merge_method": "hetero_moe", "parameters": HETERO[row]}
            merge(method, list(self.models.values()), base, output, seed)
        else:
            others = [path for name, path in self.models.items() if name != "music"]
            merge({"merge_method": "moe_linear"}, others, base, output, seed)
        return output

    def trained(self, merged: Path, row: str, rates: Rates, seed: int) -> Any:
        """The mixture of a row after a training of all its parameters, as in the paper.

        The router, or the gates, and projectors start at random and learn faster than what comes
        from the sources.
        """
        steps = self.scale.steps
        recipe = Recipe(
            learning_rate=rates.sources,
            router_learning_rate=ROUTER_LEARNING_RATE,
            projector_learning_rate=rates.projector,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, steps - 1),
            max_steps=steps,
            per_device_train_batch_size=self.scale.batch,
            held_out=0,
            seed=seed,
        )
        output = self.scratch / "trained"
        train(
            str(merged), self.data[row], "all", output=str(output), recipe=recipe, reading=READING
        )
        return load(output)


def search(bench: Bench, results: Results, validation: HeldOut, only: Sequence[str]) -> None:
    """Measures all learning rates of these rows on validation texts, with one seed."""
    for row in only:
        known = results.of_rates.get(row, {})
        missing = [rates for rates in rates_of(row) if str(rates) not in known]
        if not missing:
            continue
        merged = bench.merged(row, seed=0)
        for rates in tqdm(missing, desc=f"rates of {row}"):
            model = bench.trained(merged, row, rates, seed=0)
            results.add_rates(row, rates, mean_of(losses_of(model, validation)))
        shutil.rmtree(merged)


def measure_mixtures(
    bench: Bench,
    results: Results,
    held_out: HeldOut,
    seeds: int,
    only: Sequence[str],
) -> None:
    """Merges, trains and measures the mixtures of these rows, seed by seed."""
    runs = [(seed, row) for seed in range(seeds) for row in only]
    for seed, row in tqdm(runs, desc="mixtures"):
        if results.has(f"{row}, after", seed):
            continue
        merged = bench.merged(row, seed)
        model = AutoModelForCausalLM.from_pretrained(merged)
        if row == "own embeddings" and seed == 0:
            measure_untrained(results, model, list(bench.models), held_out)
        measure(results, f"{row}, before", model, held_out, seed)
        del model
        model = bench.trained(merged, row, results.best_rates(row), seed)
        measure(results, f"{row}, after", model, held_out, seed)
        del model
        shutil.rmtree(merged)


def measure(
    results: Results,
    row: str,
    model: Any,
    held_out: HeldOut,
    seed: int,
) -> None:
    """Measures a mixture, and which experts it chooses if they are whole models."""
    coefficients = choices(model, held_out.ids) if hasattr(model, "experts") else None
    results.add(row, losses_of(model, held_out, coefficients), coefficients, seed)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the results, *.jsonl; a run goes on where an earlier one ended.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for a figure of the routing: *.png, *.pdf or *.svg.",
)
@click.option(
    "--scale",
    "scale_name",
    type=click.Choice(list(SCALES)),
    default="small",
    show_default=True,
    help="Size of the experiment: an hour, or minutes that show that it runs.",
)
@click.option(
    "--only",
    type=click.Choice([*HETERO, *CONTROLS]),
    multiple=True,
    default=[*HETERO, *CONTROLS],
    help="Row of the table to measure. May be repeated. [default: all]",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of seeds of what is drawn at random or trained.",
)
def main(
    output: Path | None, plot: Path | None, scale_name: str, only: tuple[str, ...], seeds: int
) -> None:
    if plot:
        check_new_figure(plot)
    scale = SCALES[scale_name]
    settings: dict[str, Any] = {**asdict(scale), "block": BLOCK, "shares": SHARES}
    settings |= {"rates": LEARNING_RATES, "projector_rates": PROJECTOR_LEARNING_RATES}
    settings |= {"router_rate": ROUTER_LEARNING_RATE, "music": asdict(music_recipe(scale))}
    settings |= {"gpt2": GPT2, "music_tokenizer": [MUSIC_TOKENIZER, MUSIC_TOKENS]}
    results = Results(output, settings)
    texts = domains()
    shares = divided(texts)
    models = make_models(texts, scale)
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    models["music"] = make_music_expert(texts, scale)
    documents = {name: shares["validation"][name].train for name in DOMAINS}
    validation = HeldOut.cut(tokenizer, documents, scale.validation)
    documents = {name: texts[name].held_out for name in DOMAINS}
    held_out = HeldOut.cut(tokenizer, documents, scale.held_out)
    measure_dense(results, models, tokenizer, held_out)
    with tempfile.TemporaryDirectory() as scratch:
        data = {}
        for row in only:
            names = CONTROLS.get(row, DOMAINS)
            count = scale.steps * scale.batch
            folder = Path(scratch) / row
            data[row] = write_training(folder, tokenizer, shares["mixtures"], names, count)
        bench = Bench(models, data, scale, Path(scratch))
        search(bench, results, validation, only)
        measure_mixtures(bench, results, held_out, seeds, only)
    click.echo(results.text(list(models)))
    if plot:
        draw(results.mean_routing(), list(models), plot)


if __name__ == "__main__":
    main()
