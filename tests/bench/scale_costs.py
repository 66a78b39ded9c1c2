"""What sessions cost the stores: `python tests/bench/scale_costs.py`, then multiplied.

Real replicas (fake engine), a router's own code, a real Redis server and moto. What Redis did is
read from its INFO: commands, bytes in and out, processor time. Every figure is the difference over
one phase, less what the replicas cost when idle. `docs/scale.md` says what follows from it.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import FakeEngine
from redis_server import RedisProcess
from replicas import Replicas
from s3_server import SECRET, Door, S3Server, serve_door, snapshots
from scale_load import FEW, PROMPT, REPLICAS, ROUTERS, SESSIONS, loaded, replica, session
from scale_meter import Cost, Meter, head, row, say

from echo_ray.clock import SystemClock
from echo_ray.config import LimitsSection, SessionSection
from echo_ray.serve.front import Front
from echo_ray.serve.telemetry import Telemetry
from echo_ray.session.records import OnIdle, SnapshotRef
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import RedisServer
from echo_ray.storage.redis_snapshots import RedisSnapshots
from echo_ray.storage.s3_snapshots import S3Snapshots

LOST = 0.05
CHUNK_S = 0.75
POINT_EVERY, DURABLE_EVERY = 8, 6
EVENTS_PER_SESSION_S, CREATES_PER_S, VIEWERS_PER_S = 1 / 30, 20.0, 100.0
LOOKS = 2
"""How often a router reads replicas to place one session: a look, a short wait, a look."""
LOOK_S = 0.5
"""How often a router looks for replicas that drain."""
SIZES = {"echo-tiny": 74_000, "1.3B": 21_000_000}
HERE_REPLICAS, HERE_SESSIONS = 4, 24
WINDOW_S = 8.0


# -- the service


def service(server: RedisProcess, meter: Meter) -> dict[str, Cost]:
    """Idle replicas, streams, creation, events and a failover, by the service's own code."""
    there = RedisServer(url=server.url, timeout_s=10)
    opened: list[RedisDirectory] = []

    def directory() -> RedisDirectory:
        opened.append(RedisDirectory(there, SystemClock(), prefix="service"))
        return opened[-1]

    blobs = RedisSnapshots(there, prefix="service")
    section = SessionSection()
    costs: dict[str, Cost] = {}
    timing = {name: getattr(section, name) for name in ("lease_renew_s", "beat_s", "silence_s")}
    with Replicas(**timing) as replicas:
        front = Front(
            config=replace(replicas.config, limits=LimitsSection(sessions_per_replica=64)),
            shape=FakeEngine(frames_per_chunk=12).shape,
            directory=directory(),
            snapshots=blobs,
            clock=SystemClock(),
            telemetry=Telemetry(),
            rng=random.Random(0),
        )
        for n in range(HERE_REPLICAS):
            # Points are measured by themselves, with blobs of the real sizes.
            engine = FakeEngine(frames_per_chunk=12, point_every=10_000)
            replicas.start(
                f"replica-{n}-0123456789abcdef", engine, directory=directory, store=blobs
            )
        time.sleep(2)
        idle = meter.of(lambda: time.sleep(WINDOW_S))
        costs["idle replica, per second"] = idle * (1 / WINDOW_S / HERE_REPLICAS)
        asyncio.run(_streams(front, replicas, meter, idle * (1 / WINDOW_S), costs))
    blobs.close()
    for store in opened:
        store.close()
    return costs


async def _streams(
    front: Front, replicas: Replicas, meter: Meter, idle: Cost, costs: dict[str, Cost]
) -> None:
    async def over(work: Callable[[], object]) -> tuple[Cost, float]:
        """What it cost, less what idle replicas cost in that time."""
        before, began_s = meter.read(), time.monotonic()
        outcome = work()
        if asyncio.iscoroutine(outcome):
            await outcome
        took_s = time.monotonic() - began_s
        return meter.read() - before - idle * took_s, took_s

    ids: list[str] = []

    async def create() -> None:
        for _ in range(HERE_SESSIONS):
            fields = {"prompt": PROMPT, "on_idle": OnIdle.CONTINUE.value}
            ids.append((await front.create(fields)).id)

    def made() -> int:
        return sum(front.directory.get(id_).next_index for id_ in ids)

    cost, _ = await over(create)
    costs["a session created"] = cost * (1 / HERE_SESSIONS)
    for id_ in ids:
        await front.adopt(id_)
    await asyncio.sleep(6)
    before = made()
    streaming, took_s = await over(lambda: asyncio.sleep(2 * WINDOW_S))
    chunks = made() - before
    say(f"{chunks} chunks of {HERE_SESSIONS} sessions in {took_s:.1f} s")
    costs["a chunk, with its share of renewals"] = streaming * (1 / chunks)

    async def events() -> None:
        for n, id_ in enumerate(ids):
            await front.add_event(id_, f"event-{n}", PROMPT)

    background = streaming * (1 / took_s)
    cost, event_s = await over(events)
    costs["an event"] = (cost - background * event_s) * (1 / len(ids))
    victim = replicas._running[0]
    orphaned = [i for i in ids if front.directory.get(i).owner == victim.host.replica_id]
    replicas.crash(victim)
    await asyncio.sleep(2.5)

    async def adopt() -> None:
        found = await front.orphans()
        assert {r.id for r in found} == set(orphaned), (len(found), len(orphaned))
        for record in found:
            await front.adopt(record.id)

    cost, adopt_s = await over(adopt)
    share = 1 - len(orphaned) / len(ids)
    costs["a failover"] = (cost - background * (adopt_s * share)) * (1 / len(orphaned))


# -- the directory alone, at its full size


def direct(server: RedisProcess, meter: Meter) -> dict[str, Cost]:
    """Calls whose cost depends on how many replicas or sessions there are."""
    directory = RedisDirectory(
        RedisServer(url=server.url, timeout_s=30), SystemClock(), prefix="direct"
    )
    costs: dict[str, Cost] = {}
    for n in range(REPLICAS):
        directory.put_replica(replica(n), ttl_s=3600)
    many = 2000
    leases = []
    for n in range(many):
        id_ = f"session-{n:012d}"
        directory.create(session(id_))
        leases.append(directory.claim(id_, "replica-00000000", expect_epoch=0, ttl_s=3600))
    costs["replicas()"] = meter.of(lambda: [directory.replicas() for _ in range(20)]) * (1 / 20)
    began_s = time.process_time()
    for _ in range(10):
        directory.replicas()
    say(f"a router reads {REPLICAS} replicas in {(time.process_time() - began_s) * 100:.0f} ms")
    costs["put_replica"] = meter.of(
        lambda: [directory.put_replica(replica(n), ttl_s=3600) for n in range(400)]
    ) * (1 / 400)
    costs["renew, 5 leases"] = meter.of(
        lambda: [directory.renew(leases[n : n + 5], ttl_s=3600) for n in range(400)]
    ) * (1 / 400)
    costs["get"] = meter.of(lambda: [directory.get(leases[n].session_id) for n in range(400)]) * (
        1 / 400
    )
    costs["count_open()"] = meter.of(lambda: [directory.count_open() for _ in range(100)]) * 0.01
    costs["list(), per session"] = meter.of(lambda: [directory.list() for _ in range(5)]) * (
        0.2 / many
    )
    costs["orphans(), none due"] = meter.of(lambda: [directory.orphans() for _ in range(50)]) * 0.02
    for lease in leases[:100]:
        directory.claim(lease.session_id, "replica-00000001", expect_epoch=1, ttl_s=-1)
    costs["orphans(), per orphan"] = (
        meter.of(lambda: [directory.orphans() for _ in range(10)]) * 0.001
    )
    directory.close()
    return costs


# -- snapshots


def snapshot_costs(server: RedisProcess, meter: Meter) -> None:
    head("a snapshot on Redis, with its reference, and the oldest one dropped")
    there = RedisServer(url=server.url, timeout_s=30)
    directory = RedisDirectory(there, SystemClock(), prefix="snap")
    store = RedisSnapshots(there, prefix="snap")
    directory.create(session("snap"))
    lease = directory.claim("snap", "r", expect_epoch=0, ttl_s=3600)
    at = [0]

    def put(blob: bytes) -> None:
        at[0] += 1
        id_ = f"p{at[0]:010d}-e1"
        store.put("snap", id_, blob)
        directory.add_snapshot(lease, _ref(id_, at[0], len(blob)))
        directory.snapshots("snap")
        old = f"p{at[0] - 4:010d}-e1"
        directory.drop_snapshot("snap", old)
        store.delete("snap", old)

    for name, size in SIZES.items():
        blob, count = os.urandom(size), 40 if size < 10**6 else 8
        cost = meter.of(lambda blob=blob, count=count: [put(blob) for _ in range(count)])
        row(f"{name}, {size:,} B", cost * (1 / count))
    directory.close()
    store.close()
    with _s3() as (door, s3):
        say("\nthe same on S3 (moto): requests, bytes of blobs")
        for name, size in SIZES.items():
            blob = os.urandom(size)
            before = len(door.seen)
            s3.put("snap", "p1", blob)
            put_calls = list(door.seen[before:])
            s3.get("snap", "p1")
            get_calls = list(door.seen[before + len(put_calls) :])
            s3.delete("snap", "p1")
            gone = len(door.seen) - before - len(put_calls) - len(get_calls)
            say(f"  {name}: put {len(put_calls)}, get {len(get_calls)}, delete {gone}")


def _ref(id_: str, chunk: int, size: int) -> SnapshotRef:
    return SnapshotRef(
        id=id_,
        session_id="snap",
        chunk_index=chunk,
        size_bytes=size,
        digest="ab" * 32,
        created_at=1.7e9,
        store="redis",
        epoch=1,
    )


@contextmanager
def _s3() -> Iterator[tuple[Door, S3Snapshots]]:
    os.environ |= {"AWS_ACCESS_KEY_ID": "root", "AWS_SECRET_ACCESS_KEY": SECRET}
    server, door = S3Server(), Door("")
    front = serve_door(server.url, door)
    store = snapshots(
        f"http://127.0.0.1:{front.server_address[1]}", server.bucket(), timeout_s=60.0
    )
    try:
        yield door, store
    finally:
        store.close()
        front.shutdown()
        server.stop()


# -- at full size


def full(costs: dict[str, Cost], load: dict[str, Cost]) -> None:
    """The measured costs, as often as 10,000 sessions on 2,000 replicas make them."""
    head(f"{SESSIONS:,} sessions, {REPLICAS:,} replicas, {ROUTERS} routers: per second")
    section = SessionSection()
    ttl_s, sweep_s, beats = section.lease_ttl_s, section.sweep_s, REPLICAS / section.lease_renew_s
    creating = costs["a session created"] + load["few replicas"]
    parts = {
        "chunks": load["seal and commit"] * (SESSIONS / CHUNK_S),
        "renewals": load["renew"] * beats,
        "heartbeats": load["put_replica"] * beats,
        "sweeps: asking": costs["orphans(), none due"] * (ROUTERS / sweep_s),
        "sweeps: looking": costs["orphans(), per orphan"] * (SESSIONS / ttl_s),
        "events": costs["an event"] * (SESSIONS * EVENTS_PER_SESSION_S),
        "creates": creating * CREATES_PER_S,
        "viewers who come": (load["get"] + load["few replicas"]) * VIEWERS_PER_S,
        "looks for replicas that drain": load["draining(), none"] * (ROUTERS / LOOK_S),
    }
    for name, cost in parts.items():
        row(name, cost)
    row("all of it, without snapshots", sum(parts.values(), Cost()))
    listing = costs["list(), per session"] * (SESSIONS * ROUTERS / sweep_s)
    row("(sweeps by list(), as they were)", listing)
    lost = SESSIONS * LOST
    head(f"the loss of {LOST:.0%}: {lost:.0f} sessions, once")
    row("claims, snapshots' references, logs", costs["a failover"] * lost)
    few = load["few replicas"]
    row(f"{FEW} replicas read, {LOOKS} times for each", few * (lost * LOOKS))
    say("\nsnapshots per second, by arithmetic")
    for name, size in SIZES.items():
        often = SESSIONS / CHUNK_S / POINT_EVERY
        durable = often / DURABLE_EVERY
        say(
            f"  {name}: {often:,.0f} to Redis, {often * size / 1e6:,.0f} MB/s, "
            f"{SESSIONS * 4 * size / 1e9:,.0f} GB held; {durable:,.0f} to S3, "
            f"{durable * size / 1e6:,.0f} MB/s; {lost:.0f} read back: {lost * size / 1e6:,.0f} MB"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        server = RedisProcess(Path(made) / "redis").start()
        try:
            meter = Meter(server)
            costs = service(server, meter)
            costs |= direct(server, meter)
            head("each, on the server")
            for name, cost in costs.items():
                row(name, cost)
            load = loaded(server, meter)
            snapshot_costs(server, meter)
            full(costs, load)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
