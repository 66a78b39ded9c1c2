"""A session's state: what admission counted of it, what saving and consolidating cost, and whether
resume is exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import torch

from echo_ray.benchmark.gate import FIRST_MATURE
from echo_ray.benchmark.random_weights import random_codec
from echo_ray.benchmark.result import Check, Outcome
from echo_ray.benchmark.rungs import Setting, best_exact, free, modules_of
from echo_ray.benchmark.subject import PROMPTS, Bench, quick_codec
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.room import session_parts
from echo_ray.engine.state import SessionState
from echo_ray.session import snapshot as codec_of
from echo_ray.session.snapshot import Snapshot
from echo_ray.weights.modules import lay_out

POINT_EVERY_S = 10.0
"""How often a snapshot is taken in the goal that this stage answers."""


def engine_of(bench: Bench, setting: Setting) -> EchoEngine:
    """The whole engine as it is served, with the preset's quickest codec."""
    preset = quick_codec(bench.preset)
    codec = random_codec(preset.codec, preset.dit, bench.device, bench.dtype, bench.seed + 2)
    lay_out(codec, bench.device)
    modules = replace(modules_of(bench, setting), codec=codec)
    return EchoEngine(preset, modules, bench.device, threads=1, graphs=setting.graphs)


def run(bench: Bench, out: Outcome) -> None:
    """One session past two points, saved there, and resumed twice; what it took of the device."""
    engine = engine_of(bench, best_exact(bench).setting)
    admission(out, session_parts(quick_codec(bench.preset)), _taken(bench, engine))
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
    blob, live = _saved(bench, out, engine, state, median(plain))
    price = points[0] - median(plain)
    share = max(0.0, price) / (median(plain) * POINT_EVERY_S / engine.shape.chunk_s)
    table = out.table("Points", "what", "value", "unit")
    for what, value, unit in (
        ("live state on the device", engine.state_bytes(state) / 1e9, "GB"),
        ("consolidation, beyond its chunk", price, "ms"),
        (f"consolidation every {POINT_EVERY_S:g} s", 100 * share, "% of chunk time"),
    ):
        table.add(what=what, value=value, unit=unit)
    out.samples |= {"chunk between points": plain, "chunk at a point": points}
    out.figures["snapshot_share"] = 100 * share
    _resumed(bench, out, engine, state, blob, live)
    engine.close(state)


def _taken(bench: Bench, engine: EchoEngine) -> int:
    """The most bytes that the engine's first session had of its device; a CPU tells its state's.

    Through a full window and a memory to a switch, which is the most that a step holds.
    """
    free(bench)
    held = 0
    if not bench.dry:
        bench.timer.settle()
        torch.cuda.reset_peak_memory_stats(bench.device)
        held = torch.cuda.memory_allocated(bench.device)
    state = engine.open(PROMPTS[0], bench.seed)
    for _ in range(FIRST_MATURE + 1):
        engine.step(state)
    engine.step(state, [PROMPTS[1]])
    bench.timer.settle()
    taken = engine.state_bytes(state)
    if not bench.dry:
        taken = torch.cuda.max_memory_allocated(bench.device) - held
    engine.close(state)
    return taken


def admission(out: Outcome, counted: Mapping[str, int], taken: int) -> None:
    """What is asked for before a session is made, against what one took; less than that is red."""
    whole = sum(counted.values())
    table = out.table("Memory of a session", "what", "MB")
    for part, size in (*counted.items(), ("counted at admission", whole), ("taken", taken)):
        table.add(what=part, MB=size / 1e6)
    table.add(what="counted beyond what was taken", MB=(whole - taken) / 1e6)
    detail = f"{whole:,} bytes counted, {taken:,} taken, {whole - taken:+,}"
    out.checks.append(Check("admission counts what a session takes", whole >= taken, detail))


def _saved(
    bench: Bench, out: Outcome, engine: EchoEngine, state: SessionState, plain_ms: float
) -> tuple[bytes, list[str]]:
    """The snapshot's bytes, and the digest of the chunk that was made while it was copied.

    `Engine.saving` is called on an idle device, so that what the device does until it is idle again
    is the copy in its lane; and once more before a step, which has to share the device with it.
    """
    waits: list[Callable[[], Snapshot]] = []
    snapshots: list[Snapshot] = []
    digests: list[str] = []
    bench.timer.settle()
    begin_s = time.perf_counter()
    waits.append(engine.saving(state))
    launched_s = time.perf_counter()
    bench.timer.settle()
    copied_s = time.perf_counter()
    pack_ms = bench.timer.once(lambda: snapshots.append(waits[0]()))

    def beside() -> None:
        waits.append(engine.saving(state))
        digests.append(engine.step(state).digest)

    ms = bench.timer.once(beside)
    blob = codec_of.encode(snapshots[0])
    same = codec_of.encode(waits[1]()) == blob
    said = "the same bytes" if same else "other bytes: the step wrote to what was being copied"
    out.checks.append(Check("a snapshot copied beside a step", same, said))
    cost = ms - plain_ms
    share = max(0.0, cost) / (plain_ms * POINT_EVERY_S / engine.shape.chunk_s)
    table = out.table("Snapshot", "what", "value", "unit")
    for what, value, unit in (
        ("all of it", len(blob) / 1e6, "MB"),
        ("start of the copy, on the host", 1000 * (launched_s - begin_s), "ms"),
        ("the copy in its lane", None if bench.dry else 1000 * (copied_s - launched_s), "ms"),
        ("packing, on the host", pack_ms, "ms"),
        ("taken from the step beside it", cost, "ms"),
        (f"copy every {POINT_EVERY_S:g} s", 100 * share, "% of chunk time"),
    ):
        table.add(what=what, value=value, unit=unit)
    out.samples["chunk beside a copy"] = [ms]
    out.figures |= {"snapshot_mb": len(blob) / 1e6, "copy_share": 100 * share}
    return blob, digests


def _resumed(
    bench: Bench,
    out: Outcome,
    engine: EchoEngine,
    state: SessionState,
    blob: bytes,
    live: list[str],
) -> None:
    """Digests of the live session's next chunks, and of the resumed one's, twice.

    `live`: those that the live session has made since the snapshot.
    """
    count = bench.plan.resumed_chunks
    live = live + [engine.step(state).digest for _ in range(count - len(live))]
    firsts = []
    table = out.table("Resume", "time", "load, ms", "first new chunk after, ms", "digests")
    for number in (1, 2):
        bench.say(f"state: resume {number} of 2")
        load_ms, ms, digests = _once(bench, engine, blob, count)
        firsts.append(ms)
        same = digests == live
        said = f"{count} of {count} equal" if same else "NOT equal"
        table.add(
            {"time": number, "load, ms": load_ms, "first new chunk after, ms": ms, "digests": said}
        )
        detail = said if same else f"chunk {_first_other(digests, live)} after the point differs"
        out.checks.append(Check(f"resume {number} goes on with the same bits", same, detail))
    out.samples["resume"] = firsts
    out.figures["resume_ms"] = median(firsts)


def _once(
    bench: Bench, engine: EchoEngine, blob: bytes, count: int
) -> tuple[float, float, list[str]]:
    """Milliseconds of `Engine.load`, those to the first new chunk, and digests."""
    states: list[SessionState] = []
    digests: list[str] = []
    load_ms = bench.timer.once(lambda: states.append(engine.load(codec_of.decode(blob))))
    step_ms = bench.timer.once(lambda: digests.append(engine.step(states[0]).digest))
    digests += [engine.step(states[0]).digest for _ in range(count - 1)]
    engine.close(states[0])
    return load_ms, load_ms + step_ms, digests


def _first_other(found: list[str], expected: list[str]) -> int:
    return next(n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
