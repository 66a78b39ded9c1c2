"""Administration: who serves what, and moving a session to another replica."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from echo_ray.serve.front import Front
from echo_ray.serve.migration import migrate
from echo_ray.serve.schemas import REFUSALS, MoveRequest, MoveView, ReplicaList, ReplicaView


def admin_routes(front: Front) -> APIRouter:
    """The routes below `/v1/admin`."""
    routes = APIRouter(prefix="/v1/admin", responses=REFUSALS, tags=["admin"])

    @routes.get("/replicas")
    async def list_replicas() -> ReplicaList:
        """Live replicas, what they serve and how quick they are."""
        replicas = await asyncio.to_thread(front.directory.replicas)
        return ReplicaList(replicas=[ReplicaView.of(r) for r in replicas])

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
