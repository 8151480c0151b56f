"""Measure what another model's tokenizer costs an expert (MergeME 3.2, whose experts share one).

    python examples/mergeme_tokenizers.py -o tokenizers.json

Three small Llamas are trained on the bible and kept, each with a tokenizer of its own of 4 000
tokens: SentencePiece with byte fallback, WordPiece, and a byte-level BPE. `hetero_moe` makes a
mixture of each and SmolLM2-135M-Instruct, with the tokenizer of either. The loss of the other one,
alone in that mixture, is compared with its loss through its own tokenizer, in nats per character of
held-out text. Beside it is the least that it can be: the loss of the source itself, whose own
tokens spell every token of the other tokenizer.

It also prints how each expert goes on with the first text, alone in the mixture and with its own
tokenizer, when it always writes the likeliest token.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from mergeme_homogeneous import run_mergekit
from real_data import cache_dir, domains, smollm2, written_at_once
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mergekit_moe_ext.analysis import Tokens, check_new_file

OPTIONS = ("share", "mean", "unavailable")
KINDS = ("sentencepiece", "wordpiece", "byte-level")
SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = 4000
# A word or other signs, with a space before them, or a digit, or a line's end.
LLAMA_PARTS = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\p{N}|\s"
PROMPT = 80  # characters of the first text
WRITTEN = 32  # tokens
BLOCK = 128
BATCH = 8
LEARNING_RATE = 3e-3
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 512}


def train_tokenizer(
    kind: str, documents: list[str], tokens: int = TOKENS
) -> PreTrainedTokenizerFast:
    """A tokenizer of this kind with so many tokens, trained on the documents.

    "llama" is SentencePiece, too, with Llama's rules: no token goes beyond a digit, a line, or
    letters on one side and other characters on the other.
    """
    options: dict[str, Any] = {"vocab_size": tokens, "show_progress": False}
    trainer: Any
    if kind in ("sentencepiece", "llama"):
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        if kind == "llama":
            # Only the first of the parts that are split off is the beginning of the text.
            split = pre_tokenizers.Split(Regex(LLAMA_PARTS), "isolated")
            first = pre_tokenizers.Metaspace(prepend_scheme="first")
            raw.pre_tokenizer = pre_tokenizers.Sequence([split, first])
        spaces = decoders.Replace("▁", " ")
        raw.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
        every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(special_tokens=SPECIAL + every_byte, **options)
    elif kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(special_tokens=SPECIAL, **options)
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, **options)
    raw.train_from_iterator(documents, trainer)
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **roles)


def make_expert(kind: str, documents: list[str], steps: int) -> Path:
    """A small Llama with a tokenizer of this kind, trained on the documents."""
    settings = json.dumps([steps, BATCH, BLOCK, LEARNING_RATE, SIZES, TOKENS])
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    folder = cache_dir() / f"mergeme-tokenizers-{key}" / kind
    if folder.is_dir():
        return folder
    tokenizer = train_tokenizer(kind, documents[:300])
    ids: list[int] = []
    for document in documents[:700]:
        ids += [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False).input_ids]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **SIZES)
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    for _step in tqdm(range(steps), desc=kind):
        starts = torch.randint(len(ids) - BLOCK, (BATCH,)).tolist()
        batch = torch.tensor([ids[start : start + BLOCK] for start in starts])
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with written_at_once(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


@torch.inference_mode()
def nats(model: Any, ids: list[int], begin: int, **options: Any) -> float:
    """Minus the logarithm of the probability of these tokens, after one that begins a text."""
    inputs = torch.tensor([[begin, *ids]])
    logits = model.eval()(inputs, use_cache=False, **options).logits[0, :-1].float()
    return functional.cross_entropy(logits, inputs[0, 1:], reduction="sum").item()


def spelled(ids: list[int], donor: Tokens, own: Tokens) -> list[int]:
    """The donor's tokens as the tokens of another tokenizer, one after the other."""
    pieces: list[int] = []
    for token in ids:
        content = donor.bytes_of[token]
        exact = own.number_of(content)
        pieces += [exact] if exact is not None else own.spell(content).tokens
    return pieces


@torch.inference_mode()
def continuation(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    """The likeliest tokens after the prompt, one by one."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    inputs = torch.tensor([ids])
    output = model.eval().generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=WRITTEN,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


class Measured(NamedTuple):
    """What comes of an expert that reads the texts through some tokenizer: its loss on all of them,
    in nats, and how it goes on with the first.
    """

    nats: float
    written: str


def through_own(expert: Path, donor: Path, texts: list[str]) -> dict[str, Measured]:
    """What an expert makes of the texts through its own tokenizer, and the least loss through the
    donor's, with which it writes nothing.
    """
    of_donor = AutoTokenizer.from_pretrained(donor)
    own = AutoTokenizer.from_pretrained(expert)
    model = AutoModelForCausalLM.from_pretrained(expert)
    tokens = [Tokens(of_donor), Tokens(own)]
    own_loss = 0.0
    least = 0.0
    for text in texts:
        own_ids = own(text, add_special_tokens=False).input_ids
        own_loss += nats(model, own_ids, own.bos_token_id)
        pieces = spelled(of_donor(text, add_special_tokens=False).input_ids, *tokens)
        least += nats(model, pieces, own.bos_token_id)
    written = continuation(model, own, prompt_of(texts))
    return {"own": Measured(own_loss, written), "least": Measured(least, "")}


def in_mixture(donor: Path, experts: list[Path], kind: str, texts: list[str]) -> list[Measured]:
    """What each of these experts makes of the texts, alone in their mixture with the donor."""
    tokenizer = AutoTokenizer.from_pretrained(donor)
    parameters = {"embedding": "separate", "routing": "perplexity", "spelled_tokens": kind}
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        method = {"merge_method": "hetero_moe", "parameters": parameters}
        run_mergekit(method, [donor, *experts], donor, merged)
        model = AutoModelForCausalLM.from_pretrained(merged)
    readings = []
    for index in range(len(experts)):
        alone = torch.eye(len(experts) + 1)[[index + 1]]
        loss = 0.0
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            loss += nats(model, ids, tokenizer.bos_token_id, coefficients=alone)
        written = continuation(model, tokenizer, prompt_of(texts), coefficients=alone)
        readings.append(Measured(loss, written))
    return readings


def prompt_of(texts: list[str]) -> str:
    """The beginning of the first text, up to a space."""
    return texts[0][:PROMPT].rsplit(" ", 1)[0]


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the losses and what was written: *.json.",
)
@click.option(
    "--spelled-tokens",
    "options",
    type=click.Choice(OPTIONS),
    multiple=True,
    default=OPTIONS,
    show_default=True,
    help="Option of hetero_moe to measure with. May be repeated.",
)
@click.option(
    "--texts",
    "count",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Number of held-out texts, of 600 characters each, to measure on.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=160,
    show_default=True,
    help="Number of training steps of each small Llama.",
)
def main(output: Path | None, options: tuple[str, ...], count: int, steps: int) -> None:
    if output:
        check_new_file(output)
    bible = domains(names=("bible",))["bible"]
    # WordPiece keeps no line breaks, so that nobody gets any.
    documents = [" ".join(document.split()) for document in bible.train]
    held_out = [" ".join(document.split()) for document in bible.held_out[:count]]
    texts = [text[:600].rsplit(" ", 1)[0] for text in held_out]
    base = smollm2()
    small = [make_expert(kind, documents, steps) for kind in KINDS]
    rows: dict[str, dict[str, Measured]] = {}
    for kind, expert in zip(KINDS, small, strict=True):
        rows[f"{kind} expert, through SmolLM2's"] = through_own(expert, base, texts)
        rows[f"SmolLM2, through {kind}"] = through_own(base, expert, texts)
    for option in options:
        of_small = in_mixture(base, small, option, texts)
        for kind, expert, reading in zip(KINDS, small, of_small, strict=True):
            rows[f"{kind} expert, through SmolLM2's"][option] = reading
            (of_base,) = in_mixture(expert, [base], option, texts)
            rows[f"SmolLM2, through {kind}"][option] = of_base
    characters = sum(map(len, texts))
    width = max(map(len, rows))
    click.echo(" " * width + "".join(f"{name:>13}" for name in next(iter(rows.values()))))
    results: dict[str, Any] = {}
    for row, readings in rows.items():
        losses = {name: reading.nats / characters for name, reading in readings.items()}
        click.echo(f"{row:{width}}" + "".join(f"{loss:13.3f}" for loss in losses.values()))
        written = {name: reading.written for name, reading in readings.items() if name != "least"}
        results[row] = {"losses": losses, "written": written}
    click.echo(f"\n{prompt_of(texts)} …")
    for row, result in results.items():
        click.echo(row)
        for name, text in result["written"].items():
            click.echo(f"  {name:12} … {text}")
    if output:
        output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
