"""The snapshot codec gives back exactly what it was given, and refuses everything else by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from echo_ray.errors import (
    SnapshotCorrupt,
    SnapshotError,
    SnapshotForeign,
    SnapshotTruncated,
    SnapshotVersion,
)
from echo_ray.session.envelope import MAX_TEXT_BYTES
from echo_ray.session.snapshot import (
    DTYPE_BYTES,
    FORMAT,
    MAGIC,
    Buffer,
    Snapshot,
    decode,
    enclose,
    encode,
)

RELEASED = Path(__file__).parent / "released"
TEXT = st.text(max_size=12)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=12)
)
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
)


@st.composite
def buffers(draw: st.DrawFn) -> Buffer:
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = DTYPE_BYTES[dtype]
    for n in shape:
        size *= n
    return Buffer(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


SNAPSHOTS = st.builds(
    Snapshot,
    TEXT,
    st.dictionaries(TEXT, PLAIN, max_size=5),
    st.dictionaries(TEXT, buffers(), max_size=4),
)
SMALL = Snapshot(
    "fp-1",
    {"next_index": 8, "prompt": "a red ball", "memory": {"on": True}},
    {"sink": Buffer("float32", (2, 3), bytes(24)), "window": Buffer("uint8", (40,), b"\xa6" * 40)},
)
BLOB = encode(SMALL)
MAGIC_AT = range(1, BLOB.index(MAGIC.encode()) + len(MAGIC))


def body(**changes: Any) -> dict[str, Any]:
    """What stands between size and digest, with some of it changed; None leaves a key out."""
    whole = {
        "format": FORMAT,
        "fingerprint": "fp",
        "header": {"a": 1},
        "tensors": {"t": ["uint8", [2], b"xy"]},
    }
    return {k: v for k, v in {**whole, **changes}.items() if v is not None}


@given(SNAPSHOTS)
@example(SMALL)
def test_a_snapshot_comes_back_as_it_was(snapshot: Snapshot) -> None:
    assert decode(encode(snapshot)) == snapshot


@given(SNAPSHOTS)
def test_equal_snapshots_give_equal_bytes(snapshot: Snapshot) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: turned(v) for k, v in reversed(value.items())}
        return [turned(v) for v in value] if isinstance(value, list) else value

    twin = Snapshot(
        snapshot.fingerprint, turned(snapshot.header), dict(reversed(snapshot.tensors.items()))
    )
    assert encode(twin) == encode(snapshot)


def test_what_a_release_wrote_is_read_by_the_next() -> None:
    """The file never changes. A new format gets a file of its own and goes on reading this one."""
    assert decode((RELEASED / "snapshot-1.echo").read_bytes()) == SMALL


def test_the_file_is_one_plain_msgpack_map() -> None:
    data = msgpack.unpackb(BLOB)
    assert list(data) == [
        "magic",
        "size",
        "format",
        "fingerprint",
        "header",
        "tensors",
        "digest",
    ]
    assert int.from_bytes(data["size"], "big") == len(BLOB)


def test_every_truncation_is_called_one() -> None:
    for length in range(len(BLOB)):
        with pytest.raises(SnapshotTruncated, match=f"after {length} bytes"):
            decode(BLOB[:length])


@given(SNAPSHOTS, st.data())
def test_truncations_of_any_snapshot(snapshot: Snapshot, data: st.DataObject) -> None:
    blob = encode(snapshot)
    with pytest.raises(SnapshotTruncated):
        decode(blob[: data.draw(st.integers(0, len(blob) - 1))])


def test_every_flipped_bit_is_seen() -> None:
    for at in range(len(BLOB)):
        expected = SnapshotForeign if at in MAGIC_AT else SnapshotCorrupt
        for bit in range(8):
            damaged = bytearray(BLOB)
            damaged[at] ^= 1 << bit
            with pytest.raises(SnapshotError) as caught:
                decode(bytes(damaged))
            assert type(caught.value) is expected, (at, bit)


@given(SNAPSHOTS, st.data())
def test_flipped_bits_of_any_snapshot(snapshot: Snapshot, data: st.DataObject) -> None:
    damaged = bytearray(encode(snapshot))
    at = data.draw(st.integers(MAGIC_AT.stop, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SnapshotCorrupt):
        decode(bytes(damaged))


@given(st.binary(min_size=1, max_size=400))
@example(b"\x80\x04\x95\x0c\x00pickle")
@example(b"PK\x03\x04" + bytes(400))
@example(msgpack.packb({"magic": "other/format", "format": 1}))
@example(msgpack.packb([MAGIC]))
@example(b"\xc1")
def test_foreign_bytes_are_foreign(blob: bytes) -> None:
    assume(blob[0] & 0xF0 != 0x80 or not BLOB[1:].startswith(blob[1 : MAGIC_AT.stop]))
    with pytest.raises(SnapshotForeign):
        decode(blob)


def test_no_bytes_at_all_are_a_truncation() -> None:
    with pytest.raises(SnapshotTruncated, match="0 bytes"):
        decode(b"")


@given(st.binary(min_size=1, max_size=64))
def test_surplus_bytes_are_refused(more: bytes) -> None:
    with pytest.raises(SnapshotCorrupt):
        decode(BLOB + more)


@pytest.mark.parametrize("more", [{}, {"wholly": {"new": msgpack.Timestamp(1)}}])
@pytest.mark.parametrize("version", [FORMAT + 1, 2**40])
def test_a_newer_format_is_called_so(version: int, more: dict[str, Any]) -> None:
    with pytest.raises(SnapshotVersion, match=f"{version} is newer"):
        decode(enclose(body(format=version) | more))


def test_a_newer_format_that_is_damaged_is_called_damaged() -> None:
    blob = bytearray(enclose(body(format=FORMAT + 1)))
    blob[-50] ^= 1
    with pytest.raises(SnapshotCorrupt):
        decode(bytes(blob))


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0])
def test_a_format_that_is_no_version_is_refused(version: object) -> None:
    with pytest.raises(SnapshotCorrupt, match="positive number"):
        decode(enclose(body(format=version)))


@pytest.mark.parametrize("missing", ["fingerprint", "header", "tensors"])
def test_missing_keys_are_named(missing: str) -> None:
    with pytest.raises(SnapshotCorrupt, match=f"missing or surplus: {missing}"):
        decode(enclose(body(**{missing: None})))


def test_a_missing_format_is_refused() -> None:
    with pytest.raises(SnapshotCorrupt, match="format"):
        decode(enclose(body(format=None)))


def test_surplus_keys_are_named() -> None:
    with pytest.raises(SnapshotCorrupt, match="surplus: extra"):
        decode(enclose(body() | {"extra": 1}))


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": 3},
        {"header": [1]},
        {"header": {b"bytes": 1}},
        {"tensors": [1]},
        {"tensors": {b"t": ["uint8", [2], b"xy"]}},
        {"tensors": {"t": ["uint8", [2]]}},
        {"tensors": {"t": ["uint8", [2], "xy"]}},
        {"tensors": {"t": ["uint8", [True], b"x"]}},
        {"tensors": {"t": ["uint8", [-2], b"xy"]}},
        {"tensors": {"t": ["uint8", [3], b"xy"]}},
        {"tensors": {"t": ["object", [2], b"xy"]}},
        {"tensors": {"t": ["float32", [2**62, 2**62], b"xy"]}},
        {"header": {"when": msgpack.Timestamp(1)}},
        {"header": {"long": "x" * (MAX_TEXT_BYTES + 1)}},
        {"header": {"many": [0] * 70_000}},
    ],
)
def test_wellformed_nonsense_is_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(SnapshotCorrupt):
        decode(enclose(body(**changes)))


SIZE_AT = BLOB.index(b"size") + 6
DIGEST_HEAD_BYTES = len(msgpack.packb("digest")) + 2


def resealed(payload: bytes) -> bytes:
    """A file whose digest fits, whatever else is in it."""
    return payload[:-32] + hashlib.sha256(payload[: -32 - DIGEST_HEAD_BYTES]).digest()


def test_a_key_that_stands_twice_is_corrupt() -> None:
    blob = bytearray(enclose(body(header={"aa": 1, "ab": 2})))
    blob[blob.index(b"ab") + 1] = ord("a")
    with pytest.raises(SnapshotCorrupt, match="twice"):
        decode(resealed(bytes(blob)))


def test_a_size_that_lies_is_corrupt() -> None:
    blob = bytearray(BLOB)
    blob[SIZE_AT + 7] ^= 1
    with pytest.raises(SnapshotCorrupt, match="size says otherwise"):
        decode(resealed(bytes(blob)))


def test_more_than_the_limit_is_not_read() -> None:
    assert decode(BLOB, limit_bytes=len(BLOB)) == SMALL
    with pytest.raises(SnapshotError, match=f"at most {len(BLOB) - 1}"):
        decode(BLOB, limit_bytes=len(BLOB) - 1)


def _nested(depth: int) -> Any:
    return [] if depth == 0 else [_nested(depth - 1)]


@pytest.mark.parametrize(
    "header",
    [
        {"f": object()},
        {1: "x"},
        {"n": 2**64},
        {"s": "\ud800"},
        {"s": "x" * (MAX_TEXT_BYTES + 1)},
        {"l": [0] * 70_000},
        {"deep": _nested(40)},
    ],
)
def test_encode_refuses_what_decode_would_not_give_back(header: dict[Any, Any]) -> None:
    with pytest.raises(SnapshotError):
        encode(Snapshot("fp", header, {}))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("int4", (1,), 1), ("uint8", (-1,), 0), ("float32", (2,), 7)]
)
def test_a_buffer_must_fit_its_shape(dtype: str, shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(SnapshotCorrupt):
        Buffer(dtype, shape, bytes(size))
