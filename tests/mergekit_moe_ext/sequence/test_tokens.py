"""What tokens stand for, and how bytes are spelled: against the text that was tokenized."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mergekit_moe_ext.sequence.tokens import Tokens
from tests.mergekit_moe_ext.sequence.subwords import corpus, tokenizer_of_kind

TEXTS = [*corpus(3), "café (7 日本", "  two  spaces\nand a line", "Ünknöwn ▁x"]
KINDS = (
    "byte_level",
    "byte_level_prefix",
    "sentencepiece",
    "sentencepiece_normalizer",
    "unigram",
    "wordpiece",
)


@pytest.fixture(scope="module")
def by_kind():
    tokenizers = {kind: tokenizer_of_kind(kind) for kind in KINDS}
    return {kind: (each, Tokens(each)) for kind, each in tokenizers.items()}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", [*KINDS[:4]])
def test_the_bytes_of_a_texts_tokens_are_its_own(by_kind, kind):
    tokenizer, tokens = by_kind[kind]
    adds_a_space = kind != "byte_level"
    for text in TEXTS[:-1]:
        written = b"".join(tokens.bytes_of[token] for token in ids_of(tokenizer, text))
        has_space = text.startswith(" ") and kind in ("byte_level_prefix", "sentencepiece")
        assert written == (" " * (adds_a_space and not has_space) + text).encode()


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_the_bytes_of_words_whose_spaces_are_not_all_kept(by_kind, kind):
    tokenizer, tokens = by_kind[kind]
    for text in corpus(3, seed=1):
        known = " ".join(word for word in text.split() if word.isalpha())
        ids = ids_of(tokenizer, known)
        assert tokens.special["<unk>"] not in ids
        assert b"".join(tokens.bytes_of[token] for token in ids) == f" {known}".encode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_spelled_as_it_is_in_a_text(by_kind, kind):
    """After another word, whose tokens are taken away from the front."""
    tokenizer, tokens = by_kind[kind]
    before = ids_of(tokenizer, "kata")
    for word in ["kata", "sumilo", "tadanorike", "café", "(7"]:
        together = ids_of(tokenizer, f"kata {word}")
        assert together[: len(before)] == before
        assert list(tokens.spell(f" {word}".encode()).tokens) == together[len(before) :], word


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_word_is_spelled_without_a_space(by_kind, kind):
    _, tokens = by_kind[kind]
    for rest in ("sumilo", "tadanorike", "rake"):
        spelling = tokens.spell(rest.encode())
        assert spelling.is_whole
        assert b"".join(tokens.bytes_of[token] for token in spelling.tokens) == rest.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_a_byte_token_of_a_character_with_a_token(by_kind, kind):
    tokenizer, tokens = by_kind[kind]
    every_byte = {f"<0x{byte:02X}>": chr(byte) for byte in range(128)}
    vocabulary = tokenizer.get_vocab()
    expected = set()
    for text, character in every_byte.items():
        if text in vocabulary and ("▁" if character == " " else character) in vocabulary:
            expected.add(vocabulary[text])
    assert tokens.never_made == expected and bool(expected) == kind.startswith("sentencepiece")


def test_wordpiece_marks_what_continues_a_word(by_kind):
    tokenizer, tokens = by_kind["wordpiece"]
    vocabulary = tokenizer.get_vocab()
    assert (
        tokens.bytes_of[vocabulary["##a"]] == b"a" and tokens.number_of(b"a") == vocabulary["##a"]
    )
    assert tokens.bytes_of[vocabulary["k"]] == b" k"
    # Punctuation stands alone with a space before it and without.
    for text in (b",", b" ,"):
        assert tokens.number_of(text) == vocabulary[","]
    # A word continues within the first word alone.
    spelled = tokens.spell(b"a,a").tokens
    assert spelled == [vocabulary["##a"], vocabulary[","], vocabulary["a"]]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_parts_of_characters(by_kind, kind):
    tokenizer, tokens = by_kind[kind]
    part = "日".encode()[:2]
    spelling = tokens.spell(part)
    assert spelling.is_whole and len(spelling.tokens) == 2
    assert b"".join(tokens.bytes_of[token] for token in spelling.tokens) == part
    # Where a character has a token of its own, the byte's own is another one.
    if kind == "sentencepiece":
        vocabulary = tokenizer.get_vocab()
        assert tokens.number_of(b"k") == vocabulary["k"] != vocabulary["<0x6B>"]
        assert tokens.bytes_of[vocabulary["<0x6B>"]] == b"k"


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_what_cannot_be_written_is_not_whole(by_kind, kind):
    _, tokens = by_kind[kind]
    for content in (" 日本".encode(), "日".encode()[:2]):
        assert not tokens.spell(content).is_whole
    # The unknown token stands for what the tokenizer makes nothing of.
    assert tokens.spell("日".encode()[:2]).tokens == [tokens.special["<unk>"]]
    if kind == "wordpiece":
        assert tokens.spell(b"  ").tokens == [tokens.special["<unk>"]]


def test_a_byte_that_a_byte_level_vocabulary_lacks_is_not_whole():
    raw = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert tokens.spell(b"ab").is_whole and not tokens.spell(b"axb").is_whole


def test_special_tokens_are_told_apart_from_text(by_kind):
    tokenizer = tokenizer_of_kind("byte_level")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["\t\t"])
    tokens = Tokens(tokenizer)
    assert set(tokens.special) == {"<unk>", "<s>", "</s>", "<|im_start|>"}
    assert tokens.roles.keys() == {"unk_token", "bos_token", "eos_token"}
    assert tokens.bytes_of[tokenizer.get_vocab()["\t\t"]] == b"\t\t"
    assert not {*tokens.special.values()} & tokens.bytes_of.keys()
    # The text of a special token is text like any other.
    assert tokens.spell(b"</s>").is_whole and len(tokens.spell(b"</s>").tokens) > 1


def test_a_unigram_makes_no_special_token_of_its_text(by_kind):
    _, tokens = by_kind["unigram"]
    spelling = tokens.spell(b"</s>")
    assert not spelling.is_whole and spelling.tokens == [tokens.special["<unk>"]]


def test_the_unknown_token_of_a_unigram_without_roles():
    raw = tokenizer_of_kind("unigram").backend_tokenizer
    tokens = Tokens(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert not tokens.roles and not tokens.spell("日".encode()).is_whole


def test_a_token_of_the_model_that_is_among_the_added_ones_too():
    """As Gemma has for spaces in a row."""
    plain = tokenizer_of_kind("sentencepiece_normalizer")
    state = json.loads(plain.backend_tokenizer.to_str())
    state["model"]["vocab"]["▁▁"] = len(plain)
    state["model"]["merges"].insert(0, ["▁", "▁"])
    raw = Tokenizer.from_str(json.dumps(state))
    raw.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert len(plain) in ids_of(tokenizer, "kata  kata")
    assert Tokens(tokenizer).bytes_of[len(plain)] == b"  "
