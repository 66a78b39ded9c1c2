from hypothesis import given
from hypothesis import strategies as st

from echo_ray.session.records import ControlEntry, SnapshotRef
from echo_ray.session.replay import (
    ControlLog,
    EventMarks,
    Verdict,
    compare,
    points_to_try,
    to_prune,
)


def ref(index, *, name=None, pinned=False, created_at=0.0):
    return SnapshotRef(
        id=name or f"p{index}",
        session_id="s1",
        chunk_index=index,
        size_bytes=1,
        digest="",
        created_at=created_at,
        store="memory",
        epoch=1,
        pinned=pinned,
    )


def tried(indices, **plan):
    points = points_to_try([ref(n) for n in indices], **plan)
    return [p.chunk_index if p else 0 for p in points]


def test_the_newest_point_at_or_before_the_needed_chunk_comes_first():
    plan = {"next_index": 30, "limit": 64}
    assert tried([8, 16, 24], needed=30, **plan) == [24, 16, 8, 0]
    assert tried([8, 16, 24], needed=24, **plan) == [24, 16, 8, 0]
    assert tried([8, 16, 24], needed=23, **plan) == [16, 8, 0]
    assert tried([8, 16, 24], needed=3, **plan) == [0]
    assert tried([], needed=30, **plan) == [0]


def test_points_beyond_the_next_chunk_and_refused_ones_are_passed_over():
    assert tried([8, 16], needed=12, next_index=12, limit=64) == [8, 0]
    points = points_to_try([ref(8), ref(16)], next_index=20, needed=20, limit=64, refused={"p16"})
    assert [p.id if p else None for p in points] == ["p8", None]


def test_going_on_matters_more_than_a_past_that_is_too_far_back():
    assert tried([80, 96], needed=10, next_index=100, limit=64) == [80, 96, 0]
    assert tried([8], needed=100, next_index=100, limit=64) == [8, 0]
    assert tried([8, 16, 96], needed=90, next_index=100, limit=64) == [96, 16, 8, 0]


@given(
    st.lists(st.integers(0, 200), max_size=12),
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(1, 100),
)
def test_a_plan_always_ends_somewhere_and_never_beyond_the_next_chunk(
    indices, next_index, needed, limit
):
    points = tried(indices, next_index=next_index, needed=needed, limit=limit)
    assert points
    assert 0 in points
    assert all(p <= next_index for p in points)


def log(*entries):
    return ControlLog([ControlEntry(event_id=i, chunk=c, prompt=p) for i, c, p in entries])


def test_events_start_stay_active_and_complete_when_superseded():
    controls = log(("a", 2, "A"), ("b", 5, "B"), ("c", 5, "C"), ("d", 9, "D"))
    assert controls.marks(0) == EventMarks()
    assert controls.marks(2) == EventMarks(("a",), ("a",), ())
    assert controls.marks(4) == EventMarks((), ("a",), ())
    assert controls.marks(5) == EventMarks(("b", "c"), ("c",), ("a", "b"))
    assert controls.marks(6) == EventMarks((), ("c",), ())
    assert controls.marks(9) == EventMarks(("d",), ("d",), ("c",))
    assert controls.prompts(5) == ("B", "C")
    assert controls.prompts(6) == ()


def test_the_log_takes_what_was_read_later():
    controls = log(("a", 2, "A"), ("x", 7, "X"))
    controls.fix(5, [ControlEntry(event_id="b", chunk=5, prompt="B")])
    assert controls.prompts(2) == ("A",)
    assert controls.prompts(5) == ("B",)
    assert controls.prompts(7) == ()


def test_a_replayed_chunk_is_compared_with_the_committed_one():
    assert compare({3: "d"}, 3, "d") is Verdict.SAME
    assert compare({3: "d"}, 3, "e") is Verdict.DIFFERENT
    assert compare({}, 3, "e") is Verdict.UNKNOWN


def test_pruning_keeps_the_newest_and_every_pinned_one():
    refs = [ref(8), ref(16, pinned=True), ref(24), ref(32), ref(40, name="a"), ref(40, name="b")]
    assert [s.id for s in to_prune(refs, kept=2)] == ["p32", "p24", "p8"]
    assert to_prune(refs, kept=9) == ()


def test_pruning_never_takes_the_spared_one_nor_another_in_its_place():
    refs = [ref(index) for index in (8, 16, 24, 32)]
    assert [s.id for s in to_prune(refs, kept=1, spared="p16")] == ["p24", "p8"]
    assert [s.id for s in to_prune(refs, kept=1, spared="p32")] == ["p24", "p16", "p8"]
    assert [s.id for s in to_prune(refs, kept=3, spared="ghost")] == ["p8"]
