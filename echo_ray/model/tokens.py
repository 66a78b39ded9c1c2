"""Prompts to the token ids that the umT5 encoder was trained with.

The cleaning rules and the special tokens are the published ones (spec section 10); the vocabulary
is the published `tokenizer.json`, read from disk. It knows nothing about the encoder but the number
of ids it has.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import ftfy
from tokenizers import Tokenizer

from echo_ray.config import require
from echo_ray.errors import WeightsError

FILE_NAME = "tokenizer.json"
PAD, END = 0, 1

# Text between words and text that no vocabulary has a piece for must both be encodable.
_PROBES = ("", "a ball", "\ue000 \U0001f3d0")
# Encoders round their table up to a multiple of 128; a wider gap tells another model's tokenizer.
_ROUNDING = 128
_SPACE = re.compile(r"\s+")
# Python refuses to read thousands of digits as a number; no character has so many.
_ENDLESS_REFERENCE = re.compile(r"&#[0-9]{100,};?")
# Normalising a line costs the square of its length in the worst case, so long ones go in pieces.
_PIECE_CHARS = 4096


def clean(prompt: str) -> str:
    """The prompt as the encoder's training saw it: mended, unescaped, single spaces.

    Takes any string: what is not a character (lone surrogates, references to none) becomes U+FFFD.
    """
    mended = ftfy.fix_text(prompt, max_decode_length=_PIECE_CHARS)
    return _SPACE.sub(" ", _unescape(_unescape(mended)).strip()).strip()


def _unescape(text: str) -> str:
    return html.unescape(_ENDLESS_REFERENCE.sub("\ufffd", text))


class PromptTokenizer:
    """The tokenizer of one model, with a fixed length of its own."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        # One place is for the end of the sequence.
        require(length >= 2, "dit.text_len", length, "at least 2 for a umT5 encoder")
        self.length = length
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def from_folder(cls, folder: Path, length: int, vocab: int) -> PromptTokenizer:
        """Read `tokenizer.json` of a folder, for an encoder with `vocab` ids.

        Raises `WeightsError` unless it is a tokenizer for such an encoder.
        """
        file = folder / FILE_NAME
        if not file.is_file():
            raise WeightsError(
                f"{folder}: no tokenizer: {FILE_NAME} is not there; copy it from the folder "
                "google/umt5-xxl of the published model"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # tokenizers raises nothing narrower
            raise WeightsError(
                f"{file}: cannot be read as a tokenizer: {e}; copy it again from the folder "
                "google/umt5-xxl of the published model"
            ) from e
        problem = _misfit(tokenizer, vocab)
        if problem:
            raise WeightsError(
                f"{file}: this tokenizer does not fit the model: {problem}; it takes the one of "
                "google/umt5-xxl"
            )
        return cls(tokenizer, length)

    def __call__(self, prompt: str) -> tuple[list[int], list[int]]:
        """Ids and mask of a prompt, each exactly `length` long; the last true id is the end."""
        ids = self._tokenizer.encode(clean(prompt)).ids
        if len(ids) > self.length:
            ids = [*ids[: self.length - 1], END]
        surplus = self.length - len(ids)
        return ids + [PAD] * surplus, [1] * len(ids) + [0] * surplus

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        """The words of the cleaned prompt that reach the model, and those that are cut off.

        A word whose last pieces are cut off counts as cut off.
        """
        text = clean(prompt)
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        places = self.length - 1
        end = offsets[places][0] if len(offsets) > places else len(text)
        words = text.split()
        start, whole = 0, 0
        for word in words:
            start = text.index(word, start) + len(word)
            if start > end:
                break
            whole += 1
        return words[:whole], words[whole:]


def _misfit(tokenizer: Tokenizer, vocab: int) -> str:
    """Why a tokenizer cannot feed an encoder with `vocab` ids; empty if it can."""
    size = tokenizer.get_vocab_size()
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab:
        return f"it has {size} tokens with ids up to {highest}, the encoder ids up to {vocab - 1}"
    if size < vocab - max(_ROUNDING, vocab // 100):
        return f"it has {size} tokens, the encoder {vocab}"
    padding = tokenizer.padding or {}
    pad = padding.get("pad_id", PAD), tokenizer.token_to_id("<pad>") or PAD
    if pad != (PAD, PAD):
        return f"its padding has the id {max(pad)}, the encoder's is {PAD}"
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for probe in _PROBES:
        try:
            plain = tokenizer.encode(probe, add_special_tokens=False).ids
            ids = tokenizer.encode(probe).ids
        except Exception as e:  # tokenizers raises nothing narrower
            return f"it cannot encode {probe!r}: {e}"
        if ids != [*plain, END]:
            return f"it encodes {probe!r} as {ids}, not as {plain} and the end of sequence, {END}"
    return ""
