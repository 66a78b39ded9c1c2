"""A session's past as a blob beside its snapshots, and what the session comes back as from it.

A directory that lost everything is filled again from the durable store. There, each session has its
snapshots and, written again whenever it matters, a past: record, control log, digests and snapshot
references. Any past and any snapshot of a session fit together, so no two writes have to succeed
together: what a past does not name yet is added, what it names and is gone is left out.

    past-e{epoch}-n{next index}-l{entries in the log}-t{when it was read, in ms}

An id is never written twice; which of two is newer, the ids say. One msgpack map {magic, format,
digest, body}, body = {epoch, sealed, snapshots, archive}, the archive as in `archive.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from echo_ray.errors import ArchiveCorrupt, ArchiveForeign, ArchiveVersion
from echo_ray.session import archive as archives
from echo_ray.session import rules
from echo_ray.session.archive import Archive
from echo_ray.session.control_log import DIGESTS_KEPT
from echo_ray.session.envelope import pack
from echo_ray.session.forking import Past
from echo_ray.session.records import SessionRecord, SnapshotRef
from echo_ray.session.sweep import StoredBlob

MAGIC = "echo-ray/past"
FORMAT = 1
RAISED = 10**12
"""Epochs of sessions that were brought back begin here: they are wall times in milliseconds."""
AHEAD_CHUNKS = DIGESTS_KEPT
"""So far beyond the next chunk of a session that was brought back a viewer may have been."""
_POINT_ID = re.compile(r"p(\d{10,16})-e(\d{1,16})")
_REF = ("id", "chunk_index", "size_bytes", "digest", "created_at", "epoch", "pinned")
_REF_TYPES = (str, int, int, str, float, int, bool)


# Names


def past_id(past: Past, read_at: float) -> str:
    """The id of a past that was read from `read_at` (wall time) on."""
    record, entries = past.record, len(past.controls)
    return f"past-e{record.epoch}-n{record.next_index}-l{entries}-t{int(read_at * 1000)}"


# The blob


def encode(past: Past) -> bytes:
    """The past as a blob; the owner and the lease are no part of it."""
    _, pieces = archives.pieces(
        Archive(record=past.record, controls=past.controls, digests=past.digests)
    )
    body = pack(
        {
            "epoch": past.record.epoch,
            "sealed": past.record.sealed,
            "snapshots": [[getattr(ref, name) for name in _REF] for ref in past.snapshots],
            "archive": b"".join(pieces),
            # An archive is anybody's who has it, so it names no tenant.
            **({"tenant": past.record.tenant} if past.record.tenant else {}),
        }
    )
    digest = hashlib.sha256(body).digest()
    return pack({"magic": MAGIC, "format": FORMAT, "digest": digest, "body": body})


def decode(blob: bytes, *, store: str, limit_bytes: int) -> Past:
    """Read a past, whose snapshots rest in `store`.

    Raises `ArchiveForeign`, `ArchiveCorrupt`, `ArchiveVersion`, and what `archive.decode` raises.
    """
    outer = _unpack(blob)
    if outer is None or outer.get("magic") != MAGIC:
        raise ArchiveForeign("not the past of a session; delete the object or put it back")
    version = outer.get("format")
    if type(version) is not int or version < 1:
        raise ArchiveCorrupt(f"the past's format {version!r:.80} is not a positive number")
    if version > FORMAT:
        raise ArchiveVersion(
            f"a past of format {version} is newer than this release reads ({FORMAT}); upgrade"
        )
    body = outer.get("body")
    whole = isinstance(body, bytes) and hashlib.sha256(body).digest() == outer.get("digest")
    inner = _unpack(body) if whole and isinstance(body, bytes) else None
    if inner is None:
        raise ArchiveCorrupt(
            f"the past of {len(blob)} bytes does not match its checksum; put an older version of "
            "the object back if the bucket has one"
        )
    try:
        return _past(inner, store, limit_bytes)
    except (ValueError, TypeError, KeyError) as error:
        raise ArchiveCorrupt(f"a past holds what this release cannot read: {error!r}") from error


def _past(body: Mapping[str, Any], store: str, limit_bytes: int) -> Past:
    archive = archives.decode(body["archive"], limit_bytes=limit_bytes)
    epoch, sealed, tenant = body["epoch"], body["sealed"], body.get("tenant", "")
    if type(epoch) is not int or type(sealed) is not int or type(tenant) is not str:
        raise TypeError(f"epoch {epoch!r:.80}, sealed {sealed!r:.80}, tenant {tenant!r:.80}")
    record = replace(archive.record, epoch=epoch, sealed=sealed, tenant=tenant)
    return Past(
        record=record,
        controls=archive.controls,
        digests=archive.digests,
        snapshots=[_ref(values, record.id, store) for values in body["snapshots"]],
    )


def _ref(values: Sequence[Any], session_id: str, store: str) -> SnapshotRef:
    for name, value, kind in zip(_REF, values, _REF_TYPES, strict=True):
        if type(value) is not kind:
            raise TypeError(f"snapshot {name} {value!r:.80}")
    return SnapshotRef(**dict(zip(_REF, values, strict=True)), session_id=session_id, store=store)


def _unpack(data: bytes) -> dict[str, Any] | None:
    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    return body if isinstance(body, dict) else None


# Coming back


@dataclass(frozen=True, slots=True)
class Point:
    """A snapshot as its blob's id tells of it."""

    blob: StoredBlob
    chunk_index: int
    epoch: int


def newest_point(blobs: Collection[StoredBlob]) -> Point | None:
    """The newest snapshot among a session's blobs; of one point, that of the highest epoch."""
    found = [
        Point(blob, int(match[1]), int(match[2]))
        for blob in blobs
        if (match := _POINT_ID.fullmatch(blob.snapshot_id))
    ]
    return max(found, key=lambda p: (p.chunk_index, p.epoch), default=None)


def unnamed_point(past: Past, blobs: Collection[StoredBlob]) -> Point | None:
    """The snapshot that is newer than all that the past names, if there is one.

    It was stored after the past was read, or just before its reference was recorded.
    """
    held = {blob.snapshot_id for blob in blobs}
    named = [ref.chunk_index for ref in past.snapshots if ref.id in held]
    newest = newest_point(blobs)
    return newest if newest and newest.chunk_index > max(named, default=0) else None


def brought_back(
    past: Past, blobs: Collection[StoredBlob], now: float, added: SnapshotRef | None = None
) -> Past:
    """What a session comes back as: without an owner, under an epoch that nobody can have had.

    `blobs` are what is left of it, `added` is its `unnamed_point`; `now` is wall time. Claims are
    further apart than a millisecond, so no epoch that was in use, after whatever earlier loss, has
    reached the time of day. A closed session stays closed.
    """
    record = past.record
    held = {blob.snapshot_id for blob in blobs}
    snapshots = [ref for ref in past.snapshots if ref.id in held]
    seen = [record.epoch, *(ref.epoch for ref in snapshots)]
    next_index = record.next_index
    if added is not None:
        snapshots.append(added)
        seen.append(added.epoch)
        next_index = max(next_index, added.chunk_index)
    return replace(
        past,
        record=replace(
            record,
            owner=None,
            lease_until=0.0,
            epoch=max(max(seen) + 1, int(now * 1000)),
            next_index=next_index,
            sealed=max(record.sealed, next_index),
        ),
        digests={n: d for n, d in past.digests.items() if n >= next_index - DIGESTS_KEPT},
        snapshots=snapshots,
    )


def seen_before(index: int, epoch: int, *, want: int | None, lead_chunks: int) -> bool:
    """Whether all readers of a session are beyond chunk `index`, so that it is made for none.

    `want` is how far they let it come: `lead_chunks` beyond the one that is furthest. Only readers
    of a session that was brought back are further than the session.
    """
    return epoch >= RAISED and want is not None and want - lead_chunks > index


def check_start(start: int | None, record: SessionRecord) -> int:
    """The first index a viewer gets, as `rules.check_start` has it.

    A session that was brought back may stand behind its viewers; they wait for their next index. It
    cannot be told any more how far it had come, so any index up to `AHEAD_CHUNKS` beyond is taken.
    """
    behind = record.epoch >= RAISED
    if behind and start is not None and 0 <= start - record.next_index <= AHEAD_CHUNKS:
        return start
    return rules.check_start(start, record.next_index)
