"""Clips for the transformer: a scene per chunk, its motion and the caption of every chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from echo_ray.scenes.captions import write_captions
from echo_ray.scenes.motion import animate, as_seen
from echo_ray.scenes.scripts import KINDS, TWO_OBJECTS, Script, chunk_of_frames, write_script
from echo_ray.scenes.world import Frames

EDITION = 5
"""Another number means that the same seed gives another clip: part of what names stored clips."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames to draw and one caption a chunk."""

    script: Script
    frames: Frames
    captions: tuple[str, ...]


def make_clip(
    rng: np.random.Generator,
    chunks: int,
    size: int,
    first: int,
    later: int,
    kind: str | None = None,
    shares: Mapping[str, float] = KINDS,
    two_objects: float = TWO_OBJECTS,
) -> Clip:
    """Draw up one clip, of the given kind or of any by its share; rendering it is the caller's."""
    chunk_T = chunk_of_frames(chunks, first, later)
    script = write_script(rng, chunks, kind, shares, two_objects)
    frames = animate(rng, script, size, chunk_T)
    script = as_seen(script, frames, size, chunk_T)
    return Clip(script=script, frames=frames, captions=write_captions(rng, script))
