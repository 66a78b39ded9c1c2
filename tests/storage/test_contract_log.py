"""What every session directory promises of chunks, events, snapshots and replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import FakeClock
from stored import new, owned, produce, ref

from echo_ray.errors import (
    ChunkSealed,
    ConflictError,
    EventIdConflict,
    InvalidRequestError,
    SessionClosed,
    SnapshotNotFound,
)
from echo_ray.session.control_log import DIGESTS_KEPT
from echo_ray.session.records import (
    ReplicaRecord,
    SessionState,
)
from echo_ray.storage.interface import Directory

# -- seals and commits


def test_a_chunk_is_sealed_then_committed(directory: Directory) -> None:
    lease = owned(directory)
    directory.seal(lease, 0)
    record = directory.get("s1")
    assert (record.next_index, record.sealed, record.fingerprint) == (0, 1, None)
    directory.commit(lease, 0, "d0", "fp")
    record = directory.get("s1")
    assert (record.next_index, record.sealed, record.fingerprint) == (1, 1, "fp")
    assert directory.digests("s1", 0, 1) == {0: "d0"}


def test_only_the_next_chunk_can_be_sealed_or_committed(directory: Directory) -> None:
    lease = owned(directory)
    produce(directory, lease, 0, 1)
    for index in (0, 1, 3, -1, 2**70):
        with pytest.raises(ConflictError, match="next chunk is 2"):
            directory.seal(lease, index)
        with pytest.raises(ConflictError, match="next chunk is 2"):
            directory.commit(lease, index, "x", "fp")
    with pytest.raises(ConflictError, match="not sealed"):
        directory.commit(lease, 2, "x", "fp")
    assert directory.digests("s1", 0, 9) == {0: "digest-0", 1: "digest-1"}
    assert directory.get("s1").next_index == 2


def test_sealing_again_after_a_claim_gives_the_same_entries(directory: Directory) -> None:
    lease = owned(directory)
    first = directory.append_control("s1", "e1", "blue")
    second = directory.append_control("s1", "e2", "green")
    assert list(directory.seal(lease, 0)) == [first, second]
    late = directory.append_control("s1", "e3", "red")
    assert late.chunk == 1
    heir = directory.claim("s1", "r2", expect_epoch=1, ttl_s=1)
    assert list(directory.seal(heir, 0)) == [first, second]
    directory.commit(heir, 0, "d", "fp")
    assert list(directory.seal(heir, 1)) == [late]


def test_digests_are_a_range(directory: Directory) -> None:
    lease = owned(directory)
    produce(directory, lease, 0, 1, 2, 3)
    assert directory.digests("s1", 1, 3) == {1: "digest-1", 2: "digest-2"}
    assert directory.digests("s1", 3, 1) == {}
    assert len(directory.digests("s1", -(2**70), 2**70)) == 4


def test_old_digests_are_pruned(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DIGESTS_KEPT >= 4096
    monkeypatch.setattr("echo_ray.storage.local.DIGESTS_KEPT", 8)
    monkeypatch.setattr("echo_ray.storage.memory.DIGESTS_KEPT", 8)
    monkeypatch.setattr("echo_ray.storage.redis_directory.DIGESTS_KEPT", 8)
    directory.create(new(next_index=10, sealed=10))
    lease = directory.claim("s1", "r1", expect_epoch=0, ttl_s=1)
    produce(directory, lease, *range(10, 21))
    assert sorted(directory.digests("s1", 0, 2**40)) == list(range(13, 21))


# -- the control log


def test_an_event_is_pinned_to_the_first_open_chunk(directory: Directory) -> None:
    lease = owned(directory)
    assert directory.append_control("s1", "e1", "blue").chunk == 0
    produce(directory, lease, 0)
    assert directory.append_control("s1", "e2", "blue").chunk == 1
    directory.seal(lease, 1)
    assert directory.append_control("s1", "e3", "blue").chunk == 2


def test_controls_come_by_chunk_then_in_order(directory: Directory) -> None:
    owned(directory)
    for event_id, at in (("z", 5), ("y", None), ("x", 5), ("w", 2), ("v", None)):
        directory.append_control("s1", event_id, "p", at_chunk=at)
    assert [(e.event_id, e.chunk) for e in directory.controls("s1")] == [
        ("y", 0),
        ("v", 0),
        ("w", 2),
        ("z", 5),
        ("x", 5),
    ]
    assert [e.event_id for e in directory.controls("s1", 3)] == ["z", "x"]
    assert list(directory.controls("s1", 2**70)) == []


def test_an_event_sent_twice_is_accepted_once(directory: Directory) -> None:
    lease = owned(directory)
    first = directory.append_control("s1", "e1", "blue")
    pinned = directory.append_control("s1", "e2", "green", at_chunk=1)
    produce(directory, lease, 0, 1)
    assert directory.append_control("s1", "e1", "blue") == first
    assert directory.append_control("s1", "e2", "green", at_chunk=1) == pinned
    directory.set_state("s1", state="closed")
    assert directory.append_control("s1", "e1", "blue") == first
    assert list(directory.controls("s1")) == [first, pinned]


@pytest.mark.parametrize(("prompt", "at"), [("red", None), ("blue", 0), ("blue", 4)])
def test_an_event_id_with_another_body_is_a_conflict(
    directory: Directory, prompt: str, at: int | None
) -> None:
    owned(directory)
    first = directory.append_control("s1", "e1", "blue")
    with pytest.raises(EventIdConflict, match="e1"):
        directory.append_control("s1", "e1", prompt, at_chunk=at)
    assert list(directory.controls("s1")) == [first]


def test_event_ids_are_of_one_session(directory: Directory) -> None:
    owned(directory, "a")
    owned(directory, "b")
    directory.append_control("a", "e1", "blue")
    assert directory.append_control("b", "e1", "red").prompt == "red"


@pytest.mark.parametrize("at", [1, 0, -1, -(2**70)])
def test_a_chunk_in_the_past_is_refused(directory: Directory, at: int) -> None:
    lease = owned(directory)
    produce(directory, lease, 0)
    directory.seal(lease, 1)
    with pytest.raises(ChunkSealed, match="first chunk still open is 2"):
        directory.append_control("s1", "e1", "blue", at_chunk=at)
    assert directory.append_control("s1", "e1", "blue", at_chunk=2).chunk == 2


def test_events_that_cannot_be_kept_are_refused(directory: Directory) -> None:
    owned(directory)
    for event_id, prompt, at in (("\ud800", "p", None), ("e", "\ud800", None), ("e", "p", 2**53)):
        with pytest.raises(InvalidRequestError):
            directory.append_control("s1", event_id, prompt, at_chunk=at)
    assert list(directory.controls("s1")) == []


def test_a_closed_session_takes_no_events(directory: Directory) -> None:
    directory.create(new(state=SessionState.PAUSED))
    assert directory.append_control("s1", "e0", "blue").chunk == 0
    directory.set_state("s1", state="closed")
    with pytest.raises(SessionClosed):
        directory.append_control("s1", "e1", "blue")


# -- snapshot references


def test_snapshots_are_newest_point_first(directory: Directory) -> None:
    lease = owned(directory)
    for id_, chunk in (("a", 8), ("b", 24), ("c", 16), ("d", 24)):
        directory.add_snapshot(lease, ref(id_, chunk))
    assert [r.id for r in directory.snapshots("s1")] == ["d", "b", "c", "a"]
    directory.add_snapshot(lease, ref("b", 24, size_bytes=5))
    assert [(r.id, r.size_bytes) for r in directory.snapshots("s1")][:2] == [("b", 5), ("d", 21)]
    assert directory.snapshots("s1")[3] == ref("a", 8)


def test_a_pinned_snapshot_stays(directory: Directory) -> None:
    lease = owned(directory)
    directory.add_snapshot(lease, ref())
    assert directory.pin_snapshot("s1", "p8") == ref(pinned=True)
    assert directory.pin_snapshot("s1", "p8") == ref(pinned=True)
    directory.add_snapshot(lease, ref())
    with pytest.raises(ConflictError, match="pinned"):
        directory.drop_snapshot("s1", "p8")
    assert list(directory.snapshots("s1")) == [ref(pinned=True)]


def test_a_dropped_snapshot_is_gone(directory: Directory) -> None:
    lease = owned(directory)
    directory.add_snapshot(lease, ref())
    directory.drop_snapshot("s1", "p8")
    directory.drop_snapshot("s1", "p8")
    assert list(directory.snapshots("s1")) == []
    with pytest.raises(SnapshotNotFound, match="p8"):
        directory.pin_snapshot("s1", "p8")


def test_a_snapshot_of_another_session_is_refused(directory: Directory) -> None:
    lease = owned(directory)
    owned(directory, "s2")
    with pytest.raises(InvalidRequestError, match="s2"):
        directory.add_snapshot(lease, ref(session="s2"))
    assert [*directory.snapshots("s1"), *directory.snapshots("s2")] == []


# -- replicas


def replica(id_: str, **changes: object) -> ReplicaRecord:
    made = ReplicaRecord(id=id_, node_id="n", pid=4, address="127.0.0.1:1", sessions=("a", "b"))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_replicas_live_as_long_as_they_say(directory: Directory, clock: FakeClock) -> None:
    directory.put_replica(replica("b"), ttl_s=1.0)
    directory.put_replica(replica("a", chunk_seconds=0.25), ttl_s=2.0)
    assert list(directory.replicas()) == [
        replica("a", chunk_seconds=0.25, alive_until=clock.wall() + 2.0),
        replica("b", alive_until=clock.wall() + 1.0),
    ]
    clock.advance(1.0)
    assert [r.id for r in directory.replicas()] == ["a"]
    directory.put_replica(replica("b", state="draining"), ttl_s=5.0)
    clock.advance(2.0)
    assert [(r.id, r.state) for r in directory.replicas()] == [("b", "draining")]


def test_a_removed_replica_is_gone(directory: Directory) -> None:
    directory.put_replica(replica("a"), ttl_s=9)
    directory.remove_replica("a")
    directory.remove_replica("a")
    assert list(directory.replicas()) == []


def test_those_that_drain_are_listed_while_they_do(directory: Directory, clock: FakeClock) -> None:
    assert list(directory.draining()) == []
    for name in "cab":
        directory.put_replica(replica(name), ttl_s=9)
    for name in "cb":
        directory.put_replica(replica(name, state="draining"), ttl_s=9)
    assert list(directory.draining()) == [
        replica(name, state="draining", alive_until=clock.wall() + 9) for name in "bc"
    ]
    directory.put_replica(replica("c", state="drained"), ttl_s=9)
    assert [r.id for r in directory.draining()] == ["b"]
    directory.put_replica(replica("b", state="draining"), ttl_s=1)
    clock.advance(1.0)
    assert list(directory.draining()) == []
    directory.put_replica(replica("b", state="draining"), ttl_s=1)
    assert [r.id for r in directory.draining()] == ["b"]
    directory.remove_replica("b")
    assert list(directory.draining()) == []


def test_some_replicas_are_chosen_at_random_and_those_with_a_name_are_there(
    directory: Directory,
) -> None:
    for name in "edcba":
        directory.put_replica(replica(name), ttl_s=9)
    everybody = list(directory.replicas())
    assert list(directory.replicas(among=5)) == list(directory.replicas(among=99)) == everybody
    seen = set()
    for _ in range(200):
        (one,) = directory.replicas(among=1)
        seen.add(one.id)
        two = [r.id for r in directory.replicas(among=1, named=["d"])]
        assert two == sorted(two)
        assert "d" in two
        assert len(two) <= 2
        assert len(directory.replicas(among=3)) == 3
    assert seen == set("abcde")
    assert list(directory.replicas(named=["d"])) == everybody


def test_only_the_living_are_chosen_or_found_by_name(
    directory: Directory, clock: FakeClock
) -> None:
    assert list(directory.replicas(among=2, named=["a"])) == []
    directory.put_replica(replica("a"), ttl_s=1)
    directory.put_replica(replica("b"), ttl_s=9)
    directory.put_replica(replica("c"), ttl_s=9)
    clock.advance(1.0)
    directory.remove_replica("c")
    found = {r.id for _ in range(50) for r in directory.replicas(among=1, named=["a", "c", "?"])}
    assert found == {"b"}
    assert [r.id for r in directory.replicas(among=2)] == ["b"]


@pytest.mark.parametrize("among", [0, -1])
def test_a_sample_of_nobody_is_refused(directory: Directory, among: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"among is {among}; ask for at least 1"):
        directory.replicas(among=among)


def test_closing_twice_is_allowed(directory: Directory) -> None:
    directory.close()
    directory.close()
