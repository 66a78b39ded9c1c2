"""Engine benchmarks on the shipped preset: chunk time by stage, snapshot and restore, encoding.

Run by `make bench`. Every case first checks that what it times is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.frames import FORMATS, encode
from echo_ray.engine.state import SessionState
from echo_ray.session import snapshot as codec

pytestmark = pytest.mark.bench

MATURE = 8
Benchmark = Callable[..., Any]


@pytest.fixture(scope="module")
def engine() -> EchoEngine:
    return build_engine(ModelSection())


@pytest.fixture(scope="module")
def state(engine: EchoEngine) -> SessionState:
    """A session in the mature phase, at a point."""
    state = engine.open("a red ball on a blue background", 1)
    for _ in range(MATURE):
        engine.step(state)
    assert state.at_point
    return state


def test_chunk_by_stage(engine: EchoEngine, benchmark: Any) -> None:
    session = engine.open("a red ball on a blue background", 2)
    for _ in range(MATURE):
        engine.step(session)
    stages: dict[str, list[float]] = {}

    def chunk() -> None:
        for name, seconds in engine.step(session).stage_seconds.items():
            stages.setdefault(name, []).append(seconds)

    benchmark.pedantic(chunk, rounds=48, warmup_rounds=4)
    mean = benchmark.stats.stats.mean
    benchmark.extra_info["frames_per_second"] = round(engine.shape.frames_per_chunk / mean, 1)
    for name, seconds in stages.items():
        benchmark.extra_info[f"{name}_ms"] = round(1000 * sum(seconds) / len(seconds), 2)


def test_prompt_switch(engine: EchoEngine, benchmark: Any) -> None:
    session = engine.open("a red ball on a blue background", 3)
    for _ in range(MATURE):
        engine.step(session)
    prompts = iter(["a green square", "a red ball"] * 100)
    benchmark.pedantic(lambda: engine.step(session, [next(prompts)]), rounds=16)


def test_save(engine: EchoEngine, state: SessionState, benchmark: Any) -> None:
    blob = benchmark(lambda: codec.encode(engine.save(state)))
    assert codec.encode(engine.save(engine.load(codec.decode(blob)))) == blob
    benchmark.extra_info["snapshot_bytes"] = len(blob)


def test_restore(engine: EchoEngine, state: SessionState, benchmark: Any) -> None:
    blob = codec.encode(engine.save(state))
    restored = benchmark(lambda: engine.load(codec.decode(blob)))
    assert engine.step(restored).digest == engine.step(engine.load(codec.decode(blob))).digest


@pytest.mark.parametrize("fmt", FORMATS)
def test_encode(engine: EchoEngine, fmt: str, benchmark: Any) -> None:
    session = engine.open("a red ball on a blue background", 4)
    engine.step(session)
    chunk = engine.step(session)
    data = benchmark(lambda: encode(chunk, fmt, fps=engine.shape.fps, start_frame=9))
    benchmark.extra_info["segment_bytes"] = len(data)
