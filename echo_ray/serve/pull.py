"""One pull: a router reads the committed segments of one session, in order, as far as it wants.

Three tasks share the socket: beats, the reader's wants, and segments. A metadata message and its
bytes are sent as one, under a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from echo_ray.engine.frames import check_format
from echo_ray.errors import (
    Draining,
    EchoError,
    MessageError,
    SegmentBeyondEnd,
    SegmentExpired,
)
from echo_ray.serve.host import SessionHost
from echo_ray.serve.requests import number, waker
from echo_ray.serve.runner import Reader, SessionRunner
from echo_ray.serve.segments import Encode, Segment
from echo_ray.serve.telemetry import log
from echo_ray.wire import parse_object

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
Encoded = Callable[[Callable[[Encode], bytes]], Awaitable[bytes]]
LONGEST_MESSAGE = 4096


class Pull:
    """The replica's end of `WS /v1/pull/{session_id}`, from acceptance to close."""

    def __init__(
        self, socket: WebSocket, host: SessionHost, in_thread: InThread, encoded: Encoded
    ) -> None:
        self._socket = socket
        self._host = host
        self._in_thread = in_thread
        self._encoded = encoded
        self._sending = asyncio.Lock()
        self._wake = asyncio.Event()
        self._runner: SessionRunner | None = None
        self._reader = Reader(0, waker(asyncio.get_running_loop(), self._wake))
        self._early_want: int | None = None
        """A want that came before the session was let in."""

    async def run(self) -> None:
        """Serve the reader until one side ends it; errors are told and close the socket."""
        tasks = [
            asyncio.create_task(self._beat()),
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._serve()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._finish([t.exception() for t in done if not t.cancelled()])
        finally:
            for task in tasks:
                task.cancel()
            if self._runner is not None:
                self._runner.detach(self._reader)

    async def _finish(self, failures: list[BaseException | None]) -> None:
        error = next((f for f in failures if isinstance(f, EchoError)), None)
        gone = self._socket.client_state is WebSocketState.DISCONNECTED or any(
            isinstance(f, WebSocketDisconnect | OSError) for f in failures
        )
        if error is None and not gone:
            unknown = next((f for f in failures if f is not None), None)
            if unknown is not None:
                log(logging.ERROR, "pull_failed", failure=unknown)
            error = EchoError("the pull failed inside the replica; connect again")
        if error is None:
            return
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
            if isinstance(error, Draining):
                await self._tell({"type": "session.going_away"})
            await self._tell({**error.to_dict(), "type": "error"})
            await self._socket.close(error.ws_close)

    async def _beat(self) -> None:
        beat_s = self._host.config.session.beat_s
        while True:
            if self._runner is not None:
                self._runner.check(self._reader.epoch)
            # A replica whose engine hangs must not look alive.
            if self._host.healthy():
                await self._tell({"type": "beat"})
            await asyncio.sleep(beat_s)

    async def _listen(self) -> None:
        while True:
            text = await self._receive()
            if len(text) > LONGEST_MESSAGE:
                raise MessageError(f"message has {len(text)} characters, over {LONGEST_MESSAGE}")
            body = parse_object(text)
            if body.get("type") != "want":
                continue
            until = body.get("until")
            if not isinstance(until, int) or isinstance(until, bool) or until < 0:
                raise MessageError(f"want.until is {until!r}, not an index", param="until")
            self._early_want = until
            if self._runner is not None:
                self._runner.want(self._reader, until)
                self._wake.set()

    async def _receive(self) -> str:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text")
        if not isinstance(text, str):
            raise MessageError("binary messages are not understood here; send JSON text")
        return text

    async def _serve(self) -> None:
        query = self._socket.query_params
        session_id = self._socket.path_params["session_id"]
        epoch = number("epoch", query.get("epoch"))
        start = number("from", query.get("from"))
        fmt = check_format(query.get("format", "raw"))
        if "until" in query and self._early_want is None:
            self._early_want = number("until", query["until"])
        runner = await self._in_thread(lambda: self._host.own(session_id, epoch, start))
        self._reader.epoch = epoch
        runner.attach(self._reader, start)
        self._runner = runner
        if self._early_want is not None:
            runner.want(self._reader, self._early_want)
        await self._hello(runner, epoch, start)
        index = start
        while True:
            segment = await self._next(runner, index)
            await self._send(segment, fmt)
            index += 1

    async def _hello(self, runner: SessionRunner, epoch: int, start: int) -> None:
        while (plan := runner.plan(epoch)) is None:
            await self._sleep()
        next_index, first_index = plan
        if start > next_index:
            raise SegmentBeyondEnd(
                f"from={start} lies beyond the next chunk, {next_index}", param="from"
            )
        if start < first_index:
            raise SegmentExpired(
                f"from={start} is not kept any more; the oldest is {first_index}", param="from"
            )
        await self._tell(
            {
                "type": "hello",
                "epoch": epoch,
                "next_index": next_index,
                "first_index": first_index,
            }
        )

    async def _next(self, runner: SessionRunner, index: int) -> Segment:
        while True:
            self._wake.clear()
            segment = runner.segment(self._reader, index)
            held_back = self._reader.bounded and index >= self._reader.want
            if segment is not None and not held_back:
                return segment
            await self._wake.wait()

    async def _sleep(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    async def _send(self, segment: Segment, fmt: str) -> None:
        data = await self._encoded(lambda encode: segment.encoded(fmt, encode))
        metadata = segment.metadata(
            byte_length=len(data), epoch=self._reader.epoch, owner=self._host.replica_id
        )
        text = json.dumps(metadata)
        async with self._sending:
            await self._socket.send_text(text)
            await self._socket.send_bytes(data)
        self._host.telemetry.count("bytes_sent", len(data), format=fmt)

    async def _tell(self, body: dict[str, Any]) -> None:
        async with self._sending:
            await self._socket.send_text(json.dumps(body))
