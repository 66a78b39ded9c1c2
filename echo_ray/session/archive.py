"""The archive: one session as one file, which another service can take in. One msgpack map.

    {magic, size, format, session: {...}, controls: [[event_id, chunk, prompt]],
     digests: [[chunk, digest]], point, snapshot, clip, digest}

`magic`, `size` (of the whole file, eight bytes) and `format` stand first, at fixed places, and last
`digest`, the SHA-256 of every byte before it: what is wrong with a file is known before any of it
is believed, in this format and every later one. `snapshot` is the file of `snapshot.py` for the
state at chunk `point`, or nil if the session is to be made again from its start; `clip` is what was
uploaded, or nil. Knows nothing of stores, and does not judge what a session may be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

from echo_ray.errors import (
    ArchiveCorrupt,
    ArchiveForeign,
    ArchiveTooLarge,
    ArchiveTruncated,
    ArchiveVersion,
)
from echo_ray.session.control_log import DIGESTS_KEPT
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
PIECE_BYTES = 2**20
MAX_TEXT_BYTES = 2**20
MAX_ITEMS = 2**20
MAX_NAME_CHARS = 256
"""Of a digest or a fingerprint."""
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
    parts: list[bytes] = [_pack(part) for pair in zip(_KEYS, small, strict=False) for part in pair]
    for name, blob in (("snapshot", archive.snapshot), ("clip", archive.clip)):
        parts.append(_pack(name))
        parts += [_NIL] if blob is None else [_bin_head(blob), blob]
    parts.insert(0, _pack("format") + _pack(FORMAT))
    size = _BODY_AT + sum(len(part) for part in parts) + _TAIL_BYTES
    parts.insert(0, _OPENING + size.to_bytes(8, "big"))
    return size, _hashed(parts)


def decode(data: bytes, *, limit_bytes: int) -> Archive:
    """Read an archive, refusing everything that is not exactly one.

    Raises `ArchiveForeign`, `ArchiveTruncated`, `ArchiveCorrupt`, `ArchiveVersion`, and
    `ArchiveTooLarge` over `limit_bytes`.
    """
    if len(data) > limit_bytes:
        raise too_large(limit_bytes)
    _check_envelope(data)
    body = _unpack(data, limit_bytes)
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


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def _bin_head(blob: bytes) -> bytes:
    return b"\xc6" + len(blob).to_bytes(4, "big")


_NIL = b"\xc0"
_MAGIC_PAIR = _pack("magic") + _pack(MAGIC)
# A map of ten pairs; behind each head a value whose length never changes.
_OPENING = b"\x8a" + _MAGIC_PAIR + _pack("size") + b"\xc4\x08"
_DIGEST_HEAD = _pack("digest") + b"\xc4\x20"
_BODY_AT = len(_OPENING) + 8
_TAIL_BYTES = len(_DIGEST_HEAD) + 32


def _hashed(parts: Sequence[bytes]) -> Iterator[bytes]:
    sha256 = hashlib.sha256()
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), PIECE_BYTES):
            piece = bytes(view[at : at + PIECE_BYTES])
            sha256.update(piece)
            yield piece
    yield _DIGEST_HEAD + sha256.digest()


def _check_envelope(data: bytes) -> None:
    # A map of at most 15 pairs begins with one byte.
    ours = _MAGIC_PAIR.startswith(data[1 : 1 + len(_MAGIC_PAIR)])
    if not data or data[0] & 0xF0 != 0x80 or not ours:
        raise ArchiveForeign("not an echo_ray archive; give a file that an export wrote")
    size = int.from_bytes(data[_BODY_AT - 8 : _BODY_AT], "big")
    if len(data) < _BODY_AT + _TAIL_BYTES or len(data) < size:
        raise ArchiveTruncated(f"the archive ends early, after {len(data)} bytes; fetch it again")
    split = len(data) - _TAIL_BYTES
    digest = hashlib.sha256(memoryview(data)[:split]).digest()
    if data[split:] != _DIGEST_HEAD + digest or size != len(data):
        raise ArchiveCorrupt(
            f"the archive of {len(data)} bytes does not match its checksum; fetch it again"
        )
    unpacker = msgpack.Unpacker()
    # The key and the longest number that msgpack knows.
    unpacker.feed(data[_BODY_AT : _BODY_AT + 16])
    try:
        key, version = unpacker.unpack(), unpacker.unpack()
    except (ValueError, msgpack.UnpackException) as error:
        raise ArchiveCorrupt("the archive's format is unreadable; export it again") from error
    if key != "format" or type(version) is not int or version < 1:
        raise ArchiveCorrupt(f"the archive's format {version!r:.80} is not a positive number")
    if version > FORMAT:
        raise ArchiveVersion(
            f"archive format {version} is newer than this release reads ({FORMAT}); upgrade"
        )


def _unpack(data: bytes, limit_bytes: int) -> dict[str, Any]:
    try:
        body = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_bin_len=limit_bytes,
            max_str_len=MAX_TEXT_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ArchiveCorrupt(f"the archive cannot be unpacked: {error}") from error
    if not isinstance(body, dict):
        raise ArchiveCorrupt(f"the archive is a {type(body).__name__}, not a map")
    return body
