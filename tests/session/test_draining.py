"""A drain alone: whose deadline counts, and when a session is given up."""

from __future__ import annotations

import pytest

from echo_ray.session.draining import Drain, Reason, Verdict, asked, gave_up, verdict


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (Reason.ADMIN, Reason.ADMIN, Reason.ADMIN),
        (Reason.ADMIN, Reason.NODE, Reason.NODE),
        (Reason.ADMIN, Reason.STOP, Reason.STOP),
        (Reason.STOP, Reason.ADMIN, Reason.STOP),
        (Reason.NODE, Reason.ADMIN, Reason.NODE),
        (Reason.NODE, Reason.STOP, Reason.NODE),
    ],
)
def test_the_earliest_deadline_and_the_gravest_reason_count(
    first: Reason, second: Reason, reason: Reason
) -> None:
    drain = asked(None, first, 30.0)
    assert drain == Drain(first, 30.0)
    assert asked(drain, second, 20.0) == Drain(reason, 20.0)
    assert asked(drain, second, 40.0) == Drain(reason, 30.0)


def test_sessions_wait_to_be_moved_until_the_deadline_and_are_given_up_once() -> None:
    drain = Drain(Reason.ADMIN, 30.0)
    assert verdict(drain, 29.9, sessions=2, takers=False) is Verdict.WAIT
    assert verdict(drain, 30.0, sessions=2, takers=True) is Verdict.GIVE_UP
    drain = gave_up(drain, 30.0)
    assert verdict(drain, 31.0, sessions=1, takers=True) is Verdict.WAIT
    assert verdict(drain, 32.0, sessions=0, takers=True) is Verdict.DONE


def test_without_sessions_a_drain_is_done_at_once() -> None:
    drain = Drain(Reason.NODE, 30.0)
    assert verdict(drain, 0.0, sessions=0, takers=False) is Verdict.DONE


def test_a_replica_that_is_being_stopped_waits_for_nobody_to_come() -> None:
    drain = Drain(Reason.STOP, 30.0)
    assert verdict(drain, 0.0, sessions=1, takers=True) is Verdict.WAIT
    assert verdict(drain, 0.0, sessions=1, takers=False) is Verdict.GIVE_UP
    assert gave_up(drain, 1.0).until_s == 1.0
    node = Drain(Reason.NODE, 30.0)
    assert verdict(node, 0.0, sessions=1, takers=False) is Verdict.WAIT
