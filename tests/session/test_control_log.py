"""The rules of the session directory, on records alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import new, ref

from echo_ray.errors import (
    ChunkSealed,
    ConflictError,
    EchoError,
    EventIdConflict,
    Fenced,
    InvalidRequestError,
    SessionClosed,
)
from echo_ray.session import control_log
from echo_ray.session.control_log import LAST_CHUNK, LoggedControl
from echo_ray.session.records import ControlEntry, Lease, SessionRecord, SessionState

OWNED = control_log.claimed(new(), "r1", expect_epoch=0, lease_until=5.0)
LEASE = Lease("s1", "r1", 1)


def test_a_claim_changes_ownership_and_nothing_else() -> None:
    assert new(owner="r1", epoch=1, lease_until=5.0) == OWNED
    assert control_log.holds(OWNED, LEASE)


@pytest.mark.parametrize(
    "lease", [Lease("s1", "r1", 0), Lease("s1", "r1", 2), Lease("s1", "r2", 1)]
)
def test_another_lease_does_not_hold(lease: Lease) -> None:
    assert not control_log.holds(OWNED, lease)
    with pytest.raises(Fenced, match="the epoch is 1 and the owner 'r1'"):
        control_log.check_fence(OWNED, lease)


def test_a_session_that_nobody_owns_fences_everybody() -> None:
    with pytest.raises(Fenced):
        control_log.check_fence(new(epoch=1), LEASE)


def test_a_closed_session_says_so_before_it_speaks_of_epochs() -> None:
    with pytest.raises(SessionClosed):
        control_log.claimed(new(state=SessionState.CLOSED), "r1", expect_epoch=9, lease_until=0.0)


def test_an_owner_must_be_text() -> None:
    with pytest.raises(InvalidRequestError, match="owner"):
        control_log.claimed(new(), "\ud800", expect_epoch=0, lease_until=0.0)


def test_every_pause_fences_whoever_decided_before_it() -> None:
    once = control_log.with_state(OWNED, "paused")
    twice = control_log.with_state(once, "paused")
    assert (once.epoch, twice.epoch) == (2, 3)
    with pytest.raises(Fenced):
        control_log.claimed(twice, "r2", expect_epoch=once.epoch, lease_until=0.0)


def test_an_event_goes_to_the_first_open_chunk() -> None:
    sealed = control_log.sealed(OWNED, LEASE, 0)
    for record, chunk in ((OWNED, 0), (sealed, 1)):
        logged = control_log.placed(record, "e", "p", None, None)
        assert logged == LoggedControl(ControlEntry(event_id="e", chunk=chunk, prompt="p"), None)


def test_a_repetition_is_recognised_before_anything_else() -> None:
    closed = new(state=SessionState.CLOSED, next_index=9, sealed=9)
    earlier = LoggedControl(ControlEntry(event_id="e", chunk=3, prompt="p"), 3)
    assert control_log.placed(closed, "e", "p", 3, earlier) is earlier
    with pytest.raises(EventIdConflict):
        control_log.placed(closed, "e", "p", None, earlier)


@given(sealed=st.integers(0, 50), at=st.none() | st.integers(-5, 60))
def test_no_event_is_ever_pinned_below_the_seal(sealed: int, at: int | None) -> None:
    record = new(next_index=sealed, sealed=sealed)
    if at is not None and at < sealed:
        with pytest.raises(ChunkSealed):
            control_log.placed(record, "e", "p", at, None)
    else:
        assert control_log.placed(record, "e", "p", at, None).entry.chunk >= sealed


def test_indices_stay_within_what_json_holds() -> None:
    assert control_log.placed(OWNED, "e", "p", LAST_CHUNK, None).entry.chunk == LAST_CHUNK
    with pytest.raises(InvalidRequestError, match=str(LAST_CHUNK)):
        control_log.placed(OWNED, "e", "p", LAST_CHUNK + 1, None)


def test_a_pin_survives_being_recorded_again() -> None:
    again = control_log.recorded_snapshot(OWNED, LEASE, ref(), ref(pinned=True))
    assert again.pinned
    assert not control_log.recorded_snapshot(OWNED, LEASE, ref(), ref()).pinned
    with pytest.raises(ConflictError, match="pinned"):
        control_log.check_droppable(again)
    control_log.check_droppable(ref())


Step = Callable[[SessionRecord, Lease], SessionRecord]
STEPS: list[Step] = [
    lambda r, lease: control_log.claimed(r, "r1", expect_epoch=r.epoch, lease_until=1.0),
    lambda r, lease: control_log.sealed(r, lease, r.next_index),
    lambda r, lease: control_log.committed(r, lease, r.next_index, "fp"),
    lambda r, lease: control_log.released(r, lease, "live"),
    lambda r, lease: control_log.with_state(r, "paused"),
    lambda r, lease: control_log.with_state(r, "live"),
]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2)), max_size=40))
def test_what_always_holds(steps: list[tuple[Step, int]]) -> None:
    record, claims = new(), 0
    for step, behind in steps:
        before = record
        lease = Lease("s1", "r1", record.epoch - behind)
        try:
            record = step(before, lease)
        except EchoError:
            continue
        claims += record.epoch - before.epoch
        assert before.epoch <= record.epoch <= before.epoch + 1
        assert before.next_index <= record.next_index <= before.next_index + 1
        assert record.next_index <= record.sealed <= record.next_index + 1
        assert record.sealed >= before.sealed
        if record.sealed > before.sealed or record.next_index > before.next_index:
            assert control_log.holds(before, lease)
    assert record.epoch == claims
