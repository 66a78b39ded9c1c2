"""The archive: what goes in comes out, in bounded pieces, and nothing else is believed."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from stored import new

from echo_ray.errors import (
    ArchiveCorrupt,
    ArchiveError,
    ArchiveForeign,
    ArchiveTooLarge,
    ArchiveTruncated,
    ArchiveVersion,
)
from echo_ray.session.archive import FORMAT, MAGIC, Archive, decode, pieces
from echo_ray.session.control_log import DIGESTS_KEPT
from echo_ray.session.envelope import PIECE_BYTES
from echo_ray.session.records import ClipRef, ControlEntry, OnIdle, Pace, SessionState
from echo_ray.session.snapshot import Snapshot
from echo_ray.session.snapshot import encode as encode_snapshot

CLIP = b"clip" * 5
LIMIT = 2**24
ARCHIVE = Archive(
    record=new(
        prompt="ein \N{SNOWMAN}",
        seed=2**63 - 1,
        pace=Pace.MAX,
        on_idle=OnIdle.CONTINUE,
        labels={"a": ""},
        clip=ClipRef(id="clip-1", sha256=hashlib.sha256(CLIP).hexdigest(), frames=9),
        created_at=12.25,
        state=SessionState.PAUSED,
        next_index=20,
        sealed=20,
        fingerprint="m/1/cpu",
    ),
    controls=[
        ControlEntry(event_id="e1", chunk=3, prompt="blue"),
        ControlEntry(event_id="e0", chunk=3, prompt="red"),
        ControlEntry(event_id="e2", chunk=25, prompt="later"),
    ],
    digests={n: hashlib.sha256(bytes([n])).hexdigest() for n in range(5, 20)},
    point=16,
    snapshot=encode_snapshot(Snapshot("m/1/cpu", {}, {})),
    clip=CLIP,
)
BARE = Archive(record=new(), controls=[])


def file_of(archive: Archive = ARCHIVE) -> bytes:
    size, parts = pieces(archive)
    data = b"".join(parts)
    assert len(data) == size
    return data


@pytest.mark.parametrize("archive", [ARCHIVE, BARE, replace(ARCHIVE, clip=None)])
def test_what_goes_in_comes_out(archive: Archive) -> None:
    assert decode(file_of(archive), limit_bytes=LIMIT) == archive


def test_what_a_release_wrote_is_read_by_the_next() -> None:
    """The file never changes. A new format gets a file of its own and goes on reading this one."""
    released = Path(__file__).parent / "released" / "archive-1.echo"
    assert decode(released.read_bytes(), limit_bytes=LIMIT) == ARCHIVE


def test_owner_and_epoch_stay_behind() -> None:
    record = replace(ARCHIVE.record, owner="r1", epoch=7, lease_until=9.0, sealed=21)
    assert file_of(replace(ARCHIVE, record=record)) == file_of()


def test_it_is_one_msgpack_map_in_bounded_pieces() -> None:
    big = replace(ARCHIVE, snapshot=random.Random(0).randbytes(2 * PIECE_BYTES + 7))
    size, parts = pieces(big)
    sizes = [len(part) for part in parts]
    assert max(sizes) <= PIECE_BYTES
    assert sum(sizes) == size
    body = msgpack.unpackb(file_of(big))
    assert (body["magic"], body["format"]) == (MAGIC, FORMAT)
    assert int.from_bytes(body["size"], "big") == size
    assert body["snapshot"] == big.snapshot
    assert decode(file_of(big), limit_bytes=size) == big


def test_over_the_limit() -> None:
    data = file_of()
    with pytest.raises(ArchiveTooLarge, match=f"more than {len(data) - 1} bytes"):
        decode(data, limit_bytes=len(data) - 1)


@pytest.mark.parametrize(
    "data", [b"", b"\x8a", b"PK\x03\x04" * 99, encode_snapshot(Snapshot("f", {}, {}))]
)
def test_what_is_not_ours_is_foreign_or_empty(data: bytes) -> None:
    with pytest.raises((ArchiveForeign, ArchiveTruncated)):
        decode(data, limit_bytes=LIMIT)


def test_a_snapshot_file_is_foreign() -> None:
    with pytest.raises(ArchiveForeign, match="not an echo_ray archive"):
        decode(encode_snapshot(Snapshot("f", {}, {})), limit_bytes=LIMIT)


def test_every_cut_is_truncated_and_every_flip_is_noticed() -> None:
    data = file_of(replace(ARCHIVE, snapshot=b"s" * 40, digests={}))
    for end in range(20, len(data)):
        with pytest.raises(ArchiveTruncated, match=f"after {end} bytes"):
            decode(data[:end], limit_bytes=LIMIT)
    for at in range(len(data)):
        damaged = bytes([*data[:at], data[at] ^ 0x41, *data[at + 1 :]])
        with pytest.raises(ArchiveError):
            decode(damaged, limit_bytes=LIMIT)
    with pytest.raises(ArchiveCorrupt, match="checksum"):
        decode(data + b"x", limit_bytes=LIMIT)


def forge(**changes: Any) -> bytes:
    """A file with a valid checksum whose parts were changed."""
    body = msgpack.unpackb(file_of(), strict_map_key=False)
    session = changes.pop("session", {})
    body["session"] = {k: v for k, v in {**body["session"], **session}.items() if v is not ...}
    body = {k: v for k, v in {**body, **changes}.items() if v is not ...}
    body["size"], body["digest"] = bytes(8), bytes(32)
    packed = msgpack.packb(body)
    at = packed.index(b"\xc4\x08") + 2
    packed = packed[:at] + len(packed).to_bytes(8, "big") + packed[at + 8 :]
    return packed[:-32] + hashlib.sha256(packed[: -32 - 9]).digest()


def test_the_forger_can_write_a_good_one() -> None:
    assert decode(forge(), limit_bytes=LIMIT) == ARCHIVE


def test_a_newer_format_is_told_apart() -> None:
    with pytest.raises(ArchiveVersion, match="format 2 is newer"):
        decode(forge(format=2), limit_bytes=LIMIT)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 0},
        {"format": "1"},
        {"point": ...},
        {"point": 24},
        {"point": -1},
        {"point": 0},
        {"point": True},
        {"snapshot": None},
        {"snapshot": "text"},
        {"clip": b"another"},
        {"clip": "text"},
        {"controls": [["e1", 3]]},
        {"controls": [[1, 3, "p"]]},
        {"controls": [["e1", -3, "p"]]},
        {"controls": [["e1", True, "p"]]},
        {"controls": 5},
        {"digests": [[20, "d"]]},
        {"digests": [[-1, "d"]]},
        {"digests": [[5, 5]]},
        {"digests": [[5, "d" * 1000]]},
        {"digests": [[5, "d"]] * (DIGESTS_KEPT + 1)},
        {"session": {"prompt": ...}},
        {"session": {"prompt": 5}},
        {"session": {"seed": "7"}},
        {"session": {"seed": True}},
        {"session": {"pace": "walk"}},
        {"session": {"state": "asleep"}},
        {"session": {"next_index": -1}},
        {"session": {"next_index": 2**60}},
        {"session": {"labels": []}},
        {"session": {"clip": {"id": "c"}}},
        {"session": {"clip": None}},
        {"session": {"fingerprint": 5}},
        {"session": {"fingerprint": "f" * 1000}},
    ],
)
def test_what_a_checksum_cannot_excuse(changes: dict[str, Any]) -> None:
    with pytest.raises(ArchiveCorrupt):
        decode(forge(**changes), limit_bytes=LIMIT)
