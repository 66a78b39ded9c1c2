"""The drift meter: calm on an even stream, loud on each kind of failure."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from echo_ray.engine.drift import (
    BASELINE_CHUNKS,
    FROZEN_CHUNKS,
    SCORE_LIMIT,
    SETTLING_CHUNKS,
    WASHED_CHUNKS,
    DriftState,
    frame_parts,
    read_drift,
)
from echo_ray.scenes.world import BACKGROUNDS, COLOURS
from echo_ray.session.chunk import DriftReading

Picture = NDArray[np.float64]
Fault = Callable[[Picture], Picture]
Shown = Callable[[int], Picture]

LATENT = {"latent_mean": 0.2, "latent_spread": 1.0, "memory_norm": 1.0, "memory_update": 0.1}


def moving_square(chunk: int, *, contrast: float = 1.0, level: float = 0.0) -> dict[str, float]:
    frames = np.full((12, 64, 64, 3), 40.0)
    for i in range(12):
        at = (chunk * 12 + i) % 40
        frames[i, 20:40, at : at + 20] = (230, 40, 40)
    frames = (frames - frames.mean()) * contrast + frames.mean() + level
    return frame_parts(frames.clip(0, 255).astype(np.uint8)) | LATENT


def settled() -> DriftState:
    state = DriftState()
    for chunk in range(SETTLING_CHUNKS + BASELINE_CHUNKS):
        read_drift(state, moving_square(chunk), restart=False)
    return state


def world(background: str, colour: str | None, chunk: int, size: int = 20) -> Picture:
    """A moving square before one of the world's backgrounds, or none: [N, H, W, 3], 0 to 1."""
    frames = np.full((12, 64, 64, 3), BACKGROUNDS[background])
    for i in range(12):
        at = (chunk * 12 + i) % (64 - size)
        if colour:
            frames[i, 20 : 20 + size, at : at + size] = COLOURS[colour]
    return frames


def landscape(chunk: int) -> Picture:
    """A picture without an even ground, which moves past: hills of many colours."""
    rows, columns = np.mgrid[0:64, 0:64] / 10.0
    waves = [
        np.stack([np.sin(rows * k + (columns + (chunk * 12 + i) / 9) * (3 - k)) for k in range(3)])
        for i in range(12)
    ]
    return (0.45 + 0.3 * np.stack(waves)).transpose(0, 2, 3, 1)


def readings(shown: Shown, faulty: Shown, chunks: int = 8) -> list[DriftReading]:
    """Readings of the faulty chunks that follow on a baseline of what is shown."""
    state = DriftState()
    before = SETTLING_CHUNKS + BASELINE_CHUNKS
    found = []
    for chunk in range(before + chunks):
        picture = (shown if chunk < before else faulty)(chunk)
        parts = frame_parts((picture.clip(0, 1) * 255).round().astype(np.uint8)) | LATENT
        found.append(read_drift(state, parts, restart=False))
    assert not any(r.flags for r in found[:before])
    return found[before:]


def towards(level: float, left: float) -> Fault:
    return lambda picture: level + left * (picture - level)


def colourless(picture: Picture) -> Picture:
    luma = picture @ np.array([0.2126, 0.7152, 0.0722])
    return np.repeat(luma[..., None], 3, axis=-1)


FAULTS: dict[str, Fault] = {
    "gray": towards(0.5, 0.2),
    "white": towards(1.0, 0.2),
    "overexposed": lambda picture: 1.0 - (1.0 - picture) * 0.15 + 0.1,
    "colourless": colourless,
}
SCENES: dict[str, Shown] = {
    "black": lambda chunk: world("black", "red", chunk),
    "blue": lambda chunk: world("blue", "yellow", chunk, 13),
    "gray": lambda chunk: world("gray", "red", chunk),
    "white": lambda chunk: world("white", "magenta", chunk),
    "landscape": landscape,
}
AS_IF_GONE = ("gray", "gray")
"""A ground of the very colour that the picture fades to: only the thing before it is lost."""


def test_an_even_stream_stays_near_zero() -> None:
    state = settled()
    readings = [read_drift(state, moving_square(c), restart=False) for c in range(4, 40)]
    assert max(r.score for r in readings) < 0.1
    assert {f for r in readings for f in r.flags} == set()


def test_frozen_after_several_still_chunks_only() -> None:
    state = settled()
    still = moving_square(5) | {"motion": 0.0}
    flags = [read_drift(state, still, restart=False).flags for _ in range(FROZEN_CHUNKS)]
    assert [("frozen" in f) for f in flags] == [False] * (FROZEN_CHUNKS - 1) + [True]


def test_a_stream_that_never_moved_is_not_frozen() -> None:
    state = DriftState()
    still = moving_square(0) | {"motion": 0.0}
    readings = [read_drift(state, still, restart=False) for _ in range(20)]
    assert readings[-1].flags == ()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scene", SCENES)
def test_washed_out_after_several_chunks(scene: str, fault: str) -> None:
    shown = SCENES[scene]
    found = readings(shown, lambda chunk: FAULTS[fault](shown(chunk)))
    fires = (scene, fault) != AS_IF_GONE
    expected = [fires and n >= WASHED_CHUNKS - 1 for n in range(len(found))]
    assert [r.flags == ("washed_out",) for r in found] == expected
    assert min(r.score for r in found) > 0.15


def test_a_short_flash_is_not_washed_out() -> None:
    def flash(chunk: int) -> Picture:
        flashing = chunk % WASHED_CHUNKS
        return FAULTS["white"](landscape(chunk)) if flashing else landscape(chunk)

    assert not any(r.flags for r in readings(landscape, flash, 12))


@pytest.mark.parametrize("size", [13, 20, 30])
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_object_that_is_gone_is_read_but_not_flagged(
    background: str, colour: str, size: int
) -> None:
    found = readings(
        lambda chunk: world(background, colour, chunk, size),
        lambda chunk: world(background, None, chunk),
    )
    assert not any(f != "frozen" for r in found for f in r.flags)
    assert max(r.parts["contrast"] for r in found) < 1e-6
    assert min(r.score for r in found) > 0.15


@pytest.mark.parametrize(
    ("scene", "later"),
    [
        ("landscape", landscape),
        ("landscape", lambda chunk: towards(0.5, 0.6)(landscape(chunk))),
        ("black", lambda chunk: world("white", "green", chunk)),
        ("gray", lambda chunk: world("blue", None, chunk)),
    ],
)
def test_other_pictures_that_have_colours_are_not_washed_out(scene: str, later: Shown) -> None:
    assert not any("washed_out" in r.flags for r in readings(SCENES[scene], later))


def test_what_a_switch_leaves_behind_in_its_first_chunk_is_no_baseline() -> None:
    state = settled()
    leaving = frame_parts((world("gray", "yellow", 0) * 255).astype(np.uint8)) | LATENT
    empty = frame_parts((world("gray", None, 0) * 255).astype(np.uint8)) | LATENT
    assert read_drift(state, leaving, restart=True).score == 0
    scores = [read_drift(state, empty, restart=False).score for _ in range(8)]
    assert max(scores) == pytest.approx(0)


@pytest.mark.parametrize("parts", [{"latent_spread": 9.0}, {"latent_mean": math.nan}])
def test_exploded(parts: dict[str, float]) -> None:
    reading = read_drift(settled(), moving_square(6) | parts, restart=False)
    assert "exploded" in reading.flags
    assert 1 < reading.score <= SCORE_LIMIT


def test_a_prompt_switch_begins_a_new_baseline() -> None:
    state = settled()
    bright = [moving_square(c, level=80) for c in range(6)]
    assert read_drift(state, bright[0], restart=False).score > 0.3
    scores = [read_drift(state, b, restart=i == 0).score for i, b in enumerate(bright)]
    assert max(scores) < 0.1


def test_the_state_survives_a_round_trip() -> None:
    state = settled()
    again = DriftState.from_numbers(state.to_numbers())
    parts = moving_square(9)
    one: DriftReading = read_drift(state, parts, restart=False)
    assert one == read_drift(again, parts, restart=False)
