"""Where the objects of a script are in each frame.

Everything moves at constant speed and bounces between the walls, seen or not. Two kinds of clip
have more in store: in `cross` two tracks meet, in `border` one goes out through a wall and back.

Shapes: K chunks, T frames, O objects.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from echo_ray.scenes.scripts import Away, Script
from echo_ray.scenes.world import RADII, SPEEDS, Bools, Floats, Frames, Ints, bounce, fold

REACH: Floats = np.array([1.0, 0.88, 1.0], dtype=np.float32)
"""How far each shape reaches from its centre, at radius 1."""
STEEPEST = 0.5
"""Largest angle, in radians, between a way through the border and the straight way out."""

TRIES = 4
"""Pairs of tracks to choose from, so that two objects can mostly be told apart."""


def animate(rng: np.random.Generator, script: Script, size: int, chunk_T: Ints) -> Frames:
    """The frames of a script in a square of `size` pixels."""
    radius = np.array(list(RADII.values()), dtype=np.float32)[script.size_O]
    speed = np.array(list(SPEEDS.values()), dtype=np.float32)[script.speed_O]
    if script.kind == "cross":
        tracks = _crossing(rng, radius, speed, size, len(chunk_T))
    elif script.away is not None:
        tracks = _through_the_border(rng, script.away, radius, speed, size, chunk_T)
    else:
        tracks = _apart(rng, radius, speed, size, len(chunk_T))
    return Frames(
        background_T=script.background_K[chunk_T],
        x_TO=tracks[0],
        y_TO=tracks[1],
        radius_TO=np.broadcast_to(radius, tracks[0].shape),
        colour_TO=script.colour_KO[chunk_T],
        shape_TO=script.shape_KO[chunk_T],
        visible_TO=script.visible_KO[chunk_T],
    )


def as_seen(script: Script, frames: Frames, size: int, chunk_T: Ints) -> Script:
    """The script with what the frame's border makes of it: objects cut off or out of sight."""
    reach = frames.radius_TO * REACH[frames.shape_TO]
    centre = np.stack([frames.x_TO, frames.y_TO])
    depth_TO = np.minimum(centre, size - centre).min(axis=0)
    # Who bounces touches the wall exactly; soft edges reach half a pixel beyond a shape.
    inside_TO = depth_TO > frames.radius_TO - 0.1
    outside_TO = depth_TO < -reach - 0.5
    in_chunk_KT = np.arange(len(script.background_K))[:, None] == chunk_T
    visible_KO = script.visible_KO & _any(in_chunk_KT, ~outside_TO)
    return replace(
        script,
        visible_KO=visible_KO,
        border_KO=visible_KO & _any(in_chunk_KT, ~inside_TO),
    )


def _any(in_chunk_KT: Bools, holds_TO: Bools) -> Bools:
    return np.asarray((in_chunk_KT[:, :, None] & holds_TO).any(axis=1))


def _bouncing(
    start: Floats, speed: Floats, angle: Floats, radius: Floats, size: int, frames: int
) -> list[Floats]:
    """Tracks x and y; `start` [2, O] may lie beyond the walls and is then reflected."""
    return [
        bounce(at, speed * turn, frames, radius, size - radius)
        for at, turn in zip(start, (np.cos(angle), np.sin(angle)), strict=True)
    ]


def _apart(
    rng: np.random.Generator, radius: Floats, speed: Floats, size: int, frames: int
) -> list[Floats]:
    """Of a few random pairs of tracks, the one in which two objects hide least of each other."""
    drawn = []
    for _ in range(TRIES if len(radius) > 1 else 1):
        angle = rng.uniform(0, 2 * np.pi, radius.shape).astype(np.float32)
        start = rng.uniform(radius, size - radius, (2, *radius.shape)).astype(np.float32)
        drawn.append(_bouncing(start, speed, angle, radius, size, frames))
    return min(drawn, key=lambda tracks: _nearness(tracks, radius))


def _nearness(tracks: list[Floats], radius: Floats) -> float:
    """Mean depth to which the first and the last object are inside each other."""
    x, y = (track[:, 0] - track[:, -1] for track in tracks)
    return float(np.maximum(radius[0] + radius[-1] - np.hypot(x, y), 0).mean())


def _crossing(
    rng: np.random.Generator, radius: Floats, speed: Floats, size: int, frames: int
) -> list[Floats]:
    """Two objects meet at a place and a time, and come from and go in different directions."""
    when = np.float32(rng.uniform(0.2, 0.8) * frames)
    turn = rng.uniform(np.pi / 3, 5 * np.pi / 3)
    angle = (rng.uniform(0, 2 * np.pi) + np.array([0.0, turn])).astype(np.float32)
    widest = radius.max()
    meeting = rng.uniform(widest, size - widest, (2, 1)) + rng.uniform(-2, 2, (2, 2))
    way = speed * np.stack([np.cos(angle), np.sin(angle)])
    start = meeting.astype(np.float32) - way * when
    return _bouncing(start, speed, angle, radius, size, frames)


def _through_the_border(
    rng: np.random.Generator, away: Away, radius: Floats, speed: Floats, size: int, chunk_T: Ints
) -> list[Floats]:
    """One axis goes out and, after turning outside, comes in; the other one bounces."""
    frames = len(chunk_T)
    time = np.arange(frames, dtype=np.float32)[:, None]
    angle = rng.uniform(-STEEPEST, STEEPEST, radius.shape)
    outward, along = speed * np.cos(angle), (speed * np.sin(angle)).astype(np.float32)
    goes, comes = (_first_frame(k, chunk_T) for k in (away.leaves, away.returns))
    wall = size - radius
    beyond = outward * ((comes - goes) / 2 - np.abs(time - (comes + goes) / 2))
    across = np.where(beyond > 0, wall + beyond, fold(wall + beyond, radius, wall))
    start = rng.uniform(radius, size - radius).astype(np.float32)
    aside = bounce(start, along, frames, radius, size - radius)
    if rng.random() < 0.5:
        across = size - across
    tracks = [across.astype(np.float32), aside]
    return tracks if rng.random() < 0.5 else tracks[::-1]


def _first_frame(chunk: int, chunk_T: Ints) -> int:
    """Of a chunk, which may be before or behind the clip; all but the first are equally long."""
    first, later = (int((chunk_T == k).sum()) for k in (0, chunk_T[-1]))
    return first + later * (chunk - 1) if chunk > 0 else later * chunk
