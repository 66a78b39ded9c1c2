"""Sessions that begin with a past: where a fork can begin, and what a store takes over for it.

A fork, a rewind, an import and a session brought back from its durable copies are the same thing to
a directory: a record that stands at chunk n, the controls that led there, the committed digests by
which a replay is checked, and the snapshots that it can start from. Knows nothing of blobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from echo_ray.errors import ChunkUnreachable, InvalidRequestError, SegmentBeyondEnd, SnapshotForeign
from echo_ray.session.control_log import DIGESTS_KEPT, LAST_CHUNK, check_new, check_text
from echo_ray.session.fingerprint import model_of
from echo_ray.session.records import (
    ControlEntry,
    OnIdle,
    Pace,
    SessionRecord,
    SessionState,
    SnapshotRef,
)
from echo_ray.session.replay import newest_first


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """Everything that a directory keeps of a session that nobody owns."""

    record: SessionRecord
    """`next_index` is the first chunk that is still to be made."""
    controls: Sequence[ControlEntry] = ()
    """In the order they were appended. A repetition of one is recognised without `at_chunk`."""
    digests: Mapping[int, str] = field(default_factory=dict)
    """By chunk, of the last `DIGESTS_KEPT` before `next_index`; any of them may be missing."""
    snapshots: Sequence[SnapshotRef] = ()
    """In the order they were recorded."""


def check_past(past: Past) -> None:
    """Refuse a past that no store could keep, or that does not fit its record.

    Raises `InvalidRequestError`.
    """
    record = past.record
    check_new(record)
    if record.owner is not None:
        raise _unfit(record, "owner", f"owner {record.owner!r}: a new session has none")
    event_ids = [entry.event_id for entry in past.controls]
    if len(set(event_ids)) != len(event_ids):
        raise _unfit(record, "controls", "an event id stands twice in its control log")
    for entry in past.controls:
        check_text("event_id", entry.event_id)
        check_text("prompt", entry.prompt)
        if not 0 <= entry.chunk <= LAST_CHUNK:
            where = f"event {entry.event_id!r} at chunk {entry.chunk}: not from 0 to {LAST_CHUNK}"
            raise _unfit(record, "controls", where)
    oldest = max(0, record.next_index - DIGESTS_KEPT)
    for index, digest in past.digests.items():
        check_text("digest", digest)
        if not oldest <= index < record.next_index:
            where = f"digest of chunk {index}: not from {oldest} to {record.next_index - 1}"
            raise _unfit(record, "digests", where)
    _check_snapshots(record, past.snapshots)


def _check_snapshots(record: SessionRecord, snapshots: Sequence[SnapshotRef]) -> None:
    ids = [ref.id for ref in snapshots]
    if len(set(ids)) != len(ids):
        raise _unfit(record, "snapshots", "a snapshot id stands twice")
    for ref in snapshots:
        check_text("snapshot_id", ref.id)
        if ref.session_id != record.id:
            raise _unfit(record, "snapshots", f"snapshot {ref.id!r} is of {ref.session_id!r}")
        if not 0 <= ref.chunk_index <= record.next_index:
            where = f"snapshot {ref.id!r} of chunk {ref.chunk_index}"
            raise _unfit(record, "snapshots", f"{where}: not from 0 to {record.next_index}")


# Where a fork can begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a fork is to have of its own; None: as the session it comes from."""

    labels: Mapping[str, str] | None = None
    on_idle: OnIdle | None = None
    pace: Pace | None = None


def check_chunk(record: SessionRecord, chunk: int | None) -> int:
    """The chunk that a fork begins with: the one asked for, or the next one of all.

    Raises `SegmentBeyondEnd` for one that the session has not reached.
    """
    if chunk is None:
        return record.next_index
    if chunk < 0:
        raise InvalidRequestError(f"chunk {chunk} is negative; the first is 0", param="chunk")
    if chunk > record.next_index:
        raise SegmentBeyondEnd(
            f"chunk {chunk} lies beyond the end; the next chunk of session {record.id} is "
            f"{record.next_index}",
            param="chunk",
        )
    return chunk


def starts(
    snapshots: Sequence[SnapshotRef], *, chunk: int, limit: int
) -> tuple[SnapshotRef | None, ...]:
    """Points from which at most `limit` chunks lead to `chunk`, best first; None is point 0.

    Empty if there is none: the chunk is beyond reach.
    """
    near = [s for s in newest_first(snapshots) if 0 <= chunk - s.chunk_index <= limit]
    return (*near, None) if chunk <= limit else tuple(near)


def reach(
    snapshots: Sequence[SnapshotRef], *, next_index: int, limit: int
) -> tuple[tuple[int, int], ...]:
    """The chunks that a fork can begin with, as (first, last), in order and without overlap."""
    spans: list[tuple[int, int]] = []
    for first in sorted({0, *(s.chunk_index for s in snapshots if s.chunk_index <= next_index)}):
        last = min(first + limit, next_index)
        if spans and first <= spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
        else:
            spans.append((first, last))
    return tuple(spans)


def unreachable(
    record: SessionRecord, chunk: int, snapshots: Sequence[SnapshotRef], *, limit: int
) -> ChunkUnreachable:
    """The answer to a chunk that no readable point leads to."""
    spans = reach(snapshots, next_index=record.next_index, limit=limit)
    shown = ", ".join(f"{first} to {last}" for first, last in spans)
    return ChunkUnreachable(
        f"chunk {chunk} of session {record.id} cannot be reached any more; what can: {shown}",
        param="chunk",
    )


def forked(
    source: SessionRecord, chunk: int, *, new_id: str, now: float, wish: Wish
) -> SessionRecord:
    """The record of a session that begins at `chunk` of another, live and without an owner."""
    return replace(
        source,
        id=new_id,
        pace=wish.pace or source.pace,
        on_idle=wish.on_idle or source.on_idle,
        labels=dict(source.labels if wish.labels is None else wish.labels),
        created_at=now,
        state=SessionState.LIVE,
        owner=None,
        epoch=0,
        lease_until=0.0,
        next_index=chunk,
        sealed=chunk,
        fingerprint=source.fingerprint if chunk else None,
    )


def check_fingerprint(theirs: str | None, running: Sequence[str]) -> None:
    """Refuse what no engine of those that run here would load. Raises `SnapshotForeign`."""
    if theirs is None or not running or model_of(theirs) in map(model_of, running):
        return
    raise SnapshotForeign(
        f"the snapshot is of {model_of(theirs)!r}; here runs "
        f"{model_of(running[0])!r}: other weights or another release; use it there",
        param="fingerprint",
    )


def _unfit(record: SessionRecord, param: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"session {record.id!r} cannot begin so: {why}", param=param)
