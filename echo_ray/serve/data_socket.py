"""The replica's own door: routers pull committed segments here, by index.

The event loop only moves messages. Stores, the engine, encoding and hashing belong to other
threads; what a reader gets is bounded by its own `want`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import fields
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from echo_ray.engine.frames import check_format, encode, mime
from echo_ray.serve.access_replica import RoutersOnly, replica_secret
from echo_ray.serve.host import SessionHost
from echo_ray.serve.pull import Pull
from echo_ray.serve.requests import answering, number, routers_id, until
from echo_ray.serve.segments import Encode
from echo_ray.serve.telemetry import CONTENT_TYPE
from echo_ray.session import demand
from echo_ray.session.chunk import Chunk
from echo_ray.session.demand import Demand
from echo_ray.session.draining import Reason

PREPARE_TIMEOUT_S = 60.0
SEGMENT_TIMEOUT_S = 10.0


class DataSocket:
    """Routes and messages between routers and the sessions of one replica."""

    def __init__(self, host: SessionHost) -> None:
        """Raises `ConfigError` if the secret that routers are to show is missing."""
        self._host = host
        secret = replica_secret(host.config.access, host.clock)
        self._stores = ThreadPoolExecutor(4, thread_name_prefix="admit")
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="encode")
        self._pulls: set[Pull] = set()
        self.app = Starlette(
            routes=[
                WebSocketRoute("/v1/pull/{session_id}", self._pull),
                Route("/v1/own/{session_id}", answering(self._own), methods=["POST"]),
                Route("/v1/prepare/{session_id}", answering(self._prepare), methods=["POST"]),
                Route("/v1/segments/{session_id}/{n}", answering(self._segment)),
                Route("/v1/drain", answering(self._drain), methods=["POST"]),
                Route("/v1/demand", answering(self._demand), methods=["POST"]),
                Route("/metrics", answering(self._metrics)),
                Route("/healthz", answering(self._healthz)),
            ],
            middleware=[Middleware(RoutersOnly, secret=secret)],
        )

    def close(self) -> None:
        """Let go of the threads; encodings and admissions under way are finished."""
        self._stores.shutdown(wait=False, cancel_futures=True)
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def _pull(self, socket: WebSocket) -> None:
        await socket.accept()
        pull = Pull(socket, self._host, self._in_thread, self._encoded)
        self._pulls.add(pull)
        try:
            await pull.run()
        finally:
            self._pulls.discard(pull)

    async def _own(self, request: Request) -> Response:
        session_id, epoch = (
            request.path_params["session_id"],
            number("epoch", request.query_params.get("epoch")),
        )
        await self._in_thread(lambda: self._host.own(session_id, epoch))
        return JSONResponse({}, status_code=202)

    async def _prepare(self, request: Request) -> Response:
        session_id = request.path_params["session_id"]
        runner = await self._in_thread(lambda: self._host.prepare(session_id))
        next_index = await until(runner, lambda _: runner.caught_up_index(), PREPARE_TIMEOUT_S)
        return JSONResponse({"next_index": next_index})

    async def _drain(self, request: Request) -> Response:
        within_ms = number("within_ms", request.query_params.get("within_ms"))
        left_s = await self._in_thread(lambda: self._host.drain(Reason.ADMIN, within_ms / 1000))
        state = self._host.record().state
        return JSONResponse({"state": state, "deadline_s": left_s}, status_code=202)

    async def _demand(self, request: Request) -> Response:
        query = request.query_params
        router = routers_id(query.get("router"))
        counts = {f.name: number(f.name, query.get(f.name)) for f in fields(Demand)}
        now_s = self._host.clock.monotonic()
        self._host.told = demand.heard(self._host.told, router, Demand(**counts), now_s)
        return JSONResponse({}, status_code=202)

    async def _segment(self, request: Request) -> Response:
        session_id, epoch = (
            request.path_params["session_id"],
            number("epoch", request.query_params.get("epoch")),
        )
        index = number("n", request.path_params["n"])
        fmt = check_format(request.query_params.get("format", "raw"))
        runner = await self._in_thread(lambda: self._host.own(session_id, epoch, index))

        segment = await until(
            runner,
            lambda reader: runner.committed_segment(reader, index),
            SEGMENT_TIMEOUT_S,
            epoch=epoch,
            start=index,
        )
        blob = await self._encoded(lambda e: segment.encoded(fmt, e))
        head = segment.metadata(byte_length=len(blob), epoch=epoch, owner=self._host.replica_id)
        self._host.telemetry.count("bytes_sent", len(blob), format=fmt)
        return Response(
            blob,
            media_type=mime(fmt),
            headers={
                "X-Echo-Digest": segment.chunk.digest,
                "X-Echo-Chunk-Index": str(index),
                "X-Echo-Num-Frames": str(segment.chunk.num_frames),
                "X-Echo-Epoch": str(epoch),
                "X-Echo-Metadata": json.dumps(head),
            },
        )

    async def _metrics(self, request: Request) -> Response:
        body = await self._in_thread(self._host.telemetry.render)
        return Response(body, media_type=CONTENT_TYPE)

    async def _healthz(self, request: Request) -> Response:
        alive = self._host.alive()
        body = {"status": "ok" if alive else "stuck", "replica": self._host.replica_id}
        return JSONResponse(body, status_code=200 if alive else 503)

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._stores, copy_context().run, call
        )

    async def _encoded(self, make: Callable[[Encode], bytes]) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoders, make, self._encode)

    def _encode(self, chunk: Chunk, fmt: str, start_frame: int) -> bytes:
        clock, telemetry = self._host.clock, self._host.telemetry
        began_s = clock.monotonic()
        blob = encode(chunk, fmt, fps=self._host.engine.shape.fps, start_frame=start_frame)
        telemetry.observe("encode_seconds", clock.monotonic() - began_s, format=fmt)
        return blob
