"""The contract of every store: what a session directory and a snapshot store promise.

Both are synchronous; services call them from threads. Every method raises `StoreUnavailable` (or
`StoreFull`, `StoreCorrupt`) when the store itself fails, and then nothing was changed.

Deadlines (`lease_until`, `alive_until`) go by one clock, the store's own where it has one, and are
handed out as times of the caller's wall clock: what is left of them is right, whatever time the
caller believes it to be.

A write that carries a lease is *fenced*: unless its epoch and owner are the session's current ones
it raises `Fenced` and changes nothing. On an unknown session every method raises `SessionNotFound`.
A refused call changes nothing either. The rules themselves stand in `session/control_log.py`.

Session ids are never used again, not even after `delete`: a new session under an old id would begin
at epoch 0 and could not tell an old owner from its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from echo_ray.session.access import Quota
from echo_ray.session.forking import Past
from echo_ray.session.records import ControlEntry, Lease, ReplicaRecord, SessionRecord, SnapshotRef
from echo_ray.session.sweep import StoredBlob


class Directory(Protocol):
    """Sessions, their owners, control logs, commits and snapshot references; and live replicas."""

    def create(self, record: SessionRecord, *, quota: Quota | None = None) -> None:
        """Add a session. Raises `SessionExists`; `InvalidRequestError` if it cannot be kept.

        `quota`: of its tenant; raises `QuotaExceeded`. However many create at a time, it is never
        overrun; closed sessions do not count, creations that failed may for a minute.
        """
        ...

    def restore(self, past: Past, *, quota: Quota | None = None) -> None:
        """Add a session that begins with a past: all of it or nothing, and nobody sees a part.

        From here it is a session like any other that nobody owns: its next chunk is the record's
        `next_index`, and what comes before is replayed from a snapshot or the start. The blobs that
        it names must be stored before. Raises `SessionExists`; `InvalidRequestError` for what does
        not fit together (`session/forking.py`).
        """
        ...

    def get(self, session_id: str) -> SessionRecord:
        """The session as it stands."""
        ...

    def list(self) -> Sequence[SessionRecord]:
        """All sessions, oldest first: as much work as there are sessions."""
        ...

    def orphans(self) -> Sequence[SessionRecord]:
        """Sessions that go on without viewers and on which nobody holds a lease, oldest first.

        As much work as there are such sessions, whatever the number of others. One whose owner or
        state changed when a process or the store failed may be left out for a minute.
        """
        ...

    def count_open(self) -> int:
        """How many sessions are not closed, at little cost.

        After a failure a few too many for a minute or so, but never too few.
        """
        ...

    def delete(self, session_id: str) -> None:
        """Forget the session, its log, commits and snapshot references; its owner is fenced."""
        ...

    def claim(self, session_id: str, owner: str, *, expect_epoch: int, ttl_s: float) -> Lease:
        """Make `owner` the owner under epoch `expect_epoch + 1` and set the session live.

        Raises `Fenced` if the epoch is not `expect_epoch` any more, `SessionClosed` if closed.
        """
        ...

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> Sequence[Lease]:
        """Extend leases to now + ttl_s; returns those lost (newer epoch, released or deleted).

        A lease that ran out but that nobody claimed since is extended like any other.
        """
        ...

    def release(self, lease: Lease, *, state: str) -> None:
        """Give the session up: no owner, lease ended, `state` live, paused or closed. Fenced.

        The lease is spent: whatever is written under it afterwards raises `Fenced`.
        """
        ...

    def set_state(self, session_id: str, *, state: str) -> SessionRecord:
        """Set the state whoever owns it; paused and closed also raise the epoch and drop the owner.

        Raises `SessionClosed` when the session is closed already and `state` is another one.
        """
        ...

    def seal(self, lease: Lease, index: int) -> Sequence[ControlEntry]:
        """Fix what chunk `index` is generated under, before that; returns its entries in order.

        From here no entry can be pinned at or before `index`. Repeating it (after a claim) is
        allowed and returns the same. Raises `ConflictError` unless index == next_index. Fenced.
        """
        ...

    def commit(self, lease: Lease, index: int, digest: str, fingerprint: str) -> None:
        """Chunk `index` is produced: next_index becomes index + 1, compared and set with the epoch.

        Raises `ConflictError` unless index == next_index and the chunk is sealed. Fenced.
        """
        ...

    def digests(self, session_id: str, start: int, stop: int) -> dict[int, str]:
        """Committed digests of chunks start..stop-1, those still kept (the last 4096 at least)."""
        ...

    def append_control(
        self, session_id: str, event_id: str, prompt: str, *, at_chunk: int | None = None
    ) -> ControlEntry:
        """Append to the control log, durably; pinned to `at_chunk`, or to the first open chunk.

        The same event id with the same prompt and at_chunk returns the first entry again, even if
        that chunk has been sealed or the session closed since; with another body raises
        `EventIdConflict`. Raises `ChunkSealed` if at_chunk < sealed, `SessionClosed` if the session
        is closed, `InvalidRequestError` for text that is not Unicode or an index beyond 2^53.
        """
        ...

    def controls(self, session_id: str, start: int = 0) -> Sequence[ControlEntry]:
        """Entries pinned at chunk >= start, by chunk, then in the order they were appended."""
        ...

    def add_snapshot(self, lease: Lease, ref: SnapshotRef) -> None:
        """Record a stored snapshot. Fenced. The same id again replaces it, and stays pinned.

        Raises `InvalidRequestError` if the reference names another session than the lease.
        """
        ...

    def snapshots(self, session_id: str) -> Sequence[SnapshotRef]:
        """Recorded snapshots, newest point first; of one point, the one recorded last first."""
        ...

    def pin_snapshot(self, session_id: str, snapshot_id: str) -> SnapshotRef:
        """Keep this one as long as its session. Raises `SnapshotNotFound`."""
        ...

    def drop_snapshot(self, session_id: str, snapshot_id: str) -> None:
        """Forget the reference (before its bytes are deleted). Unknown ids are ignored.

        Raises `ConflictError` if it is pinned, so that a pin that comes while old snapshots are
        being deleted is never lost: whoever deletes keeps the bytes then.
        """
        ...

    def put_replica(self, record: ReplicaRecord, *, ttl_s: float) -> None:
        """Register or renew a replica for `ttl_s`."""
        ...

    def remove_replica(self, replica_id: str) -> None:
        """Forget a replica. Unknown ids are ignored."""
        ...

    def replicas(
        self, *, among: int | None = None, named: Collection[str] = ()
    ) -> Sequence[ReplicaRecord]:
        """Replicas whose time has not run out, by id: as much work as there are replicas.

        With `among`, at most so many of them, chosen at random, and those that `named` names, if
        they live. On a server that is as much work as are asked for, and the choice may fall on
        some that died within the last minute: so many fewer come back. Raises
        `InvalidRequestError` for `among` below 1.
        """
        ...

    def draining(self) -> Sequence[ReplicaRecord]:
        """Those of the `replicas` whose state is `draining`: as much work as there are of them."""
        ...

    def close(self) -> None:
        """Let go of files and connections. Closing twice is allowed."""
        ...


class SnapshotStore(Protocol):
    """Immutable blobs by (session, snapshot id).

    Fencing is the directory's: a blob that the directory does not list does not exist for anybody.
    Ids are 1 to 128 letters, digits, dots, dashes and underscores and begin with a letter or digit;
    every method raises `InvalidRequestError` on others.
    """

    name: str

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        """Store all of the bytes or none; the same id again replaces them.

        Raises `StoreFull`; `CapacityError` if this one blob is over the limit.
        """
        ...

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        """Raises `SnapshotNotFound`."""
        ...

    def delete(self, session_id: str, snapshot_id: str) -> None:
        """Unknown ids are ignored."""
        ...

    def delete_session(self, session_id: str) -> None:
        """Delete all blobs of a session. An unknown one is ignored."""
        ...

    @property
    def tiers(self) -> Mapping[str, SweptStore]:
        """The stores that it is made of, by name; itself if it is made of none."""
        ...

    def make_durable(self, session_id: str, snapshot_id: str) -> None:
        """Return when the blob is in the most durable tier. Raises `SnapshotNotFound`.

        If it raises `StoreUnavailable`, the copy is still made as soon as it can be.
        """
        ...

    def make_durable_soon(self, session_id: str, snapshot_id: str) -> None:
        """The same without waiting for it; asks no server and raises nothing."""
        ...

    def newest_durable(self, session_id: str, newest_first: Sequence[str]) -> str | None:
        """The first of these ids in the most durable tier, for it outlives those that are not.

        None if there is none, and from a store of one tier. Raises `StoreUnavailable` if it cannot
        be known.
        """
        ...

    def debt(self) -> int:
        """How many durable copies this process still has to make."""
        ...

    def counts(self) -> Mapping[str, int]:
        """How often each of a few named things happened between the tiers since the start."""
        ...

    def close(self) -> None:
        """Let go of files and connections. Closing twice is allowed."""
        ...


class SweptStore(SnapshotStore, Protocol):
    """A snapshot store whose contents can be listed."""

    def list_blobs(self, session_id: str | None = None) -> Iterator[StoredBlob]:
        """All blobs, or those of one session, in no order.

        One that is stored or deleted meanwhile may be among them or not.
        """
        ...
