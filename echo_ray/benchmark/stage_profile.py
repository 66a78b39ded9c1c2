"""One profiled chunk of the baseline and of ours: which kernels the time goes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from echo_ray.benchmark.gate import FIRST_MATURE
from echo_ray.benchmark.result import Outcome
from echo_ray.benchmark.rungs import attention, best_seen, climbed, published
from echo_ray.benchmark.subject import Bench

KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax", "sdpa"),
    "matrix products": (
        "gemm",
        "cutlass",
        "nvjet",
        "cublas",
        "addmm",
        "matmul",
        "::mm",
        "bmm",
        "conv",
    ),
}
"""A kernel is of the first kind of which a word is in its name; all others are glue."""
_SHOWN = 25


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    calls: int
    ms: float

    @property
    def kind(self) -> str:
        lower = self.name.lower()
        return next((k for k, words in KINDS.items() if any(w in lower for w in words)), "glue")


def run(bench: Bench, out: Outcome) -> None:
    """A table of the largest kernels for either side, and the share of each kind."""
    shares = out.table("Where a chunk's time goes", "side", "kind", "ms", "% of the chunk")
    loop = bench.baseline(attention(bench, published(bench)))
    stream, noise = loop.start(bench.prompts()[0]), bench.noise()
    for _ in range(FIRST_MATURE):
        loop.generate(stream, noise)
    bench.say("profile: R0")
    _tell(bench, out, shares, "R0", lambda: loop.generate(stream, noise))
    with climbed(bench, best_seen(bench)) as generator:
        state = generator.start(bench.prompts()[0])
        for _ in range(FIRST_MATURE + 1):
            generator.generate(state, noise)
        bench.say("profile: ours")
        _tell(bench, out, shares, "ours", lambda: generator.generate(state, noise))


def _tell(bench: Bench, out: Outcome, shares: Any, side: str, work: Callable[[], object]) -> None:
    lines = _profiled(bench, work)
    whole = sum(line.ms for line in lines) or 1.0
    for kind in (*KINDS, "glue"):
        ms = sum(line.ms for line in lines if line.kind == kind)
        shares.add({"side": side, "kind": kind, "ms": ms, "% of the chunk": 100 * ms / whole})
        out.figures[f"{side}_{kind}_share"] = 100 * ms / whole
    table = out.table(f"Profile of a chunk, {side}", "kernel", "kind", "calls", "ms")
    for line in sorted(lines, key=lambda line: -line.ms)[:_SHOWN]:
        table.add(kernel=line.name[:80], kind=line.kind, calls=line.calls, ms=line.ms)


def _profiled(bench: Bench, work: Callable[[], object]) -> list[Line]:
    """Time of every kernel on a GPU, of every operation on a CPU, without what it calls."""
    cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    bench.timer.settle()
    with profile(activities=activities) as profiler:
        work()
        bench.timer.settle()
    lines = []
    for event in profiler.key_averages():
        on_device = event.device_type.name != "CPU"
        if cuda and not on_device:
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        lines.append(Line(event.key, event.count, us / 1000))
    return lines
