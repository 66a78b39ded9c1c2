"""Router: the door of the service, a Serve deployment with a socket of its own.

Any number may run; several on one node share the port. Everything they know is in the directory.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

from ray import serve

from echo_ray.config import EchoConfig, from_mapping
from echo_ray.errors import UnavailableError
from echo_ray.serve.router_service import STOP_S, RouterService, open_front
from echo_ray.serve.telemetry import log_as_json


@serve.deployment(
    num_replicas=1,
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=1.0,
    health_check_timeout_s=5.0,
    graceful_shutdown_timeout_s=STOP_S + 2,
    graceful_shutdown_wait_loop_s=0.2,
)
class Router:
    """The deployment; `config` is the `EchoConfig` mapping."""

    _service: RouterService | None = None

    # Serve awaits a constructor, and the socket needs the loop that this one runs on.
    async def __init__(self, config: Mapping[str, Any]) -> None:  # type: ignore[misc]
        log_as_json()
        rng = random.Random()
        checked = from_mapping(EchoConfig, config)
        front = await asyncio.to_thread(open_front, checked, rng)
        self._service = RouterService(front, rng)

    async def address(self) -> str:
        """`host:port` of the HTTP door."""
        return self._running().address

    async def check_health(self) -> None:
        self._running().check()

    async def __del__(self) -> None:
        if self._service is not None:
            await self._service.stop()

    def _running(self) -> RouterService:
        if self._service is None:
            raise UnavailableError("the router has not started yet; retry", retry_after_s=1.0)
        return self._service
