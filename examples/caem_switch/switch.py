"""Small Switch Transformers that are pretrained on the texts of the tasks, for those who cannot
fetch google/switch-base.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergeme_tokenizers import train_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from caem_switch.texts import SENTINELS
from mergekit_moe_ext import Reading, Recipe, train

BALANCING = 0.01  # weight of the load-balancing loss, as in the paper of Switch Transformers


@dataclass(frozen=True)
class Shape:
    """The size of a Switch Transformer: `layers` in each of its two stacks, every second of which
    has experts.
    """

    width: int
    heads: int
    ffn: int
    layers: int
    vocabulary: int

    def config(self, experts: int, tokenizer: Any) -> SwitchTransformersConfig:
        return SwitchTransformersConfig(
            vocab_size=len(tokenizer),
            d_model=self.width,
            d_kv=self.width // self.heads,
            d_ff=self.ffn,
            num_heads=self.heads,
            num_layers=self.layers,
            num_decoder_layers=self.layers,
            num_sparse_encoder_layers=self.layers // 2,
            num_sparse_decoder_layers=self.layers // 2,
            num_experts=experts,
            # With shared ones the topics of articles were not learnt (docs/caem.md).
            tie_word_embeddings=False,
            dropout_rate=0.0,  # so small a model has little to spare (docs/caem.md)
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )


@dataclass(frozen=True)
class Pretraining:
    """The recipe of the pretraining, whose loss is measured on `held_out` rows."""

    held_out: int
    steps: int
    batch: int
    learning_rate: float


def tokenizer_of(pretraining: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that is trained on the rows to pretrain on, and ends a text as T5's
    does.
    """
    texts = []
    for line in pretraining.read_text().splitlines():
        row = json.loads(line)
        texts.append(row["input"] + " " + row["target"])
    tokenizer = train_tokenizer("byte-level", texts, vocabulary)
    tokenizer.pad_token = "<s>"  # Switch Transformers have no other use for the beginning's token
    sentinels = [f"<extra_id_{number}>" for number in range(SENTINELS)]
    tokenizer.add_special_tokens({"additional_special_tokens": sentinels})
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return tokenizer


def pretrained(
    folder: Path,
    experts: int,
    shape: Shape,
    pretraining: Pretraining,
    texts: Path,
    reading: Reading,
) -> Path:
    """A Switch Transformer with so many experts that has learnt to fill in hidden spans of words,
    and its losses, in `pretraining.json` beside it. It is made once.
    """
    output = folder / f"switch-{experts}"
    if output.is_dir():
        return output
    rows = texts / "pretraining.jsonl"
    untrained = folder / f"untrained-{experts}"
    if not untrained.is_dir():
        tokenizer = tokenizer_of(rows, shape.vocabulary)
        torch.manual_seed(0)
        model = SwitchTransformersForConditionalGeneration(shape.config(experts, tokenizer))
        # transformers starts both with a deviation of 1, which so few steps hardly move.
        with torch.no_grad():
            model.get_input_embeddings().weight *= 0.3
            model.get_output_embeddings().weight *= 0.1
        tokenizer.save_pretrained(untrained)
        model.save_pretrained(untrained)
    recipe = Recipe(
        learning_rate=pretraining.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=pretraining.steps // 20,
        max_steps=pretraining.steps,
        per_device_train_batch_size=pretraining.batch,
        per_device_eval_batch_size=50,
        router_aux_loss=BALANCING,
        held_out=pretraining.held_out,
        eval_steps=0.25,
        seed=0,
    )
    losses = train(
        str(untrained),
        [f"spans={rows}"],
        "all",
        output=str(output),
        recipe=recipe,
        reading=reading,
        resume=Path(f"{output}.checkpoints").is_dir(),
    )
    assert losses is not None  # this is the only process
    before, after = losses["spans"]
    model = SwitchTransformersForConditionalGeneration.from_pretrained(output)
    report = {"parameters": model.num_parameters(), "loss_before": before, "loss_after": after}
    (output / "pretraining.json").write_text(json.dumps(report))
    return output
