"""A planned move alone: where it goes, in which order, and what a failure leaves behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from echo_ray.errors import (
    CapacityError,
    ConflictError,
    Draining,
    EchoError,
    EngineError,
    Fenced,
    NoReplica,
    ReplicaNotFound,
    UnavailableError,
)
from echo_ray.session import moving
from echo_ray.session.locating import Owner
from echo_ray.session.moving import Move, Work, plan
from echo_ray.session.records import ReplicaRecord, SessionRecord, SessionState


def replica(name: str, state: str = "ready") -> ReplicaRecord:
    return ReplicaRecord(id=name, node_id="n", pid=1, address=f"{name}:1", state=state)


A, B, C = replica("a"), replica("b"), replica("c")
RECORD = SessionRecord(id="s1", model="m", prompt="p", seed=1, owner="a", epoch=3)
OWNER = Owner("s1", "b", "b:1", 4)


def planned() -> Move:
    move = plan(RECORD, (A, B), None, cap=8)
    assert move is not None
    return move


def test_a_move_prepares_claims_and_tells_in_this_order() -> None:
    move = planned()
    assert (move.target, move.work, move.epoch) == (B, Work.PREPARE, 3)
    move = moving.prepared(move)
    assert move.work is Work.CLAIM
    move = moving.claimed(move, OWNER)
    assert (move.work, move.epoch) == (Work.TELL, 4)
    move = moving.told(move)
    assert (move.work, move.failed) == (Work.DONE, None)


def test_the_best_other_replica_is_taken_unless_one_is_named() -> None:
    assert plan(RECORD, (A, B, C), None, cap=8) == Move(RECORD, B)
    assert plan(RECORD, (A, B, C), None, cap=8, suspects={"b"}) == Move(RECORD, C)
    assert plan(RECORD, (A, B, C), None, cap=8, pending={"b": 1}) == Move(RECORD, C)
    assert plan(RECORD, (A, B, C), "c", cap=8) == Move(RECORD, C)


def test_a_session_that_is_there_already_is_not_moved() -> None:
    assert plan(RECORD, (A, B), "a", cap=8) is None


@pytest.mark.parametrize(
    ("record", "state"),
    [
        (replace(RECORD, owner=None), "live"),
        (replace(RECORD, state=SessionState.PAUSED), "paused"),
        (replace(RECORD, state=SessionState.CLOSED), "closed"),
    ],
)
def test_without_an_owner_there_is_nothing_to_move_from(record: SessionRecord, state: str) -> None:
    with pytest.raises(ConflictError, match=f"s1 is {state} without an owner"):
        plan(record, (A, B), "b", cap=8)


def test_a_target_that_cannot_take_it_is_refused() -> None:
    with pytest.raises(ReplicaNotFound, match="'x' is not live; live: a, b"):
        plan(RECORD, (A, B), "x", cap=8)
    with pytest.raises(Draining, match="b is draining"):
        plan(RECORD, (A, replica("b", "draining")), "b", cap=8)
    with pytest.raises(NoReplica):
        plan(RECORD, (A,), None, cap=8)
    with pytest.raises(CapacityError):
        plan(RECORD, (A, B), None, cap=1, pending={"b": 1})


@pytest.mark.parametrize("error", [EngineError("cannot load"), UnavailableError("gone")])
def test_what_fails_before_the_claim_changes_nothing(error: EchoError) -> None:
    move = moving.failed(planned(), error)
    assert (move.work, move.owner, move.failed) == (Work.DONE, None, error)


def test_a_claim_that_comes_too_late_is_a_conflict() -> None:
    move = moving.failed(moving.prepared(planned()), Fenced("taken"))
    assert move.work is Work.DONE
    assert isinstance(move.failed, ConflictError)
    assert "changed hands" in move.failed.message
    assert not isinstance(move.failed, Fenced)


def test_a_target_that_cannot_be_told_owns_the_session_all_the_same() -> None:
    move = moving.claimed(moving.prepared(planned()), OWNER)
    move = moving.failed(move, UnavailableError("gone"))
    assert (move.work, move.epoch, move.failed) == (Work.DONE, 4, None)
