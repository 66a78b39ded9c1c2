"""Sessions and replicas as large as real ones, and a server that finds 200 calls waiting."""

from __future__ import annotations

import time
from collections.abc import Callable

from redis_server import RedisProcess
from scale_meter import Cost, Meter, batched, head, row

from echo_ray.clock import SystemClock
from echo_ray.session.records import Lease, OnIdle, ReplicaRecord, SessionRecord
from echo_ray.storage.redis_change import COMMITS, SESSION, SET_IF_SAME
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import Command, RedisServer

SESSIONS, REPLICAS, ROUTERS = 10_000, 2_000, 250
PROMPT = "a red ball rolls over a green table and meets a blue cube " * 2
FINGERPRINT = "echo-infinity-1.3b/cuda-sm90/bfloat16/point=8/code=1/0123456789abcdef"
AT_ONCE, ROUNDS = 200, 25
FEW = 16
"""So many replicas a router reads to place a session."""


def replica(n: int) -> ReplicaRecord:
    return ReplicaRecord(
        id=f"replica-{n:08d}",
        node_id=f"{n // 8:056x}",
        pid=1_000_000 + n,
        address=f"10.0.{n // 250}.{n % 250}:40000",
        model="echo-infinity-1.3b",
        fingerprint=FINGERPRINT,
        sessions=tuple(f"s_{n:05d}{k:021d}" for k in range(SESSIONS // REPLICAS)),
        chunk_seconds=0.1234567890123,
        free_slots=1,
    )


def session(id_: str) -> SessionRecord:
    return SessionRecord(
        id=id_, model="echo-infinity-1.3b", prompt=PROMPT, seed=7, on_idle=OnIdle.CONTINUE
    )


def loaded(server: RedisProcess, meter: Meter) -> dict[str, Cost]:
    """The same calls where 200 wait whenever the server looks, so that it does them in batches."""
    there = RedisServer(url=server.url, timeout_s=30)
    directory = RedisDirectory(there, SystemClock(), prefix="load")
    ids = [f"load-{n}" for n in range(AT_ONCE)]
    for id_ in ids:
        directory.create(session(id_))
        directory.claim(id_, "r", expect_epoch=0, ttl_s=3600)
    leases = [Lease(id_, "r", 1) for id_ in ids[: SESSIONS // REPLICAS]]
    done = [0]

    def chunks() -> None:
        for _ in range(ROUNDS):
            _chunk(directory, ids, done[0])
            done[0] += 1

    def under_load(call: Callable[[], object], at_once: int = AT_ONCE) -> Cost:
        return batched(directory, meter, call, at_once=at_once, rounds=ROUNDS)

    def measured(name: str, work: Callable[[], Cost]) -> Cost:
        began_s = time.monotonic()
        cost = work()
        row(f"{name} ({time.monotonic() - began_s:.1f} s)", cost)
        return cost

    head(f"{AT_ONCE} at once, per call (A, B, A: chunks, renewals, chunks)")
    each = 1 / AT_ONCE / ROUNDS
    for n in range(REPLICAS):
        directory.put_replica(replica(n), ttl_s=3600)
    first = measured("A: seal and commit", lambda: meter.of(chunks) * each)
    renewal = measured(
        "B: renew, 5 leases", lambda: under_load(lambda: directory.renew(leases, ttl_s=3600))
    )
    second = measured("A: seal and commit", lambda: meter.of(chunks) * each)
    beat = measured(
        "put_replica", lambda: under_load(lambda: directory.put_replica(replica(0), ttl_s=3600))
    )
    look = measured("get", lambda: under_load(lambda: directory.get(ids[0])))
    every = measured("replicas(), 2 at once", lambda: under_load(directory.replicas, 2))
    few = measured(
        f"replicas(among={FEW})", lambda: under_load(lambda: directory.replicas(among=FEW))
    )
    look_for = measured("draining(), none", lambda: under_load(directory.draining))
    directory.close()
    return {
        "seal and commit": (first + second) * 0.5,
        "renew": renewal,
        "put_replica": beat,
        "get": look,
        "replicas()": every,
        "few replicas": few,
        "draining(), none": look_for,
    }


def _chunk(directory: RedisDirectory, ids: list[str], index: int) -> None:
    """Seal and commit chunk `index` of all, each step of all in one go."""
    keys, link = directory._sessions, directory._link
    sealed: tuple[Command, ...] = (("HSET", SESSION, "sealed", index + 1),)
    committed: tuple[Command, ...] = (
        ("HSET", COMMITS, index, "ab" * 32),
        ("HDEL", COMMITS, index - 4096),
        ("HSET", SESSION, "next_index", index + 1, "fingerprint", f'"{FINGERPRINT}"'),
    )
    for step, writes in enumerate((sealed, committed)):
        reads = [part for id_ in ids for part in (keys.read(id_), keys.at_chunk(id_, index))]
        replies = link.run(*(reads if step == 0 else [keys.read(id_) for id_ in ids]))
        words = [word for write in writes for word in (len(write), *write)]
        calls = []
        for id_, reply in zip(ids, replies[:: 2 - step], strict=True):
            version = dict(zip(reply[::2], reply[1::2], strict=True))[b"version"]
            new = f"{index}-{step}"
            calls.append(SET_IF_SAME.call(keys.all_of(id_), version, new, 0, *words))
        assert set(link.run(*calls)) == {1}
