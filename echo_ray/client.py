"""The asynchronous client: create, steer and watch sessions, whatever happens to their replicas.

    async with EchoClient("http://127.0.0.1:8000") as client:
        session = await client.create("a red circle moves left on black")
        async for segment in client.segments(session["id"], start=0, format="raw"):
            ...

Segments come by index, each once and in order, over as many connections as it takes; raw ones are
checked against their digests. Needs neither torch nor ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from echo_ray import wire
from echo_ray.client_reader import Reader, worth_a_retry
from echo_ray.client_reader import Segment as Segment
from echo_ray.errors import (
    ArchiveError,
    ClipInvalid,
    EchoError,
    MessageError,
    TokenExpired,
    Unauthenticated,
    UnavailableError,
)

MAX_SEGMENT_BYTES = 2**28
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 3.0
CLIP_TIMEOUT_S = 150.0
"""A service looks at a whole clip before it answers."""
COPY_TIMEOUT_S = 660.0
"""A service waits so long for an archive on its way, and copies before it answers."""
TOKEN_VARIABLE = "ECHO_RAY_TOKEN"
CLOSE_TIMEOUT_S = 0.5
"""Leaving early, with segments on their way that nobody will read, waits no longer."""


class EchoClient:
    """A connection to one service. Every refusal is raised as the `EchoError` that it is."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout_s: float = 30.0,
        patience_s: float = 60.0,
        token: str | Path | None = None,
    ) -> None:
        """`patience_s`: how long a stream tries to connect again before it gives up.

        `token`: shown to a service with access on, or the file that holds it, read at each use;
        None: the variable ECHO_RAY_TOKEN, if it is set.
        """
        self._url = url.rstrip("/")
        self._patience_s = patience_s
        self._token = os.environ.get(TOKEN_VARIABLE) or None if token is None else token
        self._http = httpx.AsyncClient(base_url=self._url, timeout=timeout_s, auth=self._signed)
        self._sockets: set[ClientConnection] = set()

    async def __aenter__(self) -> EchoClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection, those of streams that were left in the middle too."""
        await asyncio.gather(*(socket.close() for socket in self._sockets))
        await self._http.aclose()

    async def create(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        model: str | None = None,
        pace: str | None = None,
        on_idle: str | None = None,
        labels: Mapping[str, str] | None = None,
        clip: bytes | Path | None = None,
    ) -> dict[str, Any]:
        """Create a session; the service draws the seed if none is given.

        `clip`: an MP4, PNG or JPEG, or the file that holds it. It becomes the first chunks, and
        the session continues it.
        """
        wish = {"seed": seed, "model": model, "pace": pace, "on_idle": on_idle, "labels": labels}
        body = {"prompt": prompt, **_given(wish)}
        if clip is None:
            return await self._call("POST", "/v1/sessions", body)
        data = await _bytes(clip, ClipInvalid)
        parts = {"session": (None, json.dumps(body)), "clip": ("clip", data)}
        return _object(await self._ask("POST", "/v1/sessions", files=parts, timeout=CLIP_TIMEOUT_S))

    async def get(self, session_id: str) -> dict[str, Any]:
        return await self._call("GET", _path(session_id))

    async def sessions(self) -> list[dict[str, Any]]:
        """All sessions, oldest first."""
        return list((await self._call("GET", "/v1/sessions"))["sessions"])

    async def delete(self, session_id: str) -> None:
        await self._call("DELETE", _path(session_id))

    async def pause(self, session_id: str) -> dict[str, Any]:
        return await self._call("POST", _path(session_id, "/pause"))

    async def resume(self, session_id: str) -> dict[str, Any]:
        return await self._call("POST", _path(session_id, "/resume"))

    async def fork(
        self,
        session_id: str,
        chunk: int | None = None,
        *,
        prompt: str | None = None,
        pace: str | None = None,
        on_idle: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """A new session with the same past up to `chunk` (or now), under `prompt` from there on."""
        wish = {"chunk": chunk, "prompt": prompt, "pace": pace, "on_idle": on_idle}
        body = _given({**wish, "labels": labels})
        return await self._copy(_path(session_id, "/fork"), json=body)

    async def rewind(self, session_id: str, chunk: int) -> dict[str, Any]:
        """A fork at an earlier chunk that takes the session's place; the old one is closed."""
        return await self._copy(_path(session_id, "/rewind"), json={"chunk": chunk})

    async def export(self, session_id: str, file: Path) -> int:
        """Write the session to a file that `import_` reads; returns its size in bytes.

        The file is there when it is whole. Raises `ArchiveError` if it cannot be written.
        """
        part = file.with_name(file.name + ".part")
        try:
            size = await self._download(_path(session_id, "/export"), part)
            await asyncio.to_thread(part.replace, file)
        except OSError as e:
            raise ArchiveError(f"{file}: cannot be written: {e.strerror or e}") from e
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
        return size

    async def import_(self, archive: bytes | Path) -> dict[str, Any]:
        """A new session that goes on where an exported one stood; the archive, or its file."""
        data = await _bytes(archive, ArchiveError)
        headers = {"Content-Type": "application/octet-stream"}
        return await self._copy("/v1/sessions/import", content=data, headers=headers)

    async def send_event(
        self,
        session_id: str,
        prompt: str,
        *,
        event_id: str | None = None,
        at_chunk: int | None = None,
    ) -> int:
        """Switch the prompt; returns the chunk where it takes effect, once that is durable."""
        body = {"event_id": event_id or secrets.token_hex(16), "event": {"prompt": prompt}}
        body |= _given({"at_chunk": at_chunk})
        answer = await self._call("POST", _path(session_id, "/events"), body)
        return int(answer["effective_chunk"])

    async def snapshots(self, session_id: str) -> list[dict[str, Any]]:
        return list((await self._call("GET", _path(session_id, "/snapshots")))["snapshots"])

    async def pin_snapshot(self, session_id: str) -> dict[str, Any]:
        """Keep the latest point for ever; the answer says which it is."""
        return await self._call("POST", _path(session_id, "/snapshots"))

    async def segment(self, session_id: str, index: int, *, format: str = "raw") -> bytes:
        """One past segment."""
        path = _path(session_id, f"/segments/{index}")
        return (await self._ask("GET", path, params={"format": format})).content

    async def viewer_token(self, session_id: str, *, ttl_s: float | None = None) -> dict[str, Any]:
        """A token that lets somebody watch this session for a while: `{token, expires_at}`."""
        return await self._call(
            "POST", _path(session_id, "/viewer-tokens"), _given({"ttl_s": ttl_s})
        )

    async def replicas(self) -> list[dict[str, Any]]:
        return list((await self._call("GET", "/v1/admin/replicas"))["replicas"])

    async def migrate(self, session_id: str, *, to: str | None = None) -> dict[str, Any]:
        """Move a session to replica `to`, or to the best other one."""
        path = f"/v1/admin/sessions/{session_id}/migrate"
        return await self._call("POST", path, {"to": to} if to else {})

    async def drain(self, replica_id: str, *, deadline_s: float | None = None) -> dict[str, Any]:
        """Have a replica's sessions moved elsewhere; what is left after `deadline_s` is parked."""
        body = {} if deadline_s is None else {"deadline_s": deadline_s}
        return await self._call("POST", f"/v1/admin/replicas/{replica_id}/drain", body)

    async def ready(self) -> bool:
        """Whether the service answers and has a replica."""
        try:
            await self._call("GET", "/readyz")
        except UnavailableError:
            return False
        return True

    async def segments(
        self,
        session_id: str,
        *,
        start: int | None = None,
        format: str = "raw",
        on_message: Callable[[wire.Message], None] | None = None,
    ) -> AsyncGenerator[Segment, None]:
        """Segments from index `start` (or the live edge), until the session ends.

        Connects again by itself at the next index; `on_message` is told every other message.
        Raises the service's refusal, `UnavailableError` after `patience_s` without a connection,
        `MessageError` when the service repeats, skips or damages a segment.
        """
        reader = Reader(format, start, on_message)
        failed_since: float | None = None
        delay_s = FIRST_DELAY_S
        while True:
            try:
                async with self._connected(self._stream_url(session_id, reader)) as socket:
                    async for segment in reader.read(socket):
                        failed_since, delay_s = None, FIRST_DELAY_S
                        yield segment
                return
            except (OSError, WebSocketException, TimeoutError) as e:
                reason = reader.refusal or UnavailableError(f"{self._url}: {e!r}")
                # The token held when the stream began; the file may have a new one by now.
                renewed = isinstance(reader.refusal, TokenExpired) and failed_since is None
                renewed = renewed and isinstance(self._token, Path)
                if not renewed and not worth_a_retry(e, reader.refusal):
                    raise reason from e
            now = time.monotonic()
            failed_since = failed_since or now
            if now - failed_since > self._patience_s:
                raise reason
            await asyncio.sleep(delay_s * random.uniform(0.75, 1.25))
            delay_s = min(MAX_DELAY_S, delay_s * 2)

    @contextlib.asynccontextmanager
    async def _connected(self, url: str) -> AsyncIterator[ClientConnection]:
        """A socket that `close` knows of until it is closed."""
        socket = await connect(
            url,
            max_size=MAX_SEGMENT_BYTES,
            compression=None,
            close_timeout=CLOSE_TIMEOUT_S,
            additional_headers=self._credentials(),
        )
        self._sockets.add(socket)
        try:
            yield socket
        finally:
            await socket.close()
            self._sockets.discard(socket)

    def _credentials(self) -> dict[str, str]:
        token = self._token
        if isinstance(token, Path):
            try:
                token = token.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as e:
                raise Unauthenticated(f"{token}: the token cannot be read: {e}") from e
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _signed(self, request: httpx.Request) -> httpx.Request:
        request.headers.update(self._credentials())
        return request

    def _stream_url(self, session_id: str, reader: Reader) -> str:
        query = f"?format={reader.format}"
        if reader.next is not None:
            query += f"&from={reader.next}"
        return "ws" + self._url.removeprefix("http") + _path(session_id, "/stream") + query

    async def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        return _object(await self._ask(method, path, json=body))

    async def _copy(self, path: str, **given: Any) -> dict[str, Any]:
        return _object(await self._ask("POST", path, timeout=COPY_TIMEOUT_S, **given))

    async def _download(self, path: str, file: Path) -> int:
        try:
            async with self._http.stream("GET", path, timeout=COPY_TIMEOUT_S) as answer:
                if answer.is_error:
                    await answer.aread()
                    raise _refusal(answer)
                with await asyncio.to_thread(file.open, "wb") as written:
                    async for piece in answer.aiter_bytes():
                        await asyncio.to_thread(written.write, piece)
                    return written.tell()
        except httpx.HTTPError as e:
            raise UnavailableError(f"{self._url}: the answer broke off: {e!r}") from e

    async def _ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, **given)
        except httpx.HTTPError as e:
            raise UnavailableError(f"{self._url} does not answer: {e!r}") from e
        if answer.is_error:
            raise _refusal(answer)
        return answer


def _given(wish: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that were given, in JSON's types."""
    plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in wish.items()}
    return {k: v for k, v in plain.items() if v is not None}


async def _bytes(data: bytes | Path, refusal: type[EchoError]) -> bytes:
    if isinstance(data, bytes):
        return data
    try:
        return await asyncio.to_thread(data.read_bytes)
    except OSError as e:
        raise refusal(f"{data}: cannot be read: {e.strerror or e}; name another file") from e


def _object(answer: httpx.Response) -> dict[str, Any]:
    data = answer.json() if answer.content else {}
    if not isinstance(data, dict):
        request = answer.request
        raise MessageError(f"{request.method} {request.url.path}: the answer is not a JSON object")
    return data


def _refusal(answer: httpx.Response) -> EchoError:
    try:
        body = answer.json()
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return wire.error_from(error)
    kind = UnavailableError if answer.status_code >= 500 else EchoError
    return kind(f"{answer.request.url.path}: the service answered {answer.status_code}")


def _path(session_id: str, rest: str = "") -> str:
    return f"/v1/sessions/{session_id}{rest}"
