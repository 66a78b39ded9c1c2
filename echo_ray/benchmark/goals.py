"""The goals for one H100, and what a run says about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echo_ray.benchmark.result import NOT_MEASURED, Table

SUBJECT = "echo-infinity-1.3b"
DEVICE = "H100"
"""Whose figures are held against the goals."""
MET, NOT_MET = "met", "not met"
LONG_S = 600.0
"""For so long streams have to be served before a share of 0.1 % is seen to be kept."""


@dataclass(frozen=True, slots=True)
class Goal:
    """`figure` names what is held against `must` and `goal`: at least them, or at most."""

    what: str
    figure: str
    must: float
    goal: float
    unit: str
    at_least: bool
    long: bool = False
    """Whether a short run can miss it but not meet it."""

    def verdict(self, bound: float, value: float | None, seconds: float) -> str:
        if value is None:
            return NOT_MEASURED
        if not (value >= bound if self.at_least else value <= bound):
            return NOT_MET
        if self.long and seconds < LONG_S:
            return f"{NOT_MEASURED}: {seconds:g} s of {LONG_S:g}"
        return MET

    def text(self, bound: float) -> str:
        return f"{'at least' if self.at_least else 'at most'} {bound:g} {self.unit}".strip()


GOALS = (
    Goal("speed-up over the published loop, bf16 exact", "speed_up", 1.8, 2.1, "times", True),
    Goal("bf16 exact, tiny decoder", "fps_tiny", 36, 40, "FPS", True),
    Goal("bf16 exact, Wan decoder", "fps_wan", 27, 30, "FPS", True),
    Goal("fp8 linears, tiny decoder", "fps_tiny_fp8", 42, 45, "FPS", True),
    Goal("fp8 linears and 8-bit attention, tiny decoder", "fps_tiny_fp8+attention8", 46, 52,
         "FPS", True),
    Goal("memory machinery, share of a chunk", "memory_share", 1.5, 1, "%", False),
    Goal("time in neither products nor attention", "ours_glue_share", 12, 8, "%", False),
    Goal("a point every 10 s, share of chunk time", "snapshot_share", 5, 3, "%", False),
    Goal("copy of a snapshot every 10 s, share of chunk time", "copy_share", 2, 1, "%", False),
    Goal("first frame on an idle device, p50", "first_frame_ms", 400, 250, "ms", False),
    Goal("first frame on an idle device, p95", "first_frame_p95_ms", 600, 400, "ms", False),
    Goal("resume to the first new chunk", "resume_ms", 1000, 600, "ms", False),
    Goal("missed deadlines, 2 live streams, bf16", "missed_share_2", 0.5, 0.1, "%", False, True),
    Goal("missed deadlines, 3 live streams, 8-bit", "missed_share_3_fp8+attention8", 0.5, 0.1, "%",
         False, True),
    Goal("compact state", "snapshot_mb", 21, 21, "MB", False),
)  # fmt: skip


def derived(figures: Mapping[str, float], frames_per_chunk: int) -> dict[str, float]:
    """Figures that come of two stages: frames a second with each decoder."""
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
        # Measured as a whole where there was time for it: decoded beside the forwards.
        if (whole := figures.get(f"whole_{decoder}_ms")) is not None:
            found[f"fps_{decoder}"] = 1000 * frames_per_chunk / whole
    if "memory_ms" in figures:
        found["memory_share"] = 100 * figures["memory_ms"] / chunk_ms
    return found


def goals_table(data: Mapping[str, Any]) -> Table:
    """Must and goal beside what a run's JSON says of them.

    Nothing of a dry run, of a red one, of another model or another device is held against them.
    """
    title = f"Goals on one {DEVICE}, {SUBJECT}"
    table = Table(title, ("goal", "measured", "must be", "is", "should be", "is too"))
    figures = data.get("figures", {}) if told(data) else {}
    seconds = figures.get("stream_s", 0.0)
    for goal in GOALS:
        value = figures.get(goal.figure)
        table.add({
            "goal": goal.what, "measured": value,
            "must be": goal.text(goal.must), "is": goal.verdict(goal.must, value, seconds),
            "should be": goal.text(goal.goal), "is too": goal.verdict(goal.goal, value, seconds),
        })  # fmt: skip
    return table


def told(data: Mapping[str, Any]) -> bool:
    """Whether a run says anything about the goals."""
    of = (data.get("settings", {}).get("preset"), data.get("device", {}).get("device", ""))
    return not data.get("dry_run") and not data.get("red") and of[0] == SUBJECT and DEVICE in of[1]


def verdict(table: Table) -> str:
    """A goals' table in one line."""
    ends = [str(row["is too"]).partition(":")[0] for row in table.rows]
    return "Goals: " + ", ".join(f"{ends.count(e)} {e}" for e in (MET, NOT_MET, NOT_MEASURED))
