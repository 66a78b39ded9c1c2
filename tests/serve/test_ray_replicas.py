"""The deployment under real Ray: it starts twice, registers, and leaves without a trace."""

import asyncio
import os
import time
from pathlib import Path

import httpx
import pytest
from fakes import FakeEngine, undisturbed

from echo_ray.clock import SystemClock
from echo_ray.session.records import Pace, SessionRecord
from echo_ray.storage.local import LocalDirectory
from echo_ray.storage.open import DATABASE

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def ray_here(monkeypatch):
    monkeypatch.setenv("RAY_enable_metrics_collection", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))
    import ray
    from ray import serve

    ray.init(
        address="local",
        _node_ip_address="127.0.0.2",
        include_dashboard=False,
        num_cpus=4,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    serve.start(proxy_location="Disabled")
    yield serve
    serve.shutdown()
    ray.shutdown()


def replicas(directory, count, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while len(found := directory.replicas()) != count:
        assert time.monotonic() < deadline, f"{len(found)} replicas, not {count}"
        time.sleep(0.05)
    return found


async def watch(replica, epoch, start, count):
    from replicas import PullEnd, hello
    from websockets.asyncio.client import connect

    url = f"ws://{replica.address}/v1/pull/s1?epoch={epoch}&from={start}&format=raw"
    async with asyncio.timeout(90), connect(url, compression=None) as socket:
        end = PullEnd(socket)
        await end.want(start + count)
        await hello(end)
        return [h["digest"] for h in await end.chunks(count)]


def test_two_replicas_start_register_stream_and_leave(ray_here, tmp_path):
    from echo_ray.serve.replica import GeneratorReplica

    serve = ray_here
    # A lease that no pause of a busy machine outlasts: what is gone at the end has said goodbye.
    args = {"storage": {"path": str(tmp_path)}, "session": {"lease_ttl_s": 60.0}}
    app = GeneratorReplica.options(num_replicas=2, ray_actor_options={"num_cpus": 0.5}).bind(
        args, engine="fakes:build_fake_engine"
    )
    serve.run(app, name="replicas", route_prefix=None)
    directory = LocalDirectory(tmp_path / DATABASE, SystemClock())
    one, two = replicas(directory, 2)
    assert one.pid != two.pid != os.getpid()
    assert one.node_id == two.node_id != ""
    assert one.address.startswith("127.0.0.2:")
    assert one.free_slots > 0
    for replica in (one, two):
        assert httpx.get(f"http://{replica.address}/healthz").json()["replica"] == replica.id

    directory.create(
        SessionRecord(id="s1", model="echo-tiny", prompt="a red circle", seed=7, pace=Pace.MAX)
    )
    first = directory.claim("s1", one.id, expect_epoch=0, ttl_s=60).epoch
    digests = asyncio.run(watch(one, first, 0, 6))
    second = directory.claim("s1", two.id, expect_epoch=first, ttl_s=60).epoch
    digests += asyncio.run(watch(two, second, 6, 4))
    assert digests == undisturbed(FakeEngine(), "a red circle", 7, 10, {})

    serve.delete("replicas")
    # Leaving is said, not only found out: the session is free and the replicas are gone at once.
    assert directory.replicas() == []
    assert directory.get("s1").owner is None
    directory.close()
