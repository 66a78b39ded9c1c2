"""What the sweep of the snapshot stores deletes, and what it must never delete."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import FakeClock
from hypothesis import given
from hypothesis import strategies as st
from stored import new, owned, ref

from echo_ray.errors import StoreUnavailable
from echo_ray.session.records import ClipRef
from echo_ray.session.sweep import Grace, Named, StoredBlob, to_sweep
from echo_ray.storage.interface import SweptStore
from echo_ray.storage.local import LocalSnapshots
from echo_ray.storage.memory import MemoryDirectory, MemorySnapshots
from echo_ray.storage.sweep import sweep

GRACE = Grace(unnamed_s=100.0, unknown_s=1000.0)
NOW = 10_000.0


def blob(session: str, id_: str, age_s: float) -> StoredBlob:
    return StoredBlob(session_id=session, snapshot_id=id_, size_bytes=1, stored_at=NOW - age_s)


def gone(sessions: dict[str, Named], **tiers: list[StoredBlob]) -> dict[str, list[str]]:
    doomed = to_sweep(sessions, tiers, NOW, GRACE)
    return {tier: [b.snapshot_id for b in blobs] for tier, blobs in doomed.items() if blobs}


def test_what_nothing_names_goes_after_its_grace() -> None:
    sessions = {"s1": Named(snapshots=["p8"], clip="clip-1")}
    blobs = [blob("s1", id_, age) for id_, age in (("p8", 9e3), ("clip-1", 9e3), ("p4", 101))]
    assert gone(sessions, hot=[*blobs, blob("s1", "p9", 99)]) == {"hot": ["p4"]}


def test_a_young_copy_in_one_tier_keeps_the_other() -> None:
    sessions = {"s1": Named(snapshots=["p8"])}
    named = blob("s1", "p8", 9e3)
    tiers = {"hot": [named, blob("s1", "p4", 10)], "durable": [blob("s1", "p4", 5e3)]}
    assert gone(sessions, **tiers) == {}
    tiers["hot"][1] = blob("s1", "p4", 500)
    assert gone(sessions, **tiers) == {"hot": ["p4"], "durable": ["p4"]}


def test_the_last_good_one_stays_when_the_named_ones_are_lost() -> None:
    sessions = {"s1": Named(snapshots=["p8", "p12"], clip="clip-1")}
    durable = [blob("s1", "p3", 900), blob("s1", "p4", 800), blob("s1", "clip-1", 950)]
    assert gone(sessions, hot=[], durable=durable) == {"durable": ["p3"]}


def test_an_unknown_session_goes_as_a_whole_after_its_own_grace() -> None:
    sessions = {"s1": Named(snapshots=[])}
    old, clip = blob("s2", "p8", 5000), blob("s2", "clip-1", 999)
    assert gone(sessions, hot=[old], durable=[clip]) == {}
    clip = blob("s2", "clip-1", 1001)
    assert gone(sessions, hot=[old], durable=[clip]) == {"hot": ["p8"], "durable": ["clip-1"]}


def test_an_empty_directory_deletes_nothing() -> None:
    assert gone({}, durable=[blob("s1", "p8", 1e6)]) == {}


def test_a_clock_that_is_behind_deletes_nothing() -> None:
    assert gone({"s1": Named(snapshots=[])}, hot=[blob("s2", "p8", -5e6)]) == {}


names = st.sampled_from(["s1", "s2", "s3"])
points = st.sampled_from(["p0", "p4", "p8", "p12"])
ids = points | st.just("clip-1")
blob_lists = st.lists(st.builds(blob, names, ids, st.floats(-100, 3000)), max_size=12)
directories = st.dictionaries(
    names,
    st.builds(Named, snapshots=st.sets(points), clip=st.none() | st.just("clip-1")),
    max_size=3,
)


@given(directories, blob_lists, blob_lists)
def test_never_the_last_good_nor_a_named_nor_a_young_one(
    sessions: dict[str, Named], hot: list[StoredBlob], durable: list[StoredBlob]
) -> None:
    doomed = to_sweep(sessions, {"hot": hot, "durable": durable}, NOW, GRACE)
    for tier, before in (("hot", hot), ("durable", durable)):
        assert all(b in before for b in doomed[tier])
    for b in doomed["hot"] + doomed["durable"]:
        age_s = NOW - b.stored_at
        named = sessions.get(b.session_id)
        assert sessions
        if named is None:
            assert age_s > GRACE.unknown_s
        else:
            assert age_s > GRACE.unnamed_s
            assert b.snapshot_id not in named.snapshots
            assert b.snapshot_id != named.clip
    for session_id, named in sessions.items():
        before = {b.snapshot_id: b for b in hot + durable if b.session_id == session_id}
        deleted = {
            b.snapshot_id for b in doomed["hot"] + doomed["durable"] if b.session_id == session_id
        }
        snapshots = before.keys() - {named.clip}
        assert not snapshots or snapshots - deleted


@given(directories, blob_lists)
def test_sweeping_again_finds_nothing_more(
    sessions: dict[str, Named], blobs: list[StoredBlob]
) -> None:
    doomed = to_sweep(sessions, {"hot": blobs}, NOW, GRACE)["hot"]
    rest = [b for b in blobs if b not in doomed]
    assert to_sweep(sessions, {"hot": rest}, NOW, GRACE)["hot"] == []


def test_the_errand_deletes_orphans_and_keeps_the_rest() -> None:
    clock = FakeClock()
    directory = MemoryDirectory(clock)
    hot, durable = MemorySnapshots(clock=clock), MemorySnapshots(clock=clock)
    lease = owned(directory)
    directory.create(new("s2", clip=ClipRef(id="clip-1", sha256="", frames=9)))
    for session, id_ in (("s1", "p8"), ("s1", "p4"), ("s2", "clip-1"), ("never", "clip-9")):
        hot.put(session, id_, b"x")
        durable.put(session, id_, b"x")
    directory.add_snapshot(lease, ref("p8", 8))
    directory.pin_snapshot("s1", "p8")
    tiers: dict[str, SweptStore] = {"hot": hot, "durable": durable}
    clock.advance(2000)
    hot.put("s1", "p12", b"young")
    doomed = sweep(directory, tiers, clock.wall(), GRACE)
    assert [b.snapshot_id for b in doomed["durable"]] == ["p4", "clip-9"]
    assert {b.snapshot_id for b in hot.list_blobs()} == {"p8", "clip-1", "p12"}
    assert {b.snapshot_id for b in durable.list_blobs()} == {"p8", "clip-1"}
    assert sweep(directory, tiers, clock.wall(), GRACE) == {"hot": [], "durable": []}


def test_a_session_that_is_deleted_during_the_sweep_waits_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock()
    directory, store = MemoryDirectory(clock), MemorySnapshots(clock=clock)
    directory.create(new("s1"))
    directory.create(new("s2"))
    store.put("s1", "p8", b"x")
    records = directory.list()
    directory.delete("s1")
    monkeypatch.setattr(directory, "list", lambda: records)
    assert sweep(directory, {"local": store}, clock.wall() + 500, GRACE) == {"local": []}


def test_a_store_that_cannot_be_listed_stops_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    directory = MemoryDirectory(clock)
    directory.create(new())
    hot, durable = MemorySnapshots(clock=clock), MemorySnapshots(clock=clock)
    hot.put("never", "p8", b"x")

    def down(session_id: str | None = None) -> None:
        raise StoreUnavailable("down")

    monkeypatch.setattr(durable, "list_blobs", down)
    with pytest.raises(StoreUnavailable):
        sweep(directory, {"hot": hot, "durable": durable}, clock.wall() + 1e6, GRACE)
    assert hot.get("never", "p8") == b"x"


def test_files_are_listed_by_session(tmp_path: Path) -> None:
    store = LocalSnapshots(tmp_path)
    store.put("s1", "p8", b"12")
    store.put("s2", "p8", b"1")
    (tmp_path / "s1" / ".p9.snap").write_bytes(b"not ours")
    (tmp_path / "theirs.txt").write_text("x")
    assert {(b.session_id, b.snapshot_id, b.size_bytes) for b in store.list_blobs()} == {
        ("s1", "p8", 2),
        ("s2", "p8", 1),
    }
    (listed,) = store.list_blobs("s1")
    assert listed.stored_at == (tmp_path / "s1" / "p8.snap").stat().st_mtime
