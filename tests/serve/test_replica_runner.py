import threading
from functools import partial

import pytest
from fakes import FakeClock

from echo_ray.config import SessionSection
from echo_ray.errors import Fenced, SegmentBeyondEnd, SegmentExpired
from echo_ray.serve.runner import Reader, SessionRunner
from echo_ray.serve.segments import Segment, SegmentRing
from echo_ray.session.chunk import Chunk, DriftReading
from echo_ray.session.lease import LeaseView
from echo_ray.session.owner_events import (
    Effect,
    ended,
    idled,
    loaded,
    lost,
    releasing,
    renewed,
    replayed,
    retired,
)
from echo_ray.session.owning import LeaseOver
from echo_ray.session.records import Lease, OnIdle, Pace, SessionRecord, SessionState
from echo_ray.session.replay import EventMarks, Verdict

LEASE = Lease("s1", "r1", 1)


def segment(index):
    chunk = Chunk(index, b"", 1, 8, 8, f"d{index}", DriftReading(0.0), "a red circle")
    return Segment(chunk, EventMarks(), index, float(index), 0.1)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def make(clock):
    def made(lease=True, next_index=0, pace=Pace.REALTIME, on_idle=OnIdle.PAUSE, **session):
        record = SessionRecord(
            id="s1",
            model="m",
            prompt="p",
            seed=1,
            pace=pace,
            on_idle=on_idle,
            next_index=next_index,
            epoch=1,
        )
        view = LeaseView(LEASE, 1.5, clock.monotonic()) if lease else None
        return SessionRunner(
            record,
            view,
            config=SessionSection(**session),
            clock=clock,
            changed=threading.Condition(threading.RLock()),
        )

    return made


def load(runner, at):
    event = partial(loaded, at=at, record=runner.record, fingerprint="f")
    runner.restart(at, event)


def reader(epoch=1):
    return Reader(epoch, lambda: None)


def test_a_process_that_was_stopped_may_not_write_when_it_wakes(make, clock):
    runner = make()
    assert runner.held() == LEASE
    clock.advance(1.36)
    with pytest.raises(LeaseOver, match="ran out"):
        runner.held()
    with pytest.raises(Fenced):
        runner.check(1)


def test_renewals_count_from_their_sending_and_only_for_the_lease_that_is_held(make, clock):
    runner = make()
    sent_s = clock.monotonic()
    clock.advance(1.0)
    runner.apply(partial(renewed, lease=Lease("s1", "r1", 7), sent_s=clock.monotonic()))
    clock.advance(0.34)
    assert runner.held() == LEASE
    runner.apply(partial(renewed, lease=LEASE, sent_s=sent_s + 1.0))
    clock.advance(1.0)
    assert runner.held() == LEASE


def test_shadows_and_ended_sessions_write_nothing(make):
    with pytest.raises(LeaseOver, match="followed"):
        make(lease=False).held()
    runner = make()
    assert Effect.LOST in runner.apply(partial(lost, lease=LEASE, error=Fenced("taken")))
    assert not runner.apply(partial(lost, lease=LEASE, error=Fenced("again")))
    with pytest.raises(LeaseOver, match="taken"):
        runner.held()


def test_a_lost_lease_is_nothing_to_a_session_that_holds_a_newer_one(make, clock):
    runner = make()
    newer = Lease("s1", "r1", 3)
    runner.adopt(LeaseView(newer, 1.5, clock.monotonic()), runner.record)
    assert not runner.apply(partial(lost, lease=LEASE, error=Fenced("taken")))
    assert runner.held() == newer
    with pytest.raises(Fenced, match="another epoch than 1"):
        runner.check(1)


def test_the_last_reader_starts_the_grace_and_a_new_one_ends_it(make, clock):
    runner, one, two = make(), reader(), reader()
    runner.attach(one, 0)
    runner.attach(two, 0)
    clock.advance(60)
    runner.detach(one)
    assert not runner.apply(partial(idled, now_s=clock.monotonic(), grace_s=5.0))
    runner.detach(two)
    clock.advance(4.9)
    assert not runner.apply(partial(idled, now_s=clock.monotonic(), grace_s=5.0))
    clock.advance(0.1)
    runner.apply(partial(idled, now_s=clock.monotonic(), grace_s=5.0))
    assert runner.now.release_as is SessionState.PAUSED
    runner.attach(one, 0)
    runner.apply(releasing)
    assert not runner.now.releasing
    runner.detach(one)
    runner.apply(partial(retired, state=SessionState.PAUSED))
    runner.apply(releasing)
    assert runner.now.releasing
    with pytest.raises(Fenced, match="claim it again"):
        runner.check(1)


def test_wants_only_grow_and_the_largest_counts(make):
    runner, one, two = make(), reader(), reader()
    assert runner.wanted() == 0
    runner.attach(one, 0)
    runner.attach(two, 0)
    runner.want(one, 5)
    runner.want(one, 3)
    runner.want(two, 4)
    assert runner.wanted() == 5
    runner.detach(one)
    assert runner.wanted() == 4


def test_at_pace_max_the_slowest_reader_counts(make):
    runner, one, two, lagging = make(pace=Pace.MAX), reader(), reader(), reader()
    runner.attach(one, 0)
    runner.attach(two, 0)
    runner.attach(lagging, 0)
    runner.want(one, 5)
    runner.want(two, 4)
    assert runner.wanted() == 4
    runner.detach(two)
    assert runner.wanted() == 5


def test_a_retirement_tells_its_failure_and_the_first_end_counts(make):
    runner = make()
    failure = SegmentExpired("the reason")
    runner.apply(partial(retired, state=SessionState.LIVE, failure=failure))
    runner.apply(partial(ended, error=Fenced("later")))
    runner.apply(partial(ended, error=Fenced("last")))
    with pytest.raises(SegmentExpired, match="the reason"):
        runner.check(1)


def test_single_segments_before_and_beyond_what_there_is(make):
    runner, one = make(next_index=40, retention_chunks=8), reader()
    load(runner, 38)
    again = partial(replayed, index=38, verdict=Verdict.SAME)
    runner.publish(segment(38), again)
    assert runner.plan(1) == (40, 32)
    assert runner.committed_segment(one, 38).chunk.index == 38
    assert runner.committed_segment(one, 39) is None
    with pytest.raises(SegmentBeyondEnd):
        runner.committed_segment(one, 40)
    with pytest.raises(SegmentExpired):
        runner.committed_segment(one, 31)


def test_the_past_is_wanted_by_the_reader_that_lags_most(make):
    runner, one, two = make(next_index=40, retention_chunks=16), reader(), reader()
    load(runner, 38)
    assert runner.past_wanted() is None
    runner.attach(one, 36)
    assert (runner.past_wanted(), runner.past_next()) == (36, 36)
    runner.publish_past(segment(36))
    runner.attach(two, 34)
    assert (runner.past_wanted(), runner.past_next()) == (34, 34)
    for index in (33, 34, 35, 36, 37):
        runner.publish_past(segment(index))
    assert runner.past_next() is None
    assert [runner.segment(two, n).chunk.index for n in (34, 35, 36, 37)] == [34, 35, 36, 37]
    runner.past_begins_at(36)
    with pytest.raises(SegmentExpired):
        runner.segment(reader(), 33)
    runner.detach(one)
    runner.detach(two)
    assert runner.past_wanted() is None


def test_a_ring_keeps_the_newest_and_says_what_it_has_not():
    ring = SegmentRing(3)
    ring.restart(5)
    for index in range(5, 10):
        ring.put(segment(index))
    assert (ring.first, ring.next) == (7, 10)
    assert ring.get(8).chunk.digest == "d8"
    with pytest.raises(SegmentExpired, match="oldest is 7"):
        ring.get(6)
    with pytest.raises(SegmentBeyondEnd, match="next one is 10"):
        ring.get(10)
    ring.restart(8)
    assert (ring.first, ring.next) == (7, 10)
    ring.restart(2)
    assert (ring.first, ring.next, ring.kept(8)) == (2, 2, None)


def test_a_segment_is_encoded_once_per_format():
    calls = []

    def encode(chunk, fmt, start_frame):
        calls.append((chunk.index, fmt, start_frame))
        return fmt.encode()

    made = segment(4)
    assert [made.encoded(f, encode) for f in ("raw", "jpeg", "raw")] == [b"raw", b"jpeg", b"raw"]
    assert calls == [(4, "raw", 4), (4, "jpeg", 4)]
