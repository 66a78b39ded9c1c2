"""What happens in a clip, chunk by chunk, and the motion it makes.

Attributes change at chunk borders only.

Shapes: K chunks, T frames, O objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_ray.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    SPEEDS,
    Bools,
    Frames,
    Ints,
    bounce,
)


@dataclass(frozen=True, kw_only=True)
class Script:
    """What happens in a clip, chunk by chunk; indices into the tables of `scenes`."""

    background_K: Ints
    colour_KO: Ints
    shape_KO: Ints
    visible_KO: Bools
    size_O: Ints
    speed_O: Ints


def chunk_of_frames(chunks: int, first: int, later: int) -> Ints:
    """The chunk each frame belongs to: `first` frames in chunk 0, `later` in every other."""
    return np.repeat(np.arange(chunks), [first] + [later] * (chunks - 1))


def write_script(rng: np.random.Generator, chunks: int) -> Script:
    """One clip: steady, with one or two switches, or with an object that leaves and returns."""
    kind = rng.choice(("steady", "switch", "hide"), p=(0.3, 0.5, 0.2))
    objects = 1 if kind == "hide" or rng.random() < 0.7 else 2
    background = np.full(chunks, rng.integers(len(BACKGROUNDS)))
    colours = rng.permutation(len(COLOURS))[:objects]
    colour = np.tile(colours, (chunks, 1))
    shape = np.tile(rng.integers(len(SHAPES), size=objects), (chunks, 1))
    visible = np.ones((chunks, objects), dtype=bool)
    if kind == "switch":
        for start in rng.choice(np.arange(1, chunks), size=min(chunks - 1, 2), replace=False):
            _switch(rng, int(start), background, colour, shape)
    if kind == "hide":
        appear = int(rng.integers(0, 2))
        leave = appear + int(rng.integers(1, 4))
        visible[:appear] = False
        visible[leave : leave + int(rng.integers(1, 6))] = False
    return Script(
        background_K=background,
        colour_KO=colour,
        shape_KO=shape,
        visible_KO=visible,
        size_O=rng.integers(len(RADII), size=objects),
        speed_O=rng.integers(len(SPEEDS), size=objects),
    )


def _switch(
    rng: np.random.Generator, start: int, background: Ints, colour: Ints, shape: Ints
) -> None:
    """From chunk `start` on, one to three of background, colour and shape are others."""
    changed = rng.permutation(3)[: rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15))]
    if 0 in changed:
        background[start:] = (background[start] + rng.integers(1, len(BACKGROUNDS))) % len(
            BACKGROUNDS
        )
    if 1 in changed:
        colour[start:] = rng.permutation(len(COLOURS))[: colour.shape[1]]
    if 2 in changed:
        shape[start:] = (shape[start] + rng.integers(1, len(SHAPES), colour.shape[1])) % len(SHAPES)


def animate(rng: np.random.Generator, script: Script, size: int, chunk_T: Ints) -> Frames:
    """Objects bounce between the walls at constant speed, seen or not."""
    radius = np.array(list(RADII.values()), dtype=np.float32)[script.size_O]
    speed = np.array(list(SPEEDS.values()), dtype=np.float32)[script.speed_O]
    angle = rng.uniform(0, 2 * np.pi, radius.shape)
    tracks = []
    for turn in (np.cos(angle), np.sin(angle)):
        start = rng.uniform(radius, size - radius).astype(np.float32)
        step = (speed * turn).astype(np.float32)
        tracks.append(bounce(start, step, len(chunk_T), radius, size - radius))
    return Frames(
        background_T=script.background_K[chunk_T],
        x_TO=tracks[0],
        y_TO=tracks[1],
        radius_TO=np.broadcast_to(radius, tracks[0].shape),
        colour_TO=script.colour_KO[chunk_T],
        shape_TO=script.shape_KO[chunk_T],
        visible_TO=script.visible_KO[chunk_T],
    )
