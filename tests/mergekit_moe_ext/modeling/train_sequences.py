"""Two steps of SGD with the Trainer over a sequence MoE; a program of its own for the tests on two
processes.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import mergekit_moe_ext  # noqa: F401
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        train(name, f"{name}-two", sys.argv[1])
