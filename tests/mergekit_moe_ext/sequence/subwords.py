"""Subword tokenizers of every kind, trained in a moment on a few made-up words."""

import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SYLLABLES = [first + second for first in "bdklmnrst" for second in "aeiou"]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def corpus(lines=80, words=60, seed=0):
    """Lines of made-up words, with an accent, digits and punctuation among them."""
    draw = random.Random(seed)
    known = ["".join(draw.choices(SYLLABLES, k=draw.choice((1, 2, 3)))) for _ in range(words)]
    return [
        " ".join(draw.choices([*known, "café", "(7", "-", "kata,"], k=30)) for _ in range(lines)
    ]


def _bpe(size, texts, model, pre_tokenizer, normalizer=None, **more):
    raw = Tokenizer(model)
    if pre_tokenizer is not None:
        raw.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        raw.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **more)
    raw.train_from_iterator(texts, trainer)
    return raw


def _byte_fallback():
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def tokenizer_of_kind(kind, size=420, special=None, texts=None):
    """A tokenizer of this kind: byte_level, byte_level_prefix, sentencepiece (a Metaspace before
    the model), sentencepiece_normalizer (a normalizer, as older files have it), unigram, wordpiece.
    """
    special = SPECIAL if special is None else special
    texts = corpus() if texts is None else texts
    listed = list(dict.fromkeys(special.values()))
    if kind.startswith("byte_level"):
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw = _bpe(
            size, texts, models.BPE(), splitter, special_tokens=listed, initial_alphabet=alphabet
        )
        raw.decoder = decoders.ByteLevel()
    elif kind == "sentencepiece":
        model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
        raw = _bpe(
            size, texts, model, pre_tokenizers.Metaspace(), special_tokens=listed + every_byte
        )
        raw.decoder = _byte_fallback()
    elif kind == "sentencepiece_normalizer":
        model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
        # Trained with a splitter, so that no token spans words, and used without.
        raw = _bpe(
            size, texts, model, pre_tokenizers.Metaspace(), special_tokens=listed + every_byte
        )
        raw.pre_tokenizer = pre_tokenizers.Sequence([])
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        raw.decoder = _byte_fallback()
    elif kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size,
            special_tokens=listed,
            unk_token=special["unk_token"],
            show_progress=False,
        )
        raw.train_from_iterator(texts, trainer)
    elif kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token=special["unk_token"]))
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=listed, show_progress=False
        )
        raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)
