"""A planned move of a session, as a value: another replica catches up first, then takes over.

    plan(record, replicas, to) -> the move, or an error
    work(move) -> prepare the target, claim for it, tell it, or done

The owner serves until the claim, so that readers see neither a gap nor a repeated chunk. What fails
before the claim leaves everything as it was; nothing that fails after it undoes the move.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from echo_ray.errors import ConflictError, Draining, EchoError, Fenced, ReplicaNotFound
from echo_ray.session.fingerprint import ResumePolicy
from echo_ray.session.locating import Owner
from echo_ray.session.placement import best_replica, fitting
from echo_ray.session.records import ReplicaRecord, SessionRecord, SessionState


class Work(Enum):
    """The next step of a move."""

    PREPARE = auto()
    """Have the target catch up as a shadow, and wait until it has."""
    CLAIM = auto()
    """Claim the session for the target if the record still stands."""
    TELL = auto()
    """Tell the target that it owns the session; without viewers nobody else would."""
    DONE = auto()


@dataclass(frozen=True, slots=True)
class Move:
    """One session's way from the owner that `record` names to `target`."""

    record: SessionRecord
    """As it stood when the move was planned; the claim holds only while it does."""
    target: ReplicaRecord
    work: Work = Work.PREPARE
    owner: Owner | None = None
    """The new owner, once there is one."""
    failed: EchoError | None = None
    """Why nothing was changed."""

    @property
    def epoch(self) -> int:
        """The epoch under which the session is generated as far as this move knows."""
        return self.record.epoch if self.owner is None else self.owner.epoch


def plan(
    record: SessionRecord,
    replicas: Sequence[ReplicaRecord],
    to: str | None,
    *,
    cap: int,
    policy: ResumePolicy = ResumePolicy.EXACT,
    suspects: Collection[str] = (),
    pending: Mapping[str, int] | None = None,
) -> Move | None:
    """The move to replica `to`, or to the best other one; None if it is there already.

    Raises `ConflictError` for a session without an owner, `ReplicaNotFound`, `Draining`,
    `NoReplica` (`NoFittingReplica`), `CapacityError`.
    """
    if record.state is not SessionState.LIVE or record.owner is None:
        raise ConflictError(
            f"session {record.id} is {record.state.value} without an owner; watch or resume it"
        )
    if to == record.owner:
        return None
    if to is not None:
        (target,) = fitting([_named(replicas, to)], record.fingerprint, policy)
        return Move(record, target)
    best = best_replica(
        replicas,
        model=record.model,
        cap=cap,
        made_by=record.fingerprint,
        policy=policy,
        avoid={record.owner},
        suspects=suspects,
        pending=pending,
    )
    return Move(record, best)


def prepared(move: Move) -> Move:
    """The target has made every committed chunk and follows."""
    return replace(move, work=Work.CLAIM)


def claimed(move: Move, owner: Owner) -> Move:
    """The target owns the session."""
    return replace(move, work=Work.TELL, owner=owner)


def told(move: Move) -> Move:
    """The target knows it."""
    return replace(move, work=Work.DONE)


def failed(move: Move, error: EchoError) -> Move:
    """The step has failed, and with it the move, unless the claim is made."""
    if move.owner is None and isinstance(error, Fenced):
        error = ConflictError(
            f"session {move.record.id} changed hands while it was being moved; look and retry"
        )
    return replace(move, work=Work.DONE, failed=error if move.owner is None else None)


def _named(replicas: Sequence[ReplicaRecord], to: str) -> ReplicaRecord:
    found = next((r for r in replicas if r.id == to), None)
    if found is None:
        known = ", ".join(r.id for r in replicas) or "none"
        raise ReplicaNotFound(f"replica {to!r} is not live; live: {known}", param="to")
    if found.state != "ready":
        raise Draining(f"replica {to} is {found.state}; name another one", param="to")
    return found
