"""Must and goal beside a run's own JSON: what is met, what is not, and what nobody measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from echo_ray.benchmark.goals import GOALS, derived, goals_table, verdict
from echo_ray.benchmark.report import goals_page
from echo_ray.benchmark.result import NOT_MEASURED

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "h100.md"


def data(**changed: Any) -> dict[str, Any]:
    """A made-up run's JSON, as far as goals are read from it."""
    measured = {
        "chunk_ms": 291.0, "speed_up": 2.2, "memory_ms": 3.5, "whole_tiny_ms": 295.0,
        "decode_tiny_ms": 9.0, "whole_wan_ms": 430.0, "chunk_fp8_ms": 270.0,
        "missed_share_2": 0.05, "stream_s": 600.0, "snapshot_mb": 21.4, "resume_ms": 700.0,
    }  # fmt: skip
    whole: dict[str, Any] = {
        "dry_run": None, "red": False, "settings": {"preset": "echo-infinity-1.3b"},
        "device": {"device": "NVIDIA H100 80GB HBM3"}, "figures": derived(measured, 12),
    }  # fmt: skip
    return whole | changed


def ends(of: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Verdicts about must and goal, by what they are about."""
    return {str(r["goal"]): (str(r["is"]), str(r["is too"])) for r in goals_table(of).rows}


def test_a_run_is_held_against_must_and_goal() -> None:
    found = ends(data())
    assert found["speed-up over the published loop, bf16 exact"] == ("met", "met")
    # 12 frames in 295 ms, measured as a whole; 430 ms are 27.9 a second, more than must be.
    assert found["bf16 exact, tiny decoder"] == ("met", "met")
    assert found["bf16 exact, Wan decoder"] == ("met", "not met")
    # No whole chunk was measured there: 12 frames in 270 + 9 ms.
    assert found["fp8 linears, tiny decoder"] == ("met", "not met")
    assert found["memory machinery, share of a chunk"] == ("met", "not met")
    assert found["resume to the first new chunk"] == ("met", "not met")
    assert found["compact state"] == ("not met", "not met")
    assert found["first frame on an idle device, p50"] == (NOT_MEASURED, NOT_MEASURED)
    assert verdict(goals_table(data())) == "Goals: 3 met, 5 not met, 7 not measured"


def test_a_short_run_can_miss_a_deadline_but_not_keep_them_all() -> None:
    name = "missed deadlines, 2 live streams, bf16"
    short = data()["figures"] | {"stream_s": 25.0, "missed_share_2": 0.0}
    assert ends(data(figures=short))[name] == ("not measured: 25 s of 600",) * 2
    assert ends(data(figures=short | {"missed_share_2": 3.0}))[name] == ("not met", "not met")
    assert ends(data())[name] == ("met", "met")


@pytest.mark.parametrize(
    "other",
    [
        {"dry_run": "dry run on a CPU"},
        {"red": True},
        {"settings": {"preset": "echo-tiny"}},
        {"device": {"device": "NVIDIA H200"}},
    ],
)
def test_other_runs_are_held_against_nothing(other: dict[str, Any]) -> None:
    assert set(ends(data(**other)).values()) == {(NOT_MEASURED, NOT_MEASURED)}


def test_the_page_says_what_no_run_has_measured_and_a_run_fills_it() -> None:
    empty = "\n".join(goals_page({}))
    assert empty in PAGE.read_text(encoding="utf-8")
    assert empty.count(NOT_MEASURED) == 3 * len(GOALS) + 1
    filled = "\n".join(goals_page(data()))
    row = next(line for line in filled.splitlines() if "Wan decoder" in line)
    assert row == (
        "| bf16 exact, Wan decoder | 27.9 | at least 27 FPS | met | at least 30 FPS | not met |"
    )
