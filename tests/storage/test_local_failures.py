"""A damaged, foreign, locked or absent database is named, and nothing else is disturbed."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import FakeClock
from stored import new, owned, produce

from echo_ray.config import StorageSection
from echo_ray.errors import ConfigError, EchoError, Fenced, StoreCorrupt, StoreUnavailable
from echo_ray.session.records import Lease, ReplicaRecord
from echo_ray.storage.local import LocalDirectory, LocalSnapshots
from echo_ray.storage.open import open_directory, open_snapshots
from echo_ray.storage.sqlite_file import SCHEMA_VERSION

not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with a session of some length in it, closed."""
    path = tmp_path / "d.sqlite3"
    directory = LocalDirectory(path, FakeClock())
    lease = owned(directory)
    for n in range(200):
        directory.append_control("s1", f"e{n}", "a prompt of some length " * 20)
    produce(directory, lease, 0, 1, 2)
    directory.create(new("s2"))
    directory.close()
    return path


def change(path: Path, sql: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(sql)
    connection.close()


def overwrite(path: Path, start: int, stop: int) -> None:
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(b"\xa5" * (stop - start))


def opened(path: Path) -> LocalDirectory:
    return LocalDirectory(path, FakeClock(), busy_timeout_s=0.2, beat_timeout_s=0.2)


def cut(path: Path) -> None:
    with path.open("r+b") as raw:
        raw.truncate(path.stat().st_size // 2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "pages": lambda p: overwrite(p, 3 * 4096, p.stat().st_size - 4096),
    "header": lambda p: overwrite(p, 0, 100),
    "first page": lambda p: overwrite(p, 100, 4096),
    "cut": cut,
    "text": lambda p: p.write_text("not a database, but long enough to look at\n" * 200),
    "short text": lambda p: p.write_text("x"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_named_with_a_remedy(
    file: Path, damage: Callable[[Path], object]
) -> None:
    damage(file)
    before = file.read_bytes()
    with pytest.raises(StoreCorrupt, match="backup") as caught:
        opened(file)
    assert str(file) in caught.value.message
    assert file.read_bytes() == before


def test_damage_that_comes_later_is_named_too(file: Path) -> None:
    directory = opened(file)
    overwrite(file, 4096, file.stat().st_size)
    with pytest.raises(StoreCorrupt, match=r"d\.sqlite3"):
        directory.controls("s1")
    with pytest.raises(StoreCorrupt):
        directory.append_control("s1", "new", "p")
    directory.close()


def test_a_newer_schema_is_refused(file: Path) -> None:
    change(file, f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(StoreCorrupt, match=f"schema version {SCHEMA_VERSION + 1}"):
        opened(file)


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.sqlite3"
    change(path, "CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreCorrupt, match="another program"):
        opened(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("sql", "read"),
    [
        ("UPDATE sessions SET body = '{' WHERE id = 's1'", lambda d: d.get("s1")),
        ("UPDATE sessions SET body = '{}' WHERE id = 's1'", lambda d: d.list()),
        (
            "UPDATE sessions SET body = json_set(body, '$.clip', json('[]')) WHERE id = 's1'",
            lambda d: d.get("s1"),
        ),
        (
            "UPDATE sessions SET body = json_set(body, '$.clip', 'clip-1') WHERE id = 's1'",
            lambda d: d.list(),
        ),
        ("UPDATE sessions SET state = 'asleep' WHERE id = 's1'", lambda d: d.get("s1")),
        ("UPDATE sessions SET epoch = 'x' WHERE id = 's1'", lambda d: d.get("s1")),
        ("UPDATE sessions SET id = CAST(X'FF' AS TEXT) WHERE id = 's1'", lambda d: d.list()),
        ("UPDATE controls SET chunk = 'x'", lambda d: d.controls("s1")),
        ("INSERT INTO snapshots VALUES (1, 1, 'p', 8, 0, '{}')", lambda d: d.snapshots("s1")),
        ("INSERT INTO replicas VALUES ('r', 9e99, '[]')", lambda d: d.replicas()),
    ],
)
def test_a_row_that_makes_no_sense_is_damage(
    file: Path, sql: str, read: Callable[[LocalDirectory], object]
) -> None:
    change(file, sql)
    directory = opened(file)
    with pytest.raises(StoreCorrupt, match="backup"):
        read(directory)
    assert directory.get("s2").id == "s2"
    directory.close()


def test_a_session_of_a_release_without_clips_has_none(file: Path) -> None:
    change(file, "UPDATE sessions SET body = json_remove(body, '$.clip')")
    directory = opened(file)
    assert directory.get("s1").clip is None
    assert directory.get("s1").prompt == "a red ball"
    directory.close()


def test_fields_of_a_newer_replica_are_left_alone(file: Path) -> None:
    """While a new release is rolled out, routers of the old one read what its replicas say."""
    directory = opened(file)
    directory.put_replica(ReplicaRecord(id="r1", node_id="n", pid=1, address="h:1"), ttl_s=60)
    directory.close()
    change(file, "UPDATE replicas SET body = json_set(body, '$.colour', 'red')")
    directory = opened(file)
    assert [r.id for r in directory.replicas()] == ["r1"]
    directory.close()


def test_a_writer_that_holds_the_lock_too_long_stops_writes_only(file: Path) -> None:
    directory = opened(file)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    lease = Lease("s1", "r1", 1)
    for write in (
        lambda: directory.append_control("s1", "late", "p"),
        lambda: directory.renew([lease], ttl_s=1),
    ):
        with pytest.raises(StoreUnavailable, match="locked by another writer") as caught:
            write()
        assert type(caught.value) is StoreUnavailable
        assert caught.value.retry_after_s == 1
    assert directory.get("s1").next_index == 3
    other.execute("ROLLBACK")
    other.close()
    assert directory.append_control("s1", "late", "p").chunk == 3
    directory.close()


def test_a_locked_file_cannot_be_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite3"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreUnavailable, match="locked"):
        opened(path)
    other.close()
    opened(path).close()


def test_a_folder_that_cannot_be_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.sqlite3").mkdir()
    for path in (tmp_path / "file" / "d.sqlite3", tmp_path / "folder.sqlite3"):
        with pytest.raises(StoreUnavailable, match=path.name) as caught:
            opened(path)
        assert type(caught.value) is StoreUnavailable
    with pytest.raises(StoreUnavailable, match="file"):
        LocalSnapshots(tmp_path / "file")


@not_root
def test_a_folder_without_permission_is_unavailable(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(StoreUnavailable):
        opened(locked / "d.sqlite3")
    with pytest.raises(StoreUnavailable, match="Permission denied"):
        LocalSnapshots(locked / "snapshots")


def test_a_snapshot_folder_that_is_in_the_way_is_unavailable(tmp_path: Path) -> None:
    store = LocalSnapshots(tmp_path)
    (tmp_path / "s1").write_text("in the way")
    (tmp_path / "s2" / "p8.snap").mkdir(parents=True)
    for call in (
        lambda: store.put("s1", "p8", b"x"),
        lambda: store.get("s1", "p8"),
        lambda: store.get("s2", "p8"),
        lambda: store.put("s2", "p8", b"x"),
        lambda: store.delete("s2", "p8"),
        lambda: store.delete_session("s1"),
    ):
        with pytest.raises(StoreUnavailable):
            call()
    assert [f.name for f in (tmp_path / "s2").iterdir()] == ["p8.snap"]


def test_a_snapshot_folder_that_vanished_is_unavailable(tmp_path: Path) -> None:
    store = LocalSnapshots(tmp_path / "snapshots")
    shutil.rmtree(tmp_path / "snapshots")
    with pytest.raises(StoreUnavailable):
        store.put("s1", "p8", b"x")


def test_a_closed_directory_is_unavailable(file: Path) -> None:
    directory = opened(file)
    directory.close()
    calls: list[Callable[[], object]] = [
        lambda: directory.get("s1"),
        lambda: directory.append_control("s1", "e", "p"),
        lambda: directory.renew([], ttl_s=1),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="closed"):
            call()


def test_text_without_utf8_is_refused_in_any_place(file: Path) -> None:
    directory = opened(file)
    with pytest.raises(EchoError, match="surrogate"):
        directory.get("\ud800")
    assert directory.get("s1").id == "s1"
    directory.close()


def test_what_must_last_waits_for_the_disk_without_the_write_lock(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = opened(file)
    synced: list[Path] = []
    sync = os.fsync

    def note(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        other = sqlite3.connect(file, timeout=0, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        other.close()
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    lease = directory.claim("s1", "a", expect_epoch=directory.get("s1").epoch, ttl_s=5)
    produce(directory, lease, directory.get("s1").next_index)
    log = file.with_name(file.name + "-wal")
    assert synced == [log] * 3
    assert directory.renew([lease], ttl_s=5) == []
    assert synced == [log] * 3
    directory.close()


def test_a_disk_that_fails_after_the_change_is_told_and_the_change_stands(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = opened(file)
    epoch = directory.get("s1").epoch

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(StoreUnavailable, match="the disk is broken"):
            directory.claim("s1", "a", expect_epoch=epoch, ttl_s=5)
    with pytest.raises(Fenced):
        directory.claim("s1", "b", expect_epoch=epoch, ttl_s=5)
    directory.close()


def test_an_unknown_backend_is_a_configuration_error(tmp_path: Path) -> None:
    section = StorageSection(path=str(tmp_path))
    object.__setattr__(section, "backend", "tape")
    with pytest.raises(ConfigError, match="tape"):
        open_directory(section, FakeClock())
    with pytest.raises(ConfigError, match="tape"):
        open_snapshots(section)
