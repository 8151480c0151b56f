"""Train the gates of a generic mixture on real texts: a small Gemma 2 or GPT-2 of three domains.

    python examples/upcycled_gates.py --model gemma2

1. Train a small model from scratch on bible, music (ABC notation) and code (Python) together, with
   a tokenizer of its own.
2. Train a copy further on each domain and, to compare, one on all three, with as many tokens as the
   three copies together.
3. Merge the three copies with `moe_linear` into a mixture. transformers has none for these
   architectures, so it is a generic one (`UpcycledMoe…`). Its gates start at random, once per seed,
   or at zero.
4. Train the random gates, and print the held-out loss of all these models per domain.

It takes a few minutes.
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from demo import DOMAINS
from mergeme_hetero import merge
from mergeme_tokenizers import train_tokenizer
from real_data import Domain, domains
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mergekit_moe_ext import Reading, Recipe, train
from mergekit_moe_ext.analysis import check_new_file

TOKENS = 2000  # of the tokenizer
BLOCK = 64  # tokens of a text
BATCH = 8
HELD_OUT_BLOCKS = 64  # per domain
LEARNING_RATES = {"base": 3e-3, "domain": 1e-3, "gates": 1e-2}

Losses = dict[str, float]


def new_model(kind: str, vocab_size: int) -> PreTrainedModel:
    """A model with random weights, of width 64 and 2 layers."""
    torch.manual_seed(0)
    common = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_positions=BLOCK, n_embd=64, n_layer=2, n_head=4, **common)
        )
    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=32,
            max_position_embeddings=BLOCK,
            pad_token_id=2,
            **common,
        )
    )


def all_blocks(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """The blocks of all documents, each of which begins with <s>: (blocks, BLOCK) ids."""
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False).input_ids]
    count = len(ids) // BLOCK
    return torch.tensor(ids[: count * BLOCK]).view(count, BLOCK)


def train_dense(model: Any, data: torch.Tensor, steps: int, rate: float, name: str) -> None:
    """Train all parameters on blocks that are drawn from the data (blocks, BLOCK)."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _step in tqdm(range(steps), desc=name):
        batch = data[torch.randint(len(data), (BATCH,))]
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.inference_mode()
def losses_of(path: Path, held_out: dict[str, torch.Tensor]) -> Losses:
    """The mean loss of each domain, in nats per token."""
    model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    return {name: model(ids, labels=ids).loss.item() for name, ids in held_out.items()}


def make_models(
    kind: str, texts: dict[str, Domain], folder: Path, steps: int
) -> dict[str, torch.Tensor]:
    """Write the dense models into the folder, and the files that gates are trained on. Returns the
    held-out blocks of each domain.
    """
    sample = []
    for text in texts.values():
        sample += text.train[:100]
    tokenizer = train_tokenizer("byte-level", sample, TOKENS)
    data = {}
    held_out = {}
    for name, text in texts.items():
        # Gates are trained on documents that no model has read: the last tenth.
        last = len(text.train) * 9 // 10
        data[name] = all_blocks(tokenizer, text.train[:last][:400])
        rows = [json.dumps({"text": document}) for document in text.train[last:]]
        (folder / f"{name}.jsonl").write_text("\n".join(rows[:100]) + "\n")
        held_out[name] = all_blocks(tokenizer, text.held_out)[:HELD_OUT_BLOCKS]
    smallest = min(map(len, data.values()))
    pooled = torch.cat([ids[:smallest] for ids in data.values()])

    def save(model: Any, name: str) -> None:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    base: Any = new_model(kind, len(tokenizer))
    click.echo(f"{base.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    train_dense(base, pooled, steps, LEARNING_RATES["base"], "base")
    save(base, "base")
    further = {name: (data[name], steps // 2) for name in DOMAINS}
    further["all"] = (pooled, len(DOMAINS) * (steps // 2))
    for name, (ids, number) in further.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        train_dense(model, ids, number, LEARNING_RATES["domain"], name)
        save(model, name)
    return held_out


def train_gates(mixture: Path, data: Sequence[str], steps: int, seed: int) -> Path:
    """Train the gates of a mixture. Returns the directory of the trained one."""
    recipe = Recipe(
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATES["gates"],
        lr_scheduler_type="cosine",
        held_out=0,
        packing=True,
        seed=seed,
    )
    reading = Reading(max_length=BLOCK, quiet=True)
    train(str(mixture), data, "gates", recipe=recipe, reading=reading)
    return mixture.with_name(f"{mixture.name}-trained")


def report(rows: dict[str, list[Losses]]) -> str:
    """A line per model: the mean over seeds by domain, the mean over domains, and its range."""
    lines = [" " * 26 + "".join(f"{name:>8}" for name in [*DOMAINS, "mean"])]
    for row, of_seeds in rows.items():
        cells = []
        for name in DOMAINS:
            cells.append(statistics.mean(losses[name] for losses in of_seeds))
        means = [statistics.mean(losses.values()) for losses in of_seeds]
        cells.append(statistics.mean(means))
        line = f"{row:26}" + "".join(f"{value:8.3f}" for value in cells)
        if len(of_seeds) > 1:
            line += f"  ({min(means):.3f} to {max(means):.3f})"
        lines.append(line)
    return "\n".join(lines)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--model",
    "kind",
    type=click.Choice(["gemma2", "gpt2"]),
    default="gemma2",
    show_default=True,
    help="Architecture of the models.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the losses (JSON).",
)
@click.option(
    "--steps",
    type=click.IntRange(min=4),
    default=160,
    show_default=True,
    help="Number of training steps of the base; a domain's model has half of it.",
)
@click.option(
    "--gate-steps",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Number of training steps of the gates.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of mixtures with random gates.",
)
def main(kind: str, output: Path | None, steps: int, gate_steps: int, seeds: int) -> None:
    if output:
        check_new_file(output)
    texts = domains(names=DOMAINS)
    rows: dict[str, list[Losses]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        held_out = make_models(kind, texts, folder, steps)
        data = [f"{name}={folder / name}.jsonl" for name in DOMAINS]
        rows["base"] = [losses_of(folder / "base", held_out)]
        for name in DOMAINS:
            rows[f"trained on {name}"] = [losses_of(folder / name, held_out)]
        rows["trained on all"] = [losses_of(folder / "all", held_out)]
        experts = [folder / name for name in DOMAINS]
        zeros = {"merge_method": "moe_linear", "parameters": {"gate_mode": "zeros"}}
        merge(zeros, experts, folder / "base", folder / "zeros", 0)
        rows["mixture, gates of zero"] = [losses_of(folder / "zeros", held_out)]
        random: list[Losses] = []
        trained: list[Losses] = []
        for seed in range(seeds):
            mixture = folder / f"mixture-{seed}"
            merge({"merge_method": "moe_linear"}, experts, folder / "base", mixture, seed)
            random.append(losses_of(mixture, held_out))
            trained.append(losses_of(train_gates(mixture, data, gate_steps, seed), held_out))
        rows["mixture, random gates"] = random
        rows["mixture, trained gates"] = trained
    click.echo("Held-out loss, nats per token: means over seeds, and the range of the last column")
    click.echo(report(rows))
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
