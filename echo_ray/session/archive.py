"""The archive: one session as one file, which another service can take in.

    {magic, size, format, session: {...}, controls: [[event_id, chunk, prompt]],
     digests: [[chunk, digest]], point, snapshot, clip, digest}

`envelope.py` says what holds the file together. `snapshot` is the file of `snapshot.py` for the
state at chunk `point`, or nil if the session is to be made again from its start; `clip` is what was
uploaded, or nil. Knows nothing of stores, and does not judge what a session may be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from echo_ray.errors import (
    ArchiveCorrupt,
    ArchiveForeign,
    ArchiveTooLarge,
    ArchiveTruncated,
    ArchiveVersion,
)
from echo_ray.session.control_log import DIGESTS_KEPT
from echo_ray.session.envelope import Envelope, pack
from echo_ray.session.records import (
    ClipRef,
    ControlEntry,
    OnIdle,
    Pace,
    SessionRecord,
    SessionState,
)

MAGIC = "echo-ray/archive"
FORMAT = 1
MAX_ITEMS = 2**20
MAX_NAME_CHARS = 256
"""Of a digest or a fingerprint."""
ENVELOPE = Envelope(
    name="archive",
    magic=MAGIC,
    format=FORMAT,
    max_items=MAX_ITEMS,
    source="a file that an export wrote",
    remedy="fetch it again or export the session again",
    foreign=ArchiveForeign,
    truncated=ArchiveTruncated,
    corrupt=ArchiveCorrupt,
    newer=ArchiveVersion,
)
_KEYS = ("session", "controls", "digests", "point", "snapshot", "clip")
_SESSION = {
    "id": str,
    "model": str,
    "prompt": str,
    "seed": int,
    "pace": str,
    "on_idle": str,
    "labels": dict,
    "created_at": float,
    "state": str,
    "next_index": int,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """One session with everything that makes it go on elsewhere."""

    record: SessionRecord
    """As it stood; whoever owned it is not a part of it."""
    controls: Sequence[ControlEntry] = ()
    """By chunk; those of one chunk in the order they were appended."""
    digests: Mapping[int, str] = field(default_factory=dict)
    point: int = 0
    """The chunk at which `snapshot` stands; 0 without one."""
    snapshot: bytes | None = field(default=None, repr=False)
    clip: bytes | None = field(default=None, repr=False)


def pieces(archive: Archive) -> tuple[int, Iterator[bytes]]:
    """The size of the file in bytes, and the file in pieces of at most about a megabyte."""
    head = [_session(archive.record), [[e.event_id, e.chunk, e.prompt] for e in archive.controls]]
    small = [*head, sorted(archive.digests.items()), archive.point]
    parts: list[bytes] = [pack(part) for pair in zip(_KEYS, small, strict=False) for part in pair]
    for name, blob in (("snapshot", archive.snapshot), ("clip", archive.clip)):
        parts.append(pack(name))
        parts += [_NIL] if blob is None else [_bin_head(blob), blob]
    return ENVELOPE.close([pack("format"), pack(FORMAT), *parts], 1 + len(_KEYS))


def decode(data: bytes, *, limit_bytes: int) -> Archive:
    """Read an archive, refusing everything that is not exactly one.

    Raises `ArchiveForeign`, `ArchiveTruncated`, `ArchiveCorrupt`, `ArchiveVersion`, and
    `ArchiveTooLarge` over `limit_bytes`.
    """
    if len(data) > limit_bytes:
        raise too_large(limit_bytes)
    body = ENVELOPE.open(data, limit_bytes=limit_bytes)
    if tuple(body) != ("magic", "size", "format", *_KEYS, "digest"):
        raise ArchiveCorrupt(f"archive keys are not those of format {FORMAT}: {sorted(body)[:20]}")
    try:
        return _archive(body)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArchiveCorrupt(f"archive holds what this release cannot read: {error!r}") from error


def too_large(limit_bytes: int) -> ArchiveTooLarge:
    """The answer to a file over the limit."""
    return ArchiveTooLarge(
        f"the archive has more than {limit_bytes} bytes, which is what "
        "storage.snapshot_limit_bytes and limits.* allow here; raise them"
    )


def _session(record: SessionRecord) -> dict[str, Any]:
    session = {name: getattr(record, name) for name in _SESSION}
    session["labels"] = dict(record.labels)
    session["fingerprint"] = record.fingerprint
    session["clip"] = None if record.clip is None else asdict(record.clip)
    for name in ("pace", "on_idle", "state"):
        session[name] = str(session[name])
    return session


def _archive(body: Mapping[str, Any]) -> Archive:
    session, point, snapshot, clip = (body[k] for k in ("session", "point", "snapshot", "clip"))
    record = _record(session)
    _check(_whole(point) and point <= record.next_index, f"point {point!r}")
    _check((snapshot is None) == (point == 0), f"point {point} and its snapshot")
    _check(snapshot is None or isinstance(snapshot, bytes), "snapshot")
    _check(clip is None or (isinstance(clip, bytes) and record.clip is not None), "clip")
    if clip is not None and record.clip is not None:
        _check(hashlib.sha256(clip).hexdigest() == record.clip.sha256, "the clip's digest")
    return Archive(
        record=record,
        controls=[_entry(*values) for values in body["controls"]],
        digests=_digests(body["digests"], record.next_index),
        point=point,
        snapshot=snapshot,
        clip=clip,
    )


def _record(session: Mapping[str, Any]) -> SessionRecord:
    values = {name: session[name] for name in _SESSION}
    for name, kind in _SESSION.items():
        _check(type(values[name]) is kind, f"session {name} {values[name]!r:.80}")
    _check(_whole(values["next_index"]), "session next_index")
    clip, fingerprint = session["clip"], session["fingerprint"]
    _check(fingerprint is None or _short(fingerprint), "session fingerprint")
    values["pace"], values["on_idle"] = Pace(values["pace"]), OnIdle(values["on_idle"])
    values["state"] = SessionState(values["state"])
    return SessionRecord(
        **values,
        sealed=values["next_index"],
        fingerprint=fingerprint,
        clip=None if clip is None else _clip(**clip),
    )


def _clip(id: object, sha256: object, frames: object) -> ClipRef:
    if not (isinstance(id, str) and isinstance(sha256, str) and isinstance(frames, int)):
        raise ArchiveCorrupt("archive: the session's clip does not fit")
    return ClipRef(id=id, sha256=sha256, frames=frames)


def _entry(event_id: object, chunk: object, prompt: object) -> ControlEntry:
    if not (isinstance(event_id, str) and isinstance(prompt, str)):
        raise ArchiveCorrupt(f"archive: a control entry is not text: {event_id!r:.80}")
    if not (isinstance(chunk, int) and _whole(chunk)):
        raise ArchiveCorrupt(f"archive: the chunk {chunk!r:.80} of {event_id!r:.80} is no index")
    return ControlEntry(event_id=event_id, chunk=chunk, prompt=prompt)


def _digests(pairs: Sequence[Any], next_index: int) -> dict[int, str]:
    _check(len(pairs) <= DIGESTS_KEPT, f"{len(pairs)} digests")
    digests = {}
    for index, digest in pairs:
        known = _whole(index) and next_index - DIGESTS_KEPT <= index < next_index
        _check(known and _short(digest), f"the digest of chunk {index!r:.80}")
        digests[index] = digest
    return digests


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise ArchiveCorrupt(f"archive: {what} does not fit; export the session again")


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARS


def _bin_head(blob: bytes) -> bytes:
    return b"\xc6" + len(blob).to_bytes(4, "big")


_NIL = b"\xc0"
