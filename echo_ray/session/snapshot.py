"""The snapshot format: the envelope of every file around a session's state, never pickled.

    {magic, size, format, fingerprint, header, tensors: {name: [dtype, shape, bytes]}, digest}

`envelope.py` says what holds the file together. The codec knows nothing about models: names, dtypes
and shapes are whatever the engine put there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echo_ray.errors import (
    SnapshotCorrupt,
    SnapshotError,
    SnapshotForeign,
    SnapshotTruncated,
    SnapshotVersion,
)
from echo_ray.session.envelope import MAX_TEXT_BYTES, Envelope, pack

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
MAX_ITEMS = 2**16
MAX_DEPTH = 32
ENVELOPE = Envelope(
    name="snapshot",
    magic=MAGIC,
    format=FORMAT,
    max_items=MAX_ITEMS,
    source="a file written by echo_ray",
    remedy="fetch it again or use another",
    foreign=SnapshotForeign,
    truncated=SnapshotTruncated,
    corrupt=SnapshotCorrupt,
    newer=SnapshotVersion,
)
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
    data = ENVELOPE.open(blob, limit_bytes=limit_bytes)
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
    """The file of any body, whose first key is `format`."""
    _, pieces = ENVELOPE.close([pack(part) for pair in body.items() for part in pair], len(body))
    return b"".join(pieces)


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
