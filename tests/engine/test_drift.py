"""The drift meter: calm on an even stream, loud on each kind of failure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from echo_ray.engine.drift import (
    BASELINE_CHUNKS,
    FROZEN_CHUNKS,
    SCORE_LIMIT,
    DriftState,
    frame_parts,
    read_drift,
)
from echo_ray.session.chunk import DriftReading

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
    for chunk in range(BASELINE_CHUNKS):
        read_drift(state, moving_square(chunk), restart=False)
    return state


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


def test_washed_out() -> None:
    reading = read_drift(settled(), moving_square(6, contrast=0.1, level=150), restart=False)
    assert "washed_out" in reading.flags
    assert reading.score > 0.3


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
