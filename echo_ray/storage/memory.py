"""Both stores in the memory of one process: the reference of the contract, and the simulation's.

Nothing survives the process, and no other process sees it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from echo_ray.clock import Clock, SystemClock
from echo_ray.session import control_log
from echo_ray.session.access import CREATE_WINDOW_S, Quota, Usage, check_quota
from echo_ray.session.control_log import DIGESTS_KEPT, LoggedControl
from echo_ray.session.forking import Past, check_past
from echo_ray.session.placement import sampled
from echo_ray.session.records import (
    ControlEntry,
    Lease,
    Pace,
    ReplicaRecord,
    SessionRecord,
    SessionState,
    SnapshotRef,
)
from echo_ray.session.sweep import StoredBlob
from echo_ray.storage.blob_names import check_ids, check_size
from echo_ray.storage.one_tier import OneTier


@dataclass(slots=True)
class _Session:
    record: SessionRecord
    log: dict[str, LoggedControl] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    snapshots: dict[str, SnapshotRef] = field(default_factory=dict)


class MemoryDirectory:
    """A `Directory` in this process, safe to use from any number of threads.

    `rng` chooses among the replicas.
    """

    def __init__(self, clock: Clock, rng: random.Random | None = None) -> None:
        self._clock = clock
        self._rng = rng or random.Random()
        self._lock = threading.Lock()
        self._sessions: dict[str, _Session] = {}
        self._replicas: dict[str, ReplicaRecord] = {}
        self._creates: dict[str, list[float]] = {}

    def create(self, record: SessionRecord, *, quota: Quota | None = None) -> None:
        self.restore(Past(record=record), quota=quota)

    def restore(self, past: Past, *, quota: Quota | None = None) -> None:
        check_past(past)
        record = past.record
        session = _Session(
            replace(record, labels=dict(record.labels)),
            log={entry.event_id: LoggedControl(entry, None) for entry in past.controls},
            digests=dict(past.digests),
            snapshots={ref.id: ref for ref in past.snapshots},
        )
        with self._lock:
            if record.id in self._sessions:
                raise control_log.exists(record.id)
            if quota is not None:
                self._take(record, quota)
            self._sessions[record.id] = session

    def get(self, session_id: str) -> SessionRecord:
        with self._lock:
            return self._session(session_id).record

    def list(self) -> Sequence[SessionRecord]:
        with self._lock:
            records = [s.record for s in self._sessions.values()]
        return sorted(records, key=lambda r: r.created_at)

    def orphans(self) -> Sequence[SessionRecord]:
        now = self._clock.wall()
        return [r for r in self.list() if control_log.orphaned(r, now)]

    def count_open(self) -> int:
        return sum(r.state is not SessionState.CLOSED for r in self.list())

    def delete(self, session_id: str) -> None:
        with self._lock:
            self._session(session_id)
            del self._sessions[session_id]

    def claim(self, session_id: str, owner: str, *, expect_epoch: int, ttl_s: float) -> Lease:
        with self._lock:
            session = self._session(session_id)
            session.record = control_log.claimed(
                session.record,
                owner,
                expect_epoch=expect_epoch,
                lease_until=self._clock.wall() + ttl_s,
            )
            return Lease(session_id, owner, session.record.epoch)

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> Sequence[Lease]:
        lost = []
        with self._lock:
            until = self._clock.wall() + ttl_s
            for lease in leases:
                session = self._sessions.get(lease.session_id)
                if session is None or not control_log.holds(session.record, lease):
                    lost.append(lease)
                else:
                    session.record = replace(session.record, lease_until=until)
        return lost

    def release(self, lease: Lease, *, state: str) -> None:
        with self._lock:
            session = self._session(lease.session_id)
            session.record = control_log.released(session.record, lease, state)

    def set_state(self, session_id: str, *, state: str) -> SessionRecord:
        with self._lock:
            session = self._session(session_id)
            session.record = control_log.with_state(session.record, state)
            return session.record

    def seal(self, lease: Lease, index: int) -> Sequence[ControlEntry]:
        with self._lock:
            session = self._session(lease.session_id)
            session.record = control_log.sealed(session.record, lease, index)
            return [c.entry for c in session.log.values() if c.entry.chunk == index]

    def commit(self, lease: Lease, index: int, digest: str, fingerprint: str) -> None:
        with self._lock:
            session = self._session(lease.session_id)
            session.record = control_log.committed(session.record, lease, index, fingerprint)
            session.digests[index] = digest
            session.digests.pop(index - DIGESTS_KEPT, None)

    def digests(self, session_id: str, start: int, stop: int) -> dict[int, str]:
        with self._lock:
            kept = self._session(session_id).digests
            return {n: d for n, d in kept.items() if start <= n < stop}

    def append_control(
        self, session_id: str, event_id: str, prompt: str, *, at_chunk: int | None = None
    ) -> ControlEntry:
        with self._lock:
            session = self._session(session_id)
            earlier = session.log.get(event_id)
            logged = control_log.placed(session.record, event_id, prompt, at_chunk, earlier)
            session.log[event_id] = logged
            return logged.entry

    def controls(self, session_id: str, start: int = 0) -> Sequence[ControlEntry]:
        with self._lock:
            entries = [c.entry for c in self._session(session_id).log.values()]
        return sorted((e for e in entries if e.chunk >= start), key=lambda e: e.chunk)

    def add_snapshot(self, lease: Lease, ref: SnapshotRef) -> None:
        with self._lock:
            session = self._session(lease.session_id)
            earlier = session.snapshots.get(ref.id)
            recorded = control_log.recorded_snapshot(session.record, lease, ref, earlier)
            # Taken out first: one that is recorded again counts as the newest of its point.
            session.snapshots.pop(ref.id, None)
            session.snapshots[ref.id] = recorded

    def snapshots(self, session_id: str) -> Sequence[SnapshotRef]:
        with self._lock:
            refs = list(self._session(session_id).snapshots.values())
        refs.reverse()
        return sorted(refs, key=lambda r: -r.chunk_index)

    def pin_snapshot(self, session_id: str, snapshot_id: str) -> SnapshotRef:
        with self._lock:
            session = self._session(session_id)
            ref = session.snapshots.get(snapshot_id)
            if ref is None:
                raise control_log.snapshot_not_found(session_id, snapshot_id)
            pinned = session.snapshots[snapshot_id] = replace(ref, pinned=True)
            return pinned

    def drop_snapshot(self, session_id: str, snapshot_id: str) -> None:
        with self._lock:
            session = self._session(session_id)
            ref = session.snapshots.get(snapshot_id)
            if ref is not None:
                control_log.check_droppable(ref)
                del session.snapshots[snapshot_id]

    def put_replica(self, record: ReplicaRecord, *, ttl_s: float) -> None:
        with self._lock:
            until = self._clock.wall() + ttl_s
            self._replicas[record.id] = replace(record, alive_until=until)

    def remove_replica(self, replica_id: str) -> None:
        with self._lock:
            self._replicas.pop(replica_id, None)

    def replicas(
        self, *, among: int | None = None, named: Collection[str] = ()
    ) -> Sequence[ReplicaRecord]:
        with self._lock:
            now = self._clock.wall()
            alive = [r for r in self._replicas.values() if r.alive_until > now]
            self._replicas = {r.id: r for r in alive}
        return sampled(sorted(alive, key=lambda r: r.id), among, named, self._rng)

    def _take(self, record: SessionRecord, quota: Quota) -> None:
        """Count one more session of its tenant. Raises `QuotaExceeded`."""
        now = self._clock.wall()
        made = [at for at in self._creates.get(record.tenant, []) if at > now - CREATE_WINDOW_S]
        all_open = [
            s.record
            for s in self._sessions.values()
            if s.record.tenant == record.tenant and s.record.state is not SessionState.CLOSED
        ]
        usage = Usage(
            sessions=len(all_open),
            realtime=sum(r.pace is Pace.REALTIME for r in all_open),
            creates=len(made),
            oldest_create=min(made, default=0.0),
        )
        check_quota(quota, usage, record, now)
        self._creates[record.tenant] = [*made, now]

    def draining(self) -> Sequence[ReplicaRecord]:
        return [r for r in self.replicas() if r.state == "draining"]

    def close(self) -> None:
        """Nothing to let go of; the contents stay readable."""

    def _session(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise control_log.not_found(session_id)
        return session


@dataclass(frozen=True, slots=True)
class _Blob:
    data: bytes
    stored_at: float


class MemorySnapshots(OneTier):
    """A `SnapshotStore` in this process; `clock` stamps the blobs."""

    name = "memory"

    def __init__(self, limit_bytes: int = 2**30, clock: Clock | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._blobs: dict[str, dict[str, _Blob]] = {}

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        check_ids(session_id, snapshot_id)
        check_size(snapshot_id, len(blob), self._limit_bytes)
        with self._lock:
            kept = _Blob(bytes(blob), self._clock.wall())
            self._blobs.setdefault(session_id, {})[snapshot_id] = kept

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        check_ids(session_id, snapshot_id)
        with self._lock:
            blob = self._blobs.get(session_id, {}).get(snapshot_id)
        if blob is None:
            raise control_log.snapshot_not_found(session_id, snapshot_id)
        return blob.data

    def delete(self, session_id: str, snapshot_id: str) -> None:
        check_ids(session_id, snapshot_id)
        with self._lock:
            self._blobs.get(session_id, {}).pop(snapshot_id, None)

    def delete_session(self, session_id: str) -> None:
        check_ids(session_id)
        with self._lock:
            self._blobs.pop(session_id, None)

    def list_blobs(self, session_id: str | None = None) -> Iterator[StoredBlob]:
        if session_id is not None:
            check_ids(session_id)
        with self._lock:
            found = [
                StoredBlob(
                    session_id=session,
                    snapshot_id=snapshot,
                    size_bytes=len(blob.data),
                    stored_at=blob.stored_at,
                )
                for session, blobs in self._blobs.items()
                if session_id in (None, session)
                for snapshot, blob in blobs.items()
            ]
        return iter(found)
