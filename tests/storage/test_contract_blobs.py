"""What every snapshot store promises, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from echo_ray.config import StorageSection
from echo_ray.errors import CapacityError, InvalidRequestError, SnapshotNotFound
from echo_ray.storage.interface import SnapshotStore
from echo_ray.storage.local import LocalSnapshots
from echo_ray.storage.open import open_snapshots


def test_a_blob_comes_back(blobs: SnapshotStore, section: StorageSection) -> None:
    blobs.put("s1", "p8", bytes(range(256)))
    blobs.put("s1", "p16.v-1_x", b"")
    assert blobs.get("s1", "p8") == bytes(range(256))
    assert blobs.get("s1", "p16.v-1_x") == b""
    assert blobs.name == section.backend


def test_the_same_id_again_replaces(blobs: SnapshotStore) -> None:
    blobs.put("s1", "p8", b"old and long")
    blobs.put("s1", "p8", b"new")
    assert blobs.get("s1", "p8") == b"new"


def test_sessions_do_not_mix(blobs: SnapshotStore) -> None:
    blobs.put("s1", "p8", b"1")
    blobs.put("s2", "p8", b"2")
    blobs.delete("s1", "p8")
    assert blobs.get("s2", "p8") == b"2"
    with pytest.raises(SnapshotNotFound, match="p8"):
        blobs.get("s1", "p8")


def test_unknown_blobs(blobs: SnapshotStore) -> None:
    with pytest.raises(SnapshotNotFound, match="ghost"):
        blobs.get("ghost", "p8")
    blobs.delete("ghost", "p8")
    blobs.delete_session("ghost")


def test_a_session_is_deleted_whole(blobs: SnapshotStore) -> None:
    blobs.put("s1", "p8", b"1")
    blobs.put("s1", "p16", b"2")
    blobs.put("s10", "p8", b"3")
    blobs.delete_session("s1")
    for id_ in ("p8", "p16"):
        with pytest.raises(SnapshotNotFound):
            blobs.get("s1", id_)
    assert blobs.get("s10", "p8") == b"3"
    blobs.put("s1", "p8", b"again")
    assert blobs.get("s1", "p8") == b"again"


def test_a_blob_over_the_limit_is_refused(blobs: SnapshotStore, section: StorageSection) -> None:
    limit = section.snapshot_limit_bytes
    blobs.put("s1", "p8", bytes(limit))
    with pytest.raises(CapacityError, match=f"{limit + 1} bytes, the limit is {limit}"):
        blobs.put("s1", "p8", bytes(limit + 1))
    assert len(blobs.get("s1", "p8")) == limit


BAD_IDS = ["", ".", "..", "../s", "a/b", "/etc", "-x", ".half", "a\0", "a b", "é", "a\n", "x" * 129]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_ids_cannot_leave_the_folder(blobs: SnapshotStore, bad: str) -> None:
    blobs.put("s2", "p8", b"kept")
    for session_id, snapshot_id in ((bad, "p8"), ("s1", bad)):
        with pytest.raises(InvalidRequestError, match="not allowed"):
            blobs.put(session_id, snapshot_id, b"x")
        with pytest.raises(InvalidRequestError):
            blobs.get(session_id, snapshot_id)
        with pytest.raises(InvalidRequestError):
            blobs.delete(session_id, snapshot_id)
    with pytest.raises(InvalidRequestError):
        blobs.delete_session(bad)
    assert blobs.get("s2", "p8") == b"kept"


def test_what_is_made_durable_is_there(blobs: SnapshotStore) -> None:
    blobs.put("s1", "p8", b"1")
    blobs.put("s1", "p16", b"2")
    blobs.make_durable("s1", "p8")
    blobs.make_durable_soon("s1", "p16")
    *_, durable = blobs.tiers.values()
    assert durable.get("s1", "p8") == b"1"
    assert blobs.newest_durable("s2", ["p8"]) is None
    if len(blobs.tiers) == 1:
        assert durable is blobs
        assert blobs.newest_durable("s1", ["p16", "p8"]) is None
        assert (blobs.debt(), dict(blobs.counts())) == (0, {})
        blobs.make_durable("s1", "ghost")
    else:
        assert blobs.newest_durable("s1", ["ghost", "p8"]) == "p8"
        with pytest.raises(SnapshotNotFound, match="ghost"):
            blobs.make_durable("s1", "ghost")


def test_the_tiers_hold_all_that_the_store_holds(blobs: SnapshotStore) -> None:
    blobs.put("s1", "p8", b"1")
    listed = {b.snapshot_id for tier in blobs.tiers.values() for b in tier.list_blobs()}
    assert listed == {"p8"}


def test_a_store_may_be_closed_twice(blobs: SnapshotStore) -> None:
    blobs.put("s1", "p8", b"1")
    blobs.close()
    blobs.close()


def test_files_survive_reopening_and_leave_nothing_half_done(tmp_path: Path) -> None:
    section = StorageSection(path=str(tmp_path))
    open_snapshots(section).put("s1", "p8", b"kept")
    folder = tmp_path / "snapshots" / "s1"
    abandoned = folder / ".0123.half"
    abandoned.write_bytes(b"a killed writer's")
    assert open_snapshots(section).get("s1", "p8") == b"kept"
    assert [f.name for f in folder.iterdir()] == ["p8.snap"]


def test_a_living_writers_file_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalSnapshots(tmp_path)
    replace, seen = Path.replace, []

    def replace_after_another_opened(half: Path, target: Path) -> Path:
        LocalSnapshots(tmp_path)
        seen.append(half.exists())
        return replace(half, target)

    monkeypatch.setattr(Path, "replace", replace_after_another_opened)
    store.put("s1", "p8", b"whole")
    assert seen == [True]
    assert store.get("s1", "p8") == b"whole"
