"""Where a fork can begin, what it takes along, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import new, ref

from echo_ray.errors import InvalidRequestError, SegmentBeyondEnd, SnapshotForeign
from echo_ray.session.forking import (
    Wish,
    check_chunk,
    check_fingerprint,
    forked,
    reach,
    starts,
    unreachable,
)
from echo_ray.session.records import ClipRef, OnIdle, Pace, SessionState


def points(*chunks: int) -> list:
    return [ref(f"p{n}", n) for n in chunks]


def test_the_chunk_asked_for_or_the_next_one() -> None:
    record = new(next_index=20, sealed=21)
    assert check_chunk(record, None) == 20
    assert check_chunk(record, 0) == 0
    assert check_chunk(record, 20) == 20
    with pytest.raises(SegmentBeyondEnd, match=r"chunk 21 lies beyond the end; .* 20"):
        check_chunk(record, 21)
    with pytest.raises(InvalidRequestError, match="-1 is negative"):
        check_chunk(record, -1)


@pytest.mark.parametrize(
    ("chunks", "chunk", "expected"),
    [
        ((8, 16, 24), 20, ["p16", "p8", None]),
        ((8, 16, 24), 16, ["p16", "p8", None]),
        ((8, 16, 24), 7, [None]),
        ((40, 48), 47, ["p40"]),
        ((40, 48), 39, []),
        ((16, 64), 36, ["p16"]),
        ((16, 64), 37, []),
        ((), 20, [None]),
        ((), 21, []),
    ],
)
def test_the_newest_point_at_or_before_the_chunk_is_best(
    chunks: tuple[int, ...], chunk: int, expected: list[str | None]
) -> None:
    found = starts(points(*chunks), chunk=chunk, limit=20)
    assert [s.id if s else None for s in found] == expected


def test_what_is_within_reach_is_said() -> None:
    assert reach([], next_index=9, limit=20) == ((0, 9),)
    assert reach(points(8, 16), next_index=100, limit=20) == ((0, 36),)
    assert reach(points(60, 90), next_index=100, limit=20) == ((0, 20), (60, 80), (90, 100))
    # A snapshot past the next chunk is of an owner that lost what came after it.
    assert reach(points(120), next_index=100, limit=20) == ((0, 20),)
    error = unreachable(new(next_index=100, sealed=100), 50, points(60, 90), limit=20)
    assert error.http_status == 410
    assert "what can: 0 to 20, 60 to 80, 90 to 100" in error.message


@given(
    chunks=st.lists(st.integers(1, 200), max_size=6),
    next_index=st.integers(0, 200),
    limit=st.integers(1, 40),
)
def test_reach_is_exactly_where_there_is_a_start(
    chunks: list[int], next_index: int, limit: int
) -> None:
    spans = reach(points(*chunks), next_index=next_index, limit=limit)
    for chunk in range(next_index + 1):
        there = any(first <= chunk <= last for first, last in spans)
        assert there == bool(starts(points(*chunks), chunk=chunk, limit=limit))
    assert all(a[1] + 1 < b[0] for a, b in pairwise(spans))


SOURCE = new(
    pace=Pace.MAX,
    on_idle=OnIdle.CLOSE,
    labels={"a": "b"},
    clip=ClipRef(id="clip-1", sha256="ab", frames=9),
    state=SessionState.CLOSED,
    owner="r1",
    epoch=7,
    lease_until=9.0,
    next_index=20,
    sealed=21,
    fingerprint="fp",
    created_at=1.0,
)


def test_a_fork_has_the_past_and_neither_owner_nor_state() -> None:
    made = forked(SOURCE, 12, new_id="s2", now=5.0, wish=Wish())
    assert made == new(
        "s2",
        pace=Pace.MAX,
        on_idle=OnIdle.CLOSE,
        labels={"a": "b"},
        clip=SOURCE.clip,
        created_at=5.0,
        next_index=12,
        sealed=12,
        fingerprint="fp",
    )
    assert made.state is SessionState.LIVE
    assert forked(SOURCE, 0, new_id="s2", now=5.0, wish=Wish()).fingerprint is None


def test_a_fork_has_what_was_wished_for() -> None:
    wish = Wish(labels={}, on_idle=OnIdle.CONTINUE, pace=Pace.REALTIME)
    made = forked(SOURCE, 12, new_id="s2", now=5.0, wish=wish)
    assert (made.labels, made.on_idle, made.pace) == ({}, OnIdle.CONTINUE, Pace.REALTIME)


def test_a_fingerprint_that_no_engine_here_would_load_is_refused() -> None:
    check_fingerprint(None, ["m/1/cpu"])
    check_fingerprint("m/1/cpu", [])
    check_fingerprint("m/1/gpu", ["m/2/cpu", "m/1/cpu"])
    with pytest.raises(SnapshotForeign, match="'m/1'; here runs 'm/2'"):
        check_fingerprint("m/1/cpu", ["m/2/cpu"])
