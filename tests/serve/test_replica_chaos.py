"""Random faults against one stream: whatever happens, every chunk once, in order, bit for bit."""

import asyncio
import contextlib
import random

import httpx
import pytest
from fakes import FakeEngine, undisturbed
from replicas import Replicas, pull
from websockets.exceptions import ConnectionClosed

from echo_ray.errors import EchoError, StoreUnavailable

CHUNKS = 60


class Trouble:
    """A store in front of another that loses single calls, before or after they are done."""

    def __init__(self, inner, rng):
        self._inner = inner
        self._rng = rng
        self.rate = 0.0

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        if name not in ("seal", "commit", "add_snapshot", "get", "controls", "digests", "put"):
            return found

        def call(*args, **options):
            if self._rng.random() < self.rate / 2:
                raise StoreUnavailable(f"{name} was lost")
            result = found(*args, **options)
            if self._rng.random() < self.rate / 2:
                raise StoreUnavailable(f"the answer of {name} was lost")
            return result

        return call


class Chaos:
    """Follows one session as a router would, while things go wrong."""

    def __init__(self, bench, rng):
        self.bench = bench
        self.rng = rng
        self.store = Trouble(bench.directory, rng)
        self.count = 0
        self.live = []
        self.switches = {}
        self.heads = []
        for _ in range(3):
            self.add()

    def add(self):
        self.count += 1
        engine = FakeEngine(point_every=4, delay_s=0.001)
        self.live.append(self.bench.start(f"r{self.count}", engine, directory=lambda: self.store))

    def engine(self, replica):
        return self.bench.engines[replica.host.replica_id]

    async def follow(self):
        failed = None
        while len(self.heads) < CHUNKS:
            record = self.bench.directory.get("s1")
            owner = next((r for r in self.live if r.host.replica_id == record.owner), None)
            if owner is None or record.epoch == failed:
                owner = self.rng.choice(self.live)
                record = self.bench.directory.get("s1")
                epoch = self.bench.claim(owner)
            else:
                epoch = record.epoch
            with contextlib.suppress(ConnectionClosed, OSError, EchoError, AssertionError):
                await self.read(owner, epoch)
            failed = epoch

    async def read(self, owner, epoch):
        start = len(self.heads)
        async with pull(owner, epoch, start, want=start + 3) as end:
            while len(self.heads) < CHUNKS:
                message = await asyncio.wait_for(end.message(), 1.5)
                if message["type"] == "hello":
                    continue
                if message["type"] != "video.chunk_metadata":
                    return
                data = await end.socket.recv()
                assert len(data) == message["byte_length"]
                assert message["chunk_index"] == len(self.heads)
                self.heads.append(message)
                await end.want(len(self.heads) + 3)
                if self.rng.random() < 0.35:
                    await self.harm(owner)

    async def harm(self, owner):
        match self.rng.randrange(7):
            case 0:
                self.live.remove(owner)
                await asyncio.to_thread(self.bench.crash, owner)
                await asyncio.to_thread(self.add)
            case 1:
                self.bench.claim(self.rng.choice(self.live))
            case 2:
                other = self.rng.choice(self.live)
                async with httpx.AsyncClient() as http:
                    with contextlib.suppress(httpx.HTTPError):
                        await http.post(f"http://{other.address}/v1/prepare/s1", timeout=2)
                self.bench.claim(other)
            case 3:
                self.engine(owner).may_step.clear()
                loop = asyncio.get_running_loop()
                loop.call_later(self.rng.uniform(0, 0.3), self.engine(owner).may_step.set)
            case 4:
                next_index = self.bench.directory.get("s1").next_index
                self.engine(owner).failing += [next_index + 1] * self.rng.randint(1, 3)
            case 5:
                self.store.rate = self.rng.choice([0.0, 0.2, 0.4])
            case 6:
                event = f"e{len(self.heads)}-{self.rng.random()}"
                entry = self.bench.directory.append_control("s1", event, event)
                self.switches.setdefault(entry.chunk, []).append(event)


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("seed", range(6))
def test_a_stream_under_random_faults_is_the_undisturbed_one(seed):
    rng = random.Random(seed)
    with Replicas(lease_ttl_s=0.6, lease_renew_s=0.05) as bench:
        chaos = Chaos(bench, rng)
        bench.session()
        asyncio.run(asyncio.wait_for(chaos.follow(), 120))
        expected = undisturbed(FakeEngine(), "a red circle", 7, CHUNKS, chaos.switches)
        made = [h["digest"] for h in chaos.heads]
        assert [n for n in range(CHUNKS) if made[n] != expected[n]] == []
        assert not any(h["discontinuity"] for h in chaos.heads)
        mismatches = [g.telemetry.value("echo_ray_digest_mismatches_total") for g in chaos.live]
        assert mismatches == [0] * len(chaos.live)
        for chunk, events in chaos.switches.items():
            if chunk < CHUNKS:
                assert chaos.heads[chunk]["started_event_ids"] == events
