"""A replica's stream over a Redis server that is killed, restarted and stopped while it runs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from fakes import FakeEngine
from redis_server import RedisProcess
from replicas import Replicas, digests, hello, pull, truth

from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import RedisServer
from echo_ray.storage.redis_snapshots import RedisSnapshots

CHUNKS = 60


def test_the_stream_is_the_undisturbed_one(tmp_path: Path) -> None:
    server = RedisProcess(tmp_path).start()
    there = RedisServer(url=server.url, timeout_s=0.3)
    with Replicas(lease_ttl_s=60.0) as replicas:
        own = RedisDirectory(there, replicas.clock)
        replicas.directory = own  # type: ignore[assignment]
        store = RedisSnapshots(there)
        generator = replicas.start(
            "r1",
            FakeEngine(delay_s=0.02),
            directory=lambda: RedisDirectory(there, replicas.clock),
            store=store,
        )
        replicas.session()

        async def disturb() -> int:
            await asyncio.sleep(0.2)
            chunk = (await asyncio.to_thread(own.append_control, "s1", "e1", "blue")).chunk
            for _ in range(2):
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(0.2)
                await asyncio.to_thread(server.start)
                await asyncio.sleep(0.2)
            server.pause()
            await asyncio.sleep(0.8)
            server.go_on()
            return chunk

        async def view() -> tuple[int, list[str]]:
            epoch = replicas.claim(generator)
            disturbing = asyncio.create_task(disturb())
            async with pull(generator, epoch, want=CHUNKS) as end:
                await hello(end)
                heads = await end.chunks(CHUNKS)
            return await disturbing, digests(heads)

        began_s = time.monotonic()
        switched_at, seen = asyncio.run(view())
        assert 0 < switched_at < CHUNKS
        assert seen == truth(CHUNKS, switches={switched_at: ["blue"]})
        assert time.monotonic() - began_s > 1.5
        assert own.get("s1").epoch == 1
    own.close()
    store.close()
    server.kill()
