"""The goals for one H100, and what a run says about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from echo_ray.benchmark.result import Table


@dataclass(frozen=True, slots=True)
class Goal:
    """`figure` names what is held against `bound`; at least it, or at most."""

    what: str
    figure: str
    bound: float
    unit: str
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def text(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g} {self.unit}".strip()


GOALS = (
    Goal("speed-up over the published loop, bf16 exact", "speed_up", 2.1, "times", True),
    Goal("bf16 exact, tiny decoder", "fps_tiny", 40, "FPS", True),
    Goal("bf16 exact, Wan decoder", "fps_wan", 30, "FPS", True),
    Goal("fp8 linears, tiny decoder", "fps_tiny_fp8", 45, "FPS", True),
    Goal(
        "fp8 linears and 8-bit attention, tiny decoder", "fps_tiny_fp8+attention8", 52, "FPS", True
    ),
    Goal("memory machinery, share of a chunk", "memory_share", 1, "%", False),
    Goal("snapshot every 10 s, share of chunk time", "snapshot_share", 3, "%", False),
    Goal("first frame on an idle device, p50", "first_frame_ms", 250, "ms", False),
    Goal("missed deadlines, 2 live streams, bf16", "missed_share_2", 0.1, "%", False),
    Goal(
        "missed deadlines, 3 live streams, 8-bit", "missed_share_3_fp8+attention8", 0.1, "%", False
    ),
    Goal("compact state", "snapshot_mb", 21, "MB", False),
)


def derived(figures: Mapping[str, float], frames_per_chunk: int) -> dict[str, float]:
    """Figures that come of two stages: frames a second with each decoder behind the forwards."""
    found = dict(figures)
    chunk_ms = figures.get("chunk_ms")
    if chunk_ms is None:
        return found
    found["fps_forwards"] = 1000 * frames_per_chunk / chunk_ms
    for decoder in ("tiny", "wan"):
        decode_ms = figures.get(f"decode_{decoder}_ms")
        for tier in ("", "_fp8", "_fp8+attention8"):
            forwards_ms = figures.get(f"chunk{tier}_ms")
            if decode_ms is not None and forwards_ms is not None:
                whole_ms = forwards_ms + decode_ms
                found[f"fps_{decoder}{tier}"] = 1000 * frames_per_chunk / whole_ms
    if "memory_ms" in figures:
        found["memory_share"] = 100 * figures["memory_ms"] / chunk_ms
    return found


def goals_table(figures: Mapping[str, float], *, dry: bool) -> Table:
    """Goal beside measurement; a dry run measures none of them."""
    table = Table("Goals on one H100", ("goal", "bound", "measured", "met"))
    for goal in GOALS:
        value = None if dry else figures.get(goal.figure)
        met = None if value is None else ("yes" if goal.met(value) else "no")
        table.add(goal=goal.what, bound=goal.text, measured=value, met=met)
    return table
