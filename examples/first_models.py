"""Write small models, LoRA adapters and texts, from which the walks of docs/get_started.md start.

    python examples/first_models.py

A Llama of 0.1 million parameters learns sentences about sums and lines of Python for some seconds.
Then copies of it, and adapters for it, learn more of one of the two. This writes base/, math/,
code/, math-lora/, code-lora/, math.jsonl and code.jsonl, and prints nothing of its own.
"""

import json
import random
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_moe_ext import UserError

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 1}
SENTENCES = 200  # of each kind
BATCH = 16


def sentences() -> dict[str, list[str]]:
    """Texts of both kinds, which have the numbers in common."""
    draw = random.Random(0)
    texts: dict[str, list[str]] = {"math": [], "code": []}
    for _ in range(SENTENCES):
        first = draw.randrange(1, 6)
        second = draw.randrange(1, 6)
        left = NUMBERS[first - 1]
        right = NUMBERS[second - 1]
        total = NUMBERS[first + second - 1]
        texts["math"].append(f"The sum of {left} and {right} is {total} .")
        texts["code"].append(f"def add_{left} ( x ) : return x + {left} # add_{left} ( {right} )")
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A token per word of these texts."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def train(model: Any, tokenizer: Any, texts: list[str], steps: int) -> None:
    """Steps of Adam on random batches of the texts."""
    draw = random.Random(0)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(steps):
        batch = [f"{text} </s>" for text in draw.choices(texts, k=BATCH)]
        inputs = tokenizer(batch, padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--steps", default=60, show_default=True, help="Of each training.")
def main(steps: int) -> None:
    texts = sentences()
    for name in ("base", *texts):
        if Path(name).exists():
            raise UserError(f"{name} exists and is not overwritten: start this somewhere else")
    everything = [*texts["math"], *texts["code"]]
    tokenizer = make_tokenizer(everything)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA))
    train(base, tokenizer, everything, steps)
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    for name, own in texts.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in own)
        Path(f"{name}.jsonl").write_text(rows, encoding="utf-8")
        tuned = LlamaForCausalLM.from_pretrained("base")
        train(tuned, tokenizer, own, steps)
        tuned.save_pretrained(name)
        tokenizer.save_pretrained(name)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained("base"), config)
        train(adapted, tokenizer, own, steps)
        adapted.save_pretrained(f"{name}-lora")


if __name__ == "__main__":
    main()
