"""Scenes to ask for, drawn from a case's own randomness, and true clips of them.

Shapes: T frames, O objects, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from echo_ray.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    SPEEDS,
    Frames,
    bounce,
    render,
)
from echo_ray.session.engine_port import StreamShape

COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
SHAPE_NAMES = tuple(SHAPES)
SIZE_NAMES = tuple(RADII)
SPEED_NAMES = tuple(SPEEDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object, by the words of its caption."""

    colour: str
    shape: str
    size: str
    speed: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A background and what is before it."""

    background: str
    things: tuple[Thing, ...]

    @property
    def emptied(self) -> Scene:
        return replace(self, things=())


def draw_scene(rng: np.random.Generator, things: int) -> Scene:
    """A scene of so many objects, no two of one colour."""
    colours = rng.permutation(len(COLOUR_NAMES))[:things]
    return Scene(
        background=BACKGROUND_NAMES[rng.integers(len(BACKGROUND_NAMES))],
        things=tuple(
            Thing(
                colour=COLOUR_NAMES[colour],
                shape=SHAPE_NAMES[rng.integers(len(SHAPE_NAMES))],
                size=SIZE_NAMES[rng.integers(len(SIZE_NAMES))],
                speed=SPEED_NAMES[rng.integers(len(SPEED_NAMES))],
            )
            for colour in colours
        ),
    )


def other(rng: np.random.Generator, names: Sequence[str], than: str) -> str:
    """One of the other names."""
    rest = [name for name in names if name != than]
    return rest[rng.integers(len(rest))]


def behind(background: str) -> str:
    return f"on a {background} background"


def caption(scene: Scene, *, colour: bool = True, size: bool = False, speed: bool = False) -> str:
    """The template's caption of a scene, with the attributes that are to be named."""
    if not scene.things:
        return f"empty {scene.background} background"
    subjects = []
    for thing in scene.things:
        words = ["a", thing.size if size else "", thing.colour if colour else "", thing.shape]
        subjects.append(" ".join(w for w in words if w))
    pace = f" moving {scene.things[0].speed}" if speed else ""
    return f"{' and '.join(subjects)}{pace} {behind(scene.background)}"


def return_caption(scene: Scene) -> str:
    """What makes a hidden object come back, without saying what it is."""
    return f"it comes back {behind(scene.background)}"


def track(
    rng: np.random.Generator, scenes: Sequence[Scene], frames_each: Sequence[int], size: int
) -> Frames:
    """Frames of scenes one after the other; objects keep their paths, seen or not.

    Scenes have the same number of objects, or none.
    """
    fullest = max(scenes, key=lambda s: len(s.things)).things
    radius = np.array([RADII[t.size] for t in fullest], dtype=np.float32)
    speed = np.array([SPEEDS[t.speed] for t in fullest], dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi, radius.shape)
    total = int(sum(frames_each))
    paths = []
    for turn in (np.cos(angle), np.sin(angle)):
        start = rng.uniform(radius, size - radius).astype(np.float32)
        step = (speed * turn).astype(np.float32)
        paths.append(bounce(start, step, total, radius, size - radius))

    def each_frame(rows: list[list[int]]) -> NDArray[np.int64]:
        table = np.array(rows, dtype=np.int64).reshape(len(scenes), len(fullest))
        return np.repeat(table, frames_each, axis=0)

    shown = [s.things or fullest for s in scenes]
    background = [BACKGROUND_NAMES.index(s.background) for s in scenes]
    return Frames(
        background_T=np.repeat(np.array(background, dtype=np.int64), frames_each),
        x_TO=paths[0],
        y_TO=paths[1],
        radius_TO=np.broadcast_to(radius, paths[0].shape),
        colour_TO=each_frame([[COLOUR_NAMES.index(t.colour) for t in ts] for ts in shown]),
        shape_TO=each_frame([[SHAPE_NAMES.index(t.shape) for t in ts] for ts in shown]),
        visible_TO=each_frame([[bool(s.things)] * len(fullest) for s in scenes]).astype(bool),
    )


def true_clip(
    rng: np.random.Generator, scenes: Sequence[Scene], shape: StreamShape
) -> tuple[NDArray[np.uint8], Frames]:
    """A chunk of each scene, from a stream's first chunk on: uint8 [T, H, W, 3] and the truth."""
    lengths = [shape.frames_in(index) for index in range(len(scenes))]
    truth = track(rng, scenes, lengths, min(shape.width, shape.height))
    return as_bytes(truth, shape.height, shape.width), truth


def as_bytes(truth: Frames, height: int, width: int) -> NDArray[np.uint8]:
    """Rendered frames as the engine takes and gives them: uint8 [T, H, W, 3]."""
    picture_T3HW, _ = render(truth, height, width)
    return (picture_T3HW.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
