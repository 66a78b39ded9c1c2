"""Live streams on one device: chunk latency, missed deadlines, and how soon a newcomer sees them.

Sessions take turns by the rule of `session.pacing`, a slice of the engine at a time. A chunk is due
when playout, which began with the session's first chunk, reaches it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from echo_ray.benchmark.gate import FIRST_MATURE
from echo_ray.benchmark.result import Outcome, Table, Value
from echo_ray.benchmark.rungs import best_exact, free, refusal
from echo_ray.benchmark.stage_state import engine_of
from echo_ray.benchmark.subject import PROMPTS, Bench
from echo_ray.benchmark.timing import Spread
from echo_ray.clock import Clock, SystemClock
from echo_ray.config import SessionSection
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.state import SessionState
from echo_ray.model.computing import Precision
from echo_ray.session.chunk import Chunk
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.pacing import Playout, Turn, choose

LEAD_CHUNKS = SessionSection().lead_chunks
"""A stream is made at most this many chunks ahead of playout, as it is when it is served."""


class Begun(Protocol):
    def advance(self) -> Chunk | None: ...


@dataclass(slots=True)
class Stream:
    """One viewer's stream: what it waits for and what it met."""

    name: str
    begin: Callable[[], Begun]
    joins_s: float
    index: int = 0
    playout: Playout | None = None
    step: Begun | None = None
    began_s: float = 0.0
    served_s: float = 0.0
    first_frame_s: float | None = None
    latencies_ms: list[float] = field(default_factory=list)
    missed: int = 0

    def turn(self, shape: StreamShape) -> Turn:
        if self.playout is None:
            return Turn(self.name, self.joins_s, self.joins_s, self.served_s)
        due_s = self.playout.due_s(shape.start_s(self.index))
        ready_s = due_s - LEAD_CHUNKS * shape.chunk_s
        return Turn(self.name, ready_s, due_s, self.served_s)

    def advance(self, clock: Clock, shape: StreamShape, due_s: float) -> None:
        """One slice; at its chunk's last one, the accounts."""
        if self.step is None:
            self.step, self.began_s = self.begin(), clock.monotonic()
        chunk = self.step.advance()
        now_s = self.served_s = clock.monotonic()
        if chunk is None:
            return
        self.step = None
        start_s = shape.start_s(self.index)
        if self.playout is None:
            self.first_frame_s = now_s - self.joins_s
            self.playout = Playout.begins(now_s, start_s)
        else:
            self.latencies_ms.append(1000 * (now_s - self.began_s))
            self.missed += now_s > due_s
            self.playout = self.playout.after_publishing(now_s, start_s)
        self.index += 1


def play(
    streams: list[Stream],
    shape: StreamShape,
    seconds: float,
    clock: Clock,
    sleep: Callable[[float], None],
) -> None:
    """Serve the streams until `seconds` are over."""
    end_s = clock.monotonic() + seconds
    by_name = {stream.name: stream for stream in streams}
    while (now_s := clock.monotonic()) < end_s:
        turns = {name: stream.turn(shape) for name, stream in by_name.items()}
        choice = choose(turns.values(), now_s)
        if choice.session_id is None:
            wake_s = end_s if choice.wake_s is None else min(choice.wake_s, end_s)
            sleep(max(0.0, wake_s - now_s))
            continue
        by_name[choice.session_id].advance(clock, shape, turns[choice.session_id].due_s)


def run(bench: Bench, out: Outcome) -> None:
    """First frames on an idle device, then 1, 2 and 3 streams; the last of several joins late.

    As many as possible again in the tier of 8 bits, where there is one.
    """
    table = Table(
        "Streams in real time",
        ("tier", "streams", "chunk p50 ms", "p95 ms", "p99 ms", "chunks", "missed", "missed %",
         "first frame of the last, ms"),
    )  # fmt: skip
    counts = bench.plan.streams
    for tier in (Precision.EXACT, Precision.FP8_ATTENTION8):
        setting = replace(best_exact(bench).setting, precision=tier.value, attention="auto")
        if why := refusal(bench, setting):
            out.skipped.append(f"streams, {tier}: {why}")
            continue
        engine = engine_of(bench, setting)
        warm = engine.open(PROMPTS[0], bench.seed)
        for _ in range(FIRST_MATURE):
            engine.step(warm)
        engine.close(warm)
        exact = tier is Precision.EXACT
        if exact:
            _first_frames(bench, out, engine)
        for count in counts if exact else counts[-1:]:
            _streams(bench, out, engine, tier, count, table)
        del engine, warm
        free(bench)
    out.tables.append(table)


def _streams(
    bench: Bench, out: Outcome, engine: EchoEngine, tier: Precision, count: int, table: Table
) -> None:
    seconds, clock = _seconds(bench), SystemClock()
    name = f"{count} streams, {tier}"
    if why := bench.budget.refusal("streams", seconds):
        out.skipped.append(f"{name}: {why}")
        return
    bench.say(f"{name}, {seconds:g} s")
    now_s, opened = clock.monotonic(), list[SessionState]()
    streams = []
    for number in range(count):
        late = number > 0 and number == count - 1
        joins_s = now_s + (seconds / 2 if late else 0.0)
        begin = _beginner(engine, bench.seed + number, opened)
        streams.append(Stream(f"stream {number}", begin, joins_s))
    play(streams, engine.shape, seconds, clock, time.sleep)
    for state in opened:
        engine.close(state)
    row = table_row(streams)
    table.add(row, tier=tier.value)
    if isinstance(share := row["missed %"], float):
        suffix = "" if tier is Precision.EXACT else f"_{tier}"
        out.figures[f"missed_share_{count}{suffix}"] = share
        out.figures["stream_s"] = seconds
    out.samples[name] = [ms for s in streams for ms in s.latencies_ms]


def _seconds(bench: Bench) -> float:
    """Longer where there is more time, for rare misses to be seen."""
    longer = 1.0 if bench.dry else max(1.0, bench.budget.scale)
    return longer * bench.plan.stream_seconds


def _first_frames(bench: Bench, out: Outcome, engine: EchoEngine) -> None:
    """From a prompt the engine knows to the frames of chunk 0, again and again."""

    def first() -> None:
        state = engine.open(PROMPTS[0], bench.seed)
        engine.step(state)
        engine.close(state)

    samples = [bench.timer.once(first) for _ in range(bench.plan.repeats)]
    spread = Spread.of(samples)
    table = out.table("First frame, warm engine, idle device", "p50 ms", "p95 ms", "sessions")
    table.add({"p50 ms": spread.median, "p95 ms": spread.p95, "sessions": spread.count})
    out.samples["first frame"] = samples
    out.figures |= {"first_frame_ms": spread.median, "first_frame_p95_ms": spread.p95}


def _beginner(engine: EchoEngine, seed: int, opened: list[SessionState]) -> Callable[[], Begun]:
    """Begins a session's next chunk, and the session itself with the first one."""
    own: list[SessionState] = []

    def begin() -> Begun:
        if not own:
            own.append(engine.open(PROMPTS[0], seed))
            opened.append(own[0])
        return engine.begin(own[0])

    return begin


def table_row(streams: list[Stream]) -> dict[str, Value]:
    """What the streams met together; a value that never came about is none."""
    latencies = [ms for s in streams for ms in s.latencies_ms]
    missed, last = sum(s.missed for s in streams), streams[-1].first_frame_s
    spread = Spread.of(latencies) if latencies else None
    return {
        "streams": len(streams),
        "chunk p50 ms": spread.median if spread else None,
        "p95 ms": spread.p95 if spread else None,
        "p99 ms": spread.p99 if spread else None,
        "chunks": len(latencies),
        "missed": missed,
        "missed %": 100 * missed / len(latencies) if latencies else None,
        "first frame of the last, ms": None if last is None else 1000 * last,
    }
