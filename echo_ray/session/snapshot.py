"""The snapshot format: one msgpack map, bounded, checksummed, never pickled.

    {magic, size, format, fingerprint, header, tensors: {name: [dtype, shape, bytes]}, digest}

`magic`, `size` (of the whole file, eight bytes) and `format` stand first, at fixed places, and last
`digest`, the SHA-256 of every byte before it. That much is the same in every format, past and to
come, so what is wrong with a file is known before any of it is believed: foreign by its magic,
truncated by its size, corrupt by its digest, too new by its format. The codec knows nothing about
models: names, dtypes and shapes are whatever the engine put there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from echo_ray.errors import (
    SnapshotCorrupt,
    SnapshotError,
    SnapshotForeign,
    SnapshotTruncated,
    SnapshotVersion,
)

MAGIC = "echo-ray/snapshot"
FORMAT = 1
DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
MAX_TEXT_BYTES = 2**20
MAX_ITEMS = 2**16
MAX_DEPTH = 32
_KEYS = ("magic", "size", "format", "fingerprint", "header", "tensors", "digest")


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor at rest: dtype name, shape, little-endian row-major bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise SnapshotCorrupt(f"tensor dtype {self.dtype!r} is unknown")
        count = 1
        for n in self.shape:
            if n < 0:
                raise SnapshotCorrupt(f"tensor shape {self.shape} has a negative size")
            count *= n
        expected = count * DTYPE_BYTES[self.dtype]
        if len(self.data) != expected:
            raise SnapshotCorrupt(
                f"{self.dtype} tensor of shape {self.shape}: {len(self.data)} bytes, not {expected}"
            )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session's state at a point, as a value.

    `header` is plain data: mappings with text keys, lists, text, bytes, numbers, booleans, None.
    """

    fingerprint: str
    header: Mapping[str, Any]
    tensors: Mapping[str, Buffer]


def encode(snapshot: Snapshot) -> bytes:
    """The bytes of a snapshot; equal snapshots give equal bytes.

    Raises `SnapshotError` for a header that `decode` would not give back.
    """
    return enclose(
        {
            "format": FORMAT,
            "fingerprint": _plain(snapshot.fingerprint),
            "header": _plain(snapshot.header),
            "tensors": {
                _key(name): [t.dtype, list(t.shape), t.data]
                for name, t in sorted(snapshot.tensors.items())
            },
        }
    )


def decode(blob: bytes, *, limit_bytes: int = 2**30) -> Snapshot:
    """Read a snapshot, refusing everything that is not exactly one.

    Raises `SnapshotForeign`, `SnapshotTruncated`, `SnapshotCorrupt` or `SnapshotVersion`; plain
    `SnapshotError` over `limit_bytes`.
    """
    if len(blob) > limit_bytes:
        raise SnapshotError(f"snapshot has {len(blob)} bytes; at most {limit_bytes} are read")
    _check_envelope(blob)
    _check_version(blob)
    data = _unpack(blob, limit_bytes)
    if data["size"] != len(blob).to_bytes(8, "big"):
        raise SnapshotCorrupt(f"snapshot has {len(blob)} bytes, its size says otherwise")
    if tuple(data) != _KEYS:
        wrong = sorted(str(k) for k in set(data) ^ set(_KEYS)) or ["not in their order"]
        raise SnapshotCorrupt(f"snapshot keys are missing or surplus: {', '.join(wrong)}")
    fingerprint, header, packed = (data[k] for k in ("fingerprint", "header", "tensors"))
    if not (isinstance(fingerprint, str) and isinstance(header, dict) and isinstance(packed, dict)):
        raise SnapshotCorrupt("snapshot fingerprint, header or tensors have the wrong type")
    try:
        _plain(header)
    except SnapshotError as error:
        raise SnapshotCorrupt(f"snapshot header: {error.message}") from error
    tensors = {name: _buffer(name, value) for name, value in packed.items()}
    return Snapshot(fingerprint, header, tensors)


def enclose(body: Mapping[str, Any]) -> bytes:
    """The file of any body: magic and size before it, digest behind it."""
    # A map of at most 15 keys begins with one byte.
    packed = [_pack(part) for pair in body.items() for part in pair]
    size = _BODY_AT + sum(len(p) for p in packed) + _TAIL_BYTES
    parts = [bytes([0x80 | len(body) + 3]), _OPENING, size.to_bytes(8, "big"), *packed]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join([*parts, _DIGEST_HEAD, digest.digest()])


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


_MAGIC_PAIR = _pack("magic") + _pack(MAGIC)
# The heads of two values whose length never changes: raw bytes, eight and thirty-two of them.
_OPENING = _MAGIC_PAIR + _pack("size") + b"\xc4\x08"
_DIGEST_HEAD = _pack("digest") + b"\xc4\x20"
_BODY_AT = 1 + len(_OPENING) + 8
_TAIL_BYTES = len(_DIGEST_HEAD) + 32


def _check_envelope(blob: bytes) -> None:
    if not _MAGIC_PAIR.startswith(blob[1 : 1 + len(_MAGIC_PAIR)]):
        raise _foreign()
    if len(blob) < _BODY_AT + _TAIL_BYTES:
        if blob and blob[0] & 0xF0 != 0x80:
            raise _foreign()
        raise _truncated(blob)
    split = len(blob) - _TAIL_BYTES
    digest = hashlib.sha256(memoryview(blob)[:split]).digest()
    if blob[split:] == _DIGEST_HEAD + digest:
        return
    size = int.from_bytes(blob[_BODY_AT - 8 : _BODY_AT], "big")
    # A file that ends as a whole one does was not cut: then it is the size that was damaged.
    if len(blob) < size and not blob.startswith(_DIGEST_HEAD, split):
        raise _truncated(blob)
    raise SnapshotCorrupt(
        f"snapshot of {len(blob)} bytes does not match its checksum; fetch it again or use another"
    )


def _check_version(blob: bytes) -> None:
    # The key and the longest number that msgpack knows.
    unpacker = msgpack.Unpacker()
    unpacker.feed(blob[_BODY_AT : _BODY_AT + 16])
    try:
        key, version = unpacker.unpack(), unpacker.unpack()
    except (ValueError, msgpack.UnpackException) as error:
        raise SnapshotCorrupt("snapshot format is unreadable; use another snapshot") from error
    number = isinstance(version, int) and not isinstance(version, bool)
    if key != "format" or not number or version < 1:
        raise SnapshotCorrupt(f"snapshot format {version!r} is not a positive number")
    if version > FORMAT:
        raise SnapshotVersion(
            f"snapshot format {version} is newer than this release reads ({FORMAT}); upgrade"
        )


def _unpack(blob: bytes, limit_bytes: int) -> dict[str, Any]:
    try:
        data = msgpack.unpackb(
            blob,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_without_twins,
            max_bin_len=limit_bytes,
            max_str_len=MAX_TEXT_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise SnapshotCorrupt(
            f"snapshot of {len(blob)} bytes is damaged and cannot be unpacked: {error}"
        ) from error
    if not isinstance(data, dict):
        raise SnapshotCorrupt(f"snapshot is a {type(data).__name__}, not a map")
    return data


def _without_twins(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _buffer(name: object, value: object) -> Buffer:
    if not isinstance(name, str):
        raise SnapshotCorrupt(f"tensor name {name!r} is not text")
    if not isinstance(value, list) or len(value) != 3:
        raise SnapshotCorrupt(f"tensor {name!r} is not [dtype, shape, bytes]")
    dtype, shape, data = value
    ok = isinstance(dtype, str) and isinstance(shape, list) and isinstance(data, bytes)
    if not ok or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise SnapshotCorrupt(f"tensor {name!r} is not [dtype, shape, bytes]")
    return Buffer(dtype, tuple(shape), data)


def _plain(value: Any, depth: int = 0) -> Any:
    """The value with its keys in order, if it is plain data within the bounds of `decode`."""
    if depth > MAX_DEPTH:
        raise SnapshotError(f"nested deeper than {MAX_DEPTH} levels; flatten it")
    if isinstance(value, Mapping | list | tuple) and len(value) > MAX_ITEMS:
        raise SnapshotError(f"{len(value)} items; at most {MAX_ITEMS} are kept")
    if isinstance(value, Mapping):
        return {_key(k): _plain(value[k], depth + 1) for k in sorted(value, key=_key)}
    if isinstance(value, list | tuple):
        return [_plain(v, depth + 1) for v in value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise SnapshotError(f"number {value} does not fit 64 bits")
    if value is None or isinstance(value, bool | int | float | bytes):
        return value
    raise SnapshotError(f"{type(value).__name__} is not plain data")


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise SnapshotError(f"key {key!r} is not text")
    return _text(key)


def _text(value: str) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise SnapshotError("text with half a surrogate pair; use valid Unicode") from error
    if size > MAX_TEXT_BYTES:
        raise SnapshotError(f"text of {size} bytes; at most {MAX_TEXT_BYTES} are kept")
    return value


def _truncated(blob: bytes) -> SnapshotTruncated:
    return SnapshotTruncated(f"snapshot ends early, after {len(blob)} bytes; fetch it again")


def _foreign() -> SnapshotForeign:
    return SnapshotForeign(
        "not an echo_ray snapshot: the magic is missing; give a file written by echo_ray"
    )
