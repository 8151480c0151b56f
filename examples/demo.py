"""Merge three fine-tunes of a real model into one mixture of experts, on real texts.

    python examples/demo.py

1. Fetch SmolLM2-135M-Instruct and texts of three domains: bible, music (ABC notation) and code
   (Python).
2. Fine-tune one LoRA adapter per domain, with PEFT and the Hugging Face Trainer.
3. Merge the model and its three fine-tunes into a mixture of four experts: mergekit's command
   `mergekit-yaml` with `merge_method: moe_ties`, a merge method of this package.
4. Train the gates of the result with `mergekit-moe-ext train`, and load it with transformers alone.
5. Print the held-out perplexity of each model, and how the trained mixture continues three prompts.

The models and adapters are fetched and trained once and then kept; `examples/real_data.py` says
where.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Threads that wait for each other actively slow each other down many times on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch
import transformers
from peft import LoraConfig, get_peft_model
from real_data import SMOLLM2, Domain, Unavailable, cache_dir, domains, smollm2, written_at_once
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mergekit_moe_ext import UserError

SEED = 0
WORKERS = 2  # fine-tunes at a time; so small a model uses many cores badly
DOMAINS = ["bible", "music", "code"]
BLOCK = 256  # tokens of one training or held-out sequence
HELD_OUT_BLOCKS = 8  # per domain
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train."""

    steps: int
    batch: int  # blocks per step
    learning_rate: float


FINE_TUNING = Recipe(steps=30, batch=2, learning_rate=2e-3)
GATE_TRAINING = Recipe(steps=30, batch=1, learning_rate=2e-2)

PROMPTS = {
    "bible": "And it came to pass, that",
    "music": "X:1\nT: Das Lied\nM: 3/4\nL: 1/8\nK: G\n",
    "code": "def read_lines(path):\n",
}


def blocks(
    tokenizer: Any, documents: list[str], count: int, length: int | None = None
) -> torch.Tensor:
    """The first `count` blocks of the documents, joined by the end-of-text token: (count, length)
    ids, of BLOCK tokens each if `length` is None.
    """
    size = BLOCK if length is None else length
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * size:
            return torch.tensor(ids[: count * size]).view(count, size)
    raise ValueError(f"The documents fill {len(ids) // size} blocks, not {count}.")


def write_blocks(path: Path, tokenizer: Any, ids: torch.Tensor) -> None:
    """Writes blocks (count, length) of ids as rows of text, which `--data` reads."""
    rows = [json.dumps({"text": tokenizer.decode(block)}) + "\n" for block in ids]
    path.write_text("".join(rows))


def held_out_blocks(tokenizer: Any, texts: dict[str, Domain]) -> dict[str, torch.Tensor]:
    """The held-out blocks of each domain: (HELD_OUT_BLOCKS, BLOCK) ids."""
    return {name: blocks(tokenizer, text.held_out, HELD_OUT_BLOCKS) for name, text in texts.items()}


@torch.inference_mode()
def perplexities(model: Any, held_out: dict[str, torch.Tensor], bar: tqdm) -> dict[str, float]:
    """The perplexity of each domain: the exponential of the mean loss over all tokens that have
    another before them in their block.
    """
    model.eval()
    result = {}
    for name, sequences in held_out.items():
        losses = []
        for sequence in sequences.to(model.device):
            losses.append(model(input_ids=sequence[None], labels=sequence[None]).loss)
            bar.update()
        result[name] = torch.stack(losses).mean().exp().item()
    return result


class Progress(TrainerCallback):
    """Counts the Trainer's steps on a bar of our own: two trainings at once need a line each."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bar.update()


def train(
    model: Any,
    data: torch.Tensor,
    recipe: Recipe,
    bar: tqdm,
    optimizer: Any = None,
    seed: int = SEED,
) -> None:
    """Trains the parameters that require gradients on `data`, (steps * batch, BLOCK) ids, once.

    The optimizer is the Trainer's usual one, at the recipe's learning rate, unless another is
    given. The seed orders the data.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        examples: Any = [{"input_ids": ids, "labels": ids} for ids in data]
        callbacks: Any = [Progress(bar)]
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def make_source(
    name: str, folder: Path, base: Path, texts: dict[str, Domain], line: int, quiet: bool
) -> None:
    """Fine-tunes the base model on a domain, unless `name` is "base", and measures it on every
    domain.

    The adapter and its perplexities are written to `folder`. This runs in a process of its own.
    """
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    held_out = held_out_blocks(tokenizer, texts)
    total = (FINE_TUNING.steps if name != "base" else 0) + sum(map(len, held_out.values()))
    with (
        written_at_once(folder) as partial,
        tqdm(total=total, desc=f"{name:5}", position=line, unit="batch", disable=quiet) as bar,
    ):
        if name != "base":
            model = get_peft_model(model, LoraConfig(**LORA))
            data = blocks(tokenizer, texts[name].train, FINE_TUNING.steps * FINE_TUNING.batch)
            train(model, data, FINE_TUNING, bar)
            model.save_pretrained(partial)
        (partial / "perplexity.json").write_text(json.dumps(perplexities(model, held_out, bar)))


def start_worker(lock: Any) -> None:
    """Prepares a process that trains while others do; `lock` keeps their bars from mixing."""
    # transformers warns of what PEFT does
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    tqdm.set_lock(lock)
    transformers.utils.logging.disable_progress_bar()


def make_sources(base: Path, texts: dict[str, Domain], quiet: bool) -> dict[str, Path]:
    """The folders of the adapters and of the base's perplexities, by name.

    Those that are not there yet are made, WORKERS at a time, which share the cores.
    """
    settings = [SMOLLM2.sha256, SEED, BLOCK, HELD_OUT_BLOCKS, LORA, asdict(FINE_TUNING)]
    content = [[text.train, text.held_out] for text in texts.values()]
    key = hashlib.sha256(json.dumps([settings, content]).encode()).hexdigest()[:12]
    folders = {name: cache_dir() / f"demo-{key}" / name for name in [*DOMAINS, "base"]}
    context = get_context("spawn")
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    with ProcessPoolExecutor(WORKERS, context, start_worker, (context.RLock(),)) as pool:
        jobs = [
            pool.submit(make_source, name, folders[name], base, texts, line, quiet)
            for line, name in enumerate(missing)
        ]
        for job in jobs:
            job.result()  # raises what the job raised
    return folders


CONFIG = """\
# Attention, embeddings and norms: TIES of the three fine-tunes. FFNs: copied, one expert per model.
merge_method: moe_ties
base_model: {base}
models:
  - model: {base}
  - model: {base}+{bible}
  - model: {base}+{music}
  - model: {base}+{code}
parameters:
  density: 0.8
  weight: 1.0
  normalize: false
  lambda: 0.3333
  experts_per_token: 2
  gate_mode: random
dtype: float32
"""


def merge(output: Path, base: Path, folders: dict[str, Path], quiet: bool) -> None:
    """Writes `config.yml` and runs `mergekit-yaml config.yml moe` on it."""
    (output / "config.yml").write_text(CONFIG.format(**{**folders, "base": base}))
    arguments = [str(output / "config.yml"), str(output / "moe"), "--random-seed", str(SEED)]
    if quiet:
        arguments.append("--quiet")
    run_command("mergekit-yaml", arguments, quiet)


def run_command(name: str, arguments: list[str], quiet: bool) -> None:
    """Runs a command that is installed beside this Python, as a user would in a shell."""
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or name
    command = [program, *arguments]
    click.echo("$ " + " ".join(command), err=True)
    if quiet:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    else:
        done = subprocess.run(command)
    if done.returncode != 0:
        raise UserError(f"{name} failed.\n{(done.stdout or b'').decode(errors='replace')}")


def train_gates(output: Path, tokenizer: Any, texts: dict[str, Domain], quiet: bool) -> None:
    """Writes files to train on, all domains in equal parts, and runs `mergekit-moe-ext train` on
    them.

    The documents come from the end of the list, which no fine-tune has read.
    """
    arguments = ["train", str(output / "moe"), "--train", "gates"]
    arguments += ["--output-dir", str(output / "moe-trained")]
    blocks_per_domain = GATE_TRAINING.steps * GATE_TRAINING.batch // len(DOMAINS)
    for name in DOMAINS:
        rows = blocks(tokenizer, texts[name].train[::-1], blocks_per_domain)
        path = output / f"{name}.jsonl"
        write_blocks(path, tokenizer, rows)
        arguments += ["--data", str(path)]
    arguments += ["--max-length", str(BLOCK)]
    arguments += ["--max-steps", str(GATE_TRAINING.steps)]
    arguments += ["--held-out", "0"]
    arguments += ["--per-device-train-batch-size", str(GATE_TRAINING.batch)]
    arguments += ["--seed", str(SEED)]
    arguments += ["--learning-rate", str(GATE_TRAINING.learning_rate)]
    arguments += ["--lr-scheduler-type", "cosine"]
    arguments += ["--warmup-steps", "3"]
    if quiet:
        arguments.append("--quiet")
    run_command("mergekit-moe-ext", arguments, quiet)


def table(rows: dict[str, dict[str, float]]) -> str:
    """A line per model and a column per domain; the best of a column is marked."""
    rows = {name: {**row, "mean": sum(row.values()) / len(row)} for name, row in rows.items()}
    columns = [*DOMAINS, "mean"]
    best = {}
    for column in columns:
        best[column] = min(row[column] for row in rows.values())
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{column:>10}" for column in columns)]
    for name, row in rows.items():
        cells = [f"{row[column]:9.2f}" + "*" * (row[column] == best[column]) for column in columns]
        lines.append(f"{name:{width}} " + "".join(f"{cell:10}" for cell in cells).rstrip())
    return "\n".join(lines)


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """The 40 tokens that the model finds likeliest after the prompt, one after the other."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    return tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def prepare_output(output: Path) -> None:
    """Makes an empty directory. One that this demo wrote is replaced; any other that is not empty
    is refused.
    """
    marker = output / ".written-by-mergekit-moe-ext-demo"
    if output.is_dir() and any(output.iterdir()):
        if not marker.exists():
            raise UserError(f"{output} is not empty. Remove it, or name another with --output.")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Directory for the config and the models (3 GB). The demo's own old output is replaced.",
)
@click.option("--quiet", is_flag=True, help="Show no progress bars.")
def main(output: Path, quiet: bool) -> None:
    output = output.resolve()
    prepare_output(output)
    if quiet:
        transformers.utils.logging.disable_progress_bar()

    click.echo(f"1. Model and texts (kept in {cache_dir()})", err=True)
    try:
        base = smollm2(quiet)
        texts = domains(quiet)
    except Unavailable as error:
        raise UserError(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = held_out_blocks(tokenizer, texts)

    click.echo("2. Fine-tunes, one per domain", err=True)
    folders = make_sources(base, texts, quiet)
    of_sources = {
        name: json.loads((path / "perplexity.json").read_text()) for name, path in folders.items()
    }

    click.echo("3. Merge", err=True)
    merge(output, base, folders, quiet)

    click.echo("4. Gates", err=True)
    moe: Any = AutoModelForCausalLM.from_pretrained(output / "moe")
    sequences = sum(map(len, held_out.values()))
    with tqdm(total=sequences, desc="before", unit="batch", disable=quiet) as bar:
        before = perplexities(moe, held_out, bar)
    del moe
    train_gates(output, tokenizer, texts, quiet)
    moe = AutoModelForCausalLM.from_pretrained(output / "moe-trained")
    with tqdm(total=sequences, desc="after", unit="batch", disable=quiet) as bar:
        after = perplexities(moe, held_out, bar)

    rows = {"base model": of_sources["base"]}
    rows |= {f"fine-tuned on {name}": of_sources[name] for name in DOMAINS}
    rows |= {"mixture, random gates": before, "mixture, trained gates": after}
    click.echo(
        "\nPerplexity on held-out documents (lower is better; * is the best of its column)\n"
    )
    click.echo(table(rows))
    click.echo(
        f"\nBase model: SmolLM2-135M-Instruct, dequantised from Q4_1. Held out: "
        f"{HELD_OUT_BLOCKS * BLOCK} tokens per domain. Seed {SEED}, one run.\n"
        f"Code is the standard library of Python {sys.version.split()[0]}. The learning rate of "
        "the gates was chosen on a part\nof the same held-out text, so the last row is a little "
        "optimistic."
    )
    click.echo("\nThe trained mixture goes on, greedily, from the prompt before the |:")
    for name, prompt in PROMPTS.items():
        click.echo(f"\n[{name}]\n{prompt}|{continuation(moe, tokenizer, prompt)}")
    click.echo(
        f"\nConfig         {output / 'config.yml'}"
        f"\nMerged         {output / 'moe'}"
        f"\nTrained gates  {output / 'moe-trained'}"
        f"\nFine-tunes     {folders['base'].parent}"
    )


if __name__ == "__main__":
    main()
