"""One router without Ray: its socket, its server, its front and its sweeps."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket

import uvicorn
from fastapi import FastAPI

from echo_ray import __version__
from echo_ray.clock import SystemClock
from echo_ray.config import EchoConfig, HttpSection
from echo_ray.errors import ConfigError, UnavailableError
from echo_ray.preset import load_preset
from echo_ray.serve.accounts import tell_store_calls
from echo_ray.serve.api import build_api
from echo_ray.serve.demand import DemandTeller
from echo_ray.serve.front import Front
from echo_ray.serve.mover import Mover
from echo_ray.serve.restorer import restore_forever
from echo_ray.serve.sweep import sweep_blobs_forever, sweep_forever
from echo_ray.serve.telemetry import BOTH, ROUTERS, Telemetry
from echo_ray.session.engine_port import stream_shape
from echo_ray.storage.open import open_directory, open_snapshots

BACKLOG = 1024
STOP_S = 5.0


def listen(http: HttpSection) -> socket.socket:
    """A listening socket whose port other routers of the node may share."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is named: 40 ms a message.
    door = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        door.bind((http.host, http.port))
        door.listen(BACKLOG)
    except OSError as e:
        door.close()
        raise ConfigError(
            f"http.host and http.port: cannot listen on {http.host}:{http.port}: {e.strerror or e}",
            param="http.port",
        ) from e
    return door


def web_server(app: FastAPI, http: HttpSection) -> uvicorn.Server:
    """The HTTP and WebSocket server of an application."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            # Its own would close the handlers of Serve, which then takes the router for broken.
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="websockets-sansio",
            ws_per_message_deflate=False,
            # Twice what is accepted, so that most oversized messages are refused with a reason.
            ws_max_size=2 * http.max_message_bytes,
            timeout_graceful_shutdown=int(STOP_S),
        )
    )


class RouterService:
    """A running router; make it on the loop that is to serve."""

    def __init__(self, front: Front, rng: random.Random) -> None:
        self.front = front
        self._door = listen(front.config.http)
        self._server = web_server(build_api(front), front.config.http)
        # The deployment's process is not the server's to stop.
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._door]))
        self._sweeping = asyncio.create_task(sweep_forever(front, rng))
        self._sweeping_blobs = asyncio.create_task(sweep_blobs_forever(front, rng))
        self._moving = asyncio.create_task(Mover(front, rng).run())
        self._telling = asyncio.create_task(DemandTeller(front).run())
        self._restoring = asyncio.create_task(restore_forever(front, rng))

    @property
    def address(self) -> str:
        """`host:port` that it listens on."""
        host, port = self._door.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def check(self) -> None:
        """Raise `UnavailableError` if a part of it has stopped."""
        parts = {
            "server": self._serving,
            "sweep": self._sweeping,
            "sweep of blobs": self._sweeping_blobs,
            "mover": self._moving,
            "teller of demand": self._telling,
            "restorer": self._restoring,
        }
        for name, task in parts.items():
            if task.done():
                raise UnavailableError(f"the router's {name} has stopped; replace this router")

    async def stop(self) -> None:
        """Send viewers elsewhere and close."""
        tasks = (
            self._sweeping,
            self._sweeping_blobs,
            self._moving,
            self._telling,
            self._restoring,
        )
        for task in tasks:
            task.cancel()
        await self.front.close()
        self._server.should_exit = True
        await asyncio.gather(self._serving, *tasks, return_exceptions=True)
        self._door.close()


def open_front(config: EchoConfig, rng: random.Random) -> Front:
    """A router's front over the configured stores."""
    clock = SystemClock()
    telemetry = Telemetry(ROUTERS + BOTH)
    telemetry.set("build_info", 1, version=__version__, role="router")
    return Front(
        config=config,
        shape=stream_shape(load_preset(config.model.preset)),
        directory=open_directory(config.storage, clock),
        snapshots=open_snapshots(config.storage, tell_store_calls(telemetry)),
        clock=clock,
        telemetry=telemetry,
        rng=rng,
    )
