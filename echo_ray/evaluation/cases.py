"""Scenes to ask for, drawn from a case's own randomness, and true clips of them.

Shapes: T frames, O objects, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from echo_ray.scenes.captions import PLAIN, say
from echo_ray.scenes.motion import animate
from echo_ray.scenes.scripts import Script, chunk_of_frames
from echo_ray.scenes.world import BACKGROUNDS, COLOURS, RADII, SHAPES, SPEEDS, Frames, render
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


NOBODY = Thing(
    colour=COLOUR_NAMES[0], shape=SHAPE_NAMES[0], size=SIZE_NAMES[0], speed=SPEED_NAMES[0]
)
"""Who is never to be seen in scripts of empty scenes, which need an object too."""


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


def caption(scene: Scene, *, colour: bool = True, size: bool = False, speed: bool = False) -> str:
    """The template's caption of a scene, with the attributes that are to be named."""
    how = f"moving {scene.things[0].speed}" if speed and scene.things else ""
    return say(as_script([scene]), 0, replace(PLAIN, colour=colour, size=size, how=how))


def return_caption(scene: Scene) -> str:
    """What makes a hidden object come back, without saying what it is."""
    wording = replace(PLAIN, how="", returns="it comes back")
    return say(as_script([scene]), 0, wording, gone=True)


def as_script(scenes: Sequence[Scene]) -> Script:
    """A chunk of each scene; objects go on moving while they are not to be seen.

    Scenes have the same number of objects, or none, and objects keep their size and speed.
    """
    fullest = max(scenes, key=lambda s: len(s.things)).things or (NOBODY,)
    shown = [s.things or fullest for s in scenes]
    visible = np.array([[bool(s.things)] * len(fullest) for s in scenes], dtype=bool)

    def indices(rows: list[list[int]]) -> NDArray[np.int64]:
        return np.array(rows, dtype=np.int64).reshape(len(scenes), len(fullest))

    return Script(
        kind="steady",
        background_K=np.array([BACKGROUND_NAMES.index(s.background) for s in scenes]),
        colour_KO=indices([[COLOUR_NAMES.index(t.colour) for t in things] for things in shown]),
        shape_KO=indices([[SHAPE_NAMES.index(t.shape) for t in things] for things in shown]),
        visible_KO=visible.reshape(len(scenes), len(fullest)),
        border_KO=np.zeros((len(scenes), len(fullest)), dtype=bool),
        size_O=np.array([SIZE_NAMES.index(t.size) for t in fullest], dtype=np.int64),
        speed_O=np.array([SPEED_NAMES.index(t.speed) for t in fullest], dtype=np.int64),
    )


def true_clip(
    rng: np.random.Generator, scenes: Sequence[Scene], shape: StreamShape
) -> tuple[NDArray[np.uint8], Frames]:
    """A chunk of each scene, from a stream's first chunk on: uint8 [T, H, W, 3] and the truth."""
    chunk_T = chunk_of_frames(len(scenes), shape.first_chunk_frames, shape.frames_per_chunk)
    truth = animate(rng, as_script(scenes), min(shape.width, shape.height), chunk_T)
    return as_bytes(truth, shape.height, shape.width), truth


def as_bytes(truth: Frames, height: int, width: int) -> NDArray[np.uint8]:
    """Rendered frames as the engine takes and gives them: uint8 [T, H, W, 3]."""
    picture_T3HW, _ = render(truth, height, width)
    return (picture_T3HW.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
