"""Placement: the most slack wins, ties are stable, and a full house says when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_ray.errors import CapacityError, NoReplica
from echo_ray.session.placement import admit, best_replica, slack
from echo_ray.session.records import Pace, ReplicaRecord


def replica(
    name: str,
    *,
    sessions: int = 0,
    free: int = 0,
    chunk_s: float = 0.0,
    state: str = "ready",
    model: str = "m",
) -> ReplicaRecord:
    return ReplicaRecord(
        id=name,
        node_id="n",
        pid=1,
        address="127.0.0.1:1",
        state=state,
        model=model,
        sessions=tuple(f"{name}{i}" for i in range(sessions)),
        chunk_seconds=chunk_s,
        free_slots=free,
    )


def chosen(*replicas: ReplicaRecord, cap: int = 8, **more: object) -> str:
    return best_replica(replicas, model="m", cap=cap, **more).id  # type: ignore[arg-type]


def test_the_most_slack_wins() -> None:
    assert chosen(replica("a", free=1, chunk_s=0.1), replica("b", free=3, chunk_s=0.1)) == "b"


def test_a_replica_that_has_measured_nothing_counts_by_its_cap() -> None:
    assert chosen(replica("a", free=2, chunk_s=0.1), replica("b")) == "b"
    assert slack(replica("a", sessions=3), 8, {}) == 5


def test_ties_go_to_the_emptiest_then_to_the_first_given() -> None:
    assert chosen(replica("c"), replica("a"), replica("b")) == "c"
    busy = replica("a", sessions=2, free=1, chunk_s=0.1)
    idle = replica("b", sessions=1, free=1, chunk_s=0.1)
    assert chosen(busy, idle) == "b"


def test_sessions_just_sent_count_until_the_replica_counts_them() -> None:
    assert chosen(replica("a"), replica("b"), pending={"a": 1}) == "b"
    with pytest.raises(CapacityError):
        chosen(replica("a"), cap=2, pending={"a": 2})


def test_draining_avoided_and_foreign_replicas_are_not_eligible() -> None:
    others = (replica("a", state="draining"), replica("b", model="other"), replica("c"))
    assert chosen(*others, replica("d", sessions=5), avoid={"c"}) == "d"
    for few in ((), others[:1], others[1:2]):
        with pytest.raises(NoReplica) as caught:
            chosen(*few)
        assert caught.value.retry_after_s
    with pytest.raises(NoReplica):
        chosen(replica("a"), avoid={"a"})


def test_a_suspect_is_the_last_choice_but_one() -> None:
    idle, busy = replica("a", sessions=0), replica("b", sessions=6)
    assert chosen(idle, busy, suspects={"a"}) == "b"
    assert chosen(idle, busy, suspects={"a"}, cap=6) == "a"
    assert chosen(idle, suspects={"a"}) == "a"
    with pytest.raises(NoReplica):
        chosen(idle, suspects={"a"}, avoid={"a"})


def test_a_session_that_exists_is_placed_without_slack_but_not_over_the_cap() -> None:
    full = replica("a", sessions=7, free=-2, chunk_s=9.0)
    assert chosen(full) == "a"
    with pytest.raises(CapacityError) as caught:
        chosen(replica("a", sessions=8))
    assert caught.value.retry_after_s


def test_admission_needs_slack_for_realtime_and_only_the_cap_otherwise() -> None:
    tight = replica("a", sessions=1, free=0, chunk_s=0.5)
    with pytest.raises(CapacityError):
        admit([tight], model="m", pace=Pace.REALTIME, cap=8)
    admit([tight], model="m", pace=Pace.MAX, cap=8)
    admit([tight, replica("b")], model="m", pace=Pace.REALTIME, cap=8)
    with pytest.raises(CapacityError):
        admit([tight], model="m", pace=Pace.MAX, cap=1)
    with pytest.raises(NoReplica):
        admit([], model="m", pace=Pace.MAX, cap=8)


RECORDS = st.lists(
    st.builds(
        replica,
        st.sampled_from("abcdef"),
        sessions=st.integers(0, 5),
        free=st.integers(-2, 5),
        chunk_s=st.sampled_from([0.0, 0.3]),
        state=st.sampled_from(["ready", "draining"]),
    ),
    max_size=6,
    unique_by=lambda r: r.id,
)


@given(RECORDS, st.sets(st.sampled_from("abcdef")), st.randoms())
def test_the_choice_is_never_beaten_in_any_order(
    records: list[ReplicaRecord], avoid: set[str], rng: object
) -> None:
    try:
        best = best_replica(records, model="m", cap=5, avoid=avoid)
    except (NoReplica, CapacityError):
        assert all(r.state != "ready" or r.id in avoid or len(r.sessions) >= 5 for r in records)
        return
    assert best.state == "ready"
    assert best.id not in avoid
    rivals = [
        r for r in records if r.state == "ready" and r.id not in avoid and len(r.sessions) < 5
    ]
    assert all(slack(best, 5, {}) >= slack(r, 5, {}) for r in rivals)
    shuffled = list(records)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    other = best_replica(shuffled, model="m", cap=5, avoid=avoid)
    assert slack(other, 5, {}) == slack(best, 5, {})
    assert len(other.sessions) == len(best.sessions)
