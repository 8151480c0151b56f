"""Add a fourth domain to a trained mixture of a real model, and train its rows of the gates alone.

    python examples/grown_mixture.py --output grown/

1. Fine-tune the FFNs of SmolLM2-135M-Instruct with a LoRA on each of bible, music (ABC notation),
   code (Python) and news. The adapters are trained once and kept.
2. Merge the first three into a mixture with `merge_method: moe_linear`, and train its gates.
3. Add the fourth with `add_expert`: once with the default rows of the gates (the mean of the
   others, and a margin of 5 below them), once with rows made from prompts.
4. Train the new rows of both alone, on texts of all four domains.
5. Print the held-out loss of each domain after each of these.

Models and losses are kept in the output directory as they come. The same command goes on where an
earlier one was interrupted.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
from demo import Recipe as LoraRecipe
from demo import blocks, write_blocks
from demo import train as train_dense
from mergekit.options import MergeOptions
from mergeme_homogeneous import run_mergekit
from peft import LoraConfig, PeftModel, get_peft_model
from real_data import SMOLLM2, Domain, cache_dir, domains, smollm2, written_at_once
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_moe_ext import Reading, Recipe, UserError, add_expert, train

OLD = ["bible", "music", "code"]
NEW = "news"
NAMES = [*OLD, NEW]
FFN = ["gate_proj", "up_proj", "down_proj"]
LORA = {"r": 8, "lora_alpha": 16, "target_modules": FFN, "task_type": "CAUSAL_LM"}
BLOCK = 128  # tokens of one training or held-out sequence
FINE_TUNING = LoraRecipe(steps=12, batch=2, learning_rate=2e-3)
GATE_STEPS = 12
BATCH = 2  # blocks per step of the gates
GATE_LEARNING_RATE = 2e-2
BALANCE = 0.01  # weight of the load-balancing loss where the new rows start low
MARGIN = 2.0  # of the rows from prompts
PROMPTS = 8  # per domain
HELD_OUT_BLOCKS = 4  # per domain
OPTIONS = MergeOptions(quiet=True)
READING = Reading(max_length=BLOCK, quiet=True)

Losses = dict[str, float]


class Results:
    """The held-out losses by model, kept in a file of the output directory."""

    def __init__(self, path: Path, settings: dict[str, int], held_out: dict[str, torch.Tensor]):
        self.path = path
        self.settings = settings
        self.held_out = held_out
        self.losses: dict[str, Losses] = {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != settings:
                raise UserError(f"{path} is of other settings: name another directory")
            self.losses = kept["losses"]

    def measure(self, label: str, folder: Path, lora: Path | None = None) -> None:
        """Measure a model, with an adapter on it if there is one, unless that was done, and print
        its losses.
        """
        if label not in self.losses:
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
            if lora is not None:
                model = PeftModel.from_pretrained(model, lora)
            self.losses[label] = losses_of(model, self.held_out)
            kept = {"settings": self.settings, "losses": self.losses}
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(json.dumps(kept, indent=1))
            partial.replace(self.path)
        cells = "".join(f"{self.losses[label][name]:8.3f}" for name in NAMES)
        click.echo(f"{label:32}{cells}")


@torch.inference_mode()
def losses_of(model: Any, held_out: dict[str, torch.Tensor]) -> Losses:
    """The mean loss of each domain, in nats per token."""
    model.eval()
    result = {}
    for name, rows in held_out.items():
        each = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
        result[name] = torch.stack(each).mean().item()
    return result


def make_loras(base: Path, texts: dict[str, Domain], recipe: LoraRecipe) -> dict[str, Path]:
    """A LoRA per domain, trained on it. Those that were trained before are taken."""
    settings = json.dumps([SMOLLM2.sha256, str(base), LORA, BLOCK, asdict(recipe)])
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    folders = {name: cache_dir() / f"grown-{key}" / name for name in NAMES}
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, folder in folders.items():
        if folder.is_dir():
            continue
        torch.manual_seed(0)
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))
        data = blocks(tokenizer, texts[name].train, recipe.steps * recipe.batch, BLOCK)
        with written_at_once(folder) as partial, tqdm(total=recipe.steps, desc=name) as bar:
            train_dense(model, data, recipe, bar)
            model.save_pretrained(partial)
    return folders


def write_rows(path: Path, tokenizer: Any, documents: list[str], count: int) -> str:
    """Write blocks of text to train gates on, and return the `--data` that names them."""
    write_blocks(path, tokenizer, blocks(tokenizer, documents, count, BLOCK))
    return f"{path.stem}={path}"


def train_gates(
    model: Path, sources: list[str], steps: int, only: Sequence[str] = (), balance: float = 0.0
) -> Path:
    """Train the gates of a mixture, or their rows for the experts in `only`, unless that was done.
    Returns the directory of the trained one.
    """
    trained = model.with_name(f"{model.name}-trained")
    recipe = Recipe(
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=GATE_LEARNING_RATE,
        lr_scheduler_type="cosine",
        router_aux_loss=balance,
        held_out=0,
    )
    if not trained.exists():
        train(str(model), sources, "gates", only_experts=only, recipe=recipe, reading=READING)
    return trained


def prompts(documents: list[str]) -> list[str]:
    """The beginnings of a few documents, a line each."""
    return [" ".join(document.split())[:300] for document in documents[:PROMPTS]]


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the mixtures and `losses.json` (7 GB).",
)
@click.option("--quick", is_flag=True, help="Train one step each, to see that it runs.")
def main(output: Path, quick: bool) -> None:
    recipe = LoraRecipe(1, 1, FINE_TUNING.learning_rate) if quick else FINE_TUNING
    gate_steps = 1 if quick else GATE_STEPS
    held_out_blocks = 1 if quick else HELD_OUT_BLOCKS
    output.mkdir(parents=True, exist_ok=True)
    base = smollm2()
    texts = domains(names=NAMES)
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = {}
    for name, text in texts.items():
        held_out[name] = blocks(tokenizer, text.held_out, held_out_blocks, BLOCK)
    settings = {"fine-tuning": recipe.steps, "gates": gate_steps, "held out": held_out_blocks}
    results = Results(output / "losses.json", settings, held_out)
    loras = make_loras(base, texts, recipe)

    # Gates are trained on the last documents, which no LoRA has read.
    unread = {name: text.train[::-1] for name, text in texts.items()}
    data = []
    for name in NAMES:
        path = output / f"{name}.jsonl"
        data.append(write_rows(path, tokenizer, unread[name], gate_steps * BATCH))

    click.echo(" " * 32 + "".join(f"{name:>8}" for name in NAMES))
    results.measure("base", base)
    results.measure(f"fine-tuned on {NEW}", base, loras[NEW])
    mixture = output / "mixture"
    if not mixture.exists():
        experts = [Path(f"{base}+{loras[name]}") for name in OLD]
        run_mergekit({"merge_method": "moe_linear"}, experts, base, mixture)
    results.measure("three experts, random gates", mixture)
    trained = train_gates(mixture, data[: len(OLD)], gate_steps)
    results.measure("three experts, trained gates", trained)

    # What the new expert is for, and what it is not for.
    not_for: list[str] = []
    for name in OLD:
        not_for += prompts(unread[name])
    starts: dict[str, dict[str, Any]] = {
        "mean": {},
        "prompts": {
            "gate_init": "prompts",
            "margin": MARGIN,
            "positive_prompts": [prompts(unread[NEW])],
            "negative_prompts": [not_for],
        },
    }
    for start, arguments in starts.items():
        grown = output / f"grown-{start}"
        if not grown.exists():
            expert = f"{base}+{loras[NEW]}"
            add_expert(
                str(trained), [expert], str(grown), names=[NEW], options=OPTIONS, **arguments
            )
        results.measure(f"{NEW} added ({start})", grown)
        balance = BALANCE if start == "mean" else 0.0
        rows_trained = train_gates(grown, data, gate_steps, [NEW], balance)
        results.measure(f"{NEW} added ({start}), trained", rows_trained)


if __name__ == "__main__":
    main()
