"""Archives over HTTP: a body that may be larger than any other, and an answer in pieces.

The limit of other bodies (`body_limit.py`) does not know this one; it is read here, up to a limit
of its own, a few at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from echo_ray.config import EchoConfig
from echo_ray.errors import ArchiveTruncated, CapacityError, InvalidRequestError
from echo_ray.serve.body_limit import RETRY_BUSY_S, Answer, BodyLimit
from echo_ray.session.archive import too_large

IMPORT_PATH = "/v1/sessions/import"
ARCHIVE = "application/octet-stream"
ARCHIVES_AT_ONCE = 4
"""Exports and imports under way at one router; each has an archive in memory."""
TRANSFER_S = 600.0
"""An archive that takes longer on its way is given up."""


class BodyLimits:
    """The limit of every request's body; an import has one of its own."""

    def __init__(self, app: ASGIApp, config: EchoConfig, answer: Answer) -> None:
        self._app = app
        self._limited = BodyLimit(app, config, answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        importing = (
            scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == IMPORT_PATH
        )
        await (self._app if importing else self._limited)(scope, receive, send)


class Transfers:
    """How many archives are on their way; one per router."""

    def __init__(self) -> None:
        self._open = 0

    def enter(self) -> None:
        """Take a place, to be given back by `leave`. Raises `CapacityError`."""
        if self._open >= ARCHIVES_AT_ONCE:
            raise CapacityError(
                f"{ARCHIVES_AT_ONCE} archives are on their way at this router; retry",
                retry_after_s=RETRY_BUSY_S,
            )
        self._open += 1

    def leave(self) -> None:
        self._open -= 1

    @asynccontextmanager
    async def body(self, request: Request, limit_bytes: int) -> AsyncIterator[bytes]:
        """The archive that the request brings; its place is kept until the block is left.

        Raises `InvalidRequestError`, `ArchiveTooLarge`, `ArchiveTruncated`, `CapacityError`.
        """
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != ARCHIVE:
            raise InvalidRequestError(
                f"a body of type {kind[:80]!a} is not understood; send {ARCHIVE}",
                param="content-type",
            )
        self.enter()
        try:
            yield await _read(request, limit_bytes)
        finally:
            self.leave()


class ArchiveResponse(StreamingResponse):
    """An archive in pieces, each made on a thread; it gives its place back when it is over."""

    def __init__(self, name: str, size: int, pieces: Iterator[bytes], transfers: Transfers) -> None:
        headers = {
            "Content-Length": str(size),
            "Content-Disposition": f'attachment; filename="{name}.echo"',
        }
        super().__init__(pieces, media_type=ARCHIVE, headers=headers)
        self._transfers = transfers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # What ends early lacks bytes, and the client sees that.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TRANSFER_S):
                    await super().__call__(scope, receive, send)
        finally:
            self._transfers.leave()


async def _read(request: Request, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(TRANSFER_S):
            async for part in request.stream():
                size += len(part)
                if size > limit_bytes:
                    break
                parts.append(part)
    except TimeoutError as error:
        raise InvalidRequestError(
            f"the archive did not arrive within {TRANSFER_S:.0f} s", param="body"
        ) from error
    except ClientDisconnect as error:
        raise ArchiveTruncated("the client left before its archive was whole") from error
    if size > limit_bytes:
        # The server reads on after the answer, so that a client that is still sending sees it.
        raise too_large(limit_bytes)
    return await asyncio.to_thread(b"".join, parts)
