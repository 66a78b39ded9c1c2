"""What every session directory promises of open sessions, of orphans, and of clocks that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fakes import FakeClock
from redis_server import go_by
from stored import new, owned

from echo_ray.config import StorageSection
from echo_ray.session.records import Lease, OnIdle, ReplicaRecord, SessionState
from echo_ray.storage import redis_open
from echo_ray.storage.interface import Directory
from echo_ray.storage.open import open_directory
from echo_ray.storage.redis_directory import RedisDirectory


def going_on(directory: Directory, id_: str = "s1", *, at: float = 0.0) -> Lease:
    """A session that goes on without viewers, owned for a while."""
    directory.create(new(id_, on_idle=OnIdle.CONTINUE, created_at=at))
    return directory.claim(id_, "r1", expect_epoch=0, ttl_s=1.5)


def ids(directory: Directory) -> list[str]:
    return [record.id for record in directory.orphans()]


# -- orphans


def test_a_session_whose_lease_ran_out_is_an_orphan_until_it_is_claimed(
    directory: Directory, clock: FakeClock
) -> None:
    going_on(directory, "b", at=2.0)
    going_on(directory, "a", at=3.0)
    going_on(directory, "c", at=1.0)
    assert ids(directory) == []
    clock.advance(1.5)
    assert list(directory.orphans()) == [directory.get(id_) for id_ in "cba"]
    assert ids(directory) == ["c", "b", "a"], "looking changes nothing"
    directory.claim("b", "r2", expect_epoch=1, ttl_s=2.0)
    assert ids(directory) == ["c", "a"]
    clock.advance(2.0)
    assert ids(directory) == ["c", "b", "a"]


def test_a_renewed_lease_is_looked_at_again_when_it_ends(
    directory: Directory, clock: FakeClock
) -> None:
    lease = going_on(directory)
    for _ in range(3):
        clock.advance(1.0)
        directory.renew([lease], ttl_s=1.5)
        clock.advance(1.0)
        directory.renew([lease], ttl_s=1.5)
        assert ids(directory) == []
    clock.advance(1.5)
    assert ids(directory) == ["s1"]
    directory.renew([lease], ttl_s=1.5)
    assert ids(directory) == [], "nobody claimed it, so its owner is back"


GIVEN_UP: dict[str, Callable[[Directory, Lease], object]] = {
    "released": lambda d, lease: d.release(lease, state="live"),
    "resumed": lambda d, _: (d.set_state("s1", state="paused"), d.set_state("s1", state="live")),
}


@pytest.mark.parametrize("how", GIVEN_UP)
def test_a_session_without_a_lease_is_an_orphan_at_once(directory: Directory, how: str) -> None:
    lease = going_on(directory)
    assert ids(directory) == []
    GIVEN_UP[how](directory, lease)
    assert ids(directory) == ["s1"]


def test_a_session_with_a_past_is_an_orphan_from_its_first_moment(directory: Directory) -> None:
    directory.create(new("fork", on_idle=OnIdle.CONTINUE, next_index=9, sealed=9))
    directory.create(new("claimed once", on_idle=OnIdle.CONTINUE, epoch=2))
    assert ids(directory) == ["fork", "claimed once"]


@pytest.mark.parametrize("loss", ["paused", "closed", "deleted", "released"])
def test_who_needs_no_owner_is_none(directory: Directory, clock: FakeClock, loss: str) -> None:
    lease = going_on(directory)
    clock.advance(2)
    assert ids(directory) == ["s1"]
    if loss == "deleted":
        directory.delete("s1")
    elif loss == "released":
        directory.release(lease, state="closed")
    else:
        directory.set_state("s1", state=loss)
    for _ in range(2):
        assert ids(directory) == []
        clock.advance(100)


def test_others_are_left_alone(directory: Directory, clock: FakeClock) -> None:
    directory.create(new("not begun", on_idle=OnIdle.CONTINUE))
    owned(directory, "pauses")
    directory.create(new("closes", on_idle=OnIdle.CLOSE))
    directory.claim("closes", "r1", expect_epoch=0, ttl_s=1.5)
    for _ in range(3):
        clock.advance(100)
        assert ids(directory) == []
    directory.claim("not begun", "r1", expect_epoch=0, ttl_s=1.5)
    assert ids(directory) == []
    clock.advance(1.5)
    assert ids(directory) == ["not begun"]


# -- the count


def test_open_sessions_are_counted(directory: Directory, clock: FakeClock) -> None:
    assert directory.count_open() == 0
    lease = going_on(directory)
    owned(directory, "s2")
    directory.create(new("s3", state=SessionState.PAUSED))
    directory.create(new("s4"))
    assert directory.count_open() == 4
    directory.set_state("s2", state="paused")
    directory.release(lease, state="closed")
    directory.delete("s4")
    assert directory.count_open() == 2
    directory.set_state("s2", state="closed")
    directory.delete("s1")
    for _ in range(2):
        clock.advance(100)
        directory.orphans()
        directory.list()
        assert directory.count_open() == 1


# -- clocks


@pytest.fixture
def two(section: StorageSection, clock: FakeClock) -> Iterator[tuple[Directory, Directory]]:
    """The directory as two machines see it whose clocks are hours apart; neither is the store's."""
    if section.backend != "redis":
        pytest.skip("only one machine's processes share it, and they have one clock")
    behind = open_directory(section, FakeClock(clock.wall() - 3600))
    ahead = open_directory(section, FakeClock(clock.wall() + 3600))
    for directory in (behind, ahead):
        assert isinstance(directory, RedisDirectory)
        go_by(directory, clock)
    yield behind, ahead
    behind.close()
    ahead.close()


def test_clocks_that_differ_see_the_same_leases(
    two: tuple[Directory, Directory], clock: FakeClock
) -> None:
    behind, ahead = two
    lease = going_on(behind)
    now = clock.wall()
    assert behind.get("s1").lease_until == now - 3600 + 1.5
    assert ahead.get("s1").lease_until == now + 3600 + 1.5
    assert list(ahead.list()) == [ahead.get("s1")]
    assert ids(ahead) == ids(behind) == []
    clock.advance(1.0)
    assert list(ahead.renew([lease], ttl_s=1.5)) == []
    assert behind.get("s1").lease_until == now - 3600 + 1.5
    clock.advance(1.5)
    assert ids(ahead) == ids(behind) == ["s1"]
    ahead.claim("s1", "r2", expect_epoch=1, ttl_s=1.5)
    assert ids(ahead) == ids(behind) == []
    assert behind.set_state("s1", state="live") == behind.get("s1")
    assert ahead.set_state("s1", state="paused").lease_until == 0.0


def test_clocks_that_differ_see_the_same_replicas(
    two: tuple[Directory, Directory], clock: FakeClock
) -> None:
    behind, ahead = two
    record = ReplicaRecord(id="r1", node_id="n", pid=1, address="a")
    behind.put_replica(record, ttl_s=2.0)
    assert [r.alive_until for r in behind.replicas()] == [clock.wall() - 3600 + 2.0]
    assert [r.alive_until for r in ahead.replicas()] == [clock.wall() + 3600 + 2.0]
    clock.advance(2.0)
    assert list(behind.replicas()) == list(ahead.replicas()) == []


# -- the index and the sessions disagree


@pytest.fixture
def crashing(section: StorageSection, clock: FakeClock) -> Iterator[RedisDirectory]:
    """A directory on Redis, whose index lies apart from the sessions."""
    if section.backend != "redis":
        pytest.skip("has no index that could disagree")
    directory = open_directory(section, clock)
    assert isinstance(directory, RedisDirectory)
    go_by(directory, clock)
    yield directory
    directory.close()


def test_a_name_without_a_session_goes_when_its_creator_is_surely_gone(
    crashing: RedisDirectory, clock: FakeClock
) -> None:
    crashing._link.run(crashing._open.name("ghost", clock.wall()))
    assert (ids(crashing), crashing.count_open()) == ([], 1)
    clock.advance(redis_open.LOOK_S)
    assert (ids(crashing), crashing.count_open()) == ([], 1)
    clock.advance(1)
    assert (ids(crashing), crashing.count_open()) == ([], 0)


def test_what_a_crash_left_undone_is_made_up_for_in_a_minute(
    crashing: RedisDirectory, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on(crashing, "resumed")
    going_on(crashing, "closed")
    crashing.set_state("resumed", state="paused")
    clock.advance(2)
    assert ids(crashing) == ["closed"]
    with monkeypatch.context() as dying:
        dying.setattr(crashing._open, "follow", lambda record, now: None)
        crashing.set_state("resumed", state="live")
        crashing.set_state("closed", state="closed")
    assert crashing.count_open() == 2, "one too many"
    clock.advance(redis_open.LOOK_S)
    assert ids(crashing) == ["resumed"]
    assert crashing.count_open() == 1


def test_a_change_between_the_look_and_the_new_time_wins(
    crashing: RedisDirectory, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = going_on(crashing)
    clock.advance(1.5)
    crashing.renew([lease], ttl_s=60)
    call = redis_open.MOVE.call

    def released_meanwhile(*args: object) -> object:
        monkeypatch.undo()
        clock.advance(0.5)
        crashing.release(lease, state="live")
        return call(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(redis_open.MOVE, "call", released_meanwhile)
    assert ids(crashing) == []
    assert ids(crashing) == ["s1"]


def test_sessions_without_a_name_get_one_from_whoever_lists_all(
    crashing: RedisDirectory, clock: FakeClock
) -> None:
    going_on(crashing)
    crashing.create(new("s2"))
    crashing.set_state("s2", state="closed")
    clock.advance(2)
    crashing._link.run(("DEL", crashing._keys.open))
    assert (ids(crashing), crashing.count_open()) == ([], 0)
    assert len(crashing.list()) == 2
    assert (ids(crashing), crashing.count_open()) == (["s1"], 1)
