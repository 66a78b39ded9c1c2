"""REST resources that make one session out of another: fork, rewind, export, import."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from echo_ray.serve.access import visit_of
from echo_ray.serve.archive_body import ARCHIVE, IMPORT_PATH, ArchiveResponse, Transfers
from echo_ray.serve.forks import Forks
from echo_ray.serve.front import Front
from echo_ray.serve.schemas import (
    REFUSALS,
    ForkRequest,
    ForkView,
    RewindRequest,
    SessionView,
)
from echo_ray.session.forking import Wish
from echo_ray.session.records import OnIdle, Pace

_FILE = {"content": {ARCHIVE: {"schema": {"type": "string", "format": "binary"}}}}


def fork_routes(front: Front, forks: Forks) -> APIRouter:
    """The routes below `/v1/sessions` that read one session and make another."""
    routes = APIRouter(responses=REFUSALS, tags=["sessions"])
    transfers = Transfers()

    @routes.post("/v1/sessions/{session_id}/fork", status_code=201)
    async def fork_session(session_id: str, body: ForkRequest | None = None) -> ForkView:
        """A new session with the same past up to `chunk`; the old one notices nothing."""
        wanted = body or ForkRequest.model_validate({})
        wish = Wish(
            labels=wanted.labels,
            on_idle=OnIdle(wanted.on_idle) if wanted.on_idle else None,
            pace=Pace(wanted.pace) if wanted.pace else None,
        )
        made = await forks.fork(session_id, wanted.chunk, wish, wanted.prompt)
        return ForkView.made(made, session_id, front.shape)

    @routes.post("/v1/sessions/{session_id}/rewind", status_code=201)
    async def rewind_session(session_id: str, body: RewindRequest) -> ForkView:
        """A fork at an earlier chunk that takes the session's place; its viewers are told."""
        made = await forks.rewind(session_id, body.chunk)
        return ForkView.made(made, session_id, front.shape)

    @routes.get("/v1/sessions/{session_id}/export", response_class=Response, responses={200: _FILE})
    async def export_session(session_id: str) -> Response:
        """The session as one file, which another service can import."""
        transfers.enter()
        try:
            size, pieces = await forks.export(session_id)
            return ArchiveResponse(session_id, size, pieces, transfers)
        except BaseException:
            transfers.leave()
            raise

    @routes.post(
        IMPORT_PATH, status_code=201, openapi_extra={"requestBody": {"required": True, **_FILE}}
    )
    async def import_session(request: Request) -> SessionView:
        """A new session that goes on where an exported one stood."""
        async with transfers.body(request, forks.limit_bytes) as data:
            visit = visit_of(request.scope)
            made = await forks.import_(data, visit.principal.tenant or "")
            visit.session = made.id
            return SessionView.of(made, front.shape)

    return routes
