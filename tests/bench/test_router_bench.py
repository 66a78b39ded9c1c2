"""What the router costs: a segment through it against one straight from the replica, and its CPU.

Run by `make bench`, on the real service with real processes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from service import Service, router_pid, running_service, take

from echo_ray.client import EchoClient

pytestmark = [pytest.mark.bench, pytest.mark.ray, pytest.mark.timeout(180)]

STREAMS = 3
CHUNKS = 16
INDEX = 9


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("bench")) as running:
        yield running


@pytest.fixture(scope="module")
def session(service: Service) -> dict[str, Any]:
    """A session with a few segments behind it, and where its owner is."""

    async def begin() -> dict[str, Any]:
        async with EchoClient(service.url) as client:
            made = await client.create("a red ball", seed=1, pace="max", on_idle="continue")
            await take(client, made["id"], 0, INDEX + 3)
            found = await client.get(made["id"])
            replicas = await client.replicas()
            owner = next(r for r in replicas if r["id"] == found["owner"])
            return {**found, "address": owner["address"]}

    return asyncio.run(begin())


@pytest.mark.parametrize("way", ["replica", "router"])
def test_one_segment(service: Service, session: dict[str, Any], way: str, benchmark: Any) -> None:
    where, epoch = session["id"], session["epoch"]
    url = {
        "replica": f"http://{session['address']}/v1/segments/{where}/{INDEX}?epoch={epoch}",
        "router": f"{service.url}/v1/sessions/{where}/segments/{INDEX}?x=1",
    }[way]
    with httpx.Client() as client:
        answer = benchmark(lambda: client.get(f"{url}&format=raw"))
    assert hashlib.sha256(answer.content).hexdigest() == answer.headers["X-Echo-Digest"]
    benchmark.extra_info["segment_bytes"] = len(answer.content)


def test_cpu_per_stream(service: Service, benchmark: Any) -> None:
    router = psutil.Process(router_pid(service))

    async def watch(seed: int) -> int:
        async with EchoClient(service.url) as client:
            made = await client.create("a red ball", seed=seed)
            seen = await take(client, made["id"], 0, CHUNKS)
            await client.delete(made["id"])
            return len(seen)

    async def all_streams() -> list[int]:
        return await asyncio.gather(*(watch(seed) for seed in range(STREAMS)))

    def busy() -> float:
        times = router.cpu_times()
        return float(times.user + times.system)

    before = busy()
    counts = benchmark.pedantic(lambda: asyncio.run(all_streams()), rounds=1)
    assert counts == [CHUNKS] * STREAMS
    spent, wall = busy() - before, benchmark.stats.stats.mean
    benchmark.extra_info["router_cpu_percent_per_stream"] = round(100 * spent / wall / STREAMS, 2)
    benchmark.extra_info["router_cpu_ms_per_segment"] = round(1000 * spent / STREAMS / CHUNKS, 2)
