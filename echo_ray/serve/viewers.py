"""Viewers: the WebSocket that streams a session and takes its commands, and motion JPEG.

A socket lives as long as its viewer: owners may die behind it. One task sends (segments in order,
each pair of metadata and bytes undivided; replies in between), one receives.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from echo_ray import wire
from echo_ray.engine.frames import check_format, mime, split_jpegs
from echo_ray.errors import EchoError, InvalidRequestError, MessageError, MessageTooLarge
from echo_ray.serve.access import Visit, visit_of
from echo_ray.serve.cursor import Viewer
from echo_ray.serve.front import Front
from echo_ray.serve.schemas import REFUSALS, SessionView, SnapshotView
from echo_ray.serve.upstream import WireSegment
from echo_ray.session.access import Need
from echo_ray.session.records import SessionRecord
from echo_ray.session.restoring import check_start

FAREWELL_S = 5.0
"""A viewer that reads slowly, or not at all, gets so long to hear why it is let go."""
MALFORMED_LIMIT = 16
BOUNDARY = "echo-ray-frame"
_NORMAL = 1000


def viewer_routes(front: Front) -> APIRouter:
    """The routes that stream."""
    routes = APIRouter(prefix="/v1/sessions", tags=["streams"])

    @routes.websocket("/{session_id}/stream")
    async def stream(socket: WebSocket, session_id: str) -> None:
        await ViewerSocket(front, socket, session_id).serve()

    @routes.get("/{session_id}/stream.mjpeg", response_class=StreamingResponse, responses=REFUSALS)
    async def stream_mjpeg(
        session_id: str, start: Annotated[str | None, Query(alias="from")] = None
    ) -> StreamingResponse:
        """The session as motion JPEG at the pace of playout, for an `<img>`."""
        record = await front.get(session_id)
        viewer = Viewer(check_start(_index(start, "from"), record), "mjpeg")
        front.relays.attach(record, "jpeg", viewer)
        return PartsResponse(front, viewer)

    return routes


async def end_with_its_token(viewer: Viewer, visit: Visit) -> None:
    """Let a viewer go when its token runs out or is withdrawn."""
    if visit.access.enabled:
        viewer.end(await visit.until_over())


class ViewerSocket:
    """One viewer's WebSocket from its handshake to its close."""

    def __init__(self, front: Front, socket: WebSocket, session_id: str) -> None:
        self._front = front
        self._socket = socket
        self._session_id = session_id
        self._fmt = ""
        self._viewer = Viewer(0)
        self._visit = visit_of(socket.scope)
        self._malformed = 0

    async def serve(self) -> None:
        """Stream until either side ends it. A refusal is a message too, then a close code."""
        await self._socket.accept()
        try:
            record = await self._attach()
        except EchoError as e:
            await self._close(e)
            return
        try:
            await self._greet(record)
            await self._run()
        except WebSocketDisconnect:
            # The viewer has left; nobody is there to be told.
            return
        finally:
            self._front.relays.detach(self._viewer)

    async def _attach(self) -> SessionRecord:
        query = self._socket.query_params
        self._fmt = check_format(query.get("format", "fmp4"))
        asked = _index(query.get("from"), "from")
        record = await self._front.get(self._session_id)
        self._viewer = Viewer(check_start(asked, record))
        self._front.relays.attach(record, self._fmt, self._viewer)
        return record

    async def _greet(self, record: SessionRecord) -> None:
        view = SessionView.of(record, self._front.shape).model_dump()
        await self._send(wire.Created(session=view))
        await self._send(self._video_start())

    def _video_start(self) -> wire.VideoStart:
        shape = self._front.shape
        return wire.VideoStart(
            format=self._fmt,
            fps=shape.fps,
            width=shape.width,
            height=shape.height,
            mime=mime(self._fmt),
            start=self._viewer.cursor,
        )

    async def _run(self) -> None:
        """Send and receive until one of them ends, or the viewer is let go."""
        sending = asyncio.create_task(self._send_all())
        receiving = asyncio.create_task(self._receive_all())
        over = asyncio.create_task(self._viewer.over.wait())
        guarding = asyncio.create_task(end_with_its_token(self._viewer, self._visit))
        tasks = (sending, receiving, over, guarding)
        try:
            await asyncio.wait(tasks[:3], return_when=asyncio.FIRST_COMPLETED)
            if over.done() and not sending.done() and not receiving.done():
                await asyncio.wait((sending,), timeout=FAREWELL_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in (sending, receiving):
            if not task.cancelled():
                task.result()

    async def _send_all(self) -> None:
        while True:
            item = await self._viewer.next_item()
            if isinstance(item, str):
                await self._socket.send_text(item)
            elif isinstance(item, WireSegment):
                await self._socket.send_text(item.metadata)
                await self._socket.send_bytes(item.data)
                self._front.telemetry.count("bytes_sent", len(item.data), format=self._fmt)
                self._viewer.sent(item)
            else:
                await self._close(item)
                return

    async def _receive_all(self) -> None:
        limit = self._front.config.http.max_message_bytes
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text, data = message.get("text"), message.get("bytes")
            try:
                known = wire.parse_client(
                    text if text is not None else bytes(data or b""), limit_bytes=limit
                )
                if known is not None:
                    await self._act(known)
            except MessageTooLarge as e:
                self._viewer.end(e)
                break
            except MessageError as e:
                self._malformed += 1
                if self._malformed >= MALFORMED_LIMIT:
                    self._viewer.end(e)
                    break
                self._viewer.tell(wire.error_message(e))
            except EchoError as e:
                self._viewer.tell(wire.error_message(e))
        # Read on without listening until the viewer is gone, so that it hears the reason.
        while (await self._socket.receive())["type"] != "websocket.disconnect":
            pass

    async def _act(self, message: wire.Message) -> None:
        if not isinstance(message, wire.Attach | wire.Ack | wire.Ping):
            await self._change(message)
            return
        match message:
            case wire.Ack(chunk_index=index):
                self._viewer.acknowledge(index)
            case wire.Ping():
                self._viewer.tell(wire.Pong())
            case wire.Attach(start=start):
                record = await self._front.get(self._session_id)
                self._front.relays.reposition(self._viewer, check_start(start, record))
                self._viewer.tell(self._video_start())

    async def _change(self, message: wire.Message) -> None:
        """What changes the session is not for everybody who watches."""
        try:
            self._visit.check(Need.USE)
            await self._do(message)
        except EchoError as e:
            self._visit.audit(message.type, e.code)
            if not isinstance(message, wire.Interaction):
                raise
            self._viewer.tell(wire.error_message(e, event_id=message.event_id))
        else:
            self._visit.audit(message.type, "ok")

    async def _do(self, message: wire.Message) -> None:
        front, session_id = self._front, self._session_id
        match message:
            case wire.Interaction(event_id=event_id, event=event, at_chunk=at_chunk):
                entry = await front.add_event(session_id, event_id, event.prompt, at_chunk)
                self._viewer.tell(
                    wire.InteractionQueued(event_id=entry.event_id, effective_chunk=entry.chunk)
                )
            case wire.TakeSnapshot():
                ref = await front.pin_latest(session_id)
                self._viewer.tell(
                    wire.SnapshotCommitted(snapshot=SnapshotView.of(ref).model_dump())
                )
            case wire.Pause():
                await front.pause(session_id)
            case wire.Resume():
                await front.resume(session_id)
            case wire.Stop():
                await front.stop(session_id)

    async def _send(self, message: wire.Message) -> None:
        await self._socket.send_text(wire.encode(message))

    async def _close(self, ending: EchoError | wire.Done) -> None:
        """Say why, then close with the code that belongs to it."""
        with contextlib.suppress(WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                if isinstance(ending, wire.Done):
                    await self._send(ending)
                    await self._socket.close(_NORMAL, ending.reason)
                else:
                    await self._send(wire.error_message(ending))
                    await self._socket.close(ending.ws_close, ending.code)


class PartsResponse(StreamingResponse):
    """Frames as parts of one endless answer; the viewer leaves with its connection."""

    def __init__(self, front: Front, viewer: Viewer) -> None:
        super().__init__(
            _parts(front, viewer),
            media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}",
            headers={"Cache-Control": "no-store"},
        )
        self._front = front
        self._viewer = viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        streaming = asyncio.create_task(super().__call__(scope, receive, send))
        over = asyncio.create_task(self._viewer.over.wait())
        guarding = asyncio.create_task(end_with_its_token(self._viewer, visit_of(scope)))
        try:
            await asyncio.wait((streaming, over), return_when=asyncio.FIRST_COMPLETED)
            if not streaming.done():
                await asyncio.wait((streaming,), timeout=FAREWELL_S)
        finally:
            self._front.relays.detach(self._viewer)
            tasks = (streaming, over, guarding)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _parts(front: Front, viewer: Viewer) -> AsyncIterator[bytes]:
    frame_s = 1.0 / front.shape.fps
    due = front.clock.monotonic()
    while True:
        item = await viewer.next_item()
        if isinstance(item, str):
            continue
        if not isinstance(item, WireSegment):
            return
        front.telemetry.count("bytes_sent", len(item.data), format="jpeg")
        for frame in split_jpegs(item.data):
            now = front.clock.monotonic()
            due = max(due, now - frame_s)
            await asyncio.sleep(max(0.0, due - now))
            due += frame_s
            yield _part(frame)
        viewer.sent(item)


def _part(frame: bytes) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(frame)}\r\n\r\n"
    return head.encode() + frame + b"\r\n"


def _index(text: str | None, param: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise InvalidRequestError(
            f"{param}: {text[:40]!a} is not a chunk index; send 0 or more", param=param
        )
    return int(text)
