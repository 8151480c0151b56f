"""What the tokens of a tokenizer stand for, and how it splits bytes in the middle of a text.

Tokenizers write the same text in different ways: "▁the" of SentencePiece, "Ġthe" of a byte-level
BPE and "the" of WordPiece are all the bytes of " the". Everything here is read off the tokenizer's
own parts, those of the library `tokenizers`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROLES = ("unk_token", "pad_token", "bos_token", "eos_token")  # the last of a token's roles counts
_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "▁"
_AT_THE_ENDS = ("Prepend", "Strip")  # normalizers that change a text's beginning and end alone
# A way to write a space: as bytes of an alphabet of their own, as "▁", as it is, or not at all.
_Spaces = Literal["byte_level", "metaspace", "literal", "dropped"]


@dataclass(frozen=True)
class Spelling:
    """Tokens that write some bytes; `is_whole` is False where something of the bytes is lost."""

    tokens: Sequence[int]
    is_whole: bool


class Tokens:
    """The tokens of one tokenizer.

    bytes_of: the bytes that each ordinary token stands for, by its number. A space before a word is
        part of them.
    special: the number of each special token (end of text, chat markers …), by its text.
    markers: those, and all others that are cut out of a text before it is split, by their text. Not
        every tokenizer calls a chat marker special.
    roles: the number of the token of each role that the tokenizer has.
    byte_tokens: the number of each token that is written as a byte (`<0x6B>`), by that byte.
    never_made: the byte tokens of characters that have a token, which the tokenizer makes of no
        text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """`ValueError` for a tokenizer that is written in Python."""
        if not tokenizer.is_fast:
            raise ValueError("it has no tokenizer.json, which says what its tokens stand for")
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self._prefix = state["model"].get("continuing_subword_prefix") or ""
        self._in_mid_text = _without_added_spaces(state)
        self._spaces = self._way_to_write_spaces()
        self._has_byte_tokens = bool(state["model"].get("byte_fallback")) or any(
            part["type"] == "ByteFallback" for part in _parts(state["decoder"])
        )
        vocabulary = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        texts_of_model, unknown = _vocabulary_of_model(state["model"])
        special = _special_numbers(tokenizer)
        if unknown in vocabulary:
            special.add(vocabulary[unknown])
        self.special: dict[str, int] = {}
        self.markers: dict[str, int] = {}
        self.bytes_of: dict[int, bytes] = {}
        byte_tokens = {}
        for text, number in sorted(vocabulary.items(), key=lambda item: item[1]):
            if self._has_byte_tokens and _BYTE_TOKEN.fullmatch(text):
                byte_tokens[number] = bytes.fromhex(text[3:5])
            elif number in special:
                self.special[text] = number
                self.markers[text] = number
            # Some list tokens of the model among those that are added (Gemma's "▁▁"); they are
            # written as its others are.
            elif number in added and text not in texts_of_model:
                self.markers[text] = number
                self.bytes_of[number] = text.encode()
            else:
                self.bytes_of[number] = self._bytes(text)
        self.roles = {}
        for role in ROLES:
            if getattr(tokenizer, role) is not None:
                self.roles[role] = getattr(tokenizer, f"{role}_id")
        self._unknown = {self.roles.get("unk_token"), vocabulary.get(unknown)} - {None}
        self._inside_words = self._model_inside_words(vocabulary, unknown)
        self._of_bytes = self._numbers_by_bytes(byte_tokens)
        self.byte_tokens = {content: number for number, content in byte_tokens.items()}
        self.never_made = set()
        for number, content in byte_tokens.items():
            if self._of_bytes[content] != number:
                self.never_made.add(number)
        self.bytes_of |= byte_tokens
        self._longest = max(map(len, self._of_bytes), default=0)

    def number_of(self, content: bytes) -> int | None:
        """The token that stands for these bytes; None if there is none."""
        return self._of_bytes.get(content)

    def spell(self, content: bytes) -> Spelling:
        """The tokens that the tokenizer makes of these bytes in the middle of a text; its unknown
        token, if it has one, where it makes none.
        """
        try:
            text = content.decode()
        except UnicodeDecodeError:  # a part of a character
            spelling = self._spell_bytes(content)
        else:
            spelling = self._spell_text(text)
        if not spelling.tokens:
            return Spelling(sorted(self._unknown)[:1], is_whole=False)
        # A byte-level vocabulary that lacks a byte leaves it out without a word.
        if self._spaces == "byte_level":
            written = b"".join(self.bytes_of.get(token, b"") for token in spelling.tokens)
            return replace(spelling, is_whole=written == content)
        return spelling

    def _spell_text(self, text: str) -> Spelling:
        """The tokens of each of the text's words, of which the first may be the rest of one."""
        tokens = []
        for index, word in enumerate(self._words(text)):
            is_inside = index == 0 and not text[0].isspace() and word[0].isalnum()
            model = self._in_mid_text.model
            if is_inside and self._inside_words is not None:
                model = self._inside_words
            tokens += [token.id for token in model.tokenize(word)]
        # A Unigram model makes its special tokens of their texts, which mean something else.
        written = [token for token in tokens if token in self.bytes_of]
        kept = [token for token in tokens if token in self.bytes_of or token in self._unknown]
        return Spelling(kept, is_whole=written == tokens)

    def _words(self, text: str) -> list[str]:
        """The text as the tokenizer normalises it, and as its model then gets it, in parts."""
        normalizer = self._in_mid_text.normalizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        splitter = self._in_mid_text.pre_tokenizer
        if splitter is None:
            return [text] if text else []
        return [word for word, _place in splitter.pre_tokenize_str(text) if word]

    def _spell_bytes(self, content: bytes) -> Spelling:
        """From the left, the longest tokens that stand for the next bytes."""
        tokens = []
        start = 0
        while start < len(content):
            for end in range(min(len(content), start + self._longest), start, -1):
                number = self.number_of(content[start:end])
                if number is not None:
                    tokens.append(number)
                    start = end
                    break
            else:
                return Spelling([], is_whole=False)
        return Spelling(tokens, is_whole=True)

    def _way_to_write_spaces(self) -> _Spaces:
        """How the tokenizer writes spaces, which a text that has some shows."""
        written = "".join(self._words("a é a"))
        # The two bytes of "é" as two letters; without its accent it is a byte-level tokenizer's
        # space that tells.
        if "Ã©" in written or "Ġ" in written:
            return "byte_level"
        if _METASPACE in written:
            return "metaspace"
        return "literal" if " " in written else "dropped"

    def _bytes(self, text: str) -> bytes:
        """The bytes that an ordinary token stands for."""
        if self._spaces == "byte_level":
            if all(character in _BYTE_OF_CHARACTER for character in text):
                return bytes(_BYTE_OF_CHARACTER[character] for character in text)
            return text.encode()
        if self._spaces == "metaspace":
            return text.replace(_METASPACE, " ").encode()
        if self._prefix and text.startswith(self._prefix):
            return text.removeprefix(self._prefix).encode()
        # Where spaces are dropped, a word that continues none begins after a space.
        if self._spaces == "dropped" and text[:1].isalnum():
            return f" {text}".encode()
        return text.encode()

    def _numbers_by_bytes(self, byte_tokens: dict[int, bytes]) -> dict[bytes, int]:
        """The token of each sequence of bytes. A token that is written with characters comes before
        one that is written with bytes.
        """
        numbers: dict[bytes, int] = {}
        for number, content in self.bytes_of.items():
            numbers.setdefault(content, number)
        # Where spaces are dropped, the same token is written with a space before it and without.
        if self._spaces == "dropped":
            for number, content in self.bytes_of.items():
                is_after_space = content.startswith(b" ")
                other_way = content.removeprefix(b" ") if is_after_space else b" " + content
                numbers.setdefault(other_way, number)
        for number, content in byte_tokens.items():
            numbers.setdefault(content, number)
        return numbers

    def _model_inside_words(self, vocabulary: dict[str, int], unknown: str) -> Any:
        """What splits the rest of a word, into tokens with the prefix; None where there is none."""
        if not self._prefix:
            return None
        continuing = {}
        for text, number in vocabulary.items():
            if text.startswith(self._prefix) and number in self.bytes_of:
                continuing[text.removeprefix(self._prefix)] = number
        if unknown in vocabulary:
            continuing[unknown] = vocabulary[unknown]
        return models.WordPiece(
            continuing,
            unk_token=unknown,
            continuing_subword_prefix="",
            max_input_chars_per_word=100,
        )


def _special_numbers(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that any of the tokenizer's lists calls special: they disagree on which are."""
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def _vocabulary_of_model(state: dict[str, Any]) -> tuple[set[str], str]:
    """The texts of a model's own tokens, and that of its unknown token; "" if it has none."""
    vocabulary = state["vocab"]
    if isinstance(vocabulary, dict):
        return set(vocabulary), state.get("unk_token") or ""
    # A Unigram's tokens have scores, and places for numbers.
    texts = [text for text, _score in vocabulary]
    number = state.get("unk_id")
    return set(texts), "" if number is None else texts[number]


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer's state, and all that it is made of."""
    if part is None:
        return
    yield part
    for key in ("pretokenizers", "normalizers", "decoders"):
        for inner in part.get(key, ()):
            yield from _parts(inner)


def _without_added_spaces(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer without what it does to a text's ends: it adds no space before the first word,
    takes none away, and knows no special tokens.
    """
    changed = json.loads(json.dumps(state))
    changed |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    for part in _parts(changed["normalizer"]):
        if "normalizers" in part:
            inner = part["normalizers"]
            part["normalizers"] = [each for each in inner if each["type"] not in _AT_THE_ENDS]
    if changed["normalizer"] is not None and changed["normalizer"]["type"] in _AT_THE_ENDS:
        changed["normalizer"] = None
    for part in _parts(changed["pre_tokenizer"]):
        if "pretokenizers" in part:
            inner = part["pretokenizers"]
            # Whoever splits at spaces gives every word a "▁" afterwards.
            if any(each["type"] == "Metaspace" for each in inner):
                part["pretokenizers"] = [
                    each for each in inner if each["type"] != "WhitespaceSplit"
                ]
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
    return Tokenizer.from_str(json.dumps(changed))
