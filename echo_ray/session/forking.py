"""Sessions that begin with a past: what a store takes over at once, and what it refuses.

A fork, a rewind, an import and a session brought back from its durable copies are the same thing to
a directory: a record that stands at chunk n, the controls that led there, the committed digests by
which a replay is checked, and the snapshots that it can start from. Knows nothing of blobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from echo_ray.errors import InvalidRequestError
from echo_ray.session.control_log import DIGESTS_KEPT, LAST_CHUNK, check_new, check_text
from echo_ray.session.records import ControlEntry, SessionRecord, SnapshotRef


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


def _unfit(record: SessionRecord, param: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"session {record.id!r} cannot begin so: {why}", param=param)
