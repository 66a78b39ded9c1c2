"""The real service on a real Redis and an S3 server: what is lost where, and what comes back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from redis_server import RedisProcess
from s3_server import REGION, SECRET, S3Server, snapshots
from service import (
    Service,
    lives,
    owner_pid,
    running_service,
    take,
    undisturbed,
    wait_for_replicas,
)

from echo_ray.client import EchoClient, Segment
from echo_ray.errors import SessionNotFound
from echo_ray.session.sweep import pasts
from echo_ray.storage.redis_link import RedisServer
from echo_ray.storage.redis_snapshots import RedisSnapshots
from echo_ray.storage.s3_snapshots import S3Snapshots

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

PROMPT = "a red ball on a blue background"
OTHER = "a green square on a black background"
LIMIT_S = 60.0


@dataclass(frozen=True)
class Cluster:
    """The service and both stores as they are seen from outside."""

    service: Service
    redis: RedisProcess
    folder: Path
    """Of the files of Redis."""
    s3: S3Server
    hot: RedisSnapshots
    durable: S3Snapshots

    def held(self, store: RedisSnapshots | S3Snapshots, session: str) -> set[str]:
        return {blob.snapshot_id for blob in store.list_blobs(session)}

    def flush(self) -> None:
        """Redis loses everything and goes on."""
        assert self.redis.ask("FLUSHALL") == b"+OK\r\n"

    def lose_files(self) -> None:
        """Redis dies, and comes back on an empty disk."""
        self.redis.kill()
        shutil.rmtree(self.folder / "appendonlydir")
        self.redis.start()

    def newest_past(self, session: str) -> str:
        return next(iter(pasts(self.held(self.durable, session))), "")

    def events(self, event: str) -> float:
        """How often it happened between the tiers of any replica."""
        return self._sum(f'echo_ray_snapshot_tier_events_total{{event="{event}"}} ')

    def debt(self) -> float:
        """How many copies replicas still owe to S3."""
        return self._sum("echo_ray_snapshot_debt ")

    def _sum(self, name: str) -> float:
        """A series over all replicas that answer."""
        url = f"{self.service.url}/v1/admin/replicas"
        replicas = httpx.get(url, timeout=20).json()["replicas"]
        alive = [r["address"] for r in replicas if lives(r["pid"])]
        pages = [httpx.get(f"http://{address}/metrics", timeout=20).text for address in alive]
        lines = [line for page in pages for line in page.splitlines() if line.startswith(name)]
        return sum(float(line.removeprefix(name)) for line in lines)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Credentials for the service and for this process, and none of this machine's own."""
    nothing = str(tmp_path_factory.mktemp("aws") / "none")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", nothing)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", nothing)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "root")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield


@pytest.fixture(scope="module")
def cluster(keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    redis = RedisProcess(folder / "redis").start()
    s3 = S3Server()
    try:
        bucket = s3.bucket()
        settings = {
            "storage.backend": "tiered",
            "storage.redis.url": redis.url,
            "storage.s3.bucket": bucket,
            "storage.s3.endpoint": s3.url,
            "storage.s3.region": REGION,
            "storage.s3.path_style": "true",
            # Beside the first snapshot of a session nothing becomes durable by its number alone.
            "storage.s3.durable_every": 1000,
        }
        hot = RedisSnapshots(RedisServer(url=redis.url, timeout_s=10))
        durable = snapshots(s3.url, bucket)
        with running_service(folder, **settings) as service:
            yield Cluster(service, redis, folder / "redis", s3, hot, durable)
        hot.close()
        durable.close()
    finally:
        s3.stop()
        redis.kill()


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end, "the condition never held"
        await asyncio.sleep(0.1)


def test_kill_9_of_the_owner_loses_nothing(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with EchoClient(cluster.service.url) as client:
            session = (await client.create(PROMPT, seed=1))["id"]
            seen: list[str] = []
            switches: dict[int, str] = {}
            stream = client.segments(session, start=0, format="raw")
            async with aclosing(stream):
                async for segment in stream:
                    seen.append(segment.metadata.digest)
                    assert not segment.metadata.discontinuity
                    if segment.index == 3:
                        switches[await client.send_event(session, OTHER)] = OTHER
                    if segment.index == 11:
                        os.kill((await owner_pid(client, session))[1], signal.SIGKILL)
                    if len(seen) == 20:
                        break
            assert seen == undisturbed(PROMPT, 1, 20, switches)
            # Once for the kill; on a machine that stands still for longer than a lease, again.
            assert (await client.get(session))["epoch"] >= 2
            # A copy that is on its way to S3 would arrive after the deletion.
            await until(lambda: cluster.debt() == 0)
            await client.delete(session)
            for store in (cluster.hot, cluster.durable):
                await until(lambda store=store: cluster.held(store, session) == set())

    asyncio.run(scenario())
    asyncio.run(wait_for_replicas(cluster.service, 2))


def test_a_paused_session_comes_back_from_s3_when_redis_lost_its_snapshots(
    cluster: Cluster,
) -> None:
    async def scenario() -> None:
        async with EchoClient(cluster.service.url) as client:
            session = (await client.create(PROMPT, seed=2, pace="max"))["id"]
            first = await take(client, session, 0, 40)
            await client.pause(session)
            newest = (await client.snapshots(session))[0]["id"]
            await until(lambda: newest in cluster.held(cluster.durable, session))
            before = cluster.events("put_back")
            assert newest in cluster.held(cluster.hot, session)
            cluster.hot.delete_session(session)
            more = await take(client, session, 40, 8)
            digests = [s.metadata.digest for s in first + more]
            assert digests == undisturbed(PROMPT, 2, 48, {})
            assert newest in cluster.held(cluster.hot, session)
            await until(lambda: cluster.events("put_back") > before)
            await client.delete(session)

    asyncio.run(scenario())


@pytest.mark.parametrize("hangs_s", [4.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_redis_that_hangs_for_longer_than_a_lease_costs_time_only(
    cluster: Cluster, hangs_s: float
) -> None:
    async def scenario() -> None:
        async with EchoClient(cluster.service.url) as client:
            session = (await client.create(PROMPT, seed=3))["id"]
            seen = [s.metadata.digest for s in await take(client, session, 0, 6)]
            cluster.redis.pause()
            try:
                await asyncio.sleep(hangs_s)
            finally:
                cluster.redis.go_on()
            seen += [s.metadata.digest for s in await take(client, session, 6, 12)]
            assert seen == undisturbed(PROMPT, 3, 18, {})
            await client.delete(session)

    asyncio.run(scenario())
    asyncio.run(wait_for_replicas(cluster.service, 2))


def test_s3_that_hangs_delays_no_stream_no_takeover_and_no_pause(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with EchoClient(cluster.service.url) as client:
            session = (await client.create(PROMPT, seed=4, pace="max"))["id"]
            os.kill(cluster.s3.pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(60):
                    seen = await take(client, session, 0, 30)
                    os.kill((await owner_pid(client, session))[1], signal.SIGKILL)
                    seen += await take(client, session, 30, 10)
                    paused = await client.pause(session)
                recorded = [s["id"] for s in await client.snapshots(session)]
            finally:
                os.kill(cluster.s3.pid, signal.SIGCONT)
            assert paused["state"] == "paused"
            assert [s.metadata.digest for s in seen] == undisturbed(PROMPT, 4, 40, {})
            await until(lambda: recorded[0] in cluster.held(cluster.durable, session))
            await client.delete(session)

    asyncio.run(scenario())
    asyncio.run(wait_for_replicas(cluster.service, 2))


@pytest.mark.parametrize("loss", ["flush", "files"])
def test_streams_go_on_when_redis_lost_everything(cluster: Cluster, loss: str) -> None:
    async def scenario() -> None:
        async with EchoClient(cluster.service.url) as client:
            watched = (await client.create(PROMPT, seed=5))["id"]
            paused = (await client.create(PROMPT, seed=6, pace="max"))["id"]
            closed = (await client.create(PROMPT, seed=7, pace="max"))["id"]
            gone = (await client.create(PROMPT, seed=8, pace="max"))["id"]
            before = [s.metadata.digest for s in await take(client, paused, 0, 21)]
            for session in (closed, gone):
                await take(client, session, 0, 3)
            await client.pause(paused)
            # The old one is closed by it.
            rewound = (await client.rewind(closed, 2))["id"]
            await client.delete(gone)
            seen: list[Segment] = []
            switches: dict[int, str] = {}
            async with aclosing(client.segments(watched, start=0, format="raw")) as stream:
                async for segment in stream:
                    seen.append(segment)
                    if segment.index == 3:
                        switches[await client.send_event(watched, OTHER)] = OTHER
                    if segment.index == 19:
                        await until(lambda: "-l1-" in cluster.newest_past(watched))
                        await until(lambda: "past-e2-" in cluster.newest_past(closed))
                        await until(lambda: cluster.newest_past(rewound) != "")
                        await asyncio.to_thread(
                            cluster.flush if loss == "flush" else cluster.lose_files
                        )
                    if segment.index == 25:
                        at = await client.send_event(watched, PROMPT)
                        assert at > 25
                        switches[at] = PROMPT
                    if len(seen) == 40:
                        break
            assert [s.index for s in seen] == list(range(40))
            expected = undisturbed(PROMPT, 5, 40, switches)
            assert [s.metadata.digest for s in seen] == expected
            assert not any(s.metadata.discontinuity for s in seen)
            assert seen[-1].metadata.epoch > 10**12
            more = [s.metadata.digest for s in await take(client, paused, 21, 6)]
            assert before + more == undisturbed(PROMPT, 6, 27, {})
            assert (await client.get(closed))["state"] == "closed"
            with pytest.raises(SessionNotFound):
                await client.get(gone)
            assert (await client.get(rewound))["state"] == "live"
            for session in (watched, paused, closed, rewound):
                await client.delete(session)

    asyncio.run(scenario())
    asyncio.run(wait_for_replicas(cluster.service, 2))
