"""What one engine step yields: a chunk of frames, its digest, its drift, and what it ignored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

WORDS_NAMED = 16
"""A viewer is told at most so many ignored words of a prompt."""
WORD_CHARS = 32
"""The longest word that is told whole."""
MORE = "…"
"""Stands for what is left out: at the end of a word, or behind the last one."""


@dataclass(frozen=True, slots=True)
class DriftReading:
    """How far a chunk has moved from its session's own baseline.

    `score` is 0 at the baseline and grows without bound; `parts` are its terms by name; `flags` is
    a subset of frozen, washed_out, exploded.
    """

    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Segment `index` of a session before encoding: uint8 RGB frames, row-major [N, H, W, 3]."""

    index: int
    frames: bytes
    num_frames: int
    height: int
    width: int
    digest: str
    """SHA-256 of `frames`, the same for every encoding of the segment."""
    drift: DriftReading
    prompt: str
    """The prompt this chunk was generated under."""
    ignored_words: tuple[str, ...] = ()
    """Words of `prompt` that the model did not understand, as `named_words` gives them."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds spent per stage (text, recache, denoise, context, decode, drift)."""


def named_words(words: Iterable[str]) -> tuple[str, ...]:
    """The words as a viewer is told them: each once, in order, no more than fit.

    Behind `WORDS_NAMED` of them follows `MORE`, and a word over `WORD_CHARS` characters ends in it.
    """
    each = tuple(dict.fromkeys(_shortened(word) for word in words))
    return each if len(each) <= WORDS_NAMED else (*each[:WORDS_NAMED], MORE)


def frames_digest(frames: bytes) -> str:
    """The digest that identifies a segment's decoded frames."""
    return hashlib.sha256(frames).hexdigest()


def _shortened(word: str) -> str:
    return word if len(word) <= WORD_CHARS else word[: WORD_CHARS - len(MORE)] + MORE
