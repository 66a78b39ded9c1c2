"""A real Prometheus over a real service: who is found, what panels show, and an alert."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from infra.test_dashboards import PANELS, plain
from service import Service, running_service

from echo_ray.client import EchoClient
from infra.prometheus import Prometheus, running_prometheus

LATE = "echo_ray:chunks_late:ratio_rate5m >= 0"
NOTHING_BY_NATURE = {
    "Alerts that fire",
    "Between the tiers",
    "Brought back after Redis lost everything",
    "Engine failures",
    "Kernels that fell back to plain PyTorch, calls",
    "Store errors",
}
"""Panels of what did not happen, or is not there with stores of one tier."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="prometheus is not installed (its package)",
    ),
]


async def soon(
    what: str, condition: Callable[[], Any], limit_s: float = 60.0, *, must: bool = True
) -> None:
    end = time.monotonic() + (limit_s if must else 10.0)
    while not await asyncio.to_thread(condition):
        if time.monotonic() >= end:
            assert not must, f"never: {what}"
            return
        await asyncio.sleep(0.3)


async def watch(client: EchoClient, session: str, seen: list[int]) -> None:
    async for segment in client.segments(session, start=0, format="raw"):
        seen.append(segment.index)


def table(prometheus: Prometheus) -> list[tuple[str, str, int, str]]:
    """For each panel: how many series its queries find, and the first value."""
    rows = []
    for board, panel in PANELS:
        found = [s for t in panel["targets"] for s in prometheus.query(plain(t["expr"], "5m"))]
        numbers = [s for s in found if s["value"][1] != "NaN"]
        first = f"{float(numbers[0]['value'][1]):.4g}" if numbers else "-"
        rows.append((board, panel["title"], len(numbers), first))
    return rows


def empty(rows: list[tuple[str, str, int, str]]) -> set[str]:
    """Panels that show nothing and should."""
    return {title for _, title, count, _ in rows if not count} - NOTHING_BY_NATURE


async def story(service: Service, prometheus: Prometheus) -> list[tuple[str, str, int, str]]:
    """Everything that happens; at its end, what the panels show."""
    async with EchoClient(service.url) as client:
        sid = (await client.create("a red circle", seed=7, on_idle="continue"))["id"]
        seen: list[int] = []
        watching = asyncio.create_task(watch(client, sid, seen))
        await soon("both replicas and the router are scraped", lambda: _all_there(prometheus))
        await soon("chunks come", lambda: len(seen) > 9)
        await client.send_event(sid, "a blue square")
        await client.migrate(sid)
        await soon("an hour's quiet", lambda: not prometheus.firing())

        for replica in await client.replicas():
            os.kill(replica["pid"], signal.SIGKILL)
        await soon("a waiting session", lambda: "EchoRaySessionsWaiting" in prometheus.firing())
        stood = len(seen)
        await soon("the stream goes on", lambda: len(seen) > stood + 5, limit_s=90)
        await soon("quiet", lambda: "EchoRaySessionsWaiting" not in prometheus.firing())
        await soon("new replicas are found", lambda: _all_there(prometheus))
        await soon("rates of the new ones", lambda: prometheus.query(LATE))
        assert seen == list(range(len(seen)))

        # What a new process did before it was first scraped no rate can tell.
        await client.migrate(sid)
        await soon("every panel has data", lambda: not empty(table(prometheus)), must=False)
        rows = await asyncio.to_thread(table, prometheus)
        watching.cancel()
        return rows


def _all_there(prometheus: Prometheus) -> bool:
    found = prometheus.targets()
    return (
        len(found.get("echo-ray-replicas", ())) == 2 and len(found.get("echo-ray-routers", ())) == 1
    )


def test_an_alert_fires_when_all_replicas_die_and_clears_when_streams_go_on(tmp_path: Path) -> None:
    with (
        running_service(tmp_path, **{"session.sweep_s": 0.5}) as service,
        running_prometheus(tmp_path / "p", service.url.removeprefix("http://")) as prometheus,
    ):
        rows = asyncio.run(story(service, prometheus))
    said = "".join(f"{b:9} {t:50} {n:3} {v}\n" for b, t, n, v in rows)
    (tmp_path / "panels.txt").write_text(said)
    assert not empty(rows), said
