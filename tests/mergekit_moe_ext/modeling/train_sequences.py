"""Two steps over a sequence MoE, of SGD with the Trainer and by the command `train`; a program of
its own for the tests on two processes.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import mergekit_moe_ext
from tests.mergekit_moe_ext.sequences import words

ROWS = [{"input_ids": row, "labels": row} for row in words(8, 12)]


def train(path, out, batch_size, **arguments):
    """Saves what comes out in `out`, and returns the trainer."""
    model = AutoModelForCausalLM.from_pretrained(path)
    trainer = Trainer(
        model,
        TrainingArguments(
            **{
                "output_dir": f"{out}.checkpoints",
                "max_steps": 2,
                "per_device_train_batch_size": int(batch_size),
                "learning_rate": 0.1,
                "lr_scheduler_type": "constant",
                "optim": "sgd",
                "max_grad_norm": 0,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
                "ddp_find_unused_parameters": True,
                **arguments,
            }
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS[:3],
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


def train_by_command(path, out, batch_size):
    """Trains all of a model on `texts.jsonl` beside it, balanced, and ends the group of processes.

    Two batches make a step.
    """
    recipe = mergekit_moe_ext.Recipe(
        max_steps=2,
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        router_learning_rate=1e-2,
        router_aux_loss=0.5,
        held_out=3,
    )
    reading = mergekit_moe_ext.Reading(max_length=12, quiet=True)
    texts = [str(Path(path).with_name("texts.jsonl"))]
    return mergekit_moe_ext.train(path, texts, "all", output=out, recipe=recipe, reading=reading)


if __name__ == "__main__":
    torch.set_num_threads(1)
    batch_size, *names, last = sys.argv[1:]
    for name in names:
        train(name, f"{name}-two", batch_size)
    train_by_command(last, f"{last}-two", batch_size)
