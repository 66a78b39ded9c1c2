"""The ladder: each rung against the baseline in turns, so that a device that slows down slows both.

Timed are chunks of the mature phase, forwards alone; what a decoder adds is another stage's.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from echo_ray.benchmark import lane_rung
from echo_ray.benchmark.gate import FIRST_MATURE
from echo_ray.benchmark.result import Outcome, Table
from echo_ray.benchmark.rungs import (
    ALWAYS_ON,
    Rung,
    Setting,
    attention,
    climbed,
    ladder,
    published,
    refusal,
)
from echo_ray.benchmark.stage_gate import device_facts
from echo_ray.benchmark.subject import Bench
from echo_ray.benchmark.timing import Spread
from echo_ray.benchmark.work import Work, work_of

WARM = 2
"""Chunks before the timed ones of a block: caches and clocks."""


def run(bench: Bench, out: Outcome) -> None:
    """Medians and p95 of every rung, its speed-up, and below which a gain is noise."""
    slow = _baseline(bench, published(bench))
    work = work_of(bench.preset)
    table = out.table(
        "Ladder, mature chunks, forwards only",
        "rung", "ms", "p95 ms", "baseline ms", "speed-up", "gain on the rung below", "TFLOP/s",
    )  # fmt: skip
    timed: list[tuple[Rung, list[float], list[list[float]]]] = []
    for rung in ladder(bench):
        if rung.missing:
            out.skipped.append(f"{rung.name}: {rung.missing}")
            continue
        if why := bench.budget.refusal("ladder", _needed_s(bench, timed)):
            out.skipped.append(f"{rung.name}: {why}")
            continue
        bench.say(f"ladder: {rung.name}")
        blocks, slow_blocks = _in_turns(bench, rung, slow)
        timed.append((rung, blocks, slow_blocks))
        out.samples[rung.name] = blocks
        out.samples[f"baseline beside {rung.name}"] = [ms for b in slow_blocks for ms in b]
    # While the device is still as warm and as slow as the work made it.
    facts = out.table("The device right after the ladder", "what", "value")
    for what, value in device_facts(bench.device).items():
        facts.add(what=what, value=value)
    noise = _noise([blocks for *_, blocks in timed])
    out.figures["noise_share"] = noise
    _fill(table, timed, noise, work, out)
    better = [n for n in ("fa3", "cudnn") if not refusal(bench, Setting(attention=n))]
    if better:
        _baseline_with(bench, better[0], table, out, work)
    fixed = out.table("Always on", "what", "why no rung tells its gain")
    for what, why in ALWAYS_ON.items():
        fixed.add({"what": what, "why no rung tells its gain": why})
    lane_rung.run(bench, out)
    out.figures["baseline_ms"] = median(ms for *_, b in timed for part in b for ms in part)


def before(bench: Bench) -> int:
    """Chunks before those that are timed; a dry run went through the phases at the gate."""
    return WARM + (0 if bench.dry else FIRST_MATURE)


def _baseline(bench: Bench, name: str) -> Callable[[], object]:
    """One more chunk of a baseline in the mature phase."""
    loop = bench.baseline(attention(bench, name))
    stream, noise = loop.start(bench.prompts()[0]), bench.noise()
    for _ in range(before(bench) - WARM):
        loop.generate(stream, noise)
    return lambda: loop.generate(stream, noise)


def _in_turns(
    bench: Bench, rung: Rung, slow: Callable[[], object]
) -> tuple[list[float], list[list[float]]]:
    """Times of the rung, and of the baseline by block: A-B-A-B."""
    ours: list[float] = []
    theirs: list[list[float]] = []
    with climbed(bench, rung) as generator:
        state, noise = generator.start(bench.prompts()[0]), bench.noise()
        for _ in range(before(bench)):
            generator.generate(state, noise)
        for _ in range(bench.plan.blocks):
            slow()
            theirs.append(bench.timer.samples(slow, bench.plan.chunks))
            generator.generate(state, noise)
            ours += bench.timer.samples(lambda: generator.generate(state, noise), bench.plan.chunks)
    return ours, theirs


def _needed_s(bench: Bench, timed: list[tuple[Rung, list[float], list[list[float]]]]) -> float:
    """What a rung takes, by the latest one; the first is always taken."""
    if not timed:
        return 0.0
    _, ours, theirs = timed[-1]
    per_chunk_ms = max(ours) + max(ms for block in theirs for ms in block)
    chunks = bench.plan.blocks * (bench.plan.chunks + 1) + before(bench)
    return per_chunk_ms * chunks / 1000


def _noise(blocks: list[list[list[float]]]) -> float:
    """The largest difference of two blocks of the baseline, as a share of it."""
    shares = []
    for parts in blocks:
        middles = [median(part) for part in parts]
        shares.append((max(middles) - min(middles)) / min(middles))
    return max(shares, default=0.0)


def _fill(
    table: Table,
    timed: list[tuple[Rung, list[float], list[list[float]]]],
    noise: float,
    work: Work,
    out: Outcome,
) -> None:
    below: float | None = None
    for rung, ours, blocks in timed:
        spread, slow = Spread.of(ours), median(ms for block in blocks for ms in block)
        ratio = slow / spread.median
        gain = ratio / (below or 1.0) - 1
        if below is None:
            table.add({"rung": "R0, the published loop", "ms": slow, "speed-up": 1.0})
        said = f"{100 * gain:+.1f} %" if abs(gain) > noise else "noise"
        table.add({
                "rung": rung.name, "ms": spread.median, "p95 ms": spread.p95, "baseline ms": slow,
                "speed-up": ratio, "gain on the rung below": said,
                "TFLOP/s": work.flops / spread.median / 1e9,
            }
        )  # fmt: skip
        if rung.exact:
            out.figures |= {"chunk_ms": spread.median, "speed_up": ratio}
        else:
            out.figures[f"chunk_{rung.setting.precision}_ms"] = spread.median
        below = ratio


def _baseline_with(bench: Bench, name: str, table: Table, out: Outcome, work: Work) -> None:
    """The baseline with our best attention: what is left is not the library's."""
    if why := bench.budget.refusal("ladder", 10 * out.figures.get("chunk_ms", 0.0) / 1000):
        out.skipped.append(f"R0 with {name}: {why}")
        return
    times = bench.timer.samples(_baseline(bench, name), bench.plan.chunks)
    out.samples[f"R0 with {name}"] = times
    spread = Spread.of(times)
    table.add({
            "rung": f"R0 with attention {name}", "ms": spread.median, "p95 ms": spread.p95,
            "TFLOP/s": work.flops / spread.median / 1e9,
        }
    )  # fmt: skip
