"""A planned move, carried out: asks replicas and the directory what `session/moving.py` says."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from echo_ray import wire
from echo_ray.errors import ConflictError, EchoError
from echo_ray.serve.front import Front
from echo_ray.serve.telemetry import log
from echo_ray.session import moving
from echo_ray.session.locating import Owner
from echo_ray.session.moving import Work
from echo_ray.session.records import SessionRecord

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

    Raises `ReplicaNotFound`, `NoReplica`, `CapacityError`, `Draining`, and `ConflictError` when the
    session has no owner to move from or changes hands meanwhile.
    """
    record = await front.get(session_id)
    source = record.owner or ""
    move = await front.owners.plan_move(record, to)
    if move is None:
        return Move(session_id, source, source, record.epoch, moved=False)
    front.relays.tell(session_id, wire.Migrating(to=move.target.id))
    while move.work is not Work.DONE:
        try:
            move = await _step(front, move)
        except EchoError as error:
            if move.owner is not None:
                # Viewers' pulls and the sweep look after the session from here.
                log(logging.WARNING, "own_failed", session=session_id, reason=error.message)
            move = moving.failed(move, error)
    if move.failed is not None:
        overtaken = isinstance(move.failed, ConflictError)
        front.telemetry.count("migrations", outcome="overtaken" if overtaken else "failed")
        if overtaken:
            tell_owner(front, await front.get(session_id))
        raise move.failed
    front.telemetry.count("migrations", outcome="ok")
    log(logging.INFO, "migrated", session=session_id, source=source, target=move.target.id)
    front.relays.tell(session_id, wire.Migrated(owner=move.target.id, epoch=move.epoch))
    front.relays.poke(session_id)
    return Move(session_id, source, move.target.id, move.epoch, moved=True)


def tell_owner(front: Front, record: SessionRecord) -> None:
    """Somebody else moved the session meanwhile: viewers here, too, hear where it went."""
    if record.owner is not None:
        front.relays.tell(record.id, wire.Migrated(owner=record.owner, epoch=record.epoch))
        front.relays.poke(record.id)


async def _step(front: Front, move: moving.Move) -> moving.Move:
    record, target = move.record, move.target
    if move.work is Work.PREPARE:
        shadow = Owner(record.id, target.id, target.address, record.epoch)
        await front.ask(shadow, f"/v1/prepare/{record.id}", timeout_s=PREPARE_TIMEOUT_S)
        return moving.prepared(move)
    if move.owner is None:
        return moving.claimed(move, await front.owners.claim(record, target))
    await front.ask(move.owner, f"/v1/own/{record.id}", epoch=move.epoch)
    return moving.told(move)
