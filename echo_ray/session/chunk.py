"""What one engine step yields: a chunk of frames, its digest and its drift reading."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field


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
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds spent per stage (text, recache, denoise, context, decode, drift)."""


def frames_digest(frames: bytes) -> str:
    """The digest that identifies a segment's decoded frames."""
    return hashlib.sha256(frames).hexdigest()
