"""Clips for the transformer: a scene per chunk, its motion and the caption of every chunk.

Attributes change at chunk borders only. A caption leaves attributes out at random, but never one
that changes in the clip: what the prompt does not say must be predictable from the past.

Shapes: K chunks, T frames, O objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_ray.training.scenes import (
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

COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
RADIUS_NAMES = tuple(RADII)
SPEED_NAMES = tuple(SPEEDS)
VERBS = ("moving", "bouncing", "flying")
MENTION = {"colour": 0.85, "size": 0.5, "speed": 0.4, "background": 0.92, "verb": 0.5}


@dataclass(frozen=True, kw_only=True)
class Script:
    """What happens in a clip, chunk by chunk; indices into the tables of `scenes`."""

    background_K: Ints
    colour_KO: Ints
    shape_KO: Ints
    visible_KO: Bools
    size_O: Ints
    speed_O: Ints


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames to draw and one caption a chunk."""

    script: Script
    frames: Frames
    captions: tuple[str, ...]


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


def write_captions(rng: np.random.Generator, script: Script) -> tuple[str, ...]:
    """One caption a chunk, in one wording for the whole clip."""
    chunks, objects = script.colour_KO.shape
    says = {name: bool(rng.random() < share) for name, share in MENTION.items()}
    says["background"] |= bool((script.background_K != script.background_K[0]).any())
    says["colour"] |= objects > 1 or bool((script.colour_KO != script.colour_KO[0]).any())
    verb = rng.choice(VERBS)
    behind_first = bool(rng.random() < 0.25)
    captions = []
    seen, gone = False, False
    for k in range(chunks):
        behind = f"{BACKGROUND_NAMES[script.background_K[k]]} background"
        if not script.visible_KO[k].any():
            captions.append(f"empty {behind}")
            gone = seen
            continue
        seen = True
        subject = (
            "it comes back"
            if gone
            else " and ".join(_thing(script, k, o, says) for o in range(objects))
        )
        if says["verb"] and not gone:
            subject += f" {verb}"
        if says["speed"] and objects == 1 and not gone:
            subject += f" {SPEED_NAMES[script.speed_O[0]]}"
        if not says["background"]:
            captions.append(subject)
        elif behind_first:
            captions.append(f"on a {behind} {subject}")
        else:
            captions.append(f"{subject} on a {behind}")
    return tuple(captions)


def _thing(script: Script, k: int, o: int, says: dict[str, bool]) -> str:
    words = ["a"]
    if says["size"]:
        words.append(RADIUS_NAMES[script.size_O[o]])
    if says["colour"]:
        words.append(COLOUR_NAMES[script.colour_KO[k, o]])
    return " ".join([*words, SHAPES[script.shape_KO[k, o]]])


def make_clip(rng: np.random.Generator, chunks: int, size: int, first: int, later: int) -> Clip:
    """Draw up one clip; rendering it is the caller's."""
    script = write_script(rng, chunks)
    frames = animate(rng, script, size, chunk_of_frames(chunks, first, later))
    return Clip(script=script, frames=frames, captions=write_captions(rng, script))
