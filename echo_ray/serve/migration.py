"""A planned move: another replica catches up first, then ownership changes at a boundary.

The target loads the last point and follows the log while the owner still serves, so viewers see
neither a gap nor a repeated chunk. If anything fails before the claim, nothing has changed.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from echo_ray import wire
from echo_ray.errors import ConflictError, Draining, EchoError, Fenced, ReplicaNotFound
from echo_ray.serve.front import Front
from echo_ray.serve.ownership import Owner
from echo_ray.serve.telemetry import log
from echo_ray.session.records import ReplicaRecord, SessionRecord, SessionState

PREPARE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Move:
    """What a migration did: from whom, to whom, under which epoch."""

    session_id: str
    source: str
    target: str
    epoch: int
    moved: bool


async def migrate(front: Front, session_id: str, to: str | None = None) -> Move:
    """Move a session to replica `to`, or to the best other one.

    Raises `ReplicaNotFound`, `NoReplica`, `Draining`, and `ConflictError` when the session has no
    owner to move from or changes hands meanwhile.
    """
    record = await front.get(session_id)
    if record.state is not SessionState.LIVE or record.owner is None:
        raise ConflictError(
            f"session {session_id} is {record.state.value} without an owner; watch or resume it"
        )
    if to == record.owner:
        return Move(session_id, record.owner, record.owner, record.epoch, moved=False)
    target = await _target(front, record, to)
    front.relays.tell(session_id, wire.Migrating(to=target.id))
    try:
        owner = await _hand_over(front, record, target)
    except EchoError:
        front.telemetry.count("migrations", outcome="failed")
        raise
    front.telemetry.count("migrations", outcome="ok")
    front.relays.tell(session_id, wire.Migrated(owner=target.id, epoch=owner.epoch))
    front.relays.poke(session_id)
    return Move(session_id, record.owner, target.id, owner.epoch, moved=True)


async def _target(front: Front, record: SessionRecord, to: str | None) -> ReplicaRecord:
    if to is None:
        return await front.owners.another(record)
    replicas = await asyncio.to_thread(front.directory.replicas)
    found = next((r for r in replicas if r.id == to), None)
    if found is None:
        known = ", ".join(r.id for r in replicas) or "none"
        raise ReplicaNotFound(f"replica {to!r} is not live; live: {known}", param="to")
    if found.state != "ready":
        raise Draining(f"replica {to} is {found.state}; name another one", param="to")
    return found


async def _hand_over(front: Front, record: SessionRecord, target: ReplicaRecord) -> Owner:
    shadow = Owner(record.id, target.id, target.address, record.epoch)
    await front.ask(shadow, f"/v1/prepare/{record.id}", timeout_s=PREPARE_TIMEOUT_S)
    try:
        owner = await front.owners.claim(record, target)
    except Fenced as e:
        raise ConflictError(
            f"session {record.id} changed hands while it was being moved; look and retry"
        ) from e
    try:
        # Without viewers nobody else would tell the new owner.
        await front.ask(owner, f"/v1/own/{record.id}", epoch=owner.epoch)
    except EchoError as e:
        # The move stands; viewers' pulls and the sweep look after the session from here.
        log(logging.WARNING, "own_failed", session=record.id, reason=e.message)
    return owner
