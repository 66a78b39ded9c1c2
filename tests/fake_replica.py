"""A scripted replica: speaks the data socket over a real port, makes deterministic segments.

It can crash (every connection cut, nobody listening), hang (sockets open, nothing said, wakes up
later), fall silent for one session, refuse, or go away. Segments depend on seed, index and prompt
only, so what an undisturbed run would give is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from echo_ray.config import SessionSection
from echo_ray.errors import EchoError, Fenced, SegmentBeyondEnd, SegmentExpired
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.pacing import wanted
from echo_ray.session.records import ControlEntry, Lease, OnIdle, ReplicaRecord, SnapshotRef
from echo_ray.storage.interface import Directory

SHAPE = StreamShape(
    model="fake",
    fps=16,
    width=4,
    height=4,
    frames_per_chunk=2,
    first_chunk_frames=1,
    point_every=4,
)


def frames(seed: int, index: int, prompt: str, shape: StreamShape = SHAPE) -> bytes:
    """The raw frames that any replica makes of this chunk."""
    size = shape.frames_in(index) * shape.width * shape.height * 3
    block = hashlib.sha256(f"{seed}/{index}/{prompt}".encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def digest(seed: int, index: int, prompt: str) -> str:
    return hashlib.sha256(frames(seed, index, prompt)).hexdigest()


@dataclass
class Session:
    """What one fake replica runs of one session."""

    lease: Lease
    next: int
    wants: dict[int, int] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """What may be generated has changed."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """What has been generated has changed."""
    task: asyncio.Task[None] | None = None
    fenced: bool = False


class FakeReplica:
    """One replica process, as far as a router can tell."""

    def __init__(
        self,
        name: str,
        directory: Directory,
        *,
        section: SessionSection,
        padding: int = 0,
        oldest: int = 0,
    ) -> None:
        self.name = name
        self.directory = directory
        self.section = section
        self.padding = padding
        self.oldest = oldest
        """Segments before this are expired here."""
        self.silent: set[str] = set()
        self.refuse: EchoError | None = None
        self.refuse_only: set[str] = set()
        """Sessions that `refuse` is for; empty means all."""
        self.no_commits = False
        self.pulls: list[tuple[str, str, int]] = []
        """(session, format, from) of every pull ever accepted."""
        self.open_pulls: list[WebSocket] = []
        self.owned: list[str] = []
        self.prepared: list[str] = []
        self.fenced_writes = 0
        self.chunk_s = 0.0
        self.sessions: dict[str, Session] = {}
        self._awake = asyncio.Event()
        self._awake.set()
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(64)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        app = Starlette(
            routes=[
                WebSocketRoute("/v1/pull/{session_id}", self._pull),
                Route("/v1/own/{session_id}", self._own, methods=["POST"]),
                Route("/v1/prepare/{session_id}", self._prepare, methods=["POST"]),
                Route("/v1/segments/{session_id}/{n}", self._segment),
            ]
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="critical",
                lifespan="off",
                ws="websockets-sansio",
                ws_per_message_deflate=False,
                ws_ping_interval=None,
            )
        )
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        self._beating = asyncio.create_task(self._beat())
        self.register()

    def register(self, *, state: str = "ready", ttl_s: float = 30.0) -> None:
        self.directory.put_replica(
            ReplicaRecord(
                id=self.name,
                node_id="node",
                pid=1,
                address=self.address,
                state=state,
                model=SHAPE.model,
                sessions=tuple(self.sessions),
                chunk_seconds=self.chunk_s,
            ),
            ttl_s=ttl_s,
        )

    async def crash(self) -> None:
        """Die as a killed process dies; the directory learns nothing of it."""
        self._beating.cancel()
        for session in self.sessions.values():
            if session.task is not None:
                session.task.cancel()
        self._server.should_exit = self._server.force_exit = True
        for server in getattr(self._server, "servers", []):
            server.close()
        self._socket.close()
        for connection in tuple(self._server.server_state.connections):
            connection.transport.abort()
        await asyncio.gather(self._serving, self._beating, return_exceptions=True)

    def hold(self) -> None:
        """Make no more chunks, until `go_on`; all else goes on."""
        self.no_commits = True

    def go_on(self) -> None:
        self.no_commits = False
        for session in self.sessions.values():
            session.changed.set()

    def hang(self) -> None:
        """Stop as SIGSTOP stops: sockets stay, nothing moves."""
        self._awake.clear()

    def wake(self) -> None:
        self._awake.set()

    async def stop(self) -> None:
        self.wake()
        await self.crash()

    def snapshot(self, session_id: str, index: int) -> SnapshotRef:
        """Record a snapshot of the session at a point."""
        ref = SnapshotRef(
            id=f"snap-{index}",
            session_id=session_id,
            chunk_index=index,
            size_bytes=10,
            digest="0" * 64,
            created_at=1.0,
            store="fake",
            epoch=1,
        )
        self.directory.add_snapshot(self.sessions[session_id].lease, ref)
        return ref

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.section.lease_renew_s)
            await self._awake.wait()
            leases = [s.lease for s in self.sessions.values()]
            for lost in self.directory.renew(leases, ttl_s=self.section.lease_ttl_s):
                self._lose(lost)
            self.register()

    def _lose(self, lease: Lease) -> None:
        session = self.sessions.get(lease.session_id)
        if session is not None and session.lease.epoch == lease.epoch:
            session.fenced = True
            session.news.set()
            if session.task is not None:
                session.task.cancel()
            del self.sessions[lease.session_id]

    def _run(self, session_id: str, epoch: int) -> Session:
        record = self.directory.get(session_id)
        if record.owner != self.name or record.epoch != epoch:
            raise Fenced(f"{self.name} does not own {session_id} under epoch {epoch}")
        running = self.sessions.get(session_id)
        if running is not None and running.lease.epoch == epoch:
            return running
        running = Session(Lease(session_id, self.name, epoch), record.next_index)
        running.task = asyncio.create_task(self._generate(running))
        self.sessions[session_id] = running
        return running

    async def _generate(self, session: Session) -> None:
        sid = session.lease.session_id
        record = self.directory.get(sid)
        seed, bounds = record.seed, (record.pace, OnIdle.PAUSE)
        while True:
            await self._awake.wait()
            if self.no_commits or session.next >= (wanted(session.wants.values(), *bounds) or 0):
                session.changed.clear()
                await session.changed.wait()
                continue
            await asyncio.sleep(self.chunk_s)
            await self._awake.wait()
            try:
                self.directory.seal(session.lease, session.next)
                prompt = self._prompt(sid, session.next)
                self.directory.commit(
                    session.lease, session.next, digest(seed, session.next, prompt), "fake"
                )
            except Fenced:
                self.fenced_writes += 1
                session.fenced = True
                session.news.set()
                self.sessions.pop(sid, None)
                return
            session.next += 1
            session.news.set()

    def _prompt(self, session_id: str, index: int) -> str:
        entries = [e for e in self._log(session_id) if e.chunk <= index]
        return entries[-1].prompt if entries else self.directory.get(session_id).prompt

    def _log(self, session_id: str) -> Sequence[ControlEntry]:
        return self.directory.controls(session_id)

    async def _pull(self, ws: WebSocket) -> None:
        await self._awake.wait()
        await ws.accept()
        sid, query = ws.path_params["session_id"], ws.query_params
        fmt, index = query["format"], int(query["from"])
        self.pulls.append((sid, fmt, index))
        try:
            if self.refuse is not None and sid in (self.refuse_only or {sid}):
                raise self.refuse
            session = self._run(sid, int(query["epoch"]))
            if index < self.oldest:
                raise SegmentExpired(f"chunk {index} is gone; the oldest is {self.oldest}")
        except EchoError as e:
            await self._refuse(ws, e)
            return
        self.open_pulls.append(ws)
        try:
            if "until" in query:
                session.wants[id(ws)] = int(query["until"])
                session.changed.set()
            await self._feed(ws, session, fmt, index)
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            self.open_pulls.remove(ws)
            session.wants.pop(id(ws), None)
            session.changed.set()

    async def _feed(self, ws: WebSocket, session: Session, fmt: str, index: int) -> None:
        hello = {"epoch": session.lease.epoch, "next_index": session.next, "first_index": 0}
        await ws.send_json({"type": "hello", **hello})
        listening = asyncio.create_task(self._listen(ws, session))
        try:
            while not listening.done():
                await self._awake.wait()
                if session.lease.session_id in self.silent:
                    await asyncio.sleep(self.section.beat_s)
                    continue
                if session.fenced:
                    await ws.close(Fenced.ws_close)
                    return
                if index < self._reach(session, ws):
                    metadata, data = self.segment(session.lease, index, fmt)
                    await ws.send_json(metadata)
                    await ws.send_bytes(data)
                    index += 1
                    continue
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news(session, ws, index), self.section.beat_s)
                if self._awake.is_set() and session.lease.session_id not in self.silent:
                    await ws.send_json({"type": "beat"})
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    def _reach(self, session: Session, ws: WebSocket) -> int:
        """Where this reader's segments end: with its own want, once it has said one."""
        return min(session.next, session.wants.get(id(ws), session.next))

    async def _news(self, session: Session, ws: WebSocket, index: int) -> None:
        while self._reach(session, ws) <= index and not session.fenced:
            session.news.clear()
            await session.news.wait()

    async def _listen(self, ws: WebSocket, session: Session) -> None:
        while True:
            message = json.loads(await ws.receive_text())
            if message["type"] == "want":
                session.wants[id(ws)] = message["until"]
                session.changed.set()
                session.news.set()

    async def _refuse(self, ws: WebSocket, error: EchoError) -> None:
        await ws.send_json({**error.to_dict(), "type": "error"})
        await ws.close(error.ws_close)

    async def go_away(self) -> None:
        """Tell all readers, as a draining replica does."""
        self.register(state="draining")
        for ws in tuple(self.open_pulls):
            await ws.send_json({"type": "session.going_away"})

    def segment(self, lease: Lease, index: int, fmt: str) -> tuple[dict[str, Any], bytes]:
        """The metadata and the bytes of a committed segment."""
        sid = lease.session_id
        record = self.directory.get(sid)
        prompt = self._prompt(sid, index)
        raw = frames(record.seed, index, prompt)
        data = (raw if fmt == "raw" else _jpegs(raw, index)) + bytes(self.padding)
        started = [e.event_id for e in self._log(sid) if e.chunk == index]
        return {
            "type": "video.chunk_metadata",
            "chunk_index": index,
            "num_frames": SHAPE.frames_in(index),
            "pts_ms": round(SHAPE.start_s(index) * 1000),
            "byte_length": len(data),
            "digest": hashlib.sha256(data).hexdigest() if fmt == "raw" else "",
            "epoch": lease.epoch,
            "prompt": prompt,
            "ignored_words": ["lovely"] * ("lovely" in prompt),
            "started_event_ids": started,
            "active_event_ids": [],
            "completed_event_ids": [],
            "discontinuity": False,
            "drift": {"score": 0.0, "flags": []},
            "owner": self.name,
            "chunk_seconds": 0.01,
        }, data

    async def _own(self, request: Request) -> Response:
        await self._awake.wait()
        sid = request.path_params["session_id"]
        try:
            self._run(sid, int(request.query_params["epoch"]))
        except EchoError as e:
            return _error(e)
        self.owned.append(sid)
        return JSONResponse({}, 202)

    async def _prepare(self, request: Request) -> Response:
        await self._awake.wait()
        if self.refuse is not None:
            return _error(self.refuse)
        sid = request.path_params["session_id"]
        self.prepared.append(sid)
        return JSONResponse({"next_index": self.directory.get(sid).next_index})

    async def _segment(self, request: Request) -> Response:
        await self._awake.wait()
        sid, index = request.path_params["session_id"], int(request.path_params["n"])
        try:
            session = self._run(sid, int(request.query_params["epoch"]))
            if index < self.oldest:
                raise SegmentExpired(f"chunk {index} is gone; the oldest is {self.oldest}")
            if index >= session.next:
                raise SegmentBeyondEnd(f"chunk {index} is not there")
        except EchoError as e:
            return _error(e)
        metadata, data = self.segment(session.lease, index, request.query_params["format"])
        return Response(data, headers={"X-Echo-Digest": metadata["digest"]})


def _error(error: EchoError) -> Response:
    return JSONResponse({"error": error.to_dict()}, error.http_status)


def _jpegs(raw: bytes, index: int) -> bytes:
    out = io.BytesIO()
    size = SHAPE.width * SHAPE.height * 3
    for number in range(SHAPE.frames_in(index)):
        part = raw[number * size : (number + 1) * size]
        Image.frombytes("RGB", (SHAPE.width, SHAPE.height), part).save(out, "JPEG")
    return out.getvalue()
