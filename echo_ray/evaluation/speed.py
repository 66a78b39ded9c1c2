"""Speed: frames a second of one session, by stage, everything included."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from echo_ray.engine.frames import encode
from echo_ray.evaluation.chart import Bar, Bars
from echo_ray.evaluation.report import Figure, Report
from echo_ray.evaluation.rollout import Plan, case_rng, counted, session_seed
from echo_ray.evaluation.statistics import Spread, quantile
from echo_ray.evaluation.subject import Subject

WARM_CHUNKS = 8
"""Not timed: until then the window is not full."""
CHUNKS = 16
"""Timed in each case, a prompt switch among them."""
SWITCH_AT = WARM_CHUNKS + CHUNKS // 2
PROMPTS = ("a red ball moving on a black background", "a blue square on a white background")


class Clocks:
    """Sums of wall and of processor seconds, by name."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.busy: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        wall, busy = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        self.busy[name] = self.busy.get(name, 0.0) + time.process_time() - busy


def measure(subject: Subject, plan: Plan) -> Report:
    """Every case is a session: its first chunks warm up, the rest is timed, encoding apart."""
    engine = subject.engine()
    shape = engine.shape
    clocks = Clocks()
    stages: dict[str, float] = {}
    steps_ms: list[float] = []
    records: list[dict[str, Any]] = []
    for index in counted("speed", range(plan.cases), plan.cases):
        rng = case_rng("speed", plan.seed, index)
        state = engine.open(PROMPTS[0], session_seed(rng))
        for _ in range(WARM_CHUNKS):
            engine.step(state)
        taken = []
        for number in range(WARM_CHUNKS, WARM_CHUNKS + CHUNKS):
            before = clocks.wall.get("step", 0.0)
            with clocks.timed("step"):
                chunk = engine.step(state, [PROMPTS[1]] if number == SWITCH_AT else [])
            taken.append(1000 * (clocks.wall["step"] - before))
            with clocks.timed("encode"):
                encode(chunk, "fmp4", fps=shape.fps, start_frame=shape.first_frame(number))
            for stage, seconds in chunk.stage_seconds.items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        steps_ms += taken
        records.append({"step_ms": [round(ms, 2) for ms in taken]})
    chunks = plan.cases * CHUNKS
    frames = chunks * shape.frames_per_chunk
    by_stage = _milliseconds(stages, clocks, chunks)
    return Report(
        what="speed",
        title="Speed of one session",
        figures=_figures(clocks, frames, shape.fps, steps_ms, by_stage),
        cases=records,
        panels=[
            Bars(
                "Milliseconds a chunk, by stage",
                [Bar(name, ms) for name, ms in by_stage.items()],
                top=None,
            ),
            Bars("Frames a second", _rates(clocks, frames), None, [("real time", shape.fps)]),
        ],
        notes=[
            f"{chunks} chunks of {shape.frames_per_chunk} frames at {shape.width} x "
            f"{shape.height}, one prompt switch in {CHUNKS}; {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f}. Processor time does not count what others run."
        ],
    )


def _milliseconds(stages: dict[str, float], clocks: Clocks, chunks: int) -> dict[str, float]:
    named = {name: 1000 * seconds / chunks for name, seconds in stages.items()}
    named["other"] = max(0.0, 1000 * clocks.wall["step"] / chunks - sum(named.values()))
    return named | {"mp4": 1000 * clocks.wall["encode"] / chunks}


def _figures(
    clocks: Clocks, frames: int, fps: int, steps_ms: list[float], by_stage: dict[str, float]
) -> dict[str, dict[str, Figure]]:
    both_wall = clocks.wall["step"] + clocks.wall["encode"]
    both_busy = clocks.busy["step"] + clocks.busy["encode"]
    return {
        "frames a second": {
            "engine": frames / clocks.wall["step"],
            "engine, by processor time": frames / max(clocks.busy["step"], 1e-9),
            "with MP4 encoding": frames / both_wall,
            "with MP4 encoding, by processor time": frames / max(both_busy, 1e-9),
            "times real time": frames / both_wall / fps,
        },
        "milliseconds a chunk": {
            "whole step": Spread.of(steps_ms),
            "median": quantile(steps_ms, 0.5),
            "95th percentile": quantile(steps_ms, 0.95),
            **by_stage,
        },
    }


def _rates(clocks: Clocks, frames: int) -> list[Bar]:
    wall = clocks.wall["step"] + clocks.wall["encode"]
    busy = clocks.busy["step"] + clocks.busy["encode"]
    return [
        Bar("engine", frames / clocks.wall["step"]),
        Bar("with MP4", frames / wall),
        Bar("with MP4, processor time", frames / max(busy, 1e-9)),
    ]
