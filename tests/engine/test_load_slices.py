"""Loads and openings slice by slice: the same bits whatever comes between, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_clip, small_engine

from echo_ray.engine.decoding import Decoders
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.graph_check import CheckedRecorder
from echo_ray.engine.state import SessionState
from echo_ray.engine.step import InSlices
from echo_ray.errors import EngineError, InvalidRequestError, PromptError, SnapshotCorrupt
from echo_ray.session.snapshot import Snapshot

POINT = 6
SWITCHES = {2: ("a blue square",), 7: ("two green balls",)}


def made_by(load: InSlices[SessionState]) -> tuple[int, SessionState]:
    count = 1
    while (state := load.advance()) is None:
        count += 1
    return count, state


def run(engine: EchoEngine, state: SessionState, until: int) -> list[str]:
    first = state.next_index
    return [engine.step(state, SWITCHES.get(n, ())).digest for n in range(first, until)]


@lru_cache(maxsize=4)
def alone(codec: str) -> tuple[EchoEngine, Snapshot, list[str], list[str]]:
    """An engine, a snapshot, and the digests behind it and of another session."""
    engine = small_engine(codec=codec, point_every=POINT)
    state, other = engine.open("a red ball", 1), engine.open("a green box", 2)
    run(engine, state, POINT)
    saved = engine.save(state)
    return engine, saved, run(engine, state, POINT + 3), run(engine, other, 9)


def recorded(codec: str = "tiny") -> EchoEngine:
    engine = small_engine(codec=codec, point_every=POINT)
    decoders = Decoders(engine._modules.codec, engine._lanes, CheckedRecorder())
    engine._decoders = engine._arrivals.decoders = decoders
    return engine


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), codec=st.sampled_from(["group", "tiny"]))
def test_loads_interleaved_with_steps_are_those_of_lone_runs(seed: int, codec: str) -> None:
    order, (engine, saved, behind, others) = Random(seed), alone(codec)
    loads = [engine.begin_load(saved) for _ in range(2)]
    left, opening = engine.begin_load(saved), engine.begin_open("a green box", 2)
    loaded: list[SessionState] = []
    left.advance()
    other = made_by(opening)[1]
    digests: list[str] = []
    step = None
    while loads or len(digests) < 9:
        turn = order.choice([*loads, None])
        if turn is not None:
            if (state := turn.advance()) is not None:
                loads.remove(turn)
                loaded.append(state)
        elif len(digests) < 9:
            step = step or engine.begin(other, SWITCHES.get(len(digests), ()))
            if (chunk := step.advance()) is not None:
                digests.append(chunk.digest)
                step = None
    left.close()
    assert digests == others
    assert [run(engine, state, POINT + 3) for state in loaded] == [behind, behind]
    for state in (*loaded, other):
        engine.close(state)


@pytest.mark.parametrize(("codec", "latents"), [("group", 0), ("tiny", 8)])
def test_a_slice_is_a_forward_or_a_latent(codec: str, latents: int) -> None:
    engine, saved, behind, _ = alone(codec)
    assert engine._modules.codec.rebuild_latents == latents
    count, state = made_by(engine.begin_load(saved))
    # Its parts, the sink and three chunks of the window, and the decoder's latents.
    assert count == 1 + 4 + latents
    assert run(engine, state, POINT + 3) == behind


def test_opening_is_a_slice_for_the_prompt_the_clip_and_the_state() -> None:
    engine = small_engine()
    clip = small_clip("group", 9)
    count, state = made_by(engine.begin_open("a red ball", 1, clip))
    assert count == 3
    assert run(engine, state, 4) == run(engine, engine.open("a red ball", 1, clip), 4)


def held(engine: EchoEngine) -> tuple[int, int]:
    """Arenas and places that are free."""
    return engine._generator.arenas.free, engine._decoders.free


@pytest.mark.parametrize("slices", [0, 1, 3, 7])
def test_what_a_load_that_is_left_holds_is_given_back(slices: int) -> None:
    engine = recorded()
    _, saved, behind, _ = alone("tiny")
    load = engine.begin_load(saved)
    for _ in range(slices):
        assert load.advance() is None
    load.close()
    load.close()
    assert held(engine) == (int(slices > 0), int(slices > 5))
    with pytest.raises(EngineError, match="loading a session on cpu is over"):
        load.advance()
    state = engine.load(saved)
    assert engine._generator.arenas.count == 1
    assert run(engine, state, POINT + 3) == behind
    load.close()
    assert held(engine) == (0, 0), "what another has now is not given back once more"


def test_closing_a_load_that_is_over_leaves_its_state_alone() -> None:
    engine, saved, behind, _ = alone("tiny")
    load = engine.begin_load(saved)
    _, state = made_by(load)
    load.close()
    assert run(engine, state, POINT + 3) == behind


def test_what_fails_in_a_slice_is_told_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = recorded()
    _, saved, _, _ = alone("tiny")

    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("device lost")

    for part, slices in (("_context_pass", 1), ("decode", 5)):
        load = engine.begin_load(saved)
        for _ in range(slices):
            load.advance()
        owner = engine._generator if part == "_context_pass" else engine._decoders
        with monkeypatch.context() as patch:
            patch.setattr(owner, part, lost)
            with pytest.raises(EngineError, match="loading a session on cpu failed: device lost"):
                load.advance()
        assert engine._generator.arenas.free == engine._generator.arenas.count == 1


def test_a_snapshot_that_does_not_fit_holds_nothing() -> None:
    engine = recorded()
    _, saved, _, _ = alone("tiny")
    sink = saved.tensors["sink"]
    wrong = replace(saved, tensors=saved.tensors | {"sink": replace(sink, dtype="int32")})
    load = engine.begin_load(wrong)
    with pytest.raises(SnapshotCorrupt, match="'sink'"):
        load.advance()
    assert engine._generator.arenas.free == engine._generator.arenas.count == 1


def test_an_opening_refuses_what_open_refuses_in_its_slices() -> None:
    engine = small_engine()
    with pytest.raises(InvalidRequestError, match="seed -1"):
        engine.begin_open("a red ball", -1).advance()
    with pytest.raises(PromptError, match="prompt is empty"):
        engine.begin_open(" ", 1).advance()
    opening = engine.begin_open("a red ball", 1, b"xy")
    assert opening.advance() is None
    with pytest.raises(InvalidRequestError, match="2 bytes are not whole chunks"):
        opening.advance()
    assert engine._generator.arenas.count == 0
