"""Clips for the transformer: a scene per chunk, its motion and the caption of every chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_ray.scenes.captions import write_captions
from echo_ray.scenes.scripts import Script, animate, chunk_of_frames, write_script
from echo_ray.scenes.world import Frames


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames to draw and one caption a chunk."""

    script: Script
    frames: Frames
    captions: tuple[str, ...]


def make_clip(rng: np.random.Generator, chunks: int, size: int, first: int, later: int) -> Clip:
    """Draw up one clip; rendering it is the caller's."""
    script = write_script(rng, chunks)
    frames = animate(rng, script, size, chunk_of_frames(chunks, first, later))
    return Clip(script=script, frames=frames, captions=write_captions(rng, script))
