"""A word-level tokenizer of a given size, without any download."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_tokenizer(path: Path, size: int, extra: tuple[str, ...] = (), **keywords: str) -> None:
    """Words `w0`, `w1` … after `<unk>` and `</s>`, then `extra`; `size` in all."""
    words = ["<unk>", "</s>", *(f"w{i}" for i in range(size - 2 - len(extra))), *extra]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>", **keywords
    ).save_pretrained(path)
