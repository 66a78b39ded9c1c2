"""REST resources of sessions: create, look, steer, pause, end; snapshots and single segments."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request
from fastapi.responses import Response

from echo_ray.engine.frames import check_format, mime
from echo_ray.serve.access import visit_of
from echo_ray.serve.forms import NEW_SESSION_BODY, new_session_of
from echo_ray.serve.front import Front
from echo_ray.serve.schemas import (
    REFUSALS,
    EventQueued,
    NewEvent,
    SessionList,
    SessionView,
    SnapshotList,
    SnapshotView,
)
from echo_ray.serve.upstream import WireSegment
from echo_ray.session.access import sees

SEGMENT_HEADERS = (
    "X-Echo-Digest",
    "X-Echo-Chunk-Index",
    "X-Echo-Num-Frames",
    "X-Echo-Epoch",
    "X-Echo-Metadata",
)


def session_routes(front: Front) -> APIRouter:
    """The routes below `/v1/sessions` that answer once."""
    routes = APIRouter(prefix="/v1/sessions", responses=REFUSALS, tags=["sessions"])
    _add_life(routes, front)
    _add_parts(routes, front)
    return routes


def _add_life(routes: APIRouter, front: Front) -> None:
    @routes.post("", status_code=201, openapi_extra={"requestBody": NEW_SESSION_BODY})
    async def create_session(request: Request) -> SessionView:
        """Create a session. Nothing is generated until somebody watches.

        As `multipart/form-data` it takes a clip, which becomes the session's first chunks.
        """
        body, clip = await new_session_of(request)
        visit = visit_of(request.scope)
        made = await front.create(body.model_dump(), clip, visit.principal.tenant or "")
        visit.session = made.id
        return SessionView.of(made, front.shape)

    @routes.get("")
    async def list_sessions(request: Request) -> SessionList:
        """All sessions, oldest first; with access on, those of the tenant."""
        who = visit_of(request.scope).principal
        records = [r for r in await front.all_sessions() if sees(who, r.id, r.tenant)]
        return SessionList(sessions=[SessionView.of(r, front.shape) for r in records])

    @routes.get("/{session_id}")
    async def get_session(session_id: str) -> SessionView:
        return SessionView.of(await front.get(session_id), front.shape)

    @routes.delete("/{session_id}", status_code=204)
    async def delete_session(session_id: str) -> None:
        """Forget the session, its log and its snapshots; its viewers get `session.done`."""
        await front.delete(session_id)

    @routes.post("/{session_id}/pause")
    async def pause_session(session_id: str) -> SessionView:
        """Release the device. Viewers stay connected; watching or resuming wakes it."""
        return SessionView.of(await front.pause(session_id), front.shape)

    @routes.post("/{session_id}/resume")
    async def resume_session(session_id: str) -> SessionView:
        return SessionView.of(await front.resume(session_id), front.shape)


def _add_parts(routes: APIRouter, front: Front) -> None:
    @routes.post("/{session_id}/events", status_code=202)
    async def add_event(session_id: str, body: NewEvent) -> EventQueued:
        """Switch the prompt at a chunk boundary; answered when the entry is durable."""
        entry = await front.add_event(session_id, body.event_id, body.event.prompt, body.at_chunk)
        return EventQueued(event_id=entry.event_id, effective_chunk=entry.chunk)

    @routes.get("/{session_id}/snapshots")
    async def list_snapshots(session_id: str) -> SnapshotList:
        """Recorded snapshots, newest point first."""
        refs = await front.list_snapshots(session_id)
        return SnapshotList(snapshots=[SnapshotView.of(ref) for ref in refs])

    @routes.post("/{session_id}/snapshots", status_code=201)
    async def pin_snapshot(session_id: str) -> SnapshotView:
        """Keep the latest point for ever, and say which it is; 409 while there is none."""
        return SnapshotView.of(await front.pin_latest(session_id))

    @routes.get("/{session_id}/segments/{n}", response_class=Response)
    async def get_segment(session_id: str, n: int, format: str = "raw") -> Response:
        """One committed segment: the same bytes at every time and from every replica."""
        check_format(format)
        relay = front.relays.get(session_id, format)
        held = relay.ring.get(n) if relay is not None else None
        if held is not None:
            return Response(held.data, media_type=mime(format), headers=_headers(held))
        got = await front.segment(session_id, n, format)
        return Response(got.data, media_type=mime(format), headers=got.headers)


def _headers(held: WireSegment) -> dict[str, str]:
    """The headers that a replica would send with this segment."""
    metadata = json.loads(held.metadata)
    return {
        "X-Echo-Digest": str(metadata.get("digest", "")),
        "X-Echo-Chunk-Index": str(held.index),
        "X-Echo-Num-Frames": str(metadata.get("num_frames", "")),
        "X-Echo-Epoch": str(metadata.get("epoch", "")),
        "X-Echo-Metadata": json.dumps(metadata),
    }
