"""What requests to a replica are made of: numbers, errors as answers, waiting for a session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo_ray.errors import EchoError, InvalidRequestError, UnavailableError
from echo_ray.serve.logs import REQUEST_ID, REQUEST_ID_HEADER, about, log
from echo_ray.serve.runner import Reader, SessionRunner

T = TypeVar("T")
Answer = Callable[[Request], Awaitable[Response]]
LONGEST_NUMBER = 15
_ROUTER = re.compile("[A-Za-z0-9_-]{1,64}")


def number(name: str, text: str | None) -> int:
    """A chunk index or an epoch from a request. Raises `InvalidRequestError`."""
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > LONGEST_NUMBER:
        raise InvalidRequestError(
            f"{name}={text!r} is not a number of at most {LONGEST_NUMBER} digits", param=name
        )
    return int(text)


def routers_id(text: str | None) -> str:
    """The name that a router gives itself. Raises `InvalidRequestError`."""
    if text is None or not _ROUTER.fullmatch(text):
        raise InvalidRequestError(
            f"router={text!r} is not a name of 1 to 64 letters, digits, - and _", param="router"
        )
    return text


def answering(answer: Answer) -> Answer:
    """The route, with errors of ours turned into their answers."""

    async def route(request: Request) -> Response:
        given = request.headers.get(REQUEST_ID_HEADER, "")
        asked_by = given if REQUEST_ID.fullmatch(given) else None
        with about(request_id=asked_by, session=request.path_params.get("session_id")):
            try:
                return await answer(request)
            except EchoError as error:
                log(logging.INFO, "refused", error=error.message, code=error.code)
                return JSONResponse({"error": error.to_dict()}, status_code=error.http_status)

    return route


def waker(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], None]:
    """A call for any thread that sets `event` on its loop; nothing once the loop is closed."""

    def wake() -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(event.set)

    return wake


async def until(
    runner: SessionRunner,
    probe: Callable[[Reader], T | None],
    timeout_s: float,
    *,
    epoch: int = 0,
    start: int | None = None,
) -> T:
    """What `probe` answers once it is not None. Raises `UnavailableError` after `timeout_s`.

    Meanwhile the session has a reader that needs chunk `start` and asks for no new ones.
    """
    wake = asyncio.Event()
    reader = Reader(epoch, waker(asyncio.get_running_loop(), wake))
    runner.attach(reader, start)
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                wake.clear()
                found = probe(reader)
                if found is not None:
                    return found
                await wake.wait()
    except TimeoutError as error:
        raise UnavailableError(
            f"session {runner.session_id!r} was not ready after {timeout_s} s; try again",
            retry_after_s=1.0,
        ) from error
    finally:
        runner.detach(reader)
