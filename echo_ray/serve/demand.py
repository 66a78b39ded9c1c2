"""A router tells a replica what asks for room, and the replica tells Serve: `serve/scaling.py`.

It keeps to one replica as long as that one takes sessions, so that hardly anything is told twice.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import asdict

from echo_ray.errors import EchoError
from echo_ray.serve.front import Front
from echo_ray.serve.telemetry import log
from echo_ray.session.demand import TELL_S, Demand
from echo_ray.session.locating import Owner
from echo_ray.session.records import ReplicaRecord

TIMEOUT_S = 1.0


class DemandTeller:
    """Tells of one router's demand; run it as a task."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._router = secrets.token_hex(8)
        self._listener: str | None = None

    async def run(self) -> None:
        """Tell every `TELL_S`, for ever."""
        while True:
            await asyncio.sleep(TELL_S)
            try:
                await self.tell()
            except EchoError as e:
                # Another replica is told the next time.
                self._listener = None
                log(logging.DEBUG, "demand_not_told", reason=e.message)

    async def tell(self) -> None:
        """Tell a replica that takes sessions; nobody if there is none. Raises `EchoError`."""
        replica = await asyncio.to_thread(self._choose)
        if replica is None:
            return
        self._listener = replica.id
        demand = await self._seen()
        door = Owner("", replica.id, replica.address, 0)
        told = {"router": self._router, **asdict(demand)}
        await self._front.ask(door, "/v1/demand", timeout_s=TIMEOUT_S, **told)

    def _choose(self) -> ReplicaRecord | None:
        named = () if self._listener is None else (self._listener,)
        found = self._front.directory.replicas(among=1, named=named)
        ready = [r for r in found if r.state == "ready"]
        return max(ready, key=lambda r: r.id == self._listener, default=None)

    async def _seen(self) -> Demand:
        front = self._front
        draining = await asyncio.to_thread(front.directory.draining)
        left = [r for r in draining if r.sessions]
        return Demand(
            watched=len(front.relays.waiting()),
            unwatched=front.homeless,
            refused=front.owners.refusals.count(front.clock.monotonic()),
            draining=len(left),
            moving=sum(len(r.sessions) for r in left),
        )
