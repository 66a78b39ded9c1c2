"""What a store may do to a session, decided once for every store.

Each function takes the record as it stands and returns the record as it should become, or raises
what the caller has to hear. Stores add atomicity and durability round these and no rule of their
own. Nothing here knows a clock, a lock or a database.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from echo_ray.errors import (
    ChunkSealed,
    ConflictError,
    EventIdConflict,
    Fenced,
    InvalidRequestError,
    SessionClosed,
    SessionExists,
    SessionNotFound,
    SnapshotNotFound,
)
from echo_ray.session.records import (
    ControlEntry,
    Lease,
    OnIdle,
    SessionRecord,
    SessionState,
    SnapshotRef,
)

DIGESTS_KEPT = 4096
"""Committed digests that a store keeps per session; older ones are deleted."""
LAST_CHUNK = 2**53 - 1
"""The largest chunk index that every JSON reader can hold."""


@dataclass(frozen=True, slots=True)
class LoggedControl:
    """A control entry with the chunk its sender asked for, by which a repetition is recognised."""

    entry: ControlEntry
    asked: int | None


def not_found(session_id: str) -> SessionNotFound:
    """The answer of every method to a session id that the directory does not hold."""
    return SessionNotFound(
        f"session {session_id!r} does not exist: it was deleted or never created",
        param="session_id",
    )


def exists(session_id: str) -> SessionExists:
    """The answer to creating a session whose id is taken."""
    return SessionExists(f"session {session_id!r} exists already; choose another id", param="id")


def snapshot_not_found(session_id: str, snapshot_id: str) -> SnapshotNotFound:
    """The answer to a snapshot id that is not there."""
    return SnapshotNotFound(
        f"session {session_id!r} has no snapshot {snapshot_id!r}; list its snapshots",
        param="snapshot_id",
    )


def session_state(value: str) -> SessionState:
    """The state of that name. Raises `InvalidRequestError` on any other word."""
    try:
        return SessionState(value)
    except ValueError as error:
        known = ", ".join(SessionState)
        raise InvalidRequestError(
            f"session state {value!r} is unknown: use {known}", param="state"
        ) from error


def check_text(name: str, value: str) -> None:
    """Refuse text that has no UTF-8 form. Raises `InvalidRequestError`."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} holds half a surrogate pair at position {error.start}; send valid Unicode",
            param=name,
        ) from error


def check_new(record: SessionRecord) -> None:
    """Refuse a record that no store could keep. Raises `InvalidRequestError`."""
    for name in ("id", "model", "prompt", "tenant"):
        check_text(name, getattr(record, name))
    if record.clip is not None:
        check_text("clip.id", record.clip.id)
        check_text("clip.sha256", record.clip.sha256)
    session_state(record.state)
    if not 0 <= record.next_index <= LAST_CHUNK or not 0 <= record.epoch <= LAST_CHUNK:
        raise InvalidRequestError(
            f"session {record.id!r}: next_index {record.next_index} and epoch {record.epoch} must "
            f"lie in 0 to {LAST_CHUNK}",
            param="next_index",
        )
    if not record.next_index <= record.sealed <= record.next_index + 1:
        raise InvalidRequestError(
            f"session {record.id!r}: next_index {record.next_index} and sealed {record.sealed} do "
            "not fit: sealed is next_index or one more",
            param="sealed",
        )


def holds(record: SessionRecord, lease: Lease) -> bool:
    """Whether the lease is the one that owns the session now."""
    return record.epoch == lease.epoch and record.owner == lease.owner


def goes_on(record: SessionRecord) -> bool:
    """Whether the session is to be generated though nobody watches: live, and begun once.

    Begun is also what was given a past that nobody has owned yet.
    """
    begun = record.epoch > 0 or record.next_index > 0
    return begun and record.state is SessionState.LIVE and record.on_idle is OnIdle.CONTINUE


def orphaned(record: SessionRecord, now: float) -> bool:
    """Whether the session goes on and nobody holds a lease on it; `now` by the lease's clock."""
    return goes_on(record) and record.lease_until <= now


def check_fence(record: SessionRecord, lease: Lease) -> None:
    """Refuse a writer that does not own the session any more. Raises `Fenced`."""
    if not holds(record, lease):
        raise Fenced(
            f"session {record.id!r}: {lease.owner!r} under epoch {lease.epoch} does not own it; "
            f"the epoch is {record.epoch} and the owner {record.owner!r}; stop writing",
            param="epoch",
        )


def claimed(
    record: SessionRecord, owner: str, *, expect_epoch: int, lease_until: float
) -> SessionRecord:
    """The session under its next epoch and `owner`, live. Raises `SessionClosed`, `Fenced`."""
    check_text("owner", owner)
    _check_open(record)
    if record.epoch != expect_epoch:
        raise Fenced(
            f"session {record.id!r}: claim expects epoch {expect_epoch}, it is {record.epoch}; "
            "somebody else was faster, read the session again",
            param="epoch",
        )
    return replace(
        record,
        owner=owner,
        epoch=record.epoch + 1,
        lease_until=lease_until,
        state=SessionState.LIVE,
    )


def released(record: SessionRecord, lease: Lease, state: str) -> SessionRecord:
    """The session without an owner. Raises `Fenced`, `InvalidRequestError`."""
    target = session_state(state)
    check_fence(record, lease)
    return replace(record, owner=None, lease_until=0.0, state=target)


def with_state(record: SessionRecord, state: str) -> SessionRecord:
    """The session in another state; paused and closed take it from whoever owns it.

    Raises `SessionClosed` if it is closed and should become something else, `InvalidRequestError`
    on an unknown state.
    """
    target = session_state(state)
    if record.state is SessionState.CLOSED:
        if target is SessionState.CLOSED:
            return record
        _check_open(record)
    if target is SessionState.LIVE:
        return replace(record, state=target)
    return replace(record, state=target, owner=None, lease_until=0.0, epoch=record.epoch + 1)


def sealed(record: SessionRecord, lease: Lease, index: int) -> SessionRecord:
    """The session with chunk `index` closed to new controls. Raises `Fenced`, `ConflictError`."""
    check_fence(record, lease)
    _check_next(record, index, "sealed")
    return replace(record, sealed=index + 1)


def committed(record: SessionRecord, lease: Lease, index: int, fingerprint: str) -> SessionRecord:
    """The session with chunk `index` produced. Raises `Fenced`, `ConflictError`."""
    check_fence(record, lease)
    _check_next(record, index, "committed")
    if record.sealed != index + 1:
        raise ConflictError(
            f"session {record.id!r}: chunk {index} is not sealed; seal it before it is committed",
            param="chunk_index",
        )
    return replace(record, next_index=index + 1, fingerprint=fingerprint)


def placed(
    record: SessionRecord,
    event_id: str,
    prompt: str,
    at_chunk: int | None,
    earlier: LoggedControl | None,
) -> LoggedControl:
    """Where an event belongs in the control log; `earlier` itself if it is a repetition of that.

    An event that was accepted once stays accepted, so a repetition is recognised before anything
    else is looked at. Raises `EventIdConflict`, `SessionClosed`, `ChunkSealed`,
    `InvalidRequestError`.
    """
    if earlier is not None:
        if earlier.entry.prompt == prompt and earlier.asked == at_chunk:
            return earlier
        raise EventIdConflict(
            f"event {event_id!r} was accepted before with another prompt or at_chunk; "
            "use a new event id",
            param="event_id",
        )
    check_text("event_id", event_id)
    check_text("prompt", prompt)
    _check_open(record)
    if at_chunk is not None and at_chunk < record.sealed:
        raise ChunkSealed(
            f"session {record.id!r}: at_chunk {at_chunk} is generated already; the first chunk "
            f"still open is {record.sealed}",
            param="at_chunk",
        )
    if at_chunk is not None and at_chunk > LAST_CHUNK:
        raise InvalidRequestError(
            f"at_chunk {at_chunk} is too large; at most {LAST_CHUNK}", param="at_chunk"
        )
    chunk = record.sealed if at_chunk is None else at_chunk
    return LoggedControl(ControlEntry(event_id=event_id, chunk=chunk, prompt=prompt), at_chunk)


def recorded_snapshot(
    record: SessionRecord, lease: Lease, ref: SnapshotRef, earlier: SnapshotRef | None
) -> SnapshotRef:
    """The reference to record; one that was pinned stays pinned.

    Raises `Fenced`, or `InvalidRequestError` if the reference belongs to another session.
    """
    if ref.session_id != lease.session_id:
        raise InvalidRequestError(
            f"snapshot {ref.id!r} is of session {ref.session_id!r}, the lease is on "
            f"{lease.session_id!r}; record it under its own session",
            param="session_id",
        )
    check_fence(record, lease)
    check_text("snapshot_id", ref.id)
    return replace(ref, pinned=True) if earlier is not None and earlier.pinned else ref


def check_droppable(ref: SnapshotRef) -> None:
    """Refuse to forget a pinned snapshot. Raises `ConflictError`."""
    if ref.pinned:
        raise ConflictError(
            f"snapshot {ref.id!r} of session {ref.session_id!r} is pinned and stays until its "
            "session is deleted",
            param="snapshot_id",
        )


def _check_open(record: SessionRecord) -> None:
    if record.state is SessionState.CLOSED:
        raise SessionClosed(
            f"session {record.id!r} is closed and stays so; create another", param="session_id"
        )


def _check_next(record: SessionRecord, index: int, verb: str) -> None:
    if index != record.next_index:
        raise ConflictError(
            f"session {record.id!r}: chunk {index} cannot be {verb}; "
            f"the next chunk is {record.next_index}",
            param="chunk_index",
        )
