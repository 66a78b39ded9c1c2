"""A session's state: its size, what saving and consolidating cost, and whether resume is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

from echo_ray.benchmark.random_weights import random_codec
from echo_ray.benchmark.result import Check, Outcome
from echo_ray.benchmark.rungs import Setting, best_exact, free, modules_of
from echo_ray.benchmark.subject import PROMPTS, Bench, quick_codec
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.state import SessionState
from echo_ray.session import snapshot as codec_of
from echo_ray.session.snapshot import Snapshot

POINT_EVERY_S = 10.0
"""How often a snapshot is taken in the goal that this stage answers."""


def engine_of(bench: Bench, setting: Setting) -> EchoEngine:
    """The whole engine as it is served, with the preset's quickest codec."""
    preset = quick_codec(bench.preset)
    codec = random_codec(preset.codec, preset.dit, bench.device, bench.dtype, bench.seed + 2)
    if not bench.dry:
        codec.lie_channels_last()
    modules = replace(modules_of(bench, setting), codec=codec)
    return EchoEngine(preset, modules, bench.device, threads=1, graphs=setting.graphs)


def run(bench: Bench, out: Outcome) -> None:
    """One session past two points, saved there, and resumed twice."""
    engine = engine_of(bench, best_exact(bench).setting)
    if engine.shape.point_every:
        _session(bench, out, engine)
    else:
        out.skipped.append(f"{bench.preset.name} has no points (cache.point_every is 0)")
    del engine
    free(bench)


def _session(bench: Bench, out: Outcome, engine: EchoEngine) -> None:
    every, state = engine.shape.point_every, engine.open(PROMPTS[0], bench.seed)
    plain: list[float] = []
    points: list[float] = []
    for index in range(2 * every):
        ms = bench.timer.once(lambda: engine.step(state))
        if index >= every:
            (points if (index + 1) % every == 0 else plain).append(ms)
    bench.say("state: saving")
    waits: list[Callable[[], Snapshot]] = []
    snapshots: list[Snapshot] = []
    launch_ms = bench.timer.once(lambda: waits.append(engine.saving(state)))
    wait_ms = bench.timer.once(lambda: snapshots.append(waits[0]()))
    blob = codec_of.encode(snapshots[0])
    price = points[0] - median(plain)
    share = max(0.0, price) / (median(plain) * POINT_EVERY_S / engine.shape.chunk_s)
    table = out.table("State", "what", "value", "unit")
    for what, value, unit in (
        ("snapshot, all of it", len(blob) / 1e6, "MB"),
        ("live state on the device", engine.state_bytes(state) / 1e9, "GB"),
        ("start of the copy", launch_ms, "ms"),
        ("wait for the copy and packing", wait_ms, "ms"),
        ("consolidation, beyond its chunk", price, "ms"),
        (f"consolidation every {POINT_EVERY_S:g} s", 100 * share, "% of chunk time"),
    ):
        table.add(what=what, value=value, unit=unit)
    out.samples |= {"chunk between points": plain, "chunk at a point": points}
    out.figures |= {"snapshot_mb": len(blob) / 1e6, "snapshot_share": 100 * share}
    _resumed(bench, out, engine, state, blob)
    engine.close(state)


def _resumed(
    bench: Bench, out: Outcome, engine: EchoEngine, state: SessionState, blob: bytes
) -> None:
    """Digests of the live session's next chunks, and of the resumed one's, twice."""
    count = bench.plan.resumed_chunks
    live = [engine.step(state).digest for _ in range(count)]
    loads = []
    table = out.table("Resume", "time", "first new chunk after, ms", "digests")
    for number in (1, 2):
        bench.say(f"state: resume {number} of 2")
        ms, digests = _once(bench, engine, blob, count)
        loads.append(ms)
        same = digests == live
        said = f"{count} of {count} equal" if same else "NOT equal"
        table.add({"time": number, "first new chunk after, ms": loads[-1], "digests": said})
        detail = said if same else f"chunk {_first_other(digests, live)} after the point differs"
        out.checks.append(Check(f"resume {number} goes on with the same bits", same, detail))
    out.samples["resume"] = loads
    out.figures["resume_ms"] = median(loads)


def _once(bench: Bench, engine: EchoEngine, blob: bytes, count: int) -> tuple[float, list[str]]:
    """Milliseconds from a snapshot's bytes to the first new chunk, and digests of `count`."""
    states: list[SessionState] = []
    digests: list[str] = []

    def first() -> None:
        states.append(engine.load(codec_of.decode(blob)))
        digests.append(engine.step(states[0]).digest)

    ms = bench.timer.once(first)
    digests += [engine.step(states[0]).digest for _ in range(count - 1)]
    engine.close(states[0])
    return ms, digests


def _first_other(found: list[str], expected: list[str]) -> int:
    return next(n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
