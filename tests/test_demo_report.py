"""The demo's verdict: it must see what is lost, doubled, different or late."""

from __future__ import annotations

import pytest
from small import small_engine

from echo_ray.commands.demo import BUFFER_S, Viewing
from echo_ray.commands.demo_report import complaints, examine, stall_seconds, table
from echo_ray.session.chunk import Chunk

COUNT = 8


def truth() -> list[Chunk]:
    engine = small_engine()
    state = engine.open("a red ball", 1)
    return [engine.step(state) for _ in range(COUNT)]


def viewing(chunks: list[Chunk]) -> Viewing:
    shape = small_engine().shape
    return Viewing(
        name="first",
        session_id="s",
        arrivals=[shape.start_s(c.index) for c in chunks],
        indices=[c.index for c in chunks],
        digests=[c.digest for c in chunks],
        owners=["a"] * 4 + ["b"] * 4,
        switched_at=3,
        killed_at=1.0,
        snapshot_bytes=100,
    )


def test_a_whole_stream_is_clean() -> None:
    chunks, shape = truth(), small_engine().shape
    seen = viewing(chunks)
    found = examine(seen, chunks, shape)
    assert (found.lost, found.duplicated, found.differing, found.owners) == (0, 0, 0, 2)
    assert found.frames == 9 + 12 * (COUNT - 1)
    assert found.stall_s == 0
    assert complaints([seen], {"first": found}) == []
    assert "0/0/0" in table([seen], {"first": found})


@pytest.mark.parametrize(
    ("change", "expected"),
    [("lose", (1, 0, 0)), ("double", (0, 1, 0)), ("differ", (0, 0, 1)), ("swap", (0, 1, 0))],
)
def test_every_kind_of_damage_is_counted(change: str, expected: tuple[int, int, int]) -> None:
    chunks, shape = truth(), small_engine().shape
    seen = viewing(chunks)
    if change == "lose":
        for row in (seen.arrivals, seen.indices, seen.digests, seen.owners):
            del row[5]
    elif change == "double":
        for row in (seen.arrivals, seen.indices, seen.digests, seen.owners):
            row.insert(5, row[5])  # type: ignore[arg-type]
    elif change == "differ":
        seen.digests[5] = "0" * 64
    else:
        seen.indices[4], seen.indices[5] = seen.indices[5], seen.indices[4]
        seen.digests[4], seen.digests[5] = seen.digests[5], seen.digests[4]
    found = examine(seen, chunks, shape)
    assert (found.lost, found.duplicated, found.differing) == expected
    assert complaints([seen], {"first": found}) != []


def test_promises_that_were_never_put_to_the_test_are_broken() -> None:
    chunks, shape = truth(), small_engine().shape
    seen = viewing(chunks)
    seen.owners, seen.switched_at, seen.snapshot_bytes = ["a"] * COUNT, None, 0
    said = complaints([seen], {"first": examine(seen, chunks, shape)})
    assert len(said) == 3


def test_stalls_add_up_and_are_not_counted_twice() -> None:
    chunks, shape = truth(), small_engine().shape
    seen = viewing(chunks)
    late = BUFFER_S + 1.5
    seen.arrivals = [a + (late if i >= 4 else 0) for i, a in enumerate(seen.arrivals)]
    assert stall_seconds(seen, shape) == pytest.approx(1.5)
