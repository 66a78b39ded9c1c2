"""A session's past as a blob, and what a session comes back as from what is left of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import msgpack
import pytest
from stored import new, ref

from echo_ray.errors import (
    ArchiveCorrupt,
    ArchiveError,
    ArchiveForeign,
    ArchiveVersion,
    InvalidRequestError,
    SegmentBeyondEnd,
)
from echo_ray.session import restoring
from echo_ray.session.control_log import DIGESTS_KEPT
from echo_ray.session.forking import Past, check_past
from echo_ray.session.records import ClipRef, ControlEntry, OnIdle, Pace, SessionState
from echo_ray.session.restoring import AHEAD_CHUNKS, RAISED
from echo_ray.session.sweep import StoredBlob, pasts

NOW = 1_700_000_000.5
LIMIT = 2**20
PAST = Past(
    record=new(
        pace=Pace.MAX,
        on_idle=OnIdle.CONTINUE,
        labels={"team": "a"},
        clip=ClipRef(id="clip-1", sha256="ab" * 32, frames=21),
        created_at=12.25,
        state=SessionState.PAUSED,
        epoch=3,
        next_index=20,
        sealed=21,
        fingerprint="fp",
    ),
    controls=[
        ControlEntry(event_id="e1", chunk=3, prompt="ein \N{SNOWMAN}"),
        ControlEntry(event_id="e2", chunk=25, prompt="blue"),
    ],
    digests={n: f"digest-{n}" for n in range(8, 20)},
    snapshots=[
        ref("p0000000008-e1", 8, store="tiered", pinned=True),
        ref("p0000000016-e2", 16, store="tiered", epoch=2),
    ],
)


def blob(id_: str) -> StoredBlob:
    return StoredBlob(session_id="s1", snapshot_id=id_, size_bytes=21, stored_at=NOW - 60)


def decoded(data: bytes) -> Past:
    return restoring.decode(data, store="tiered", limit_bytes=LIMIT)


def test_a_past_is_read_as_it_was_written() -> None:
    assert decoded(restoring.encode(PAST)) == PAST


def test_owner_and_lease_are_no_part_of_it() -> None:
    owned = replace(PAST, record=replace(PAST.record, owner="r1", lease_until=9.0))
    assert decoded(restoring.encode(owned)) == PAST


def packed(**changes: object) -> bytes:
    outer = msgpack.unpackb(restoring.encode(PAST))
    body = changes.pop("body", None)
    if body is not None:
        inner = {**msgpack.unpackb(outer["body"]), **body}  # type: ignore[dict-item]
        outer["body"] = msgpack.packb(inner)
        outer["digest"] = hashlib.sha256(outer["body"]).digest()
    whole: bytes = msgpack.packb({**outer, **changes})
    return whole


@pytest.mark.parametrize(
    ("data", "kind", "why"),
    [
        (b"", ArchiveForeign, "not the past of a session"),
        (b"\xc1 rubbish", ArchiveForeign, "not the past of a session"),
        (restoring.encode(PAST)[:-9], ArchiveForeign, "not the past of a session"),
        (packed(magic="echo-ray/snapshot"), ArchiveForeign, "not the past"),
        (packed(format=2), ArchiveVersion, r"format 2 is newer .*\(1\); upgrade"),
        (packed(format=0), ArchiveCorrupt, "format 0 is not a positive"),
        (packed(digest=b"other"), ArchiveCorrupt, "does not match its checksum"),
        (packed(body={"epoch": "3"}), ArchiveCorrupt, "epoch '3'"),
        (packed(body={"snapshots": [["p8"]]}), ArchiveCorrupt, "cannot read"),
        (
            packed(body={"snapshots": [["p8", 8, 21, "d", 1.5, "1", False]]}),
            ArchiveCorrupt,
            "snapshot epoch '1'",
        ),
        (packed(body={"archive": b"x"}), ArchiveError, "archive"),
        (packed(body={"archive": 7}), ArchiveCorrupt, "cannot read"),
    ],
)
def test_anything_else_is_refused(data: bytes, kind: type[ArchiveError], why: str) -> None:
    with pytest.raises(kind, match=why):
        decoded(data)


def test_one_byte_that_differs_is_seen() -> None:
    data = bytearray(restoring.encode(PAST))
    data[data.index(b"ein ")] ^= 1
    with pytest.raises(ArchiveCorrupt, match="checksum"):
        decoded(bytes(data))


def test_the_ids_say_which_past_is_newer() -> None:
    record = PAST.record
    older_first = [
        restoring.past_id(PAST, NOW),
        restoring.past_id(PAST, NOW + 1),
        restoring.past_id(replace(PAST, controls=[*PAST.controls, PAST.controls[0]]), NOW),
        restoring.past_id(replace(PAST, record=replace(record, next_index=101)), NOW),
        restoring.past_id(replace(PAST, record=replace(record, epoch=11)), NOW),
    ]
    assert older_first[0] == "past-e3-n20-l2-t1700000000500"
    others = ["p0000000020-e4", "clip-1", "past-e3", "past-e3-n20-l2-t1x"]
    assert pasts([*others, *older_first]) == older_first[::-1]


HELD = [blob("p0000000008-e1"), blob("p0000000016-e2"), blob("clip-1"), blob("past-e3-n20-l2-t1")]


def test_a_session_comes_back_without_an_owner_under_an_epoch_of_now() -> None:
    back = restoring.brought_back(PAST, HELD, NOW)
    assert back == replace(PAST, record=replace(PAST.record, epoch=int(NOW * 1000)))
    assert back.record.epoch >= RAISED
    check_past(back)


@pytest.mark.parametrize("state", list(SessionState))
def test_it_comes_back_in_the_state_it_had(state: SessionState) -> None:
    past = replace(PAST, record=replace(PAST.record, state=state, owner="r1", lease_until=9.0))
    record = restoring.brought_back(past, HELD, NOW).record
    assert (record.state, record.owner, record.lease_until) == (state, None, 0.0)


def test_the_epoch_rises_even_when_the_clock_was_set_back() -> None:
    later = replace(PAST, record=replace(PAST.record, epoch=int(NOW * 1000) + 5000))
    assert restoring.brought_back(later, HELD, NOW).record.epoch == int(NOW * 1000) + 5001
    ahead = ref("p0000000016-e2", 16, epoch=int(NOW * 1000) + 7000)
    back = restoring.brought_back(replace(PAST, snapshots=[ahead]), HELD, NOW)
    assert back.record.epoch == int(NOW * 1000) + 7001


def test_snapshots_that_are_gone_are_left_out() -> None:
    back = restoring.brought_back(PAST, [blob("p0000000008-e1")], NOW)
    assert [s.id for s in back.snapshots] == ["p0000000008-e1"]
    assert restoring.brought_back(PAST, [], NOW).snapshots == []
    assert restoring.brought_back(PAST, [], NOW).record.next_index == 20


def test_a_newer_snapshot_that_is_not_named_is_found() -> None:
    assert restoring.unnamed_point(PAST, HELD) is None
    older = blob("p0000000012-e9")
    assert restoring.unnamed_point(PAST, [*HELD, older]) is None
    newer = [blob("p0000000024-e2"), blob("p0000000024-e3"), blob("p0000000018-e4")]
    found = restoring.unnamed_point(PAST, [*HELD, *newer])
    assert found is not None
    assert (found.blob.snapshot_id, found.chunk_index, found.epoch) == ("p0000000024-e3", 24, 3)
    # All that the past names are gone: any is better than none.
    found = restoring.unnamed_point(PAST, [older])
    assert found is not None
    assert found.chunk_index == 12


def test_a_newer_snapshot_carries_the_session_to_its_point() -> None:
    added = ref("p0000000024-e7", 24, epoch=7)
    back = restoring.brought_back(PAST, [*HELD, blob(added.id)], NOW, added)
    assert (back.record.next_index, back.record.sealed) == (24, 24)
    assert back.snapshots[-1] == added
    assert back.digests == PAST.digests
    check_past(back)
    behind = ref("p0000000018-e7", 18, epoch=7)
    assert restoring.brought_back(PAST, HELD, NOW, behind).record.next_index == 20
    far = ref("p0000009000-e7", 9000, epoch=7)
    back = restoring.brought_back(PAST, HELD, NOW, far)
    assert back.digests == {}
    assert back.record.next_index - DIGESTS_KEPT > 20
    check_past(back)


BACK = new(epoch=RAISED, next_index=20, sealed=20)


@pytest.mark.parametrize("start", [0, 20, 21, 20 + AHEAD_CHUNKS])
def test_a_viewer_may_be_ahead_of_a_session_that_was_brought_back(start: int) -> None:
    assert restoring.check_start(start, BACK) == start


def test_without_an_index_it_is_the_next_one() -> None:
    assert restoring.check_start(None, BACK) == 20


@pytest.mark.parametrize(
    ("start", "epoch"), [(21 + AHEAD_CHUNKS, RAISED), (21, RAISED - 1), (21, 0)]
)
def test_other_indices_beyond_the_end_are_refused(start: int, epoch: int) -> None:
    with pytest.raises(SegmentBeyondEnd, match=f"{start} lies beyond the end"):
        restoring.check_start(start, replace(BACK, epoch=epoch))


def test_a_negative_one_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="-1 is negative"):
        restoring.check_start(-1, BACK)


@pytest.mark.parametrize(
    ("index", "epoch", "want", "seen"),
    [
        (19, RAISED, 23, True),
        (20, RAISED, 23, False),
        (19, RAISED, None, False),
        (19, RAISED - 1, 99, False),
    ],
)
def test_what_all_readers_have_seen(index: int, epoch: int, want: int | None, seen: bool) -> None:
    assert restoring.seen_before(index, epoch, want=want, lead_chunks=3) is seen
