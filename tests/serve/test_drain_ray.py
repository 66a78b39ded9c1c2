"""Draining on a real Ray of several nodes: every way a replica comes to leave, viewers watching."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, undisturbed
from ports import free_port
from replicas import eventually

from echo_ray import wire
from echo_ray.client import EchoClient, Segment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TESTS = str(Path(__file__).parents[1])
PROMPT = "a red circle"
COUNT = 24
"""Chunks of a quarter of a second that each viewer watches at least."""
WITHIN_S = 120.0
"""For what takes seconds on an idle machine."""


@dataclass
class Cluster:
    """A head with two routers, and nodes with room for one replica each."""

    ray: Any
    nodes: list[Any]
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, replicas: int, release: int = 1) -> None:
        """Have so many replicas, as `serve deploy` does; another release is new code to Serve."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        app = {
            "name": "drained",
            "import_path": "fake_app:build",
            "route_prefix": None,
            "args": {
                "storage": {"path": str(self.folder)},
                "http": {"port": self.port},
                "limits": {"sessions": 1000 + release},
            },
            "deployments": [
                {
                    "name": "GeneratorReplica",
                    "num_replicas": replicas,
                    "ray_actor_options": {"num_cpus": 0, "resources": {"slot": 1}},
                },
                {
                    "name": "Router",
                    "num_replicas": 2,
                    "ray_actor_options": {"num_cpus": 0, "resources": {"head": 1}},
                },
            ],
        }
        config = ServeDeploySchema.model_validate({"applications": [app]})
        client = _get_global_client()
        client.deploy_apps(config, _blocking=False)
        client._wait_for_application_running("drained", timeout_s=WITHIN_S)

    def replicas(self, state: str = "ready") -> list[dict[str, Any]]:
        try:
            found = httpx.get(f"{self.url}/v1/admin/replicas", timeout=30).json()["replicas"]
        except httpx.HTTPError:
            return []
        return [r for r in found if r["state"] == state]

    def wait(self, replicas: int, state: str = "ready") -> list[dict[str, Any]]:
        """The replicas in that state, once there are so many."""
        until_s = time.monotonic() + WITHIN_S
        while len(found := self.replicas(state)) != replicas:
            assert time.monotonic() < until_s, f"{len(found)} replicas are {state}, not {replicas}"
            time.sleep(0.1)
        return found

    def drain(self, replica_id: str, deadline_s: float) -> None:
        body = {"deadline_s": deadline_s}
        url = f"{self.url}/v1/admin/replicas/{replica_id}/drain"
        assert httpx.post(url, json=body, timeout=60).status_code == 202

    def add_node(self) -> None:
        number = len(self.nodes)
        self.nodes.append(
            self.ray.add_node(
                node_ip_address=f"127.0.0.{42 + number}",
                num_cpus=2,
                resources={"slot": 1},
                include_log_monitor=False,
                object_store_memory=80 * 2**20,
            )
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_enable_metrics_collection", "0")
    patch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
    import ray
    from ray import cluster_utils, serve

    nodes = cluster_utils.Cluster(shutdown_at_exit=True)
    try:
        nodes.add_node(
            node_ip_address="127.0.0.41",
            num_cpus=4,
            resources={"head": 10},
            include_dashboard=False,
            no_monitor=True,
            include_log_monitor=False,
            object_store_memory=80 * 2**20,
        )
        found = Cluster(nodes, [], tmp_path_factory.mktemp("drained"), free_port())
        found.add_node()
        found.add_node()
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        serve.start(proxy_location="Disabled")
        yield found
        serve.shutdown()
    finally:
        ray.shutdown()
        nodes.shutdown()
        patch.undo()


@dataclass
class Seen:
    """What a viewer got."""

    segments: list[Segment]
    at_s: list[float]
    messages: list[wire.Message]

    @property
    def longest_gap_s(self) -> float:
        return max(y - x for x, y in zip(self.at_s, self.at_s[1:], strict=False))

    @property
    def owners(self) -> list[str]:
        """The replicas in the order they served."""
        names = [s.metadata.owner for s in self.segments]
        return [n for i, n in enumerate(names) if i == 0 or n != names[i - 1]]

    def told(self, kind: type[wire.Migrated | wire.ErrorMessage]) -> list[Any]:
        return [m for m in self.messages if isinstance(m, kind)]


@dataclass
class Scene:
    """Sessions and their viewers, as a disturbance finds them."""

    ids: list[str]
    seen: list[Seen]

    async def until(self, condition: Callable[[Seen], bool]) -> None:
        """Return when it holds for every viewer; all of them watch on meanwhile."""
        everybody = lambda: all(condition(seen) for seen in self.seen)  # noqa: E731
        assert await asyncio.to_thread(eventually, everybody, WITHIN_S)


Disturb = Callable[[Scene], Awaitable[None]]


async def watched(cluster: Cluster, disturb: Disturb, *, sessions: int = 3) -> list[Seen]:
    """Watch sessions through a disturbance, to its end; every segment once, and exact."""
    begun, over = asyncio.Event(), asyncio.Event()

    async def view(client: EchoClient, session_id: str, seen: Seen) -> None:
        stream = client.segments(session_id, start=0, on_message=seen.messages.append)
        async with aclosing(stream):
            async for segment in stream:
                seen.segments.append(segment)
                seen.at_s.append(time.monotonic())
                if segment.index == 8:
                    begun.set()
                if len(seen.segments) >= COUNT and over.is_set():
                    return

    everybody = [Seen([], [], []) for _ in range(sessions)]

    async def disturbed(ids: list[str]) -> None:
        await begun.wait()
        await disturb(Scene(ids, everybody))
        over.set()

    async with asyncio.timeout(4 * WITHIN_S), EchoClient(cluster.url) as client:
        ids = [(await client.create(PROMPT, seed=n))["id"] for n in range(sessions)]
        views = [view(client, sid, s) for sid, s in zip(ids, everybody, strict=True)]
        await asyncio.gather(*views, disturbed(ids))
        for session_id in ids:
            await client.delete(session_id)
    gaps = ", ".join(f"{seen.longest_gap_s:.2f}" for seen in everybody)
    logging.getLogger(__name__).info("longest gaps: %s s", gaps)
    for seed, seen in enumerate(everybody):
        count = len(seen.segments)
        assert [s.index for s in seen.segments] == list(range(count))
        digests = undisturbed(FakeEngine(), PROMPT, seed, count, {})
        assert [s.metadata.digest for s in seen.segments] == digests
        assert not any(s.metadata.discontinuity for s in seen.segments)
    return everybody


async def gather_at(cluster: Cluster, scene: Scene) -> dict[str, Any]:
    """Move all sessions to one replica, until viewers have seen segments of it; returns it."""
    target = (await asyncio.to_thread(cluster.replicas))[0]
    async with EchoClient(cluster.url) as client:
        for session_id in scene.ids:
            await client.migrate(session_id, to=target["id"])
    await scene.until(lambda seen: seen.owners[-1] == target["id"])
    return target


def left(source: str) -> Callable[[Seen], bool]:
    """Whether a viewer has seen its session leave `source`, and was told where it went."""
    return lambda seen: (
        seen.owners[-1] != source and seen.owners[-1] in [m.owner for m in seen.told(wire.Migrated)]
    )


def moved(everybody: list[Seen], source: str) -> None:
    """Every session left `source` by a planned move, and its viewer was told where it went.

    That it is about to move, its viewer hears unless another router was quicker.
    """
    begun = 0
    for seen in everybody:
        assert source in seen.owners
        assert seen.owners[-1] != source
        assert seen.owners[-1] in [m.owner for m in seen.told(wire.Migrated)]
        begun += seen.owners[-1] in [m.to for m in seen.messages if isinstance(m, wire.Migrating)]
    assert begun


def test_an_admin_drains_a_replica_with_three_watched_sessions(cluster: Cluster) -> None:
    cluster.deploy(2)
    cluster.wait(2)
    source: list[str] = []

    async def drain(scene: Scene) -> None:
        target = await gather_at(cluster, scene)
        source.append(target["id"])
        await asyncio.to_thread(cluster.drain, target["id"], WITHIN_S)
        await scene.until(left(target["id"]))

    everybody = asyncio.run(watched(cluster, drain))
    moved(everybody, source[0])
    (drained,) = cluster.wait(1, "drained")
    assert (drained["id"], drained["sessions"]) == (source[0], [])
    # A drained replica holds its device until its process ends; then Serve starts another.
    os.kill(drained["pid"], signal.SIGTERM)
    cluster.wait(2)


def test_sigterm_moves_the_sessions_before_the_process_ends(cluster: Cluster) -> None:
    cluster.deploy(2)
    cluster.wait(2)
    source: list[str] = []

    async def end(scene: Scene) -> None:
        target = await gather_at(cluster, scene)
        source.append(target["id"])
        os.kill(target["pid"], signal.SIGTERM)
        await scene.until(left(target["id"]))

    everybody = asyncio.run(watched(cluster, end))
    moved(everybody, source[0])
    cluster.wait(2)


def test_new_code_replaces_every_replica_under_its_viewers(cluster: Cluster) -> None:
    cluster.deploy(2)
    before = {r["id"] for r in cluster.wait(2)}

    async def redeploy(scene: Scene) -> None:
        await asyncio.to_thread(cluster.deploy, 2, 2)
        await scene.until(lambda seen: seen.owners[-1] not in before)

    everybody = asyncio.run(watched(cluster, redeploy))
    assert not before & {r["id"] for r in cluster.wait(2)}
    for seen in everybody:
        assert seen.owners[0] in before
        # One of the new; on a starved machine Serve may have replaced that one too, meanwhile.
        assert seen.owners[-1] not in before


def test_scale_down_moves_the_sessions_of_the_replica_that_goes(cluster: Cluster) -> None:
    cluster.deploy(2, 2)
    cluster.wait(2)

    at: list[str] = []

    stayed: list[str] = []

    async def shrink(scene: Scene) -> None:
        at.extend(r["id"] for r in await asyncio.to_thread(cluster.replicas))
        async with EchoClient(cluster.url) as client:
            for session_id, replica_id in zip(scene.ids, at, strict=True):
                await client.migrate(session_id, to=replica_id)
        places = dict(zip(map(id, scene.seen), at, strict=True))
        await scene.until(lambda seen: seen.owners[-1] == places[id(seen)])
        await asyncio.to_thread(cluster.deploy, 1, 2)
        (last,) = await asyncio.to_thread(cluster.wait, 1)
        stayed.append(last["id"])
        await scene.until(lambda seen: seen.owners[-1] == last["id"])

    everybody = asyncio.run(watched(cluster, shrink, sessions=2))
    for seen, first in zip(everybody, at, strict=True):
        last = [first] if first == stayed[0] else [first, stayed[0]]
        assert seen.owners[-len(last) :] == last


def test_without_room_sessions_are_parked_and_go_on_when_a_replica_comes(cluster: Cluster) -> None:
    cluster.deploy(1, 2)
    (only,) = cluster.wait(1)
    parked: list[tuple[str, Any]] = []

    async def drain(scene: Scene) -> None:
        await asyncio.to_thread(cluster.drain, only["id"], 3)
        await asyncio.to_thread(cluster.wait, 1, "drained")
        async with EchoClient(cluster.url) as client:
            record = await client.get(scene.ids[0])
        parked.append((record["state"], record["owner"]))
        await scene.until(lambda seen: bool(seen.told(wire.ErrorMessage)))
        await asyncio.to_thread(cluster.deploy, 2, 2)
        await scene.until(lambda seen: seen.owners[-1] != only["id"])

    (seen,) = asyncio.run(watched(cluster, drain, sessions=1))
    assert parked == [("live", None)]
    assert {e.code for e in seen.told(wire.ErrorMessage)} == {"no_replica"}
    assert len(seen.owners) == 2


def test_a_node_that_is_drained_loses_nothing(cluster: Cluster) -> None:
    cluster.deploy(2, 3)
    cluster.wait(2)
    source: list[str] = []

    async def drain_node(scene: Scene) -> None:
        target = await gather_at(cluster, scene)
        source.append(target["id"])
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        options = {
            "--address": cluster.ray.address,
            "--node-id": target["node_id"],
            "--reason": "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message": "a spot notice",
            "--deadline-remaining-seconds": "100",
        }
        words = [word for pair in options.items() for word in pair]
        await asyncio.to_thread(
            subprocess.run, [*command, *words], check=True, timeout=WITHIN_S, capture_output=True
        )
        # Seen by the replica itself, long before Serve stops it.
        page = await asyncio.to_thread(httpx.get, f"http://{target['address']}/metrics")
        while 'echo_ray_drains_total{reason="node"} 1.0' not in page.text:
            await asyncio.sleep(0.2)
            page = await asyncio.to_thread(httpx.get, f"http://{target['address']}/metrics")
        await scene.until(left(target["id"]))

    everybody = asyncio.run(watched(cluster, drain_node))
    moved(everybody, source[0])
