"""Drift: does a long stream stay what it was in its first chunks?

Streams under one prompt, and streams with a new prompt every ten chunks. Pixel statistics and flags
are the engine's own drift readings; whether the prompt holds, and how sure that is, the detector's;
the latents' distance is taken at the points, from the snapshots that the engine saves there.

All streams go on side by side, a block of chunks at a time, and only sums over blocks are kept: a
day's stream needs little memory, and what is measured so far is a report already.

Shapes: F frames, C channels, h w latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from echo_ray.engine.state import to_tensor
from echo_ray.evaluation.cases import Scene, caption, draw_scene
from echo_ray.evaluation.chart import Line, Lines
from echo_ray.evaluation.report import Figure, Report
from echo_ray.evaluation.rollout import (
    Plan,
    Reading,
    case_rng,
    counted,
    read,
    session_seed,
    vote,
)
from echo_ray.evaluation.statistics import Change, Rate, Spread, mean
from echo_ray.evaluation.subject import Measured, Subject
from echo_ray.session.chunk import Chunk
from echo_ray.session.engine_port import State

SWITCH_EVERY = 10
SETTLED = 3
"""Chunks after a switch that do not count for or against the prompt."""
BASELINE_POINTS = 2
LONGEST_BLOCK = 50
"""Chunks of a stretch whose verdicts count as one; shorter where ten of them are no stream."""
STRETCH = 1000
"""Chunks at both ends of a long stream that are compared besides its tenths."""
SHOW_EVERY = 1000
"""Chunks, of all streams, after which what is measured so far is handed on."""
BINS = 100
FLAGGED = 1000
"""At most so many flagged chunks of a stream are named."""
CONSTANT, SWITCHED = "one prompt", f"new prompt every {SWITCH_EVERY}"
KINDS = (CONSTANT, SWITCHED)
PARTS = ("luminance", "saturation", "sharpness", "motion")
CURVES = (*PARTS, "confidence", "latent distance")
RIGHT = ("prompt right", "shape too")
"""Background and colour; and the shape."""


@dataclass(slots=True)
class Block:
    """Some chunks of a stream that follow each other, in sums."""

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CURVES, 0.0))
    known: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CURVES, 0))
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RIGHT, 0))
    judged: int = 0
    """Chunks that count for or against the prompt."""

    def add(self, values: dict[str, float], right: dict[str, bool] | None) -> None:
        """Take in a chunk: values, nan where there is none, and verdicts, unless it settles."""
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] += value
                self.known[name] += 1
        if right is not None:
            self.judged += 1
            for name in RIGHT:
                self.right[name] += right[name]

    def mean(self, name: str) -> float:
        return self.sums[name] / self.known[name] if self.known[name] else math.nan

    def rate(self, name: str) -> Rate:
        return Rate(self.right[name], self.judged)


@dataclass(slots=True)
class Stream:
    """One rollout: its blocks, and which chunks were flagged."""

    kind: str
    index: int
    prompt: str = ""
    """The first one."""
    chunks: int = 0
    blocks: list[Block] = field(default_factory=list)
    flags: dict[str, int] = field(default_factory=dict)
    """How many chunks have it."""
    first: dict[str, int] = field(default_factory=dict)
    """The first chunk that has it."""
    flagged: list[int] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        """Take in a chunk's flags."""
        for name in chunk.drift.flags:
            self.flags[name] = self.flags.get(name, 0) + 1
            self.first.setdefault(name, chunk.index)
        if chunk.drift.flags and len(self.flagged) < FLAGGED:
            self.flagged.append(chunk.index)
        self.chunks += 1


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
    counts = {CONSTANT: plan.constant_streams, SWITCHED: plan.switched_streams}
    streams = [
        Stream(kind, index)
        for kind, count in counts.items()
        for index in range(plan.cases if count is None else count)
    ]
    total = len(streams) * plan.chunks
    ticks = counted("drift", range(total), total, "chunk")
    runs = [_blocks(engine, plan, stream, lambda: next(ticks)) for stream in streams]
    shown = 0
    for _ in zip(*runs, strict=True):
        done = sum(s.chunks for s in streams)
        if done - shown >= SHOW_EVERY and done < total:
            plan.so_far(_report(streams, plan))
            shown = done
    next(ticks, None)
    return _report(streams, plan)


def block_of(chunks: int) -> int:
    """How many chunks of a stream so long make a block: at least one in each tenth of it."""
    return min(LONGEST_BLOCK, max(1, chunks // 10))


def _blocks(
    engine: Measured, plan: Plan, stream: Stream, tick: Callable[[], object]
) -> Iterator[None]:
    """Run a stream; it can be left and taken up again after each block."""
    rng = case_rng(f"drift {stream.kind}", plan.seed, stream.index)
    scene, distance = draw_scene(rng, 1), LatentDistance()
    stream.prompt = caption(scene)
    state = engine.open(stream.prompt, session_seed(rng))
    since, length = 0, block_of(plan.chunks)
    for number in range(plan.chunks):
        prompts = []
        if stream.kind == SWITCHED and number and number % SWITCH_EVERY == 0:
            scene, since = draw_scene(rng, 1), 0
            prompts = [caption(scene)]
        chunk = engine.step(state, prompts)
        seen = vote(read([chunk], 1))
        values = {part: chunk.drift.parts.get(part, math.nan) for part in PARTS}
        values |= {"confidence": seen.confidence, "latent distance": distance.at(engine, state)}
        if number % length == 0:
            stream.blocks.append(Block())
        settles = since < SETTLED and number != since
        stream.blocks[-1].add(values, None if settles else _verdicts(scene, seen))
        stream.add(chunk)
        since += 1
        tick()
        if (number + 1) % length == 0 or number + 1 == plan.chunks:
            yield


def _verdicts(scene: Scene, seen: Reading) -> dict[str, bool]:
    thing = scene.things[0]
    holds = seen.background == scene.background and seen.colour == thing.colour
    return dict(zip(RIGHT, (holds, holds and seen.shape == thing.shape), strict=True))


def _report(streams: Sequence[Stream], plan: Plan) -> Report:
    length = block_of(plan.chunks)
    kinds = {kind: [s for s in streams if s.kind == kind] for kind in KINDS}
    kinds = {kind: mine for kind, mine in kinds.items() if mine}
    done = sum(s.chunks for s in streams)
    notes = [
        f"{' and '.join(f'{len(mine)} of {kind}' for kind, mine in kinds.items())}, "
        f"{plan.chunks} chunks each. A stream's chunks are alike: intervals count every "
        f"{length} of them once, and speak of these streams, not of other scenes. Latents are "
        f"compared with those of the first {BASELINE_POINTS} points; under new prompts they move "
        "with the prompt."
    ]
    if done < len(streams) * plan.chunks:
        notes.append(f"Unfinished: {done} of {len(streams) * plan.chunks} chunks.")
    return Report(
        what="drift",
        title="Drift over a long stream",
        figures={
            group: rows
            for kind, mine in kinds.items()
            for group, rows in _figures(kind, mine, length).items()
        },
        cases=[_record(s, length) for s in streams],
        panels=[
            *(_panel(name, kinds, length, [name]) for name in CURVES),
            _panel("background and colour right; shape too", kinds, length, RIGHT),
        ],
        notes=notes,
    )


def stretches(blocks: int, length: int) -> dict[str, int]:
    """The parts at both ends of a stream that are compared, by name, as numbers of blocks."""
    found = {"tenth": max(1, blocks // 10)}
    if blocks * length >= 2 * STRETCH:
        found[f"{STRETCH:,}"] = STRETCH // length
    return found


def _figures(kind: str, streams: Sequence[Stream], length: int) -> dict[str, dict[str, Figure]]:
    names = sorted({name for s in streams for name in s.flags})
    whole: dict[str, Figure] = {
        "chunks": sum(s.chunks for s in streams),
        "drift flags": sum(count for s in streams for count in s.flags.values()),
    }
    for name in names:
        whole[f"flag {name}"] = sum(s.flags.get(name, 0) for s in streams)
        whole[f"flag {name}, first at chunk"] = min(
            s.first[name] for s in streams if name in s.first
        )
    groups = {kind: whole}
    blocks = min(len(s.blocks) for s in streams)
    for part, count in stretches(blocks, length).items():
        for name in RIGHT:
            first = Rate.of_blocks(b.rate(name) for s in streams for b in s.blocks[:count])
            last = Rate.of_blocks(b.rate(name) for s in streams for b in s.blocks[-count:])
            whole[f"{name}, first {part}"], whole[f"{name}, last {part}"] = first, last
            change = Change.between(first, last)
            whole |= change.rows(f"{name}, last less first {part}, points")
    tenth = stretches(blocks, length)["tenth"]
    for label, where in (("first", slice(tenth)), ("last", slice(-tenth, None))):
        groups[f"{kind}, {label} tenth"] = {
            name: Spread.of(
                [v for s in streams for b in s.blocks[where] if math.isfinite(v := b.mean(name))]
            )
            for name in CURVES
        }
    return groups


def binned(values: Sequence[float], bins: int = BINS, step: int = 1) -> list[tuple[float, float]]:
    """(chunk, mean) of at most so many equal stretches; of stretches without a value nothing.

    A value stands for `step` chunks.
    """
    width = max(1, -(-len(values) // bins))
    points = []
    for start in range(0, len(values), width):
        known = [v for v in values[start : start + width] if math.isfinite(v)]
        if known:
            points.append((step * (start + width / 2), mean(known)))
    return points


def _curve(stream: Stream, name: str) -> list[float]:
    """Block by block: a value's mean, or the share of right chunks."""
    return [b.rate(name).value if name in RIGHT else b.mean(name) for b in stream.blocks]


def _panel(title: str, kinds: dict[str, list[Stream]], length: int, names: Sequence[str]) -> Lines:
    """A curve for each kind, the mean of its streams."""
    lines = []
    for kind, streams in kinds.items():
        for name in names:
            columns = zip(*(_curve(s, name) for s in streams), strict=True)
            means = [mean([v for v in column if math.isfinite(v)]) for column in columns]
            shown = f"{kind}, {name}" if len(names) > 1 else kind
            lines.append(Line(shown, binned(means, 20 if name in RIGHT else BINS, length)))
    top = 1.0 if set(names) <= set(RIGHT) else None
    return Lines(title, lines, "chunk", bottom=0.0, top=top)


def _record(stream: Stream, length: int) -> dict[str, Any]:
    return {
        "kind": stream.kind,
        "prompt": stream.prompt,
        "chunks": stream.chunks,
        "flags": {
            name: {"chunks": count, "first": stream.first[name]}
            for name, count in stream.flags.items()
        },
        "flagged_chunks": stream.flagged,
        "curves": {name: binned(_curve(stream, name), BINS, length) for name in CURVES},
        "right": {name: binned(_curve(stream, name), 20, length) for name in RIGHT},
    }
