"""Many small worlds full of faults: nobody sees a chunk lost, twice, out of order or torn.

The code under test is `session/` (owners, pulls, leases, placement, the control log) and the
in-memory stores; what executes them here is a virtual clock, network and set of processes.
A seed that fails prints its log, and is run again alone with `-k "seed[N]"`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from sim.ledger import Breach
from sim.replica import Replica
from sim.scenario import Plan, run

from echo_ray.session import control_log, pulling
from echo_ray.session.lease import LeaseView

SMALL = Plan(replicas=3, routers=2, sessions=3, troubled_s=15, peaceful_s=12, faults_per_s=0.8)


@pytest.mark.parametrize("seed", range(60))
def test_no_stream_is_lost_or_torn_whatever_happens(seed: int) -> None:
    cluster = run(seed, SMALL)
    assert cluster.ledger.deliveries > 30


def test_a_seed_is_the_same_world_again() -> None:
    assert run(3, SMALL).world.log == run(3, SMALL).world.log
    assert run(3, SMALL).world.log != run(4, SMALL).world.log


def found(seeds: range) -> bool:
    """Whether any of the seeds notices that something is wrong."""
    for seed in seeds:
        try:
            run(seed, SMALL)
        except Breach:
            return True
    return False


def test_a_chunk_that_is_shown_before_its_commit_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: readers have a chunk before the store has it."""
    commit = Replica._commit

    def planted(self, seat, segment):  # type: ignore[no-untyped-def]
        seat.segments[segment.index] = segment
        seat.now = replace(seat.now, committed=segment.index + 1)
        seat.ring()
        yield from commit(self, seat, segment)

    monkeypatch.setattr(Replica, "_commit", planted)
    assert found(range(40))


def test_a_lease_that_nobody_looks_at_and_no_fence_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: owners and store believe in every lease. Each alone is covered by the other."""
    monkeypatch.setattr(LeaseView, "valid", lambda self, now_s: True)
    assert not found(range(15))
    monkeypatch.setattr(control_log, "check_fence", lambda record, lease: None)
    assert found(range(60))


def test_an_epoch_that_is_not_raised_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a claim leaves the epoch as it is."""
    claimed = control_log.claimed

    def planted(record, owner, *, expect_epoch, lease_until):  # type: ignore[no-untyped-def]
        now = claimed(record, owner, expect_epoch=expect_epoch, lease_until=lease_until)
        if record.epoch == 0:
            return now
        return replace(now, epoch=record.epoch)

    monkeypatch.setattr(control_log, "claimed", planted)
    assert found(range(40))


def test_a_seal_that_seals_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: events may still be pinned to a chunk that is being made."""
    placed = control_log.placed

    def planted(record, *rest):  # type: ignore[no-untyped-def]
        return placed(replace(record, sealed=record.next_index), *rest)

    monkeypatch.setattr(control_log, "placed", planted)
    assert found(range(40))


def test_an_index_that_is_not_looked_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a pull takes whatever comes."""
    monkeypatch.setattr(pulling, "takes", lambda p, index: True)
    monkeypatch.setattr("sim.router.serve_pull", _from_one_before, raising=True)
    assert found(range(40))


def _from_one_before(replica, owner, start, inbox, wants):  # type: ignore[no-untyped-def]
    from sim import router

    yield from router._serve(replica, owner, max(0, start - 1), inbox, wants)
