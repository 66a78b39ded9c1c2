"""Scenes of coloured shapes as plain arrays, and their rendering to pixels.

Knows nothing of captions, clips or models. A frame is a background and up to O objects; every
quantity is an array over frames and objects, so a whole batch is drawn in a few passes.

Shapes: T frames, O objects, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.35, 0.98),
    "yellow": (0.97, 0.87, 0.10),
    "magenta": (0.87, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.03, 0.03, 0.03),
    "white": (0.96, 0.96, 0.96),
    "gray": (0.50, 0.50, 0.50),
    "blue": (0.07, 0.10, 0.36),
}
SHAPES = ("ball", "square", "triangle")
RADII: dict[str, float] = {"small": 8.0, "big": 13.0}
SPEEDS: dict[str, float] = {"slowly": 0.7, "quickly": 1.7}
"""Pixels a frame."""

COLOUR_RGB: Floats = np.array(list(COLOURS.values()), dtype=np.float32)
BACKGROUND_RGB: Floats = np.array(list(BACKGROUNDS.values()), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Frames:
    """What is to be seen in each of T frames; colours, shapes and backgrounds by index."""

    background_T: Ints
    x_TO: Floats
    y_TO: Floats
    radius_TO: Floats
    colour_TO: Ints
    shape_TO: Ints
    visible_TO: Bools


def fold(place: Floats, low: Floats, high: Floats) -> Floats:
    """Where a straight way ends that is reflected at two walls whenever it meets one."""
    span = high - low
    phase = np.mod(place - low, 2 * span)
    return np.asarray(low + span - np.abs(phase - span), dtype=np.float32)


def bounce(start: Floats, step: Floats, frames: int, low: Floats, high: Floats) -> Floats:
    """Positions [frames, ...] of a constant speed reflected between two walls."""
    time = np.arange(frames, dtype=np.float32).reshape(-1, *([1] * start.ndim))
    return fold(start + step * time, low, high)


def coverage(shape: int, dx: Floats, dy: Floats, radius: Floats) -> Floats:
    """How much of each pixel a shape covers, 0 to 1, with soft edges of one pixel."""
    if SHAPES[shape] == "ball":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif SHAPES[shape] == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
    else:
        slope = 0.8944271 * np.abs(dx) - 0.4472136 * dy
        distance = np.maximum(dy - 0.85 * radius, slope - 0.4472136 * radius)
    return np.asarray(np.clip(0.5 - distance, 0.0, 1.0), dtype=np.float32)


def render(frames: Frames, height: int, width: int) -> tuple[Floats, Floats]:
    """Pixels [T, 3, H, W] in [0, 1] and the share of each that objects cover [T, H, W]."""
    total, objects = frames.x_TO.shape
    picture = np.empty((total, 3, height, width), dtype=np.float32)
    picture[:] = BACKGROUND_RGB[frames.background_T][:, :, None, None]
    covered = np.zeros((total, height, width), dtype=np.float32)
    for o in range(objects):
        for shape in range(len(SHAPES)):
            rows = np.flatnonzero(frames.visible_TO[:, o] & (frames.shape_TO[:, o] == shape))
            if rows.size:
                _draw(frames, rows, o, picture, covered)
    return picture, covered


def _draw(frames: Frames, rows: Ints, o: int, picture: Floats, covered: Floats) -> None:
    """Draw one object into the frames `rows`, in all of which it has the same shape.

    Only a window round the object is touched. It is moved to lie inside of the frame, and then
    still holds everything of the object that is to be seen.
    """
    x, y, radius = (v[rows, o, None] for v in (frames.x_TO, frames.y_TO, frames.radius_TO))
    side = 2 * int(np.ceil(radius.max())) + 3
    xs, ys = (
        _window(at, side, length) for at, length in ((x, picture.shape[3]), (y, picture.shape[2]))
    )
    dx = (xs.astype(np.float32) + 0.5 - x)[:, None, :]
    dy = (ys.astype(np.float32) + 0.5 - y)[:, :, None]
    alpha = coverage(int(frames.shape_TO[rows[0], o]), dx, dy, radius[:, :, None])
    rgb = COLOUR_RGB[frames.colour_TO[rows, o]]
    where = rows[:, None, None], ys[:, :, None], xs[:, None, :]
    for channel in range(3):
        plane = picture[:, channel]
        old = plane[where]
        plane[where] = old + alpha * (rgb[:, channel, None, None] - old)
    covered[where] = np.maximum(covered[where], alpha)


def _window(middle: Floats, side: int, length: int) -> Ints:
    """Pixels [N, side] of a side of a window round each middle, inside of the frame."""
    side = min(side, length)
    begin = np.clip(np.floor(middle).astype(np.int64) - side // 2, 0, length - side)
    return np.asarray(begin + np.arange(side))


def random_groups(rng: np.random.Generator, groups: int, stride: int, size: int) -> Frames:
    """Short runs of `stride` frames for the codec: none to two objects each, some at rest."""
    objects = 2
    shape = (groups, objects)
    radius = rng.choice(np.array(list(RADII.values()), dtype=np.float32), shape)
    speed = rng.uniform(0.0, 2.2, shape) * (rng.random((groups, 1)) > 0.15)
    angle = rng.uniform(0.0, 2 * np.pi, shape)
    low, high = radius, size - radius
    tracks = []
    for turn in (np.cos(angle), np.sin(angle)):
        start = rng.uniform(low, high).astype(np.float32)
        step = (speed * turn).astype(np.float32)
        tracks.append(bounce(start, step, stride, low, high).swapaxes(0, 1))
    count = rng.choice(3, groups, p=[0.05, 0.6, 0.35])
    visible = np.arange(objects) < count[:, None]

    def each_frame(values: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.repeat(values, stride, axis=0)

    return Frames(
        background_T=each_frame(rng.integers(len(BACKGROUNDS), size=groups)),  # type: ignore[arg-type]
        x_TO=tracks[0].reshape(-1, objects),
        y_TO=tracks[1].reshape(-1, objects),
        radius_TO=each_frame(radius),  # type: ignore[arg-type]
        colour_TO=each_frame(rng.integers(len(COLOURS), size=shape)),  # type: ignore[arg-type]
        shape_TO=each_frame(rng.integers(len(SHAPES), size=shape)),  # type: ignore[arg-type]
        visible_TO=each_frame(visible),  # type: ignore[arg-type]
    )
