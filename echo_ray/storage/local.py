"""The session directory on one machine without servers: one SQLite database for all processes.

Every change is one transaction that holds the write lock from its beginning, so what it read still
stands when it writes. What must survive a power cut (sessions, claims, seals, commits, the control
log, snapshot references) waits for the disk; lease renewals and heartbeats have a connection of
their own that never does, since a lost one only looks like an owner that was late.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from echo_ray.clock import Clock
from echo_ray.session import control_log
from echo_ray.session.access import Quota
from echo_ray.session.control_log import DIGESTS_KEPT, LAST_CHUNK, LoggedControl
from echo_ray.session.forking import Past, check_past
from echo_ray.session.placement import sampled
from echo_ray.session.records import (
    ControlEntry,
    Lease,
    ReplicaRecord,
    SessionRecord,
    SessionState,
    SnapshotRef,
)
from echo_ray.storage import sqlite_quota
from echo_ray.storage import sqlite_rows as rows
from echo_ray.storage.local_snapshots import LocalSnapshots
from echo_ray.storage.sqlite_file import Channel, prepare

__all__ = ["LocalDirectory", "LocalSnapshots"]


class LocalDirectory:
    """A `Directory` in the SQLite file `path`, safe for any number of threads and processes.

    Deadlines are of the wall clock, which all processes of a machine share. Opening raises
    `StoreCorrupt` for a damaged, foreign or newer file.
    """

    def __init__(
        self,
        path: Path | str,
        clock: Clock,
        *,
        busy_timeout_s: float = 5.0,
        beat_timeout_s: float = 1.0,
    ) -> None:
        self._clock = clock
        self._rng = random.Random()
        file = Path(path)
        prepare(file, rows.SCHEMA, busy_timeout_s=busy_timeout_s)
        self._channels: list[Channel] = []
        try:
            self._durable = self._open(file, durable=True, busy_timeout_s=busy_timeout_s)
            self._quick = self._open(file, durable=False, busy_timeout_s=beat_timeout_s)
            self._reading = self._open(file, durable=True, busy_timeout_s=busy_timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def create(self, record: SessionRecord, *, quota: Quota | None = None) -> None:
        self.restore(Past(record=record), quota=quota)

    def restore(self, past: Past, *, quota: Quota | None = None) -> None:
        check_past(past)
        record = past.record
        with self._durable.write() as db:
            if db.execute("SELECT 1 FROM sessions WHERE id = ?", (record.id,)).fetchone():
                raise control_log.exists(record.id)
            if quota is not None:
                sqlite_quota.take(db, record, quota, self._clock.wall())
            seq = db.execute(rows.INSERT_SESSION, rows.session_values(record)).lastrowid
            controls = ((seq, e.event_id, e.chunk, e.prompt, None) for e in past.controls)
            db.executemany(_INSERT_CONTROL, controls)
            db.executemany(_INSERT_COMMIT, ((seq, n, d) for n, d in past.digests.items()))
            db.executemany(_INSERT_SNAPSHOT, (_snapshot_row(seq, ref) for ref in past.snapshots))

    def get(self, session_id: str) -> SessionRecord:
        with self._reading.read() as db:
            return _find(db, session_id)[1]

    def list(self) -> Sequence[SessionRecord]:
        sql = f"SELECT {rows.SESSION_COLUMNS} FROM sessions ORDER BY created_at, seq"
        with self._reading.read() as db:
            return [rows.session_from(row)[1] for row in db.execute(sql)]

    def orphans(self) -> Sequence[SessionRecord]:
        now = self._clock.wall()
        # A scan inside SQLite, of one machine's sessions; hardly any of them come out of it.
        sql = (
            f"SELECT {rows.SESSION_COLUMNS} FROM sessions WHERE state = ? AND lease_until <= ? "
            "ORDER BY created_at, seq"
        )
        with self._reading.read() as db:
            found = db.execute(sql, (SessionState.LIVE.value, now))
            records = [rows.session_from(row)[1] for row in found]
        return [r for r in records if control_log.orphaned(r, now)]

    def count_open(self) -> int:
        sql = "SELECT count(*) FROM sessions WHERE state != ?"
        with self._reading.read() as db:
            (count,) = db.execute(sql, (SessionState.CLOSED.value,)).fetchone()
            return int(count)

    def delete(self, session_id: str) -> None:
        with self._durable.write() as db:
            seq, _ = _find(db, session_id)
            db.execute("DELETE FROM sessions WHERE seq = ?", (seq,))

    def claim(self, session_id: str, owner: str, *, expect_epoch: int, ttl_s: float) -> Lease:
        def change(record: SessionRecord) -> SessionRecord:
            until = self._clock.wall() + ttl_s
            return control_log.claimed(record, owner, expect_epoch=expect_epoch, lease_until=until)

        return Lease(session_id, owner, self._change(session_id, change).epoch)

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> Sequence[Lease]:
        lost = []
        with self._quick.write() as db:
            until = self._clock.wall() + ttl_s
            for lease in leases:
                found = _look_up(db, lease.session_id)
                if found is None or not control_log.holds(found[1], lease):
                    lost.append(lease)
                else:
                    _store(db, found[0], replace(found[1], lease_until=until))
        return lost

    def release(self, lease: Lease, *, state: str) -> None:
        self._change(lease.session_id, lambda r: control_log.released(r, lease, state))

    def set_state(self, session_id: str, *, state: str) -> SessionRecord:
        return self._change(session_id, lambda r: control_log.with_state(r, state))

    def seal(self, lease: Lease, index: int) -> Sequence[ControlEntry]:
        sql = f"{_CONTROLS} WHERE session = ? AND chunk = ? ORDER BY position"
        with self._durable.write() as db:
            seq, record = _find(db, lease.session_id)
            _store(db, seq, control_log.sealed(record, lease, index))
            return [rows.control_from(row).entry for row in db.execute(sql, (seq, index))]

    def commit(self, lease: Lease, index: int, digest: str, fingerprint: str) -> None:
        with self._durable.write() as db:
            seq, record = _find(db, lease.session_id)
            _store(db, seq, control_log.committed(record, lease, index, fingerprint))
            db.execute(_INSERT_COMMIT, (seq, index, digest))
            db.execute(
                "DELETE FROM commits WHERE session = ? AND chunk <= ?", (seq, index - DIGESTS_KEPT)
            )

    def digests(self, session_id: str, start: int, stop: int) -> dict[int, str]:
        sql = "SELECT chunk, digest FROM commits WHERE session = ? AND chunk >= ? AND chunk < ?"
        with self._reading.read() as db:
            seq, _ = _find(db, session_id)
            found = db.execute(sql, (seq, _bounded(start), _bounded(stop)))
            return {int(chunk): digest for chunk, digest in found}

    def append_control(
        self, session_id: str, event_id: str, prompt: str, *, at_chunk: int | None = None
    ) -> ControlEntry:
        sql = f"{_CONTROLS} WHERE session = ? AND event_id = ?"
        with self._durable.write() as db:
            seq, record = _find(db, session_id)
            row = db.execute(sql, (seq, event_id)).fetchone()
            earlier: LoggedControl | None = rows.control_from(row) if row else None
            logged = control_log.placed(record, event_id, prompt, at_chunk, earlier)
            if logged is not earlier:
                row = (seq, event_id, logged.entry.chunk, prompt, at_chunk)
                db.execute(_INSERT_CONTROL, row)
            return logged.entry

    def controls(self, session_id: str, start: int = 0) -> Sequence[ControlEntry]:
        sql = f"{_CONTROLS} WHERE session = ? AND chunk >= ? ORDER BY chunk, position"
        with self._reading.read() as db:
            seq, _ = _find(db, session_id)
            found = db.execute(sql, (seq, _bounded(start)))
            return [rows.control_from(row).entry for row in found]

    def add_snapshot(self, lease: Lease, ref: SnapshotRef) -> None:
        with self._durable.write() as db:
            seq, record = _find(db, lease.session_id)
            earlier = _find_snapshot(db, seq, ref.id)
            kept = control_log.recorded_snapshot(record, lease, ref, earlier)
            # Taken out first: one that is recorded again counts as the newest of its point.
            db.execute("DELETE FROM snapshots WHERE session = ? AND id = ?", (seq, ref.id))
            db.execute(_INSERT_SNAPSHOT, _snapshot_row(seq, kept))

    def snapshots(self, session_id: str) -> Sequence[SnapshotRef]:
        sql = f"{_SNAPSHOTS} WHERE session = ? ORDER BY chunk_index DESC, position DESC"
        with self._reading.read() as db:
            seq, _ = _find(db, session_id)
            return [rows.snapshot_from(row) for row in db.execute(sql, (seq,))]

    def pin_snapshot(self, session_id: str, snapshot_id: str) -> SnapshotRef:
        sql = "UPDATE snapshots SET pinned = 1 WHERE session = ? AND id = ?"
        with self._durable.write() as db:
            seq, _ = _find(db, session_id)
            ref = _find_snapshot(db, seq, snapshot_id)
            if ref is None:
                raise control_log.snapshot_not_found(session_id, snapshot_id)
            db.execute(sql, (seq, snapshot_id))
            return replace(ref, pinned=True)

    def drop_snapshot(self, session_id: str, snapshot_id: str) -> None:
        with self._durable.write() as db:
            seq, _ = _find(db, session_id)
            ref = _find_snapshot(db, seq, snapshot_id)
            if ref is not None:
                control_log.check_droppable(ref)
                db.execute("DELETE FROM snapshots WHERE session = ? AND id = ?", (seq, ref.id))

    def put_replica(self, record: ReplicaRecord, *, ttl_s: float) -> None:
        sql = "INSERT OR REPLACE INTO replicas (id, alive_until, body) VALUES (?, ?, ?)"
        with self._quick.write() as db:
            now = self._clock.wall()
            db.execute("DELETE FROM replicas WHERE alive_until <= ?", (now,))
            db.execute(sql, (record.id, now + ttl_s, rows.replica_body(record)))

    def remove_replica(self, replica_id: str) -> None:
        with self._quick.write() as db:
            db.execute("DELETE FROM replicas WHERE id = ?", (replica_id,))

    def replicas(
        self, *, among: int | None = None, named: Collection[str] = ()
    ) -> Sequence[ReplicaRecord]:
        sql = "SELECT body, alive_until FROM replicas WHERE alive_until > ? ORDER BY id"
        with self._reading.read() as db:
            found = db.execute(sql, (self._clock.wall(),))
            alive = [rows.replica_from(row) for row in found]
        return sampled(alive, among, named, self._rng)

    def draining(self) -> Sequence[ReplicaRecord]:
        return [r for r in self.replicas() if r.state == "draining"]

    def _change(
        self, session_id: str, change: Callable[[SessionRecord], SessionRecord]
    ) -> SessionRecord:
        with self._durable.write() as db:
            seq, record = _find(db, session_id)
            changed = change(record)
            _store(db, seq, changed)
            return changed

    def _open(self, path: Path, *, durable: bool, busy_timeout_s: float) -> Channel:
        channel = Channel(path, durable=durable, busy_timeout_s=busy_timeout_s)
        self._channels.append(channel)
        return channel


_INSERT_CONTROL = (
    "INSERT INTO controls (session, event_id, chunk, prompt, asked) VALUES (?, ?, ?, ?, ?)"
)
_INSERT_COMMIT = "INSERT INTO commits (session, chunk, digest) VALUES (?, ?, ?)"
_INSERT_SNAPSHOT = (
    "INSERT INTO snapshots (session, id, chunk_index, pinned, body) VALUES (?, ?, ?, ?, ?)"
)
_CONTROLS = "SELECT event_id, chunk, prompt, asked FROM controls"
_SNAPSHOTS = "SELECT body, pinned FROM snapshots"


def _look_up(db: sqlite3.Connection, session_id: str) -> tuple[int, SessionRecord] | None:
    sql = f"SELECT {rows.SESSION_COLUMNS} FROM sessions WHERE id = ?"
    row: tuple[Any, ...] | None = db.execute(sql, (session_id,)).fetchone()
    return None if row is None else rows.session_from(row)


def _find(db: sqlite3.Connection, session_id: str) -> tuple[int, SessionRecord]:
    found = _look_up(db, session_id)
    if found is None:
        raise control_log.not_found(session_id)
    return found


def _find_snapshot(db: sqlite3.Connection, seq: int, snapshot_id: str) -> SnapshotRef | None:
    row = db.execute(f"{_SNAPSHOTS} WHERE session = ? AND id = ?", (seq, snapshot_id)).fetchone()
    return None if row is None else rows.snapshot_from(row)


def _snapshot_row(seq: int | None, ref: SnapshotRef) -> tuple[Any, ...]:
    return seq, ref.id, ref.chunk_index, int(ref.pinned), rows.snapshot_body(ref)


def _store(db: sqlite3.Connection, seq: int, record: SessionRecord) -> None:
    db.execute(rows.UPDATE_SESSION, (*rows.mutable_values(record), seq))


def _bounded(index: int) -> int:
    """An index that fits SQLite's integers; no chunk lies beyond it."""
    return max(-1, min(index, LAST_CHUNK + 1))
