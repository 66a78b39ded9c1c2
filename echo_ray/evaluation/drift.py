"""Drift: does a long stream stay what it was in its first chunks?

Streams under one prompt, and streams with a new prompt every ten chunks. Pixel statistics and flags
are the engine's own drift readings; whether the prompt holds, and how sure that is, the detector's;
the latents' distance is taken at the points, from the snapshots that the engine saves there.

Shapes: F frames, C channels, h w latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from echo_ray.engine.state import to_tensor
from echo_ray.evaluation.cases import Scene, caption, draw_scene
from echo_ray.evaluation.chart import Line, Lines
from echo_ray.evaluation.report import Figure, Report
from echo_ray.evaluation.rollout import Plan, case_rng, counted, read, session_seed, vote
from echo_ray.evaluation.statistics import Rate, Spread, mean
from echo_ray.evaluation.subject import Measured, Subject
from echo_ray.session.engine_port import State

SWITCH_EVERY = 10
SETTLED = 3
"""Chunks after a switch that do not count for or against the prompt."""
BASELINE_POINTS = 2
BINS = 100
CONSTANT, SWITCHED = "one prompt", f"new prompt every {SWITCH_EVERY}"
PARTS = ("luminance", "saturation", "sharpness", "motion")
CURVES = (*PARTS, "confidence", "latent distance")

T = TypeVar("T")


@dataclass(slots=True)
class Stream:
    """One rollout, chunk by chunk; a value that is not there is nan."""

    kind: str
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})
    right: list[bool | None] = field(default_factory=list)
    """Whether background and colour are the prompt's; None while a switch settles."""
    flags: list[tuple[str, ...]] = field(default_factory=list)


class LatentDistance:
    """How far latents have moved, as a distribution, from those of the first points."""

    def __init__(self) -> None:
        self._first: list[Tensor] = []

    def at(self, engine: Measured, state: State) -> float:
        """The distance at a point; nan elsewhere, before there is a baseline, or without latents.

        Per channel, mean and spread over the latest latents against the baseline's: root of the
        mean square of both differences. Latents have unit spread, so this is in units of it.
        """
        if not state.at_point or state.next_index == 0:
            return math.nan
        history = engine.save(state).tensors.get("history")
        if history is None:
            return math.nan
        latents_BFChw = to_tensor(history).float()
        spread = latents_BFChw.std(dim=(0, 1, 3, 4))
        now = torch.stack([latents_BFChw.mean(dim=(0, 1, 3, 4)), spread])
        if len(self._first) < BASELINE_POINTS:
            self._first.append(now)
        away = now - torch.stack(self._first).mean(dim=0)
        return float(away.square().sum(dim=0).mean().sqrt())


def measure(subject: Subject, plan: Plan) -> Report:
    """So many streams of each kind, each `plan.chunks` long."""
    engine = subject.engine()
    jobs = [(kind, index) for kind in (CONSTANT, SWITCHED) for index in range(plan.cases)]
    streams: list[Stream] = []
    ticks = counted("drift", range(len(jobs) * plan.chunks), len(jobs) * plan.chunks, "chunk")
    for kind, index in jobs:
        streams.append(_stream(engine, plan, kind, index, lambda: next(ticks)))
    next(ticks, None)
    kinds = (CONSTANT, SWITCHED)
    return Report(
        what="drift",
        title="Drift over a long stream",
        figures={
            group: rows
            for kind in kinds
            for group, rows in _figures(kind, [s for s in streams if s.kind == kind]).items()
        },
        cases=[_record(s) for s in streams],
        panels=[*(_panel(name, streams) for name in CURVES), _right_panel(streams)],
        notes=[
            f"{plan.cases} streams of {plan.chunks} chunks each; tenths are of a stream. Latents "
            f"are compared with those of the first {BASELINE_POINTS} points; under new prompts "
            "they move with the prompt. Chunks of a stream are alike, so the intervals are "
            "narrower than they should be."
        ],
    )


def _stream(
    engine: Measured, plan: Plan, kind: str, index: int, tick: Callable[[], object]
) -> Stream:
    rng = case_rng(f"drift {kind}", plan.seed, index)
    scene = draw_scene(rng, 1)
    stream, distance = Stream(kind), LatentDistance()
    state = engine.open(caption(scene), session_seed(rng))
    since = 0
    for number in range(plan.chunks):
        prompts = []
        if kind == SWITCHED and number and number % SWITCH_EVERY == 0:
            scene, since = draw_scene(rng, 1), 0
            prompts = [caption(scene)]
        chunk = engine.step(state, prompts)
        seen = vote(read([chunk], 1))
        for part in PARTS:
            stream.values[part].append(chunk.drift.parts.get(part, math.nan))
        stream.values["confidence"].append(seen.confidence)
        stream.values["latent distance"].append(distance.at(engine, state))
        holds = _holds(scene, seen.background, seen.colour)
        stream.right.append(holds if since >= SETTLED or number == since else None)
        stream.flags.append(tuple(chunk.drift.flags))
        since += 1
        tick()
    return stream


def _holds(scene: Scene, background: str | None, colour: str | None) -> bool:
    return background == scene.background and colour == scene.things[0].colour


def tenth(length: int) -> int:
    return max(1, length // 10)


def _figures(kind: str, streams: Sequence[Stream]) -> dict[str, dict[str, Figure]]:
    flags = [f for s in streams for chunk in s.flags for f in chunk]
    whole: dict[str, Figure] = {
        "chunks": sum(len(s.right) for s in streams),
        "drift flags": len(flags),
        **{f"flag {name}": flags.count(name) for name in sorted(set(flags))},
    }
    first, last = _right_in(streams, first=True), _right_in(streams, first=False)
    whole["prompt right, first tenth"] = first
    whole["prompt right, last tenth"] = last
    whole["last less first, points"] = 100 * (last.value - first.value)
    groups = {kind: whole}
    for label, is_first in (("first tenth", True), ("last tenth", False)):
        groups[f"{kind}, {label}"] = {
            name: Spread.of(_values_in(streams, name, first=is_first)) for name in CURVES
        }
    return groups


def _part(values: Sequence[T], *, first: bool) -> Sequence[T]:
    return values[: tenth(len(values))] if first else values[-tenth(len(values)) :]


def _right_in(streams: Sequence[Stream], *, first: bool) -> Rate:
    return Rate.of(r for s in streams for r in _part(s.right, first=first) if r is not None)


def _values_in(streams: Sequence[Stream], name: str, *, first: bool) -> list[float]:
    return [v for s in streams for v in _part(s.values[name], first=first) if math.isfinite(v)]


def binned(values: Sequence[float], bins: int = BINS) -> list[tuple[float, float]]:
    """(chunk, mean) of at most so many equal stretches; of stretches without a value nothing."""
    width = max(1, -(-len(values) // bins))
    points = []
    for start in range(0, len(values), width):
        known = [v for v in values[start : start + width] if math.isfinite(v)]
        if known:
            points.append((start + width / 2, mean(known)))
    return points


def _across(streams: Sequence[Stream], kind: str, name: str) -> list[float]:
    """The mean over a kind's streams, chunk by chunk."""
    columns = zip(*(s.values[name] for s in streams if s.kind == kind), strict=True)
    return [mean([v for v in column if math.isfinite(v)]) for column in columns]


def _panel(name: str, streams: Sequence[Stream]) -> Lines:
    lines = [Line(k, binned(_across(streams, k, name))) for k in (CONSTANT, SWITCHED)]
    return Lines(name, lines, "chunk", bottom=0.0)


def _right_panel(streams: Sequence[Stream]) -> Lines:
    lines = []
    for kind in (CONSTANT, SWITCHED):
        columns = zip(*(s.right for s in streams if s.kind == kind), strict=True)
        shares = [mean([float(r) for r in column if r is not None]) for column in columns]
        lines.append(Line(kind, binned(shares, 20)))
    return Lines("background and colour right", lines, "chunk", 0.0, 1.0)


def _record(stream: Stream) -> dict[str, Any]:
    flagged = [n for n, flags in enumerate(stream.flags) if flags]
    return {
        "kind": stream.kind,
        "chunks": len(stream.right),
        "flagged_chunks": flagged[:1000],
        "curves": {name: binned(values) for name, values in stream.values.items()},
        "right": binned([math.nan if r is None else float(r) for r in stream.right], 20),
    }
