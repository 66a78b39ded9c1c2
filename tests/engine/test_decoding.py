"""Decoders in places of their own: recorded once, replayed for every stream, the same bits."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from small import small_engine

from echo_ray.engine.decoding import PLACES_KEPT, Decoders, Place
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.graph_check import CheckedRecorder
from echo_ray.engine.state import SessionState

CODECS = ("group", "tiny", "wan")


def recorded_engine(codec: str) -> tuple[EchoEngine, CheckedRecorder]:
    engine, recorder = small_engine((1000,), codec, point_every=2), CheckedRecorder()
    decoders = Decoders(engine._modules.codec, engine._lanes, recorder)
    engine._decoders = engine._arrivals.decoders = decoders
    return engine, recorder


def played(engine: EchoEngine, state: SessionState, chunks: int) -> list[str]:
    return [engine.step(state).digest for _ in range(chunks)]


def eager(codec: str, seed: int, chunks: int) -> list[str]:
    engine = small_engine((1000,), codec, point_every=2)
    return played(engine, engine.open("a red ball", seed), chunks)


def place_of(state: SessionState) -> Place:
    assert state.decoder.place is not None
    return state.decoder.place


@pytest.mark.parametrize("codec", CODECS)
def test_replayed_decodings_change_no_bit(codec: str) -> None:
    engine, recorder = recorded_engine(codec)
    assert played(engine, engine.open("a red ball", 1), 3) == eager(codec, 1, 3)
    # A stream's first latent, and all others.
    assert recorder.recorded == 2


@pytest.mark.parametrize("codec", CODECS)
def test_a_loaded_stream_goes_on_in_a_place(codec: str) -> None:
    engine, _ = recorded_engine(codec)
    state = engine.open("a red ball", 1)
    played(engine, state, 2)
    snapshot = engine.save(state)
    expected = played(engine, state, 1)
    loaded = engine.load(snapshot)
    assert played(engine, loaded, 1) == expected
    assert place_of(loaded) is not place_of(state)


def test_sessions_take_turns_in_places_of_their_own() -> None:
    engine, recorder = recorded_engine("tiny")
    states = [engine.open("a red ball", seed) for seed in (1, 2)]
    mixed = [[engine.step(state).digest for state in states] for _ in range(3)]
    assert list(map(list, zip(*mixed, strict=True))) == [eager("tiny", s, 3) for s in (1, 2)]
    one, two = ({t.data_ptr() for t in place_of(s).past.values()} for s in states)
    assert not one & two
    assert recorder.recorded == 4


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_of_a_session_is_left_to_the_next(codec: str) -> None:
    engine, recorder = recorded_engine(codec)
    state = engine.open("a red ball", 1)
    played(engine, state, 1)
    place = place_of(state)
    assert "decoder" not in engine._arrivals.left()
    engine.close(state)
    engine.close(state)
    assert engine._arrivals.left() == ["window", "decoder"]
    with torch.inference_mode():
        for key, past in place.past.items():
            if key != "begun":
                past.fill_(math.nan)
    other = engine.open("a red ball", 2)
    assert played(engine, other, 2) == eager(codec, 2, 2)
    assert place_of(other) is place
    assert recorder.recorded == 2
    assert place_of(other) is not place_of(_opened(engine))


def _opened(engine: EchoEngine) -> SessionState:
    state = engine.open("a red ball", 3)
    engine.step(state)
    return state


def test_a_place_is_part_of_a_state_s_size() -> None:
    engine, _ = recorded_engine("wan")
    state, plain = _opened(engine), small_engine((1000,), "wan", point_every=2)
    assert engine.state_bytes(state) == plain.state_bytes(_opened(plain))


def test_places_are_counted_leased_or_free() -> None:
    """Beside the windows, and under their own name; what is dropped counts no more."""
    engine, _ = recorded_engine("wan")
    assert engine.memory()["decoders"] == 0
    states = [_opened(engine) for _ in range(PLACES_KEPT + 1)]
    kept = sum(past.nbytes for past in place_of(states[0]).past.values())
    latent = states[0].latent.sink_BFCHW[:, 0].nbytes
    place = place_of(states[0]).size_bytes
    assert place == kept + latent
    assert engine.memory()["decoders"] == len(states) * place
    for state in states:
        engine.close(state)
    del states, state
    gc.collect()
    assert engine.memory()["decoders"] == PLACES_KEPT * place
    assert engine.memory()["arenas"] > 0


def test_so_many_free_places_are_kept() -> None:
    engine, _ = recorded_engine("group")
    states = [_opened(engine) for _ in range(PLACES_KEPT + 1)]
    for state in states:
        engine.close(state)
    assert engine._decoders.free == PLACES_KEPT
