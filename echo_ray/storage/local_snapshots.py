"""Snapshot blobs as files: `<folder>/<session>/<snapshot id>.snap`, whole or not there."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echo_ray.errors import InvalidRequestError
from echo_ray.session import control_log
from echo_ray.session.sweep import StoredBlob
from echo_ray.storage.blob_names import check_ids, check_size
from echo_ray.storage.one_tier import OneTier
from echo_ray.storage.sqlite_file import os_meaning

_HALF = ".half"
_WHOLE = ".snap"


class LocalSnapshots(OneTier):
    """A `SnapshotStore` in a folder, safe for any number of threads and processes.

    A blob is written under a temporary name, forced to disk and renamed. Whoever opens the folder
    deletes what killed writers left behind: a living one holds a lock on its file.
    """

    name = "local"

    def __init__(self, path: Path | str, limit_bytes: int = 2**30) -> None:
        self._folder = Path(path)
        self._limit_bytes = limit_bytes
        with _translated(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for half in self._folder.glob(f"*/*{_HALF}"):
                _delete_abandoned(half)

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        target = self._file(session_id, snapshot_id)
        check_size(snapshot_id, len(blob), self._limit_bytes)
        with _translated(target):
            if not target.parent.exists():
                target.parent.mkdir(exist_ok=True)
                _force(self._folder)
            _write(target, blob)
            _force(target.parent)

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        file = self._file(session_id, snapshot_id)
        with _translated(file):
            try:
                return file.read_bytes()
            except FileNotFoundError as error:
                raise control_log.snapshot_not_found(session_id, snapshot_id) from error

    def delete(self, session_id: str, snapshot_id: str) -> None:
        file = self._file(session_id, snapshot_id)
        with _translated(file):
            file.unlink(missing_ok=True)

    def delete_session(self, session_id: str) -> None:
        check_ids(session_id)
        folder = self._folder / session_id
        with _translated(folder):
            try:
                shutil.rmtree(folder)
            except FileNotFoundError:
                return

    def list_blobs(self, session_id: str | None = None) -> Iterator[StoredBlob]:
        if session_id is not None:
            check_ids(session_id)
        with _translated(self._folder):
            for file in self._folder.glob(f"{session_id or '*'}/*{_WHOLE}"):
                blob = _as_listed(file)
                if blob is not None:
                    yield blob

    def _file(self, session_id: str, snapshot_id: str) -> Path:
        check_ids(session_id, snapshot_id)
        return self._folder / session_id / f"{snapshot_id}{_WHOLE}"


def _as_listed(file: Path) -> StoredBlob | None:
    """The blob in that file; None for one that was deleted since or is not ours."""
    session_id, snapshot_id = file.parent.name, file.name.removesuffix(_WHOLE)
    try:
        check_ids(session_id, snapshot_id)
        stat = file.stat()
    except (FileNotFoundError, InvalidRequestError):
        return None
    return StoredBlob(
        session_id=session_id,
        snapshot_id=snapshot_id,
        size_bytes=stat.st_size,
        stored_at=stat.st_mtime,
    )


def _write(target: Path, blob: bytes) -> None:
    half = target.with_name(f".{uuid.uuid4().hex}{_HALF}")
    fd = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        rest = memoryview(blob)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
        half.replace(target)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _force(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _delete_abandoned(half: Path) -> None:
    try:
        fd = os.open(half, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        half.unlink(missing_ok=True)
    finally:
        os.close(fd)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise os_meaning(path, error) from error
