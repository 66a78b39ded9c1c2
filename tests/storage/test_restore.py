"""Keeping pasts, and filling an empty directory from them: any directory, any durable store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from fakes import FakeClock
from replicas import eventually
from stored import new, owned, produce, ref

from echo_ray.clock import SystemClock
from echo_ray.errors import (
    CapacityError,
    EchoError,
    Fenced,
    NotFoundError,
    SessionClosed,
    SessionNotFound,
    StoreCorrupt,
    StoreUnavailable,
)
from echo_ray.session import restoring
from echo_ray.session.forking import Past
from echo_ray.session.records import SessionState
from echo_ray.session.sweep import Grace, pasts
from echo_ray.storage.memory import MemoryDirectory, MemorySnapshots
from echo_ray.storage.pasts import PastKeeper, read_past
from echo_ray.storage.restore import Report, Restorer
from echo_ray.storage.sweep import sweep

DOWN = StoreUnavailable("down, as told by a test")
FAR = 10_000.0


class Durable(MemorySnapshots):
    """A store that fails when told, and remembers what it was asked to read."""

    def __init__(self, clock: FakeClock, limit_bytes: int = 2**20) -> None:
        super().__init__(limit_bytes, clock)
        self.down: EchoError | None = None
        self.damaged: dict[str, EchoError] = {}
        self.before_put: Callable[[], object] = lambda: None
        self.closed = 0

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        if self.down is not None:
            raise self.down
        self.before_put()
        super().put(session_id, snapshot_id, blob)

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        if self.down is not None:
            raise self.down
        if snapshot_id in self.damaged:
            raise self.damaged[snapshot_id]
        return super().get(session_id, snapshot_id)

    def list_blobs(self, session_id: str | None = None):  # type: ignore[no-untyped-def]
        if self.down is not None:
            raise self.down
        return super().list_blobs(session_id)

    def close(self) -> None:
        self.closed += 1

    def pasts(self, session_id: str = "s1") -> list[str]:
        return pasts([b.snapshot_id for b in MemorySnapshots.list_blobs(self, session_id)])


class FakeIdentity:
    """Whether the directory is whole, as a value."""

    def __init__(self) -> None:
        self.whole = False
        self.asked = 0
        self.whole_at: int | None = None

    def lost(self) -> bool:
        self.asked += 1
        if self.whole_at is not None and self.asked >= self.whole_at:
            self.whole = True
        return not self.whole

    def set(self) -> None:
        self.whole = True


class World:
    """A directory that is lost, what is left of it, and an empty one to be filled."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.before = MemoryDirectory(self.clock)
        self.store = Durable(self.clock)
        self.empty = MemoryDirectory(self.clock)
        self.identity = FakeIdentity()
        self.keeper = PastKeeper(
            self.before, lambda: self.store, SystemClock(), soon_s=0.0, every_s=FAR, retry_s=0.01
        )

    def keep(self, session_id: str = "s1") -> None:
        """Store the session's past as it is now."""
        past = read_past(self.before, session_id)
        id_ = restoring.past_id(past, self.clock.wall())
        self.store.put(session_id, id_, restoring.encode(past))

    def restorer(self, directory: MemoryDirectory | None = None) -> Restorer:
        return Restorer(
            directory or self.empty,
            self.store,
            self.identity,  # type: ignore[arg-type]
            self.clock,
            limit_bytes=2**20,
        )

    def restore(self) -> Report:
        return self.restorer().restore_all()


@pytest.fixture
def world() -> World:
    return World()


def running(world: World) -> None:
    """A session that stands at chunk 10 with two snapshots, of which one is durable."""
    lease = owned(world.before)
    produce(world.before, lease, *range(10))
    for at in (4, 8):
        world.before.add_snapshot(lease, ref(f"p{at:010d}-e1", at, store="memory"))
    world.store.put("s1", "p0000000004-e1", b"state at 4")
    world.before.append_control("s1", "e1", "blue", at_chunk=12)


def test_a_session_comes_back_as_it_was_kept(world: World) -> None:
    running(world)
    world.keep()
    report = world.restore()
    assert (report.brought_back, report.there, report.refused) == (["s1"], [], {})
    assert world.identity.whole
    record = world.empty.get("s1")
    kept = world.before.get("s1")
    assert record == replace(kept, owner=None, lease_until=0.0, epoch=record.epoch)
    assert world.empty.controls("s1") == world.before.controls("s1")
    assert world.empty.digests("s1", 0, 99) == {n: f"digest-{n}" for n in range(4, 10)}
    assert [s.id for s in world.empty.snapshots("s1")] == ["p0000000004-e1"]


def test_an_owner_that_lived_through_it_is_fenced(world: World) -> None:
    running(world)
    world.keep()
    lease = world.before.claim("s1", "r1", expect_epoch=1, ttl_s=1.5)
    world.restore()
    assert world.empty.renew([lease], ttl_s=1.5) == [lease]
    for write in (
        lambda: world.empty.seal(lease, 10),
        lambda: world.empty.release(lease, state="live"),
        lambda: world.empty.add_snapshot(lease, ref()),
    ):
        with pytest.raises(Fenced):
            write()
    again = world.empty.claim("s1", "r1", expect_epoch=world.empty.get("s1").epoch, ttl_s=1.5)
    world.empty.seal(again, 10)
    with pytest.raises(Fenced):
        world.empty.commit(lease, 10, "d", "fp")


def test_losing_everything_twice_raises_the_epoch_twice(world: World) -> None:
    running(world)
    world.keep()
    world.restore()
    first = world.empty.claim("s1", "r1", expect_epoch=world.empty.get("s1").epoch, ttl_s=1.5)
    world.clock.advance(1.0)
    world.identity.whole = False
    again = MemoryDirectory(world.clock)
    world.restorer(again).restore_all()
    assert again.get("s1").epoch > first.epoch
    assert again.renew([first], ttl_s=1.5) == [first]


def test_a_closed_session_comes_back_closed_and_a_paused_one_paused(world: World) -> None:
    for id_, state in (("s1", "closed"), ("s2", "paused")):
        world.before.create(new(id_))
        world.before.set_state(id_, state=state)
        world.keep(id_)
    world.restore()
    assert world.empty.get("s1").state is SessionState.CLOSED
    with pytest.raises(SessionClosed):
        world.empty.claim("s1", "r1", expect_epoch=world.empty.get("s1").epoch, ttl_s=1)
    assert world.empty.get("s2").state is SessionState.PAUSED


def test_the_newest_past_counts(world: World) -> None:
    running(world)
    world.keep()
    world.before.append_control("s1", "e2", "green")
    world.keep()
    assert len(world.store.pasts()) == 2
    world.restore()
    assert [e.event_id for e in world.empty.controls("s1")] == ["e2", "e1"]


def test_a_damaged_past_gives_way_to_an_older_one(world: World) -> None:
    running(world)
    world.keep()
    world.before.append_control("s1", "e2", "green")
    world.keep()
    world.store.damaged[world.store.pasts()[0]] = StoreCorrupt("as told by a test")
    assert world.restore().brought_back == ["s1"]
    assert [e.event_id for e in world.empty.controls("s1")] == ["e1"]


def test_what_cannot_be_read_is_told_and_the_others_come_back(world: World) -> None:
    for id_ in ("s1", "s2", "s3", "s4", "s5"):
        world.before.create(new(id_))
        world.keep(id_)
    world.store.put("s2", world.store.pasts("s2")[0], b"rubbish")
    newer = restoring.encode(read_past(world.before, "s3")).replace(
        b"\xa6format\x01", b"\xa6format\x02"
    )
    world.store.put("s3", "past-e9-n0-l0-t1", newer)
    world.store.put(
        "s4", world.store.pasts("s4")[0], world.store.get("s5", world.store.pasts("s5")[0])
    )
    world.store.put("s6", "p0000000008-e1", b"of an older release")
    report = world.restore()
    assert sorted(report.brought_back) == ["s1", "s5"]
    assert {id_: error.code for id_, error in report.refused.items()} == {
        "s2": "archive_foreign",
        "s3": "archive_version",
        "s4": "archive_foreign",
        "s6": "archive_corrupt",
    }
    assert "no past among them" in report.refused["s6"].message
    assert "is of session 's5'" in report.refused["s4"].message
    # Waiting for what will not get better helps nobody.
    assert world.identity.whole


def test_a_store_that_does_not_answer_ends_the_try(world: World) -> None:
    running(world)
    world.keep()
    world.store.down = DOWN
    with pytest.raises(StoreUnavailable, match="as told"):
        world.restore()
    world.store.down = None
    world.store.damaged[world.store.pasts()[0]] = DOWN
    with pytest.raises(StoreUnavailable, match="as told"):
        world.restore()
    assert not world.identity.whole
    assert list(world.empty.list()) == []
    world.store.damaged.clear()
    assert world.restore().brought_back == ["s1"]


def test_an_empty_store_is_a_new_deployment(world: World) -> None:
    assert world.restore() == Report(brought_back=[], there=[], refused={})
    assert world.identity.whole


def test_what_is_there_is_left_alone(world: World) -> None:
    running(world)
    world.keep()
    world.restore()
    lease = world.empty.claim("s1", "r1", expect_epoch=world.empty.get("s1").epoch, ttl_s=1.5)
    produce(world.empty, lease, 10)
    world.identity.whole = False
    assert world.restore().there == ["s1"]
    assert world.empty.get("s1").next_index == 11


def test_a_newer_snapshot_than_the_past_knows_is_used(world: World) -> None:
    running(world)
    world.keep()
    world.store.put("s1", "p0000000016-e3", b"state at 16")
    world.restore()
    assert (world.empty.get("s1").next_index, world.empty.get("s1").sealed) == (16, 16)
    newest = world.empty.snapshots("s1")[0]
    assert (newest.id, newest.size_bytes, newest.epoch) == ("p0000000016-e3", 11, 3)
    assert newest.digest == hashlib.sha256(b"state at 16").hexdigest()


def test_one_that_cannot_be_read_is_not(world: World) -> None:
    running(world)
    world.keep()
    world.store.put("s1", "p0000000016-e3", b"state at 16")
    world.store.damaged["p0000000016-e3"] = StoreCorrupt("as told by a test")
    assert world.restore().brought_back == ["s1"]
    assert world.empty.get("s1").next_index == 10


def test_what_was_deleted_since_another_one_was_done_stays_deleted(world: World) -> None:
    world.before.create(new())
    world.keep()
    # Once when it is asked before, once after: whole in between.
    world.identity.whole_at = 2
    assert world.restore() == Report(brought_back=[], there=["s1"], refused={})
    with pytest.raises(SessionNotFound):
        world.empty.get("s1")
    world.identity.whole_at, world.identity.whole = None, True
    assert world.restore().there == ["s1"]


def test_single_sessions_are_brought_back_when_asked_for(world: World) -> None:
    for id_ in ("s1", "s2"):
        world.before.create(new(id_))
        world.keep(id_)
    world.identity.whole = True
    restorer = world.restorer()
    assert restorer.missing() == ["s1", "s2"]
    assert restorer.restore(["s2"]).brought_back == ["s2"]
    assert restorer.missing() == ["s1"]
    with pytest.raises(NotFoundError, match="nothing of session 's9'"):
        restorer.restore(["s9"])


# Keeping


def test_a_change_is_kept_and_the_older_past_goes(world: World) -> None:
    running(world)
    world.keeper.changed("s1")
    assert eventually(lambda: world.store.pasts() != [])
    (first,) = world.store.pasts()
    world.before.append_control("s1", "e2", "green")
    world.keeper.changed("s1")
    assert eventually(lambda: world.store.pasts() not in ([], [first]))
    assert eventually(lambda: len(world.store.pasts()) == 1)
    assert first not in world.store.pasts()
    world.keeper.close()


def test_getting_on_is_kept_now_and_then(world: World) -> None:
    running(world)
    world.keeper.moved("s1")
    assert eventually(lambda: world.store.pasts() != [] and world.keeper.waiting() == 0)
    (first,) = world.store.pasts()
    world.keeper.moved("s1")
    assert world.keeper.waiting() == 1
    assert world.store.pasts() == [first]
    # Whoever was told of a change does not wait for that.
    world.before.append_control("s1", "e2", "green")
    world.keeper.changed("s1")
    assert eventually(lambda: world.store.pasts() not in ([], [first]))
    world.keeper.close()


def test_a_store_that_fails_is_tried_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    running(world)
    world.store.down = DOWN
    world.keeper.changed("s1")
    assert eventually(lambda: "past_not_kept" in caplog.text)
    world.store.down = None
    assert eventually(lambda: world.store.pasts() != [])
    assert caplog.text.count("past_not_kept") == 1
    world.keeper.close()


def test_a_past_over_the_limit_holds_up_no_other(world: World) -> None:
    running(world)
    world.before.create(new("s2"))
    failed: list[str] = []

    def put(session_id: str, snapshot_id: str, blob: bytes) -> None:
        if session_id == "s1":
            failed.append(session_id)
            raise CapacityError("over the limit")
        MemorySnapshots.put(world.store, session_id, snapshot_id, blob)

    world.store.put = put  # type: ignore[method-assign]
    for id_ in ("s1", "s2"):
        world.keeper.changed(id_)
    assert eventually(lambda: world.store.pasts("s2") != [])
    assert eventually(lambda: world.keeper.waiting() == 0)
    assert failed == ["s1"]
    world.keeper.close()


def test_what_is_deleted_while_it_is_kept_stays_deleted(world: World) -> None:
    running(world)
    world.store.before_put = lambda: world.before.delete("s1")
    world.keeper.changed("s1")
    assert eventually(lambda: not world.before.list() and world.keeper.waiting() == 0)
    world.keeper.close()
    assert world.store.pasts() == []


def test_deleting_goes_on_until_nothing_is_left(world: World) -> None:
    running(world)
    world.keep()
    world.before.delete("s1")
    tries: list[str] = []

    def delete_session(session_id: str) -> None:
        tries.append(session_id)
        if len(tries) < 3:
            raise DOWN
        MemorySnapshots.delete_session(world.store, session_id)

    world.store.delete_session = delete_session  # type: ignore[method-assign]
    world.keeper.deleted("s1")
    world.keeper.changed("s1")
    assert eventually(lambda: len(tries) == 3)
    world.keeper.close()
    assert list(MemorySnapshots.list_blobs(world.store)) == []
    assert world.restore() == Report(brought_back=[], there=[], refused={})


def test_closing_keeps_what_waits_and_closes_the_store(world: World) -> None:
    running(world)
    slow = PastKeeper(world.before, lambda: world.store, SystemClock(), soon_s=FAR)
    slow.changed("s1")
    slow.close()
    slow.close()
    assert len(world.store.pasts()) == 1
    assert world.store.closed
    slow.changed("s1")
    assert slow.waiting() == 0


def test_a_keeper_that_was_told_nothing_opens_nothing(world: World) -> None:
    world.keeper.close()
    assert world.store.closed == 0


def test_a_past_names_what_the_record_has_reached(world: World) -> None:
    running(world)
    lease = world.before.claim("s1", "r1", expect_epoch=1, ttl_s=1.5)
    # Its reference was recorded after the record was read.
    world.before.add_snapshot(lease, ref("p0000000012-e2", 12))
    past = read_past(world.before, "s1")
    assert [s.chunk_index for s in past.snapshots] == [4, 8]
    assert (past.record.owner, past.record.lease_until) == (None, 0.0)
    with pytest.raises(SessionNotFound):
        read_past(world.before, "s9")


def test_a_pinned_snapshot_far_back_does_not_blow_the_past_up(world: World) -> None:
    running(world)
    world.before.pin_snapshot("s1", "p0000000004-e1")
    assert sorted(read_past(world.before, "s1").digests) == [8, 9]


# The sweep


def test_the_sweep_keeps_the_newest_past_and_the_last_good_snapshot(world: World) -> None:
    running(world)
    world.keep()
    world.clock.advance(1.0)
    world.before.append_control("s1", "e2", "green")
    world.keep()
    newest, older = world.store.pasts()
    world.store.put("s1", "p0000000002-e1", b"lost its reference")
    world.clock.advance(5000.0)
    tiers = {"durable": world.store}
    doomed = sweep(world.before, tiers, world.clock.wall(), Grace())  # type: ignore[arg-type]
    assert sorted(b.snapshot_id for b in doomed["durable"]) == ["p0000000002-e1", older]
    assert world.store.pasts() == [newest]
    # A past is no snapshot: the last good one stays beside it.
    world.before.delete("s1")
    world.before.restore(Past(record=new()))
    doomed = sweep(world.before, tiers, world.clock.wall(), Grace())  # type: ignore[arg-type]
    assert doomed == {"durable": []}
    assert world.store.get("s1", "p0000000004-e1") == b"state at 4"
