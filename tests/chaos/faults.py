"""What goes wrong in a run, drawn from its seed: kinds, targets, durations, quiet times.

Each fault does its harm, undoes it where that is a part of it, and returns; what heals by itself
(a new replica, a node started again) goes on in the background while the next faults come.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import psutil
from chaos.balancer import Balancer
from chaos.cluster import CONTROLLER, ROUTER, Cluster, Node

from echo_ray.client import EchoClient
from echo_ray.errors import EchoError

HEAL_LIMIT_S = 90.0
QUIET_S = (2.0, 6.0)
CABLES = ("node cut off", "node cut from stores", "nodes cut apart")
SHARES = {
    "replica killed": 7,
    "replica hung": 5,
    "node killed": 5,
    "router killed": 4,
    "router hung": 3,
    "controller killed": 2,
    "GCS killed": 3,
    "Redis restarted": 3,
    "Redis hung": 3,
    "S3 hung": 3,
    "planned migration": 5,
    "node cut off": 3,
    "node cut from stores": 2,
    "nodes cut apart": 2,
}
"""How often each kind comes in fifty faults."""


@dataclass
class Fault:
    """One fault as it was done."""

    kind: str
    target: str
    at: float
    lasted_s: float = 0.0
    healed_s: float = 0.0
    """From the fault until enough lived for the next one, the quiet time included."""
    clock: str = ""
    """When it was, as the logs write it."""


def draw(rng: random.Random, count: int, *, cables: bool) -> list[str]:
    """The kinds of a run, in order: bags of fifty, each in its shares, one after another."""
    bag = [kind for kind, n in SHARES.items() for _ in range(n) if cables or kind not in CABLES]
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += rng.sample(bag, len(bag))
    return kinds[:count]


@dataclass
class Trouble:
    """Makes faults happen to a cluster."""

    cluster: Cluster
    balancer: Balancer
    client: EchoClient
    rng: random.Random
    notes: list[str] = field(default_factory=list)
    _repairs: set[asyncio.Task[None]] = field(default_factory=set)

    async def make(self, kind: str) -> Fault:
        """Wait until the cluster can bear it, do it, and leave some quiet after it."""
        acts: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "replica killed": self._kill_replica,
            "replica hung": self._hang_replica,
            "node killed": self._kill_node,
            "router killed": self._kill_router,
            "router hung": self._hang_router,
            "controller killed": self._kill_controller,
            "GCS killed": self._kill_gcs,
            "Redis restarted": self._restart_redis,
            "Redis hung": self._hang_redis,
            "S3 hung": self._hang_s3,
            "planned migration": self._migrate,
            "node cut off": self._cut_off,
            "node cut from stores": self._cut_from_stores,
            "nodes cut apart": self._cut_apart,
        }
        fault = Fault(kind, "", time.monotonic())
        await acts[kind](fault)
        fault.lasted_s = time.monotonic() - fault.at
        began = datetime.now(UTC) - timedelta(seconds=fault.lasted_s)
        fault.clock = began.isoformat(timespec="milliseconds")
        await asyncio.sleep(self.rng.uniform(*QUIET_S))
        await self.healed()
        fault.healed_s = time.monotonic() - fault.at
        return fault

    async def healed(self) -> None:
        """Two replicas live and two routers answer, so that one of each may be lost."""
        limit = time.monotonic() + HEAL_LIMIT_S
        while time.monotonic() < limit:
            await asyncio.to_thread(self.cluster.reap)
            for node in self.cluster.given_up():
                # Whatever runs nodes starts a container again that has ended.
                self.cluster.gone.add(node.number)
                self._later(0.0, partial(self.cluster.restart_node, node))
            if len(self.balancer.up) >= 2 and len(await self._replicas()) >= 2:
                return
            await asyncio.sleep(0.3)
        raise TimeoutError(
            f"the cluster did not heal within {HEAL_LIMIT_S:g} s: "
            f"routers {self.balancer.up}, replicas {await self._replicas()}"
        )

    async def settled(self) -> None:
        """Repairs are done; whatever was stopped goes on."""
        await asyncio.gather(*self._repairs, return_exceptions=True)

    # Processes

    async def _kill_replica(self, fault: Fault) -> None:
        await self._kill(fault, await self._busy_replica())

    async def _kill_router(self, fault: Fault) -> None:
        await self._kill(fault, await self._busy_router())

    async def _kill_controller(self, fault: Fault) -> None:
        await self._kill(fault, await self._one(CONTROLLER))

    async def _hang_replica(self, fault: Fault) -> None:
        await self._hang(fault, await self._busy_replica())

    async def _hang_router(self, fault: Fault) -> None:
        await self._hang(fault, await self._busy_router())

    async def _kill(self, fault: Fault, process: psutil.Process) -> None:
        fault.target, fault.at = f"pid {process.pid}", time.monotonic()
        process.kill()

    async def _hang(self, fault: Fault, process: psutil.Process) -> None:
        fault.target, fault.at = f"pid {process.pid}", time.monotonic()
        process.suspend()
        await asyncio.sleep(self.rng.uniform(1.0, 6.0))
        if process.is_running():
            process.resume()

    # Nodes and cables

    async def _kill_node(self, fault: Fault) -> None:
        node = await self._busy_node()
        fault.target, fault.at = node.ip, time.monotonic()
        await asyncio.to_thread(self.cluster.kill_node, node)
        self._later(self.rng.uniform(0.0, 2.0), lambda: self.cluster.restart_node(node))

    async def _cut_off(self, fault: Fault) -> None:
        node, wiring = await self._busy_node(), self.cluster.wiring
        fault.target, fault.at = node.ip, time.monotonic()
        wiring.pull_out(node.number)
        await asyncio.sleep(self.rng.uniform(0.5, 5.0))
        wiring.plug_in(node.number)

    async def _cut_from_stores(self, fault: Fault) -> None:
        node = await self._busy_node()
        await self._deafen(fault, [(node, self.cluster.wiring.stores)])

    async def _cut_apart(self, fault: Fault) -> None:
        one = await self._busy_node()
        two = self.rng.choice([n for n in self._nodes() if n is not one])
        await self._deafen(fault, [(one, two.ip), (two, one.ip)])

    async def _deafen(self, fault: Fault, ways: list[tuple[Node, str]]) -> None:
        fault.target = " and ".join(f"{node.ip} to {address}" for node, address in ways)
        fault.at = time.monotonic()
        for node, address in ways:
            self.cluster.wiring.deafen(node.number, address)
        await asyncio.sleep(self.rng.uniform(0.5, 5.0))
        for node, address in ways:
            self.cluster.wiring.mend(node.number, address)

    # Servers

    async def _kill_gcs(self, fault: Fault) -> None:
        fault.at = time.monotonic()
        words, env = await asyncio.to_thread(self.cluster.kill_gcs)
        await asyncio.sleep(self.rng.uniform(0.5, 3.0))
        await asyncio.to_thread(self.cluster.start_gcs, words, env)

    async def _restart_redis(self, fault: Fault) -> None:
        fault.at = time.monotonic()
        await asyncio.to_thread(self.cluster.redis.kill)
        await asyncio.sleep(self.rng.uniform(0.0, 2.0))
        await asyncio.to_thread(self.cluster.redis.start)

    async def _hang_redis(self, fault: Fault) -> None:
        fault.at = time.monotonic()
        self.cluster.redis.pause()
        await asyncio.sleep(self.rng.uniform(0.5, 4.0))
        self.cluster.redis.go_on()

    async def _hang_s3(self, fault: Fault) -> None:
        fault.at = time.monotonic()
        self.cluster.pause_s3()
        await asyncio.sleep(self.rng.uniform(2.0, 8.0))
        self.cluster.resume_s3()

    async def _migrate(self, fault: Fault) -> None:
        sessions = [s for r in await self._replicas() for s in r["sessions"]]
        session = self.rng.choice(sorted(sessions) or [""])
        fault.target, fault.at = session, time.monotonic()
        try:
            await self.client.migrate(session)
        except EchoError as e:
            self.notes.append(f"migration of {session}: {e.code}: {e.message}")

    # Whom it hits

    async def _replicas(self) -> list[dict[str, Any]]:
        """What the service itself says of its replicas."""
        limit = time.monotonic() + HEAL_LIMIT_S
        while True:
            try:
                return await self.client.replicas()
            except EchoError:
                if time.monotonic() > limit:
                    raise
                await asyncio.sleep(0.3)

    async def _busy_replica(self) -> psutil.Process:
        """A replica that generates a session, if there is one that does."""
        known = {r["pid"]: r for r in await self._replicas() if _is_live(r["pid"])}
        busy = sorted(pid for pid, r in known.items() if r["sessions"])
        return psutil.Process(self.rng.choice(busy or sorted(known)))

    async def _busy_router(self) -> psutil.Process:
        """The router that most are connected to."""
        ip, _ = self.balancer.busiest or ("", 0)
        for node in (n for n in self._nodes() if n.ip == ip):
            for router in await asyncio.to_thread(self.cluster.workers, ROUTER, node):
                return router
        return await self._one(ROUTER)

    async def _busy_node(self) -> Node:
        replica = await self._busy_replica()
        node = await asyncio.to_thread(self.cluster.node_of, replica.pid)
        return node or self.rng.choice(self._nodes())

    def _nodes(self) -> list[Node]:
        return [n for n in self.cluster.nodes if n.number not in self.cluster.gone]

    async def _one(self, title: str) -> psutil.Process:
        limit = time.monotonic() + HEAL_LIMIT_S
        while time.monotonic() < limit:
            found = await asyncio.to_thread(self.cluster.workers, title)
            if found:
                return self.rng.choice(found)
            await asyncio.sleep(0.2)
        raise RuntimeError(f"no process {title!r} within {HEAL_LIMIT_S:g} s")

    def _later(self, delay_s: float, repair: Callable[[], None]) -> None:
        async def work() -> None:
            await asyncio.sleep(delay_s)
            await asyncio.to_thread(repair)

        task = asyncio.create_task(work())
        self._repairs.add(task)
        task.add_done_callback(self._repairs.discard)


def _is_live(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False
