"""Windows are leased: nothing of one session reaches the next, and nothing grows."""

from __future__ import annotations

import pytest
import torch
from small import small_clip, small_engine

from echo_ray.engine.arena import Arena, Arenas
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.state import SessionState
from echo_ray.errors import EngineError, InvalidRequestError

SWITCHES = {2: ["a blue square"], 6: ["a green ball"]}


def played(engine: EchoEngine, state: SessionState, chunks: int = 9) -> list[str]:
    first = state.next_index
    return [engine.step(state, SWITCHES.get(n, ())).digest for n in range(first, first + chunks)]


def poison(arena: Arena) -> None:
    for tensor in arena.tensors():
        tensor.fill_(float("nan"))


@pytest.mark.parametrize(
    "cache", [{}, {"point_every": 0}, {"policy": "window"}, {"policy": "absolute"},
              {"global_sink": False}], ids=str,
)  # fmt: skip
def test_a_session_reads_nothing_of_the_one_before(cache: dict[str, object]) -> None:
    expected = played(small_engine(**cache), small_engine(**cache).open("a red ball", 1))
    engine = small_engine(**cache)
    first = engine.open("a red ball", 9)
    played(engine, first)
    arena = first.latent.window.arena
    engine.close(first)
    with torch.inference_mode():
        poison(arena)
    second = engine.open("a red ball", 1)
    assert second.latent.window.arena is arena
    assert played(engine, second) == expected


def test_a_loaded_session_reads_nothing_of_the_one_before() -> None:
    engine = small_engine()
    live = engine.open("a red ball", 1)
    played(engine, live, 8)
    snapshot = engine.save(live)
    expected = played(engine, live)
    arena = live.latent.window.arena
    engine.close(live)
    with torch.inference_mode():
        poison(arena)
    loaded = engine.load(snapshot)
    assert loaded.latent.window.arena is arena
    assert played(engine, loaded) == expected


def test_a_closed_state_is_refused() -> None:
    engine = small_engine()
    state = engine.open("a red ball", 1)
    engine.step(state)
    engine.close(state)
    engine.close(state)
    with pytest.raises(EngineError, match="closed: open or load the session again"):
        engine.step(state)
    # It gave its arena back once, however often it was closed.
    assert engine._generator.arenas.free == 1


def test_sessions_at_the_same_time_have_an_arena_each() -> None:
    engine = small_engine()
    states = [engine.open("a red ball", n) for n in range(3)]
    arenas = engine._generator.arenas
    assert len({id(s.latent.window.arena) for s in states}) == arenas.count == 3
    assert engine.memory()["arenas"] == 3 * states[0].latent.window.arena.size_bytes > 10_000
    for state in states:
        engine.close(state)
    for seed in range(20):
        engine.close(engine.open("a red ball", seed))
    assert (arenas.count, arenas.free) == (3, 3)


def test_a_refused_clip_takes_no_arena() -> None:
    engine = small_engine()
    with pytest.raises(InvalidRequestError):
        engine.open("a red ball", 1, small_clip("group", 10)[:-1])
    assert engine._generator.arenas.count == 0


def test_the_size_of_a_state_is_its_arena_s_and_ends_with_it() -> None:
    engine = small_engine()
    state = engine.open("a red ball", 1)
    whole = engine.state_bytes(state)
    arena = state.latent.window.arena
    engine.close(state)
    assert whole - engine.state_bytes(state) == arena.size_bytes


def test_a_pool_keeps_so_many_free_and_no_more() -> None:
    shapes = small_engine()._preset

    def make(batch: int) -> Arena:
        return Arena(
            shapes.dit, shapes.cache,
            batch=batch, device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip

    pool = Arenas(make, kept=1)
    one, other, wider = pool.lease(1), pool.lease(1), pool.lease(2)
    pool.give_back(one)
    pool.give_back(other)
    assert pool.free == 1
    # Of another batch than the free one.
    assert pool.lease(2) is not wider
    assert pool.lease(1) is one
    del one, other, wider
    assert pool.count == 0
    assert pool.size_bytes == 0
