"""Routers and replicas of a fake engine around one test, and viewers that keep what they got."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from fakes import FakeEngine, undisturbed
from replicas import Replicas, eventually

from echo_ray import wire
from echo_ray.client import EchoClient, Segment
from echo_ray.config import HttpSection
from echo_ray.serve.front import Front
from echo_ray.serve.router_service import RouterService
from echo_ray.serve.telemetry import BOTH, ROUTERS, Telemetry

PROMPT = "a red circle"
COUNT = 20


@dataclass
class Rig:
    """Replicas, and routers with a client each."""

    replicas: Replicas
    routers: list[RouterService] = field(default_factory=list)
    clients: list[EchoClient] = field(default_factory=list)

    def router(self) -> EchoClient:
        rng = random.Random(len(self.routers))
        front = Front(
            config=replace(self.replicas.config, http=HttpSection(port=0)),
            shape=FakeEngine().shape,
            directory=self.replicas.directory,
            snapshots=self.replicas.snapshots,
            clock=self.replicas.clock,
            telemetry=Telemetry(ROUTERS + BOTH),
            rng=rng,
        )
        self.routers.append(RouterService(front, rng))
        self.clients.append(EchoClient(f"http://{self.routers[-1].address}"))
        return self.clients[-1]

    async def drain(self, name: str, body: dict[str, Any] | None = None) -> httpx.Response:
        url = f"http://{self.routers[0].address}/v1/admin/replicas/{name}/drain"
        async with httpx.AsyncClient() as http:
            return await http.post(url, json=body)

    def owner(self, session_id: str) -> str | None:
        return self.replicas.directory.get(session_id).owner

    def sessions(self, name: str) -> set[str]:
        """The sessions that a replica says it has."""
        found = {r.id: r.sessions for r in self.replicas.directory.replicas()}
        return set(found.get(name, ()))

    def state(self, name: str) -> str | None:
        found = {r.id: r.state for r in self.replicas.directory.replicas()}
        return found.get(name)

    def counted(self, series: str, **labels: str) -> float:
        fronts = [router.front for router in self.routers]
        return sum(front.telemetry.value(series, **labels) for front in fronts)


def run(test: Callable[[Rig], Awaitable[None]], **session: Any) -> None:
    async def whole(replicas: Replicas) -> None:
        rig = Rig(replicas)
        try:
            async with asyncio.timeout(55):
                rig.router()
                await test(rig)
        finally:
            for client in rig.clients:
                await client.close()
            for router in rig.routers:
                await router.stop()

    with Replicas(**session) as replicas:
        asyncio.run(whole(replicas))


@dataclass
class Seen:
    """What one viewer got, and when."""

    segments: list[Segment] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    messages: list[wire.Message] = field(default_factory=list)

    def exact(self, seed: int) -> None:
        """Each index once, in order, each as an undisturbed run makes it; nothing marked."""
        assert [s.index for s in self.segments] == list(range(COUNT))
        digests = undisturbed(FakeEngine(), PROMPT, seed, COUNT, {})
        assert [s.metadata.digest for s in self.segments] == digests
        assert not any(s.metadata.discontinuity for s in self.segments)

    def told(self, *kinds: type[wire.Message]) -> list[wire.Message]:
        return [m for m in self.messages if isinstance(m, kinds)]


async def view(
    client: EchoClient,
    session_id: str,
    at: dict[int, Callable[[], Awaitable[Any]]] | None = None,
    seen: Seen | None = None,
) -> Seen:
    """Watch `COUNT` segments; `at`: what to do after a segment, before the next one is taken.

    As long as that takes, no more is made than the lead: what is to happen before the end of the
    stream can be waited for there.
    """
    seen = seen or Seen()
    async with aclosing(client.segments(session_id, start=0, on_message=seen.messages.append)) as s:
        async for segment in s:
            seen.segments.append(segment)
            seen.at_s.append(time.monotonic())
            if at and segment.index in at:
                await at[segment.index]()
            if len(seen.segments) == COUNT:
                return seen
    return seen


async def until(condition: Callable[[], bool]) -> None:
    assert await asyncio.to_thread(eventually, condition)
