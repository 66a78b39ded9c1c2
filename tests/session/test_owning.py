"""The owner's machine alone: what is next, what follows, and what never happens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from echo_ray.errors import (
    ClipLost,
    ConflictError,
    Draining,
    EchoError,
    EngineError,
    Fenced,
    SessionClosed,
    SessionNotFound,
    StoreUnavailable,
)
from echo_ray.session import owner_events as on
from echo_ray.session.lease import LeaseView
from echo_ray.session.owner_events import Effect
from echo_ray.session.owning import LeaseOver, Owning, Pacing, Work, held, started, times, work
from echo_ray.session.records import Lease, OnIdle, SessionRecord, SessionState
from echo_ray.session.replay import Verdict

LEASE = Lease("s1", "r1", 1)
VIEW = LeaseView(LEASE, 1.5, 0.0)
NEWER = LeaseView(Lease("s1", "r1", 3), 1.5, 0.0)


def record(**changes: object) -> SessionRecord:
    new = SessionRecord(id="s1", model="m", prompt="p", seed=1, epoch=1, owner="r1")
    return replace(new, **changes)  # type: ignore[arg-type]


def new(lease: LeaseView | None = VIEW, **changes: object) -> Owning:
    return started(record(**changes), lease, 0.0)


def with_state(at: int, next_index: int, lease: LeaseView | None = VIEW) -> Owning:
    o, _ = on.loaded(new(lease, next_index=next_index), at, record(next_index=next_index), "f")
    return o


def pacing(want: int | None = 100) -> Pacing:
    return Pacing(start_s=3.0, chunk_s=0.75, lead_s=1.5, want=want)


def test_a_session_is_fetched_replayed_and_goes_on() -> None:
    o = new(next_index=9)
    assert work(o) is Work.FETCH
    o, effects = on.loaded(o, 8, record(next_index=9, fingerprint="f"), "f")
    assert work(o) is Work.REPLAY
    assert not o.caught_up
    o, effects = on.replayed(o, 8, Verdict.SAME)
    assert effects == (Effect.PUBLISH, Effect.RESUMED, Effect.TELL)
    assert work(o) is Work.PRODUCE
    o, effects = on.made(o, 9, "d9")
    assert not effects, "nothing is published before its commit"
    assert work(o) is Work.COMMIT
    o, effects = on.committed(o, 9, 6.75, 1.0)
    assert effects == (Effect.PUBLISH, Effect.FIRST_CHUNK)
    assert (o.committed, o.at, o.pending) == (10, 10, None)


def test_a_new_session_is_no_resumption() -> None:
    o, effects = on.loaded(new(), 0, record(), "f")
    assert effects == (Effect.TELL,)
    assert o.caught_up
    assert work(o) is Work.PRODUCE


def test_a_shadow_follows_and_never_writes() -> None:
    o = with_state(8, 8, lease=None)
    assert work(o) is Work.REFRESH
    with pytest.raises(LeaseOver, match="followed"):
        held(o, 0.0)
    o, _ = on.refreshed(o, record(next_index=10), None, None)
    assert work(o) is Work.REPLAY
    ended, effects = on.expired(o, 30.0)
    assert isinstance(ended.ended, Fenced)
    assert Effect.DROP_STATE in effects
    ended, _ = on.drained(o, "r1")
    assert isinstance(ended.ended, Draining)


def test_another_lease_means_another_look_before_anything_is_written() -> None:
    o = with_state(8, 8)
    o, _ = on.adopted(o, NEWER, 1.0)
    assert work(o) is Work.REFRESH
    assert not o.planned
    late, _ = on.refreshed(o, record(next_index=8), None, VIEW)
    assert work(late) is Work.REFRESH, "it was read under the lease before"
    o, _ = on.refreshed(o, record(next_index=8), None, NEWER)
    assert work(o) is Work.PRODUCE
    assert o.planned


@pytest.mark.parametrize(
    ("next_index", "sealed", "found", "published", "kept"),
    [
        (9, 9, "d8", True, False),
        (9, 9, "another", False, False),
        (8, 9, None, False, True),
        (8, 8, None, False, False),
        (10, 10, None, False, False),
    ],
)
def test_a_chunk_in_hand_is_published_kept_or_thrown_away(
    next_index: int, sealed: int, found: str | None, published: bool, kept: bool
) -> None:
    o, _ = on.made(with_state(8, 8), 8, "d8")
    o, _ = on.failed(o, ConflictError("?"), VIEW, 1.0)
    assert work(o) is Work.REFRESH
    o, effects = on.refreshed(o, record(next_index=next_index, sealed=sealed), found, VIEW)
    assert (Effect.PUBLISH in effects) == published
    assert (o.pending is not None) == kept
    assert (Effect.DROP_STATE in effects) == (o.at is None) == (not published and not kept)


def test_a_state_beyond_what_is_committed_is_thrown_away() -> None:
    o, _ = on.adopted(with_state(8, 8), NEWER, 1.0)
    o, effects = on.refreshed(o, record(next_index=7), None, NEWER)
    assert Effect.DROP_STATE in effects
    assert work(o) is Work.FETCH


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (StoreUnavailable("away"), Work.PRODUCE),
        (ConflictError("other index"), Work.REFRESH),
        (EngineError("broken"), Work.FETCH),
        (ValueError("a bug"), Work.FETCH),
        (ClipLost("gone"), Work.RELEASE),
        (Fenced("taken"), None),
        (LeaseOver("late"), None),
        (SessionClosed("closed"), None),
        (SessionNotFound("deleted"), None),
    ],
)
def test_what_a_failure_leads_to(error: Exception, after: Work | None) -> None:
    o, effects = on.failed(with_state(8, 8), error, VIEW, 1.0)
    assert work(o) is after
    assert (Effect.LOST in effects) == isinstance(error, Fenced)
    if after in (Work.PRODUCE, Work.REFRESH, Work.FETCH):
        ready_and_due = times(o, pacing())
        assert ready_and_due is not None
        assert ready_and_due[0] >= 1.05, "not at once again"


def test_an_engine_that_fails_three_times_gives_the_session_to_others() -> None:
    o = with_state(8, 8)
    for _ in range(2):
        o, _ = on.failed(o, EngineError("broken"), VIEW, 1.0)
        assert work(o) is Work.FETCH
        o, _ = on.loaded(o, 8, record(next_index=8), "f")
    o, _ = on.failed(o, EngineError("broken"), VIEW, 1.0)
    assert (work(o), o.release_as) == (Work.RELEASE, SessionState.LIVE)
    shadow = with_state(8, 8, lease=None)
    for _ in range(3):
        shadow, _ = on.failed(shadow, EngineError("broken"), None, 1.0)
    assert isinstance(shadow.ended, EngineError)


def test_a_failure_under_a_lease_of_the_past_is_nothing_to_the_present_one() -> None:
    o, _ = on.adopted(with_state(8, 8), NEWER, 1.0)
    o, effects = on.failed(o, Fenced("taken"), VIEW, 1.0)
    assert not effects
    assert o.ended is None


def test_after_its_end_nothing_happens_any_more() -> None:
    reason = EchoError("the first")
    o, _ = on.ended(with_state(8, 9), reason)
    for step in (
        on.loaded(o, 3, record(next_index=9), "f"),
        on.replayed(o, 8, Verdict.SAME),
        on.made(o, 9, "d"),
        on.committed(o, 9, 0.0, 0.0),
        on.refreshed(o, record(next_index=12), None, VIEW),
        on.retired(o, SessionState.PAUSED),
        on.lost(o, LEASE, Fenced("later")),
        on.expired(o, 99.0),
    ):
        assert step == (o, ())
    o, _ = on.ended(o, EchoError("the second"))
    assert o.ended is reason
    assert work(o) is None
    assert times(o, pacing()) is None


def test_readers_call_a_pause_off_but_neither_a_failure_nor_a_drain() -> None:
    idle, _ = on.retired(with_state(8, 8), SessionState.PAUSED)
    assert work(on.watched(idle)[0]) is Work.PRODUCE
    broken, _ = on.retired(with_state(8, 8), SessionState.LIVE, failure=EngineError("x"))
    assert work(on.watched(broken)[0]) is Work.RELEASE
    leaving, _ = on.drained(with_state(8, 8), "r1")
    assert work(on.watched(leaving)[0]) is Work.RELEASE
    begun, _ = on.releasing(leaving)
    assert work(begun) is None


@pytest.mark.parametrize(
    ("on_idle", "state"),
    [(OnIdle.PAUSE, SessionState.PAUSED), (OnIdle.CLOSE, SessionState.CLOSED)],
)
def test_idle_sessions_go_after_the_grace(on_idle: OnIdle, state: SessionState) -> None:
    o, _ = on.unwatched(replace(with_state(8, 8), on_idle=on_idle), 10.0)
    assert on.idled(o, 14.9, 5.0) == (o, ())
    o, _ = on.idled(o, 15.0, 5.0)
    assert o.release_as is state
    kept, _ = on.unwatched(replace(with_state(8, 8), on_idle=OnIdle.CONTINUE), 10.0)
    assert on.idled(kept, 99.0, 5.0) == (kept, ())


def test_what_all_readers_have_seen_does_not_begin_to_play() -> None:
    o = with_state(4, 4)
    o, effects = on.committed(on.made(o, 4, "d4")[0], 4, 3.0, 10.0, seen=True)
    assert effects == (Effect.PUBLISH,)
    assert times(o, pacing()) == (-math.inf, 0.0)
    o, effects = on.committed(on.made(o, 5, "d5")[0], 5, 3.75, 10.1)
    assert effects == (Effect.PUBLISH, Effect.FIRST_CHUNK)
    later = Pacing(start_s=4.5, chunk_s=0.75, lead_s=1.5, want=100)
    assert times(o, later) == (pytest.approx(9.35), pytest.approx(10.85))
    # Without a viewer it is made as time asks for it, with what others leave.
    assert times(o, replace(later, want=None)) == (pytest.approx(9.35), math.inf)


def test_times_follow_playout_and_wants() -> None:
    o = with_state(4, 4)
    assert times(o, pacing(want=4)) is None
    assert times(o, pacing()) == (-math.inf, 0.0)
    o, _ = on.committed(on.made(o, 4, "d4")[0], 4, 3.0, 10.0)
    o, _ = on.made(o, 5, "d5")
    assert times(o, pacing()) == (-math.inf, 0.0), "what is made is committed at once"
    o, _ = on.committed(o, 5, 3.75, 10.2)
    later = Pacing(start_s=4.5, chunk_s=0.75, lead_s=1.5, want=100)
    assert times(o, later) == (10.0, 11.5)
    assert on.late_s(o, 4.5, 12.0) == pytest.approx(0.5)
    assert on.late_s(on.held_back(o)[0], 4.5, 12.0) == 0.0
    follower, _ = on.begun(with_state(8, 8, lease=None), 20.0)
    assert times(follower, pacing()) == (20.05, math.inf)


def test_a_chunk_in_hand_is_finished_before_anything_else_takes_effect() -> None:
    o, _ = on.stepping(with_state(8, 8))
    assert work(o) is Work.ADVANCE
    adopted, _ = on.adopted(o, NEWER, 1.0)
    assert work(adopted) is Work.ADVANCE
    paused, _ = on.retired(o, SessionState.PAUSED)
    assert work(paused) is Work.ADVANCE
    assert times(paused, pacing()) == (-math.inf, -math.inf), "and then it goes at once"
    for o in (adopted, paused):
        o, _ = on.made(o, 8, "d8")
        assert work(o) in (Work.REFRESH, Work.RELEASE)
    again, _ = on.stepping(with_state(8, 9))
    again, _ = on.replayed(again, 8, Verdict.SAME)
    assert work(again) is Work.PRODUCE


@pytest.mark.parametrize(
    "end",
    [
        lambda o: on.lost(o, LEASE, Fenced("taken")),
        lambda o: on.expired(o, 9.0),
        lambda o: on.ended(o, SessionClosed("closed")),
    ],
)
def test_the_end_of_a_session_leaves_its_chunk_where_it_is(
    end: Callable[[Owning], on.Step],
) -> None:
    o, effects = end(on.stepping(with_state(8, 8))[0])
    assert Effect.DROP_STATE in effects
    assert (work(o), o.stepping, o.at) == (None, False, None)
    assert on.stepping(o) == (o, ())


def test_a_chunk_that_fails_half_way_is_not_in_hand_any_more() -> None:
    o, effects = on.failed(on.stepping(with_state(8, 8))[0], EngineError("broken"), VIEW, 1.0)
    assert Effect.DROP_STATE in effects
    assert (work(o), o.stepping) == (Work.FETCH, False)


def test_a_load_is_due_like_a_stream_that_began_to_play_when_it_came() -> None:
    rate = Pacing(start_s=0.0, chunk_s=0.75, lead_s=1.5, want=None, chunk_seconds=0.25)
    o, _ = on.begun(new(next_index=9), 10.0)
    assert times(o, rate) == (-math.inf, 0.0), "as its first chunk is"
    o, _ = on.loading(o, 10.5)
    assert times(o, rate) == (-math.inf, pytest.approx(1.5)), "two chunks could have been made"
    assert times(o, replace(rate, chunk_seconds=0.0)) == (-math.inf, 0.5)
    assert times(o, replace(rate, chunk_seconds=3.0)) == (-math.inf, 0.5)
    # What is made again comes behind it.
    behind, _ = on.loaded(o, 8, record(next_index=9), "f")
    assert times(behind, rate) == (-math.inf, pytest.approx(1.5))
    # A load that fails begins again, and has had its time.
    failed, _ = on.failed(o, EngineError("broken"), VIEW, 10.6)
    assert times(failed, rate) == (pytest.approx(10.65), pytest.approx(1.5))
    taken, _ = on.adopted(o, NEWER, 11.0)
    assert times(taken, rate) == (-math.inf, 11.0)
    shadow, _ = on.loading(new(lease=None), 0.5)
    assert times(shadow, rate) == (-math.inf, math.inf)


def test_a_load_does_not_hold_up_a_release() -> None:
    o, _ = on.loading(new(next_index=9), 0.5)
    assert work(on.retired(o, SessionState.PAUSED)[0]) is Work.RELEASE


def test_a_chunk_in_hand_keeps_its_due_time() -> None:
    o, _ = on.committed(on.made(with_state(4, 4), 4, "d4")[0], 4, 3.0, 10.0)
    later = Pacing(start_s=3.75, chunk_s=0.75, lead_s=1.5, want=100)
    assert times(o, later) == (9.25, 10.75)
    o, _ = on.stepping(o)
    assert times(o, later) == (-math.inf, 10.75)
    assert times(o, replace(later, want=5)) == (-math.inf, math.inf), "nobody wants it any more"
    replay, _ = on.stepping(with_state(3, 8))
    assert times(replay, later) == (-math.inf, 0.0)
    shadow, _ = on.stepping(with_state(3, 8, lease=None))
    assert times(shadow, later) == (-math.inf, math.inf)
