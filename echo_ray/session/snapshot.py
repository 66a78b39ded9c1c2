"""The snapshot format: one msgpack map, bounded, checksummed, never pickled.

    {magic, format, fingerprint, header, tensors: {name: [dtype, shape, bytes]}, digest}

`digest` is the SHA-256 of the canonical packing of everything else. The codec knows nothing about
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
_KEYS = {"magic", "format", "fingerprint", "header", "tensors", "digest"}


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
    """A session's state at a point, as a value."""

    fingerprint: str
    header: Mapping[str, Any]
    tensors: Mapping[str, Buffer]


def encode(snapshot: Snapshot) -> bytes:
    """The bytes of a snapshot; equal snapshots give equal bytes."""
    body = _body(snapshot.fingerprint, snapshot.header, snapshot.tensors)
    packed: bytes = msgpack.packb({**body, "digest": _digest(body)}, use_bin_type=True)
    return packed


def decode(blob: bytes, *, limit_bytes: int = 2**30) -> Snapshot:
    """Read a snapshot, refusing everything that is not exactly one.

    Raises `SnapshotTruncated`, `SnapshotCorrupt`, `SnapshotForeign` or `SnapshotVersion`.
    """
    if len(blob) > limit_bytes:
        raise SnapshotError(f"snapshot has {len(blob)} bytes; at most {limit_bytes} are read")
    if not blob:
        raise SnapshotTruncated("snapshot is empty (0 bytes)")
    try:
        data = msgpack.unpackb(
            blob,
            raw=False,
            strict_map_key=True,
            max_bin_len=limit_bytes,
            max_str_len=2**20,
            max_array_len=2**16,
            max_map_len=2**16,
            max_ext_len=0,
        )
    except (msgpack.ExtraData, msgpack.FormatError, msgpack.StackError, UnicodeDecodeError) as e:
        raise _unreadable(blob) from e
    except ValueError as e:
        cut = "incomplete" in str(e).lower()
        raise _truncated(blob) if cut and _looks_ours(blob) else _unreadable(blob) from e
    except Exception as e:
        raise _unreadable(blob) from e
    return _checked(data)


def _checked(data: object) -> Snapshot:
    if not isinstance(data, dict) or data.get("magic") != MAGIC:
        raise SnapshotForeign(
            "not an echo_ray snapshot: the magic is missing; give a file written by echo_ray"
        )
    version = data.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SnapshotCorrupt(f"snapshot format {version!r} is not a positive number")
    if version > FORMAT:
        raise SnapshotVersion(
            f"snapshot format {version} is newer than this release reads ({FORMAT}); upgrade"
        )
    if set(data) != _KEYS:
        wrong = sorted(str(k) for k in set(data) ^ _KEYS)
        raise SnapshotCorrupt(f"snapshot keys are missing or surplus: {', '.join(wrong)}")
    fingerprint, header, packed, digest = (
        data[k] for k in ("fingerprint", "header", "tensors", "digest")
    )
    if not (isinstance(fingerprint, str) and isinstance(header, dict) and isinstance(packed, dict)):
        raise SnapshotCorrupt("snapshot fingerprint, header or tensors have the wrong type")
    tensors = {name: _buffer(name, value) for name, value in packed.items()}
    actual = _digest(_body(fingerprint, header, tensors))
    if digest != actual:
        raise SnapshotCorrupt(f"snapshot checksum does not match: says {digest!r}, is {actual!r}")
    return Snapshot(fingerprint, header, tensors)


def _buffer(name: str, value: object) -> Buffer:
    if not isinstance(value, list) or len(value) != 3:
        raise SnapshotCorrupt(f"tensor {name!r} is not [dtype, shape, bytes]")
    dtype, shape, data = value
    ok = isinstance(dtype, str) and isinstance(shape, list) and isinstance(data, bytes)
    if not ok or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise SnapshotCorrupt(f"tensor {name!r} is not [dtype, shape, bytes]")
    return Buffer(dtype, tuple(shape), data)


def _body(
    fingerprint: str, header: Mapping[str, Any], tensors: Mapping[str, Buffer]
) -> dict[str, Any]:
    return {
        "magic": MAGIC,
        "format": FORMAT,
        "fingerprint": fingerprint,
        "header": dict(sorted(header.items())),
        "tensors": {n: [t.dtype, list(t.shape), t.data] for n, t in sorted(tensors.items())},
    }


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(msgpack.packb(body, use_bin_type=True)).hexdigest()


def _looks_ours(blob: bytes) -> bool:
    return MAGIC.encode() in blob[:64]


def _truncated(blob: bytes) -> SnapshotTruncated:
    return SnapshotTruncated(f"snapshot ends early, after {len(blob)} bytes; fetch it again")


def _unreadable(blob: bytes) -> SnapshotError:
    if _looks_ours(blob):
        return SnapshotCorrupt(f"snapshot of {len(blob)} bytes is damaged and cannot be unpacked")
    return SnapshotForeign(
        "not an echo_ray snapshot: the magic is missing; give a file written by echo_ray"
    )
