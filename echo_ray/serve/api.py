"""The router's HTTP application: resources, health, metrics, the player, and how errors look."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo_ray import __version__
from echo_ray.errors import (
    EchoError,
    InvalidRequestError,
    NoReplica,
    NotFoundError,
)
from echo_ray.serve.access import Access, Guard, Visit, visit_of
from echo_ray.serve.api_access import access_routes
from echo_ray.serve.api_admin import admin_routes
from echo_ray.serve.api_forks import fork_routes
from echo_ray.serve.api_sessions import SEGMENT_HEADERS, session_routes
from echo_ray.serve.archive_body import BodyLimits
from echo_ray.serve.forks import Forks
from echo_ray.serve.front import Front
from echo_ray.serve.logs import REQUEST_ID_HEADER, about, log, request_id
from echo_ray.serve.schemas import REFUSALS, ModelList, ModelView, ScrapeTarget
from echo_ray.serve.telemetry import CONTENT_TYPE
from echo_ray.serve.viewers import viewer_routes
from echo_ray.serve.web_headers import WebHeaders

PLAYER = Path(str(resources.files("echo_ray") / "player"))


def build_api(front: Front, player: Path = PLAYER) -> FastAPI:
    """The application that serves everything a viewer or an operator asks of the router."""
    app = FastAPI(
        title="echo_ray",
        version=__version__,
        description="Endless generated video sessions. Streams are WebSockets at "
        "`/v1/sessions/{id}/stream`.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(EchoError, _echo_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    _add_middleware(app, front)
    app.include_router(session_routes(front))
    app.include_router(fork_routes(front, Forks(front)))
    app.include_router(viewer_routes(front))
    app.include_router(admin_routes(front))
    app.include_router(access_routes(front.config.access))
    _add_service_routes(app, front)
    _add_player(app, player)
    return app


def _add_middleware(app: FastAPI, front: Front) -> None:
    """From the innermost out: a request meets the last one first."""
    config = front.config

    async def tenant_of(session_id: str) -> str:
        return (await front.get(session_id)).tenant

    app.add_middleware(BodyLimits, config=config, answer=error_response)
    access = Access(config.access, front.clock)
    app.add_middleware(Guard, access=access, tenant_of=tenant_of, answer=error_response)
    if config.access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.access.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["Retry-After", "X-Request-Id", *SEGMENT_HEADERS],
        )
    app.add_middleware(WebHeaders)
    app.add_middleware(RequestCount, front=front)


def _add_service_routes(app: FastAPI, front: Front) -> None:
    @app.get("/v1/models", tags=["models"])
    async def list_models() -> ModelList:
        """Models served here."""
        shape = front.shape
        return ModelList(
            models=[
                ModelView(
                    id=shape.model,
                    fps=shape.fps,
                    width=shape.width,
                    height=shape.height,
                    frames_per_chunk=shape.frames_per_chunk,
                    first_chunk_frames=shape.first_chunk_frames,
                    point_every=shape.point_every,
                )
            ]
        )

    @app.get("/healthz", tags=["service"])
    async def healthz() -> dict[str, str]:
        """Whether this router runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["service"], responses={503: REFUSALS[503]})
    async def readyz() -> dict[str, Any]:
        """Whether a replica is ready for sessions."""
        replicas = await asyncio.to_thread(front.directory.replicas)
        ready = sum(r.state == "ready" for r in replicas)
        if not ready:
            raise NoReplica(
                f"no replica is ready ({len(replicas)} live); wait for one", retry_after_s=2.0
            )
        return {"status": "ready", "replicas": ready}

    @app.get("/metrics", tags=["service"])
    async def metrics() -> Response:
        """This router's metrics, for Prometheus."""
        return Response(front.telemetry.render(), media_type=CONTENT_TYPE)

    @app.get("/metrics/targets", tags=["service"])
    async def metrics_targets() -> list[ScrapeTarget]:
        """Where the live replicas serve their own, as Prometheus' HTTP service discovery."""
        replicas = await asyncio.to_thread(front.directory.replicas)
        return [ScrapeTarget.of(r) for r in replicas]


def _add_player(app: FastAPI, player: Path) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        file = player / "index.html"
        if not file.is_file():
            raise NotFoundError("the player page is not part of this installation; reinstall it")
        return FileResponse(file)

    if player.is_dir():
        app.mount("/player", StaticFiles(directory=player), name="player")


async def _echo_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, EchoError):
        raise error
    visit_of(request.scope).code = error.code
    return error_response(error)


def error_response(error: EchoError) -> JSONResponse:
    """An error as an HTTP answer."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    body = {**error.to_dict(), "request_id": request_id()}
    return JSONResponse({"error": body}, error.http_status, headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    return error_response(_first_of(error.errors()))


def _first_of(errors: Sequence[Any]) -> InvalidRequestError:
    first = errors[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return InvalidRequestError(
            f"the body is not JSON: {first.get('ctx', {}).get('error', 'unreadable')}; "
            "send a JSON object",
            param="body",
        )
    name = ".".join(place[1:]) or place[0]
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(f"{name} is unknown; remove it", param=name)
    return InvalidRequestError(f"{name}: {first['msg']}", param=name)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        return error_response(NotFoundError(f"nothing is at {ascii(request.url.path)[1:-1]}"))
    answer = error_response(InvalidRequestError(str(error.detail)))
    answer.status_code = error.status_code
    answer.headers.update(error.headers or {})
    return answer


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    # This is answered outside of all middleware.
    visit = request.scope.get("echo.visit")
    with about(request_id=visit.request if isinstance(visit, Visit) else None):
        log(logging.ERROR, "request_failed", failure=error, path=request.url.path)
        answer = error_response(EchoError("the router failed; its log says why"))
        answer.headers[REQUEST_ID_HEADER] = request_id() or ""
        return answer


class RequestCount:
    """Counts answers by route and status; the route's pattern, never its path."""

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app = app
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._front.telemetry.count("requests", route=route, status=str(message["status"]))
            await send(message)

        await self._app(scope, receive, counted)
