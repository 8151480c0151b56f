"""Fine-tune a sequence MoE with the Trainer: all of it, or its projectors and router only.

    mergekit-yaml hetero.yml out/
    python examples/seq_moe_finetune.py out/ --data math=math.jsonl --data code=code.jsonl \\
        --output out-trained/

MergeME does so in section 3.2. Every line of a file is a JSON object with a `text`. The model
computes its own loss, which leaves out the tokens by which a sequence chose its experts; texts of
no more than `routing_tokens` tokens teach it nothing. The script prints how many parameters it
trains, and the Trainer prints the loss. It runs on many processes under `accelerate launch`.
"""

from pathlib import Path
from typing import Any

import click
from datasets import concatenate_datasets, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from mergekit_moe_ext import UserError  # importing it makes from_pretrained know the architecture

LEARNING_RATES = {"all": 1e-5, "projectors": 1e-3}  # the paper's; that of the projectors is ours


def choose_parameters(model: Any, part: str) -> int:
    """Leaves gradients only to what is trained, and returns how many parameters that is."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part == "all" or ".proj_" in name or name.startswith("router."))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trained:
        raise UserError("this model has neither projectors nor a learned router: take --train all")
    return trained


def read(sources: dict[str, str], tokenizer: Any, max_length: int) -> Any:
    """The texts of all sources, one source after the other, tokenised."""

    def tokenise(rows: Any) -> Any:
        return tokenizer(rows["text"], truncation=True, max_length=max_length)

    texts = [
        load_dataset("json", data_files=path, split="train").select_columns(["text"])
        for path in sources.values()
    ]
    return concatenate_datasets(texts).map(tokenise, batched=True, remove_columns=["text"])


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.argument("model_path", metavar="MODEL")
@click.option(
    "--data",
    "data",
    multiple=True,
    required=True,
    metavar="NAME=FILE",
    help="Texts to train on: JSON lines with a `text`.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory for the trained model; it must be new or empty.",
)
@click.option(
    "--train",
    "part",
    type=click.Choice(list(LEARNING_RATES)),
    default="projectors",
    show_default=True,
    help="Parameters to train: all, or only the projectors and the router.",
)
@click.option(
    "--learning-rate",
    type=float,
    help="Learning rate of AdamW. [default: 1e-5 for all, as in MergeME; 1e-3 for projectors]",
)
@click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Number of training steps.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Number of texts in a step, per process.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Number of tokens after which a text is cut.",
)
@click.option(
    "--seed", type=int, default=42, show_default=True, help="Seed of the order of the texts."
)
def main(
    model_path: str,
    data: tuple[str, ...],
    output: Path,
    part: str,
    learning_rate: float | None,
    max_steps: int,
    batch_size: int,
    max_length: int,
    seed: int,
) -> None:
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; name another directory")
    sources = dict(source.partition("=")[::2] for source in data)
    missing = [path for path in sources.values() if not Path(path).is_file()]
    if missing:
        raise UserError(f"--data: there is no file {missing[0]!r}; write NAME=FILE")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_path)
    click.echo(
        f"training {choose_parameters(model, part):,} of {model.num_parameters():,} parameters"
    )
    arguments = TrainingArguments(
        output_dir=str(output.with_name(f"{output.name}.checkpoints")),
        learning_rate=learning_rate or LEARNING_RATES[part],
        weight_decay=0.01,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        seed=seed,
        logging_steps=max(1, max_steps // 10),
        save_strategy="no",
        report_to="none",
        ddp_find_unused_parameters=True,  # an expert that no sequence of this process chose
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=read(sources, tokenizer, max_length),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(output))


if __name__ == "__main__":
    main()
