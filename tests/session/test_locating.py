"""Who generates a session: what one look at the directory leads to, and what a router remembers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from echo_ray.errors import CapacityError, NoReplica, SessionClosed
from echo_ray.session import locating
from echo_ray.session.locating import (
    JITTER_S,
    Ask,
    Claim,
    Memory,
    Owner,
    SessionPaused,
    Standing,
    Wait,
    decide,
    holds_for_all,
)
from echo_ray.session.records import ReplicaRecord, SessionRecord, SessionState


def replica(name: str, *sessions: str) -> ReplicaRecord:
    return ReplicaRecord(id=name, node_id="n", pid=1, address=f"{name}:1", sessions=sessions)


A, B = replica("a"), replica("b")
OWNED = SessionRecord(id="s1", model="m", prompt="p", seed=1, owner="a", epoch=3, lease_until=100.0)
LATE = replace(OWNED, lease_until=90.0)
LOST = replace(OWNED, owner=None, lease_until=0.0)
PAUSED = replace(OWNED, state=SessionState.PAUSED, owner=None, lease_until=0.0)
OWNER = Owner("s1", "a", "a:1", 3)


def look(
    record: SessionRecord,
    *replicas: ReplicaRecord,
    ask: Ask | None = None,
    first: bool = False,
    cap: int = 8,
    memory: Memory | None = None,
) -> Standing | Wait | Claim:
    memory = memory or Memory()
    return decide(
        record,
        replicas,
        ask or Ask(),
        first=first,
        cap=cap,
        suspects=memory.suspects(0.0),
        pending=memory.pending(replicas, 0.0),
    )


def test_an_owner_whose_lease_runs_is_followed() -> None:
    assert look(OWNED, A, B, first=True) == Standing(OWNER)


def test_a_live_replica_whose_lease_looks_over_is_asked_before_it_is_taken_from() -> None:
    """A router's clock may be ahead; the replica renews the lease, or refuses and is failed."""
    assert look(LATE, A, B, first=True) == Standing(OWNER)
    assert isinstance(look(LATE, A, B, ask=Ask(failed=OWNER)), Claim)


@pytest.mark.parametrize(
    ("record", "replicas"),
    [(LOST, (A, B)), (OWNED, (B,)), (LATE, (B,))],
    ids=["given up", "the replica is gone", "the lease ran out as well"],
)
def test_a_lost_session_is_claimed_at_the_second_look(
    record: SessionRecord, replicas: tuple[ReplicaRecord, ...]
) -> None:
    assert look(record, *replicas, first=True) == Wait(JITTER_S)
    assert isinstance(look(record, *replicas), Claim)


def test_sessions_without_an_owner_spread_over_equal_replicas() -> None:
    equal = tuple(replica(name) for name in "abcd")
    chosen = {}
    for n in range(100):
        new = replace(LOST, id=f"s{n}", epoch=0)
        decision = look(new, *equal)
        assert isinstance(decision, Claim)
        assert look(new, *equal[::-1]) == decision
        chosen[decision.replica.id] = chosen.get(decision.replica.id, 0) + 1
    assert chosen.keys() == set("abcd")
    assert max(chosen.values()) < 50


def test_a_choice_in_a_sample_stands_unless_others_may_be_better() -> None:
    made = replace(LOST, fingerprint="m/one")
    same, other = replace(A, fingerprint="m/one"), replace(A, fingerprint="m/two")
    assert holds_for_all(Claim(same), made, ())
    assert holds_for_all(Claim(other), LOST, ())
    assert not holds_for_all(Claim(other), made, ())
    assert not holds_for_all(Claim(same), made, {"a"})
    assert holds_for_all(Wait(JITTER_S), made, {"a"})
    assert holds_for_all(Standing(OWNER), made, {"a"})


def test_a_new_session_is_claimed_at_once() -> None:
    new = replace(OWNED, owner=None, epoch=0, lease_until=0.0)
    assert look(new, A, first=True) == Claim(A)


def test_an_owner_that_failed_counts_as_none_until_somebody_claims() -> None:
    ask = Ask(failed=OWNER)
    assert isinstance(look(OWNED, A, B, ask=ask), Claim)
    newer = replace(OWNED, epoch=4)
    assert look(newer, A, B, ask=ask) == Standing(replace(OWNER, epoch=4))


def test_a_closed_session_is_refused() -> None:
    with pytest.raises(SessionClosed, match="s1 is closed; create another"):
        look(replace(OWNED, state=SessionState.CLOSED), A)


def test_a_pause_is_kept_unless_it_is_to_be_woken_or_was_for_want_of_readers() -> None:
    with pytest.raises(SessionPaused):
        look(PAUSED, A, ask=Ask(wake=False))
    with pytest.raises(SessionPaused):
        look(PAUSED, A, ask=Ask(wake=False, last_epoch=2))
    assert look(PAUSED, A, ask=Ask(wake=False, last_epoch=3)) == Claim(A)
    assert look(PAUSED, A, ask=Ask(wake=True)) == Claim(A)


def test_a_paused_session_never_stands_whatever_its_lease_says() -> None:
    assert look(replace(OWNED, state=SessionState.PAUSED), A) == Claim(A)


def test_replicas_that_refused_the_session_are_not_claimed_for() -> None:
    assert look(LOST, A, B, ask=Ask(avoid={"a"})) == Claim(B)
    with pytest.raises(NoReplica):
        look(LOST, A, ask=Ask(avoid={"a"}))


def test_a_full_house_is_refused() -> None:
    with pytest.raises(CapacityError, match="sessions_per_replica is 1"):
        look(LOST, replica("a", "s9"), cap=1)


def test_a_replica_that_failed_somebody_is_the_last_choice_for_a_while() -> None:
    memory = locating.failed(Memory(), "a", 0.0)
    assert look(LOST, A, B, memory=memory) == Claim(B)
    assert look(LOST, A, memory=memory) == Claim(A)
    assert memory.suspects(2.9) == {"a"}
    assert memory.suspects(3.0) == set()
    assert set(locating.failed(memory, "b", 3.0).avoided) == {"b"}


def test_a_claim_counts_until_the_replica_counts_it_or_time_passes() -> None:
    memory = locating.claimed(Memory(), "s2", "a", 0.0)
    assert memory.pending((A, B), 0.0) == {"a": 1}
    assert look(LOST, A, B, memory=memory) == Claim(B)
    assert memory.pending((replica("a", "s2"), B), 0.0) == {}
    assert memory.pending((A, B), 2.0) == {}
    with pytest.raises(CapacityError):
        look(LOST, A, cap=1, memory=memory)


def test_only_the_latest_claim_of_a_session_counts() -> None:
    memory = locating.claimed(Memory(), "s2", "a", 0.0)
    memory = locating.claimed(memory, "s2", "b", 1.0)
    assert memory.pending((A, B), 1.0) == {"b": 1}
    later = locating.claimed(memory, "s3", "a", 9.0)
    assert set(later.sent) == {"s3"}, "what counts no longer is forgotten"


def test_a_session_that_never_settles_is_refused_with_a_time_to_retry() -> None:
    error = locating.unsettled("s1")
    assert "s1 changed hands 5 times" in error.message
    assert error.retry_after_s == 1.0
