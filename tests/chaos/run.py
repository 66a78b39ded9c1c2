"""One run, inside its cage: start the cluster, watch, break things, compare, report."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import Any

from chaos.balancer import Balancer
from chaos.cage import Wiring, adopt_orphans
from chaos.cluster import Cluster
from chaos.faults import Fault, Trouble, draw
from chaos.report import UNDISTURBED, Findings, Window, examine, headline, table, waits, write
from chaos.viewers import Audience

from echo_ray.client import EchoClient

NODES = 3
SESSIONS = 3
CALM_S = 5.0
"""Watched before the first fault, to know what an undisturbed wait is here."""
LAG_EVERY_S = 0.05
FIRST_LIMIT_S = 60.0


def run(wish: argparse.Namespace, *, caged: bool) -> int:
    """0 if nothing was lost, duplicated or different."""
    adopt_orphans()
    began = time.monotonic()
    say(f"seed {wish.seed}: {wish.faults} faults, {wish.engine} engine; starting the cluster ...")
    cluster = Cluster(wish.folder, Wiring(caged), wish.engine)
    cluster.start(NODES)
    say(f"{NODES} nodes, Redis and S3 after {time.monotonic() - began:.0f} s")
    engine = lone_engine(wish.engine)
    findings = Findings(wish.seed, wish.engine, 0.0)
    if not caged:
        findings.notes.append("no namespaces on this machine: no cables were cut")
    audience = asyncio.run(Run(wish, cluster, engine.shape, findings, caged).watched())
    findings.took_s = time.monotonic() - began
    say("comparing with undisturbed runs ...")
    examine(findings, audience.shows, engine.shape, engine)
    findings.broken += audience.complaints
    write(findings, wish.out)
    say("\n".join(["", headline(findings), table(findings)]))
    for text in [*(f"BROKEN: {b}" for b in findings.broken), *findings.notes]:
        say(text)
    say(f"results: {wish.out}/chaos.json, {wish.out}/chaos.md; logs: {wish.out}/logs")
    return 1 if findings.failed else 0


class Run:
    """The part with viewers."""

    def __init__(
        self,
        wish: argparse.Namespace,
        cluster: Cluster,
        shape: Any,
        findings: Findings,
        caged: bool,
    ) -> None:
        self._wish = wish
        self._cluster = cluster
        self._shape = shape
        self._findings = findings
        self._caged = caged
        self._rng = random.Random(wish.seed)
        self._lag_s = 0.0

    async def watched(self) -> Audience:
        """Play, disturb, let everybody come to an end."""
        balancer = Balancer(self._cluster.doors)
        await balancer.start()
        url = f"http://127.0.0.1:{balancer.port}"
        audience = Audience(url, random.Random(self._rng.random()), self._shape, SESSIONS)
        lag = asyncio.create_task(self._measure_lag())
        async with EchoClient(url, timeout_s=5.0) as client:
            rng = random.Random(self._rng.random())
            trouble = Trouble(self._cluster, balancer, client, rng)
            await trouble.healed()
            playing = asyncio.create_task(audience.play())
            await self._calm(audience)
            try:
                for number, kind in enumerate(self._kinds(), 1):
                    await self._one(number, kind, trouble, audience)
            except TimeoutError as e:
                self._findings.broken.append(str(e))
            await trouble.settled()
            audience.end()
            await playing
        lag.cancel()
        self._findings.notes += trouble.notes
        balancer.close()
        return audience

    def _kinds(self) -> list[str]:
        rng = random.Random(self._rng.random())
        return draw(rng, self._wish.faults, cables=self._caged)

    async def _calm(self, audience: Audience) -> None:
        async with asyncio.timeout(FIRST_LIMIT_S):
            await audience.begun()
        calm = Fault(UNDISTURBED, "", time.monotonic())
        self._began = calm.at
        await asyncio.sleep(CALM_S)
        self._close(calm)

    async def _one(self, number: int, kind: str, trouble: Trouble, audience: Audience) -> None:
        fault = await trouble.make(kind)
        window = self._close(fault)
        views = [v for s in audience.shows for v in s.viewings]
        blamed = [s for v in views for w, s in waits(self._findings.windows, v) if w is window]
        waited = max(blamed, default=0.0)
        gone = time.monotonic() - self._began
        left = gone / number * (self._wish.faults - number)
        say(
            f"[{number}/{self._wish.faults}] {kind} {fault.target}: lasted {fault.lasted_s:.1f} s, "
            f"next frame {waited:.2f} s, healed after {fault.healed_s:.0f} s; "
            f"{gone / 60:.1f} min gone, about {left / 60:.1f} left"
        )

    def _close(self, fault: Fault) -> Window:
        window = Window(fault, lag_s=self._lag_s)
        self._findings.windows.append(window)
        self._lag_s = 0.0
        return window

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self._lag_s = max(self._lag_s, time.monotonic() - due)


def lone_engine(name: str) -> Any:
    """The engine that replicas have, for the undisturbed runs."""
    if name == "fake":
        from fakes import FakeEngine

        return FakeEngine()
    from echo_ray.config import ModelSection
    from echo_ray.engine.build import build_engine

    return build_engine(ModelSection())


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
