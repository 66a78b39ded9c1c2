"""Serve's number of replicas follows the sessions on a real Ray, and viewers see nothing of it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, undisturbed
from ports import free_port

from echo_ray.client import EchoClient, Segment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TESTS = str(Path(__file__).parents[1])
PROMPT = "a red circle"
WITHIN_S = 240.0
"""For what takes seconds on an idle machine."""
SLOTS = 4
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 0,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "policy": {
        "policy_function": "echo_ray.serve.scaling:SessionScaling",
        "policy_kwargs": {"spare_slots": 1, "stable_s": 3, "settle_s": 2},
    },
}


def deploy(folder: Path, port: int) -> None:
    """The service as `serve deploy` has it, on nodes with room for one replica each."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    app = {
        "name": "scaled",
        "import_path": "fake_app:build",
        "route_prefix": None,
        "args": {
            "storage": {"path": str(folder)},
            "http": {"port": port},
            "limits": {"sessions_per_replica": SLOTS},
        },
        "deployments": [
            {
                "name": "GeneratorReplica",
                "autoscaling_config": AUTOSCALING,
                "ray_actor_options": {"num_cpus": 0, "resources": {"slot": 1}},
            },
            {
                "name": "Router",
                "num_replicas": 1,
                "ray_actor_options": {"num_cpus": 0, "resources": {"head": 1}},
            },
        ],
    }
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [app]}), _blocking=False)
    client._wait_for_application_running("scaled", timeout_s=WITHIN_S)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a service on a head and two more nodes."""
    monkeypatch.setenv("RAY_enable_metrics_collection", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
    import ray
    from ray import cluster_utils, serve

    nodes = cluster_utils.Cluster(shutdown_at_exit=True)
    common = {"num_cpus": 2, "include_log_monitor": False, "object_store_memory": 80 * 2**20}
    head = {"include_dashboard": False, "no_monitor": True, "resources": {"head": 10}}
    try:
        nodes.add_node(node_ip_address="127.0.0.71", **common, **head)
        for ip in ("127.0.0.72", "127.0.0.73"):
            nodes.add_node(node_ip_address=ip, resources={"slot": 1}, **common)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        serve.start(proxy_location="Disabled")
        port = free_port()
        deploy(tmp_path, port)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()
        nodes.shutdown()


@dataclass
class Seen:
    """A session with a viewer, who watches until it is deleted."""

    session_id: str
    segments: list[Segment] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    came: asyncio.Condition = field(default_factory=asyncio.Condition)

    @classmethod
    async def create(cls, client: EchoClient, seed: int, tasks: asyncio.TaskGroup) -> Seen:
        """One whose first segment has come."""
        seen = cls((await client.create(PROMPT, seed=seed))["id"])
        tasks.create_task(seen._watch(client))
        await seen.more(1)
        return seen

    async def _watch(self, client: EchoClient) -> None:
        async with aclosing(client.segments(self.session_id, start=0)) as stream:
            async for segment in stream:
                async with self.came:
                    self.segments.append(segment)
                    self.at_s.append(time.monotonic())
                    self.came.notify_all()

    async def more(self, count: int) -> None:
        """Return when so many more segments have come."""
        enough = len(self.segments) + count
        async with self.came:
            await self.came.wait_for(lambda: len(self.segments) >= enough)

    @property
    def owner(self) -> str | None:
        return self.segments[-1].metadata.owner

    def exact(self, seed: int) -> None:
        """Each index once, in order, each as an undisturbed run makes it; nothing marked."""
        count = len(self.segments)
        assert [s.index for s in self.segments] == list(range(count))
        digests = undisturbed(FakeEngine(), PROMPT, seed, count, {})
        assert [s.metadata.digest for s in self.segments] == digests
        assert not any(s.metadata.discontinuity for s in self.segments)


async def ready(url: str, count: int) -> list[dict[str, Any]]:
    """The replicas that take sessions, once there are so many and no others."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(WITHIN_S), httpx.AsyncClient(timeout=60) as http:
        while [r["state"] for r in found] != ["ready"] * count:
            await asyncio.sleep(0.2)
            found = (await http.get(f"{url}/v1/admin/replicas")).json()["replicas"]
    return found


def test_replicas_come_with_sessions_and_go_without_a_viewer_seeing_it(url: str) -> None:
    async def whole() -> None:
        async with asyncio.timeout(WITHIN_S), EchoClient(url) as client:
            await ready(url, 1)
            begun_s = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                # All slots of the one replica.
                crowd = [await Seen.create(client, seed, tasks) for seed in range(SLOTS)]
                await ready(url, 2)
                grown_s = time.monotonic()
                first, second = crowd[0], await Seen.create(client, SLOTS, tasks)
                await first.more(4)
                await second.more(4)
                assert first.owner != second.owner
                for seen in crowd[1:]:
                    await client.delete(seen.session_id)
                halved_s = time.monotonic()
                (left,) = await ready(url, 1)
                shrunk_s = time.monotonic()
                for seen in (first, second):
                    await seen.more(8)
                    assert seen.owner == left["id"]
                    await client.delete(seen.session_id)
        for seed, seen in enumerate([*crowd, second]):
            seen.exact(seed)
        gaps = [max(b - a for a, b in pairwise(seen.at_s)) for seen in (first, second)]
        logging.getLogger(__name__).info(
            "two replicas after %.1f s; one %.1f s after the crowd left; gaps %.2f and %.2f s",
            *(grown_s - begun_s, shrunk_s - halved_s, *gaps),
        )

    asyncio.run(whole())
