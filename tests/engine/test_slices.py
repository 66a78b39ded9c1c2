"""Chunks made slice by slice: the same bits whatever comes between, and as many slices as said."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_clip, small_engine

from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.lanes import HostLanes
from echo_ray.engine.slices import Slices, whole
from echo_ray.engine.state import SessionState
from echo_ray.engine.step import EngineStep, Stages
from echo_ray.errors import EngineError, PromptError
from echo_ray.session.chunk import Chunk
from echo_ray.session.snapshot import encode

SWITCHES = {2: ("a blue square",), 7: ("two green balls", "a red triangle")}
SEEDS = (1, 2, 3)


def slices_of(step: EngineStep) -> tuple[int, Chunk]:
    """How many slices a step has, and what it makes."""
    count = 1
    while (chunk := step.advance()) is None:
        count += 1
    return count, chunk


@lru_cache(maxsize=16)
def engine_of(every: int) -> EchoEngine:
    """The small model with a point every so many chunks; echo-tiny for 0."""
    return small_engine(point_every=every) if every else build_engine(ModelSection())


@lru_cache(maxsize=16)
def undisturbed(every: int, seed: int, chunks: int) -> tuple[list[str], dict[int, bytes]]:
    engine = engine_of(every)
    state, digests, points = engine.open("a red ball", seed), [], {}
    for index in range(chunks):
        digests.append(engine.step(state, SWITCHES.get(index, ())).digest)
        if state.at_point:
            points[state.next_index] = encode(engine.save(state))
    return digests, points


def interleaved(every: int, chunks: int, order: Random) -> None:
    """Sessions that take turns slice by slice, each compared with its lone run.

    Snapshots are begun at every point and waited for at the very end; one more session is left in
    the middle of a chunk, where its state stays.
    """
    engine = engine_of(every)
    alone = {seed: undisturbed(every, seed, chunks) for seed in SEEDS}
    states = {seed: engine.open("a red ball", seed) for seed in SEEDS}
    left = engine.begin(engine.open("a green box", 9))
    steps: dict[int, EngineStep] = {}
    digests: dict[int, list[str]] = {seed: [] for seed in SEEDS}
    saving = {}
    left.advance()
    while going := [seed for seed in SEEDS if len(digests[seed]) < chunks]:
        seed = order.choice(going)
        state, index = states[seed], len(digests[seed])
        if seed not in steps:
            steps[seed] = engine.begin(state, SWITCHES.get(index, ()))
        for _ in range(order.randint(1, 4)):
            chunk = steps[seed].advance()
            if chunk is not None:
                del steps[seed]
                digests[seed].append(chunk.digest)
                if state.at_point:
                    saving[seed, state.next_index] = engine.saving(state)
                break
    for seed in SEEDS:
        assert digests[seed] == alone[seed][0]
    points = {(seed, n): blob for seed in SEEDS for n, blob in alone[seed][1].items()}
    assert {at: encode(packed()) for at, packed in saving.items()} == points


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32), every=st.sampled_from([2, 3]))
def test_sessions_interleaved_slice_by_slice_are_those_of_lone_runs(seed: int, every: int) -> None:
    interleaved(every, 8, Random(seed))


@pytest.mark.timeout(180)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_so_are_those_of_echo_tiny(seed: int) -> None:
    interleaved(0, 2, Random(seed))


def test_a_slice_is_a_forward_or_the_decoding() -> None:
    engine = small_engine(point_every=6)
    state = engine.open("a red ball", 1)
    found = [
        slices_of(engine.begin(state, ("a blue box",) if n == 7 else ()))[0] for n in range(12)
    ]
    # Two denoising steps, the context pass, decoding; at points four passes rebuild the window.
    # A switch looks up its prompt and recaches.
    assert found == [4, 4, 4, 4, 4, 7, 4, 6, 4, 4, 4, 7]


def test_given_chunks_have_no_denoising_slices() -> None:
    engine = small_engine(point_every=0)
    state = engine.open("a red ball", 1, small_clip("group", 9))
    assert [slices_of(engine.begin(state))[0] for _ in range(2)] == [3, 4]


def test_a_step_is_the_same_as_its_slices() -> None:
    engine = small_engine()
    one, other = engine.open("a red ball", 1), engine.open("a red ball", 1)
    stepped, (_, sliced) = engine.step(one), slices_of(engine.begin(other))
    assert stepped.digest == sliced.digest
    assert set(stepped.stage_seconds) == set(sliced.stage_seconds)


def half_way(engine: EchoEngine) -> tuple[SessionState, EngineStep]:
    state = engine.open("a red ball", 1)
    step = engine.begin(state)
    step.advance()
    return state, step


def test_nothing_else_is_asked_of_a_state_in_the_middle_of_a_step() -> None:
    engine = small_engine(point_every=1)
    state, step = half_way(engine)
    for ask in (engine.begin, engine.step, engine.save, engine.saving):
        with pytest.raises(EngineError, match="in the middle of a step"):
            ask(state)
    slices_of(step)
    assert engine.save(state).header["prompt"] == "a red ball"


def test_a_step_that_is_over_or_failed_is_not_advanced() -> None:
    engine = small_engine()
    state, step = half_way(engine)
    slices_of(step)
    with pytest.raises(EngineError, match="chunk 0 on cpu is over"):
        step.advance()
    failing = engine.begin(state, (" ",))
    with pytest.raises(PromptError):
        failing.advance()
    with pytest.raises(EngineError, match="is over"):
        failing.advance()
    with pytest.raises(EngineError, match="load the state again"):
        engine.step(state)


def test_a_device_that_fails_in_a_slice_says_in_which_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = small_engine()
    state, step = half_way(engine)

    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._generator, "_flow", lost)
    with pytest.raises(EngineError, match="chunk 0 on cpu failed: device lost"):
        slices_of(step)
    assert not state.whole


def test_what_comes_between_slices_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("echo_ray.engine.lanes.time.perf_counter", lambda: now_s[0])
    stages = Stages(HostLanes(), [])

    def working() -> Slices[int]:
        for _ in range(3):
            now_s[0] += 1.0
            yield
        now_s[0] += 0.5
        return 7

    slices = stages.each("denoise", working())
    for _ in range(3):
        next(slices)
        now_s[0] += 100.0
    with pytest.raises(StopIteration) as end:
        next(slices)
    with stages.on_host("drift"):
        now_s[0] += 0.25
    assert end.value.value == 7
    assert stages.told() == {"denoise": 3.5, "drift": 0.25}
    assert stages.told() == {}


def test_a_run_of_slices_gives_what_the_last_one_makes() -> None:
    done = []

    def three() -> Slices[str]:
        for n in range(2):
            done.append(n)
            yield
        return "made"

    assert whole(three()) == "made"
    assert done == [0, 1]
