"""The simulation finds bugs: each is planted, and has to be found within so many seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sim import planted
from sim.ledger import Breach
from sim.plans import CALM, TINY, Plan, plan_of
from sim.scenario import run

STORM = replace(
    TINY,
    name="storm",
    sessions=4,
    faults=("bad weather", "process isolated", "replica stopped"),
    faults_per_s=3.0,
)
"""Owners are lost all the time, and what they sent still comes."""
AHEAD = replace(TINY, name="ahead", sessions=4, skew_s=12.0)
"""Clocks are further off than a lease is long."""


def found(seeds: range, plan: Plan | None = None) -> str | None:
    """What the first of the seeds says that notices anything."""
    for seed in seeds:
        try:
            run(seed, plan or plan_of(seed))
        except Breach as breach:
            return str(breach)
    return None


@pytest.mark.parametrize(
    ("bug", "within", "says"),
    [
        (planted.no_fence, 20, "after a newer one|though it is"),
        (planted.epoch_not_raised_by_claims, 10, "was claimed twice"),
        (planted.pause_without_fence, 20, "though it is"),
        (planted.callers_deadlines, 60, "is stuck"),
        (planted.publish_before_commit, 10, "was never committed"),
        (planted.no_index_check, 40, "committed after|is placed at"),
        (planted.no_replay_log, 20, "is torn|, not "),
        (planted.move_skips, 20, ", not |is torn"),
        (planted.seal_seals_nothing, 10, "is placed at"),
        (planted.repetition_applied, 10, "another body|as well"),
        (planted.acknowledged_before_durable, 10, "is not at"),
        (planted.any_index_taken, 10, "was due"),
        (planted.retention_not_honoured, 20, "ended: SegmentExpired"),
        (planted.readers_left_behind, 20, "readers of"),
        (planted.ring_without_end, 10, "keeps 13 segments"),
        (planted.nobody_asked, 20, "nobody wanted"),
        (planted.loss_ignored, 10, "is stuck"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_bug_is_found(
    bug: planted.Planting, within: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch.setattr)
    what = found(range(within))
    assert what is not None
    assert any(word in what for word in says.split("|")), what


def test_snapshots_without_a_fence_are_found_when_messages_come_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes an owner that is replaced between its own look at its lease and the store's."""
    planted.no_fence_on_snapshots(monkeypatch.setattr)
    what = found(range(90, 130), STORM)
    assert what is not None
    assert "records a snapshot after a newer one" in what or "records a snapshot though" in what


def test_a_move_that_is_felt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted.move_stops_the_owner(monkeypatch.setattr)
    what = found(range(20), CALM)
    assert what is not None
    assert "stalled for" in what


def test_routers_that_believe_their_own_clocks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, both ahead, took a session from each other for ever: seed 18."""
    planted.clocks_believed(monkeypatch.setattr)
    what = found(range(16, 21), AHEAD)
    assert what is not None
    assert "is stuck" in what


@pytest.mark.parametrize("covered", [planted.no_lease_check, planted.lease_renewed_after_its_loss])
def test_what_the_fence_covers_is_found_without_it(
    covered: planted.Planting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner's own look at its lease only saves it a refusal; what counts is the store's."""
    covered(monkeypatch.setattr)
    assert found(range(30)) is None
    planted.no_fence(monkeypatch.setattr)
    assert found(range(20)) is not None
