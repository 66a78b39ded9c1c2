"""Administration: who serves what, moving one session, and emptying a replica."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel, Field

from echo_ray.errors import ReplicaNotFound
from echo_ray.serve.front import Front
from echo_ray.serve.migration import migrate
from echo_ray.serve.schemas import (
    REFUSALS,
    MoveRequest,
    MoveView,
    ReplicaList,
    ReplicaView,
    Request,
)
from echo_ray.session.draining import MAX_WITHIN_S
from echo_ray.session.locating import Owner
from echo_ray.session.records import ReplicaRecord


class DrainRequest(Request):
    deadline_s: float | None = Field(
        None,
        ge=0,
        le=MAX_WITHIN_S,
        description="sessions that are still there after so long are parked; session.drain_s if "
        "missing",
    )


class DrainView(BaseModel):
    id: str
    state: str
    sessions: list[str]
    deadline_s: float = Field(description="what is left of the time; the earliest request counts")


def admin_routes(front: Front) -> APIRouter:
    """The routes below `/v1/admin`."""
    routes = APIRouter(prefix="/v1/admin", responses=REFUSALS, tags=["admin"])

    @routes.get("/replicas")
    async def list_replicas() -> ReplicaList:
        """Live replicas, what they serve and how quick they are."""
        replicas = await asyncio.to_thread(front.directory.replicas)
        return ReplicaList(replicas=[ReplicaView.of(r) for r in replicas])

    @routes.post("/replicas/{replica_id}/drain", status_code=202)
    async def drain_replica(replica_id: str, body: DrainRequest | None = None) -> DrainView:
        """Have a replica's sessions moved elsewhere; it takes none any more. Twice is once."""
        replica = await _live(front, replica_id)
        asked = None if body is None else body.deadline_s
        within_s = front.config.session.drain_s if asked is None else asked
        door = Owner("", replica.id, replica.address, 0)
        answer = await front.ask(door, "/v1/drain", within_ms=int(within_s * 1000))
        return DrainView(id=replica.id, sessions=list(replica.sessions), **answer.json())

    @routes.post("/sessions/{session_id}/migrate")
    async def migrate_session(session_id: str, body: MoveRequest | None = None) -> MoveView:
        """Move a session; answered when the new owner has it. Viewers see no gap."""
        move = await migrate(front, session_id, body.to if body else None)
        return MoveView(
            id=move.session_id,
            source=move.source,
            target=move.target,
            epoch=move.epoch,
            moved=move.moved,
        )

    return routes


async def _live(front: Front, replica_id: str) -> ReplicaRecord:
    replicas = await asyncio.to_thread(front.directory.replicas)
    found = next((r for r in replicas if r.id == replica_id), None)
    if found is None:
        known = ", ".join(r.id for r in replicas) or "none"
        raise ReplicaNotFound(f"replica {replica_id!r} is not live; live: {known}", param="id")
    return found
