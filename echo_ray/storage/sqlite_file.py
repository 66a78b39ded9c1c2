"""One SQLite database that several processes share: opening, transactions, and what failures mean.

Knows nothing about sessions; `local.py` says what is in the tables.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from echo_ray.errors import (
    EchoError,
    InvalidRequestError,
    StoreCorrupt,
    StoreFull,
    StoreUnavailable,
)

APPLICATION_ID = 0x4563686F
SCHEMA_VERSION = 1
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
# Reading every page at the start is worth its time only while it takes well under a second.
_CHECKED_BYTES = 64 * 2**20
_SMALLEST_BYTES = 512
_PROBE_BYTES = 64 * 1024
_OPEN_PAUSE_S = 0.02
_RETRY_OPEN = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_REMEDY = "stop the service, put a backup in its place or move the file away to begin empty"


class RowDamaged(ValueError):
    """A row that was read cannot have been written by this release."""


class Channel:
    """One connection and the lock that keeps threads apart on it.

    A durable channel waits for the disk after each transaction, and does so when it no longer holds
    the database's write lock: a process that is stopped while it waits stops nobody else.
    """

    def __init__(self, path: Path, *, durable: bool, busy_timeout_s: float) -> None:
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.Lock()
        self._durable = durable
        with _translated(path):
            self._connection = _connect(path, busy_timeout_s)
            try:
                # FULL would wait for the disk too, but with the write lock in hand.
                self._execute("PRAGMA synchronous=NORMAL")
                # A checkpoint waits for the disk. The quick channel leaves it to the durable one
                # unless that has been idle for long.
                self._execute(f"PRAGMA wal_autocheckpoint={1000 if durable else 8000}")
            except BaseException:
                self._connection.close()
                raise

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the database's write lock from its first moment.

        If the disk fails after the transaction, the error is raised and the change stands.
        """
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection
        if self._durable:
            with _translated(self.path):
                sync_log(self.path)

    def read(self) -> AbstractContextManager[sqlite3.Connection]:
        """A transaction that sees one state of the database and waits for no writer."""
        return self._transaction("BEGIN")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if not self._lock.acquire(timeout=self._busy_timeout_s):
            raise StoreUnavailable(
                f"{self.path}: no turn within {self._busy_timeout_s} s; try again", retry_after_s=1
            )
        try:
            with _translated(self.path):
                self._roll_back()
                self._execute(begin)
                try:
                    yield self._connection
                    self._execute("COMMIT")
                except BaseException:
                    self._roll_back()
                    raise
        finally:
            self._lock.release()

    def _roll_back(self) -> None:
        # SQLite ends a transaction by itself on some failures, a full disk among them.
        if self._connection.in_transaction:
            self._execute("ROLLBACK")

    def _execute(self, sql: str) -> None:
        self._connection.execute(sql).close()


def sync_log(path: Path) -> None:
    """Wait until everything that was committed to the database at `path` is on the disk.

    Commits rest in the write-ahead log; what was moved from there is on the disk already. The log
    carries none of SQLite's file locks, so opening and closing it here drops none.
    """
    try:
        log = os.open(path.with_name(path.name + "-wal"), os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(log)
    finally:
        os.close(log)


def prepare(path: Path, schema: str, *, busy_timeout_s: float) -> None:
    """Make sure that a sound database of this schema is at `path`, creating it if there is none.

    Raises `StoreCorrupt`, `StoreFull`, `StoreUnavailable`.
    """
    with _translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + busy_timeout_s
        while not _prepared(path, schema, busy_timeout_s, final=time.monotonic() >= deadline):
            time.sleep(_OPEN_PAUSE_S)


def _prepared(path: Path, schema: str, busy_timeout_s: float, *, final: bool) -> bool:
    """Whether it worked; no only if another process was opening it too and `final` is not set.

    Switching a new file to WAL answers "busy" at once, without the usual waiting.
    """
    try:
        _prepare(path, schema, busy_timeout_s)
    except sqlite3.OperationalError as error:
        if final or _code(error) not in _RETRY_OPEN:
            raise
        return False
    return True


def _prepare(path: Path, schema: str, busy_timeout_s: float) -> None:
    # SQLite would take so short a file for an empty one and write over it. Only its size is looked
    # at: opening and closing it would drop the locks that this process holds on it elsewhere.
    if path.exists() and 0 < path.stat().st_size < _SMALLEST_BYTES:
        raise StoreCorrupt(f"{path}: not a SQLite database; {_REMEDY}")
    connection = _connect(path, busy_timeout_s)
    try:
        # One transaction: a database that somebody else creates is seen before that or after.
        connection.execute("BEGIN").close()
        version = _check_ours(connection, path)
        connection.execute("COMMIT").close()
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise StoreUnavailable(
                f"{path}: this file system cannot share a database (journal mode {mode!r}, needs "
                "wal); use a local disk"
            )
        if version == 0:
            _create(connection, path, schema)
        _check_sound(connection, path)
    finally:
        connection.close()


def _create(connection: sqlite3.Connection, path: Path, schema: str) -> None:
    connection.execute("PRAGMA synchronous=FULL").close()
    connection.execute("BEGIN IMMEDIATE").close()
    # Another process may have been first.
    if _check_ours(connection, path) == 0:
        for statement in schema.split(";"):
            connection.execute(statement).close()
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}").close()
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}").close()
    connection.execute("COMMIT").close()


def _connect(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA foreign_keys=ON").close()
    except BaseException:
        connection.close()
        raise
    return connection


def _check_ours(connection: sqlite3.Connection, path: Path) -> int:
    """The schema version, 0 for an empty file. Raises `StoreCorrupt` for anybody else's."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (version, application, tables) == (0, 0, 0):
        return 0
    if application != APPLICATION_ID:
        raise StoreCorrupt(
            f"{path}: a SQLite database of another program; name another storage.path"
        )
    if version != SCHEMA_VERSION:
        raise StoreCorrupt(
            f"{path}: schema version {version}, this release reads {SCHEMA_VERSION}; use the "
            "release that wrote it or name another storage.path"
        )
    return int(version)


def _check_sound(connection: sqlite3.Connection, path: Path) -> None:
    if path.stat().st_size <= _CHECKED_BYTES:
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            first = str(verdict).splitlines()[-1]
            raise StoreCorrupt(f"{path}: the database is damaged ({first}); {_REMEDY}")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _meaning(path, error) from error
    except RowDamaged as error:
        raise StoreCorrupt(f"{path}: the database is damaged ({error}); {_REMEDY}") from error
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"text with half a surrogate pair at position {error.start}; send valid Unicode"
        ) from error
    except OSError as error:
        raise os_meaning(path, error) from error


def os_meaning(path: Path, error: OSError) -> EchoError:
    """What a failed file operation means to the caller."""
    if error.errno in FULL_ERRNOS:
        return full(path, str(error.strerror))
    return StoreUnavailable(f"{path}: {error.strerror or error}; see to the disk, then try again")


def full(path: Path, detail: str) -> StoreFull:
    """The answer when there is no room."""
    return StoreFull(f"{path}: no room to write ({detail}); free disk space, then try again")


def _meaning(path: Path, error: sqlite3.Error) -> EchoError:
    code = _code(error)
    undecodable = code is None and "decode" in str(error)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or undecodable:
        return StoreCorrupt(f"{path}: the database is damaged ({error}); {_REMEDY}")
    if code == sqlite3.SQLITE_FULL:
        return full(path, str(error))
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _no_room(path):
        return full(path, str(error))
    if code in _RETRY_OPEN:
        return StoreUnavailable(
            f"{path}: locked by another writer for too long ({error}); try again", retry_after_s=1
        )
    return StoreUnavailable(f"{path}: {error}; see to the disk, then try again")


def _code(error: sqlite3.Error) -> int | None:
    # Errors of the Python module itself (a closed connection) carry no SQLite code.
    extended: int | None = getattr(error, "sqlite_errorcode", None)
    return None if extended is None else extended & 0xFF


def _no_room(path: Path) -> bool:
    """Whether a write past the end of the largest file fails for want of room.

    SQLite reports a file size limit and an exhausted quota as a plain I/O error.
    """
    files = (path, path.with_name(path.name + "-wal"))
    end = max((f.stat().st_size for f in files if f.exists()), default=0)
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".room-")
        try:
            return os.pwrite(fd, bytes(_PROBE_BYTES), end) < _PROBE_BYTES
        finally:
            os.close(fd)
            Path(name).unlink()
    except OSError as error:
        return error.errno in FULL_ERRNOS
