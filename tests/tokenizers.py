"""Word-level tokenizers, without any download."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_tokenizer(path: Path, size: int, extra: tuple[str, ...] = (), **keywords: str) -> None:
    """Words `w0`, `w1` … after `<unk>` and `</s>`, then `extra`; `size` in all."""
    words = ["<unk>", "</s>", *(f"w{i}" for i in range(size - 2 - len(extra))), *extra]
    save_words(
        path, words, **{"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>", **keywords}
    )


def save_words(path: Path, words: Sequence[str], **special: str) -> None:
    """These words, in this order."""
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
