"""How much of a request's body is read before anybody parses it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo_ray.config import EchoConfig
from echo_ray.errors import (
    CapacityError,
    ClipTooLarge,
    EchoError,
    InvalidRequestError,
    MessageTooLarge,
)
from echo_ray.serve.forms import is_form

UPLOAD_PATH = "/v1/sessions"
UPLOADS_AT_ONCE = 8
"""Clips in memory, on their way or waiting to be checked."""
UPLOAD_S = 120.0
"""A clip that takes longer to arrive is given up, so that its place is free for another."""
RETRY_BUSY_S = 5.0
DISCARD_S = 20.0
DISCARD_BYTES = 2**28
"""The rest of a refused body is read and thrown away for so long, and up to so much."""
Answer = Callable[[EchoError], Response]


class _Gone(Exception):
    """The client left before its body was whole."""


class _Body:
    """A request's body as it arrives."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.more = True

    async def piece(self) -> bytes:
        """What has arrived next. Raises `_Gone`."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        self.more = message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        return piece

    async def read(self, limit: int) -> list[bytes] | None:
        """All of it, in the pieces that it came in; None once it is over the limit."""
        pieces = []
        while self.more:
            pieces.append(await self.piece())
            limit -= len(pieces[-1])
            if limit < 0:
                return None
        return pieces

    async def discard(self, limit: int) -> None:
        """Read the rest, up to the limit, and keep nothing of it."""
        while self.more and limit > 0:
            limit -= len(await self.piece())


Read = Callable[[_Body], Awaitable[list[bytes]]]


class BodyLimit:
    """Reads a request's body whole, up to the limit; only a new session's form may hold a clip."""

    def __init__(self, app: ASGIApp, config: EchoConfig, answer: Answer) -> None:
        self._app = app
        self._limit = config.http.max_message_bytes
        self._clip_limit = config.limits.clip_bytes
        self._answer = answer
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not _is_upload(scope):
            await self._limited(self._message, scope, receive, send)
            return
        if self._uploads >= UPLOADS_AT_ONCE:
            error = CapacityError(
                f"{UPLOADS_AT_ONCE} clips are being uploaded to this router; retry",
                retry_after_s=RETRY_BUSY_S,
            )
            await self._refuse(error, _Body(receive), scope, receive, send)
            return
        self._uploads += 1
        try:
            await self._limited(self._clip, scope, receive, send)
        finally:
            self._uploads -= 1

    async def _limited(self, read: Read, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive)
        try:
            pieces = await read(body)
        except EchoError as error:
            await self._refuse(error, body, scope, receive, send)
        except _Gone:
            return
        else:
            await self._app(scope, _replaying(pieces, receive), send)

    async def _message(self, body: _Body) -> list[bytes]:
        pieces = await body.read(self._limit)
        if pieces is None:
            raise MessageTooLarge(
                f"the body has more than {self._limit} bytes (http.max_message_bytes); send less"
            )
        return pieces

    async def _clip(self, body: _Body) -> list[bytes]:
        try:
            async with asyncio.timeout(UPLOAD_S):
                pieces = await body.read(self._clip_limit + self._limit)
        except TimeoutError as error:
            raise InvalidRequestError(
                f"the clip did not arrive within {UPLOAD_S:.0f} s; send a smaller one",
                param="clip",
            ) from error
        if pieces is None:
            raise ClipTooLarge(
                f"the form has more than {self._clip_limit} bytes for the clip "
                f"(limits.clip_bytes) and {self._limit} for the rest (http.max_message_bytes); "
                "send a shorter or smaller clip",
                param="clip",
            )
        return pieces

    async def _refuse(
        self, error: EchoError, body: _Body, scope: Scope, receive: Receive, send: Send
    ) -> None:
        # A client that is still sending when the connection closes never sees the answer.
        with contextlib.suppress(TimeoutError, _Gone):
            async with asyncio.timeout(DISCARD_S):
                await body.discard(DISCARD_BYTES)
        answer = self._answer(error)
        # What of the body was not read is not the next request.
        answer.headers["Connection"] = "close"
        await answer(scope, receive, send)


def _is_upload(scope: Scope) -> bool:
    if scope["method"] != "POST" or scope["path"] != UPLOAD_PATH:
        return False
    kinds = [value.decode("latin-1") for name, value in scope["headers"] if name == b"content-type"]
    return len(kinds) == 1 and is_form(kinds[0])


def _replaying(pieces: list[bytes], receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The body again, piece by piece; each is let go of when it has been handed on."""
    waiting = pieces[::-1]
    pieces.clear()

    async def replay() -> Message:
        if not waiting:
            return await receive()
        body = waiting.pop()
        return {"type": "http.request", "body": body, "more_body": bool(waiting)}

    return replay
