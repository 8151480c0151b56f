"""Run CAEM on real weights: merge three fine-tunes of one mixture by entropy and by fixed numbers.

    python examples/caem_tasks.py --output caem/

1. Upcycle SmolLM2-135M-Instruct into a mixture of four copies of its FFNs (`moe_linear`).
2. Fine-tune all of it briefly on bible, music and code: three mixtures of one family, each for its
   own task.
3. Count which experts each one uses on texts of its task (`mergekit-moe-ext usage`).
4. Merge them into one of eight experts per layer with `merge_method: caem`, twice: allotted by
   entropy, and 2:3:3 as in the paper's ablation. Draw the first allocation (`allocation.png`, as
   `mergekit-moe-ext plan --plot` does).
5. Fine-tune both briefly on all three tasks. Print the held-out losses before and after, and write
   them to `results.txt`.

It shows how the pieces fit together, not that one allocation is better: one seed, a small model,
very little training. It takes about half an hour on two cores; `--steps 1` shows that it runs.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import yaml
from demo import BLOCK, DOMAINS, blocks, table, write_blocks
from mergeme_homogeneous import BATCH, READING, write_texts
from real_data import Domain, domains, smollm2
from transformers import AutoTokenizer

from mergekit_moe_ext import Recipe, UserError, count_usage, train

SOURCE_EXPERTS = 4
MERGED_EXPERTS = 8
FIXED = dict(zip(DOMAINS, (2, 3, 3), strict=True))
CALIBRATION_BLOCKS = 8  # per task
LEARNING_RATE = 1e-4


def run(*command: str | Path) -> str:
    """Runs a command that is installed beside this Python, and returns what it prints."""
    name, *arguments = map(str, command)
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or name
    click.echo("$ " + " ".join([name, *arguments]), err=True)
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(done.stderr)
    return done.stdout


def merge(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """The merged model, in `folder` under this name, with its configuration beside it."""
    file = folder / f"{name}.yml"
    file.write_text(yaml.safe_dump({**config, "dtype": "float32"}, sort_keys=False))
    run("mergekit-yaml", file, folder / name, "--random-seed", "0", "--quiet")
    return folder / name


def fine_tune(
    model: Path, output: Path, data: list[str], steps: int, eval_data: list[str]
) -> dict[str, Any]:
    """Fine-tunes all of a model. Returns the losses before and after, per source of `eval_data`."""
    recipe = Recipe(
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=2,
        held_out=0,
        eval_steps=steps,
    )
    losses = train(
        str(model),
        data,
        "all",
        output=str(output),
        recipe=recipe,
        reading=READING,
        eval_data=eval_data,
    )
    return losses or {}


def make_source(
    upcycled: Path, name: str, text: Domain, data: str, steps: int, tokenizer: Any, usage_file: Path
) -> Path:
    """A fine-tune of the mixture on one task, beside it, whose usage of experts on texts of the
    task is written to a file.

    data: the file of blocks that it is trained on.
    """
    click.echo(f"fine-tuning on {name}", err=True)
    model = upcycled.with_name(f"moe-{name}")
    fine_tune(upcycled, model, [data], steps, [])
    documents = text.train[len(text.train) // 2 :]
    calibration = upcycled.with_name(f"{name}-calibration.jsonl")
    write_blocks(calibration, tokenizer, blocks(tokenizer, documents, CALIBRATION_BLOCKS))
    usage = count_usage(str(model), [f"{name}={calibration}"], reading=READING, batch_size=2)
    assert usage is not None  # this is the only process
    usage.write(usage_file)
    return model


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the results; it must be new or empty.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Number of training steps of each fine-tuning.",
)
def main(output: Path, steps: int) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} is not empty. Remove it, or name another.")
    output.mkdir(parents=True, exist_ok=True)
    base = smollm2()
    texts = domains()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        folder = Path(scratch)
        files = write_texts(folder, tokenizer, texts, steps * len(DOMAINS))
        upcycled = merge(
            folder,
            "upcycled",
            {"merge_method": "moe_linear", "models": [{"model": str(base)}] * SOURCE_EXPERTS},
        )
        entries: dict[str, list[dict[str, Any]]] = {"entropy": [], "fixed": []}
        for name, data in zip(DOMAINS, files["train"], strict=True):
            usage_file = output / f"{name}.usage.json"
            model = make_source(upcycled, name, texts[name], data, steps, tokenizer, usage_file)
            parameters = {"usage": str(usage_file)}
            entries["entropy"].append({"model": str(model), "parameters": parameters})
            entries["fixed"].append(
                {"model": str(model), "parameters": {**parameters, "experts": FIXED[name]}}
            )
        rows_of_table: dict[str, dict[str, float]] = {}
        allocation = ""
        for kind, models in entries.items():
            config = {
                "merge_method": "caem",
                "models": models,
                "parameters": {"num_experts": MERGED_EXPERTS, "allocation": kind},
            }
            merged = merge(folder, f"caem-{kind}", config)
            if kind == "entropy":
                config_file = folder / f"caem-{kind}.yml"
                allocation = run(
                    "mergekit-moe-ext", "plan", config_file, "--plot", output / "allocation.png"
                )
            click.echo(f"fine-tuning the merged model ({kind})", err=True)
            losses = fine_tune(
                merged, folder / f"tuned-{kind}", files["train"], steps, files["held_out"]
            )
            rows_of_table[f"{kind}, merged"] = {name: both[0] for name, both in losses.items()}
            rows_of_table[f"{kind}, and fine-tuned"] = {
                name: both[1] for name, both in losses.items()
            }
    title = f"Held-out loss ({BLOCK * BATCH * steps} tokens of mixed fine-tuning)"
    text = f"{title}\n\n{table(rows_of_table)}\n\n{allocation}"
    (output / "results.txt").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
