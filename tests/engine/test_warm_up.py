"""What an engine does before anybody is served: sessions that come find their recordings made."""

from __future__ import annotations

import logging

import pytest
from small import small_engine, small_preset

from echo_ray.engine.build import record_ahead
from echo_ray.engine.decoding import Decoders
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.graph_check import CheckedRecorder
from echo_ray.engine.room import Room

TIMES = (1000, 500)
CACHE = small_preset(TIMES, point_every=4).cache


def recorded_engine() -> tuple[EchoEngine, list[CheckedRecorder]]:
    engine, recorders = small_engine(TIMES, point_every=4), [CheckedRecorder(), CheckedRecorder()]
    engine._generator._recorder = recorders[0]
    decoders = Decoders(engine._modules.codec, engine._lanes, recorders[1])
    engine._decoders = engine._arrivals.decoders = decoders
    return engine, recorders


def recordings(sessions: int, recorders: list[CheckedRecorder], engine: EchoEngine) -> list[int]:
    """How many are made while so many sessions play in turns, loads and switches among them."""
    before = [recorder.recorded for recorder in recorders]
    states = [engine.open("a red ball", seed) for seed in range(sessions)]
    for n in range(10):
        for i, state in enumerate(states):
            engine.step(state, ["a blue square"] if n == 7 else ())
            if state.at_point:
                saved = engine.save(state)
                engine.close(state)
                states[i] = engine.load(saved)
    for state in states:
        engine.close(state)
    return [r.recorded - b for r, b in zip(recorders, before, strict=True)]


def test_so_many_sessions_at_once_record_nothing_more() -> None:
    engine, recorders = recorded_engine()
    record_ahead(engine, CACHE, 3)
    assert recordings(3, recorders, engine) == [0, 0]
    one_more = recordings(4, recorders, engine)
    assert min(one_more) > 0, "the fourth had none made"


def test_memory_that_ends_the_recordings_is_said_and_the_engine_serves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, recorders = recorded_engine()
    arenas = engine._generator.arenas
    engine._arrivals._room = Room(
        small_preset(TIMES, point_every=4), "cuda", lambda: 0 if arenas.count == 2 else 10**9
    )
    with caplog.at_level(logging.WARNING):
        record_ahead(engine, CACHE, 4)
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("recorded ahead for 2 of 4 sessions: a session of")
    assert "0 are free" in said
    engine._arrivals._room = Room(small_preset(TIMES, point_every=4), "cpu", None)
    assert recordings(2, recorders, engine) == [0, 0]
