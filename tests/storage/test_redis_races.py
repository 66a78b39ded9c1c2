"""What holds when many connections, in threads and processes, change one session on Redis."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator

import pytest
from fakes import FakeClock
from redis_server import RedisProcess, go_by
from rivals import race
from stored import new, owned, produce

from echo_ray.clock import SystemClock
from echo_ray.errors import SnapshotNotFound, StoreUnavailable
from echo_ray.session import control_log
from echo_ray.session.records import Lease, SessionRecord
from echo_ray.storage import redis_change
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import Command, RedisServer
from echo_ray.storage.redis_snapshots import PIECE_BYTES, RedisSnapshots

RIVAL = """
import json, sys
from echo_ray.clock import SystemClock
from echo_ray.errors import Fenced
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import Command, RedisServer

url, prefix, owner, rounds = *sys.argv[1:4], int(sys.argv[4])
directory = RedisDirectory(RedisServer(url=url, timeout_s=10), SystemClock(), prefix=prefix)
print("ready", flush=True)
sys.stdin.readline()
won, made = [], 0
for epoch in range(rounds):
    try:
        lease = directory.claim("s1", owner, expect_epoch=epoch, ttl_s=1)
        won.append(epoch)
        index = directory.get("s1").next_index
        directory.seal(lease, index)
        directory.commit(lease, index, f"{owner}/{lease.epoch}", "fp")
        made += 1
    except Fenced:
        pass
    directory.append_control("s1", f"{owner}-{epoch}", "p")
directory.close()
print(json.dumps([won, made]), flush=True)
"""


@pytest.fixture
def prefix() -> str:
    return f"t-{uuid.uuid4().hex}"


@pytest.fixture
def directory(redis_server: RedisProcess, prefix: str) -> Iterator[RedisDirectory]:
    there = RedisServer(url=redis_server.url, timeout_s=10)
    store = RedisDirectory(there, SystemClock(), prefix=prefix)
    yield store
    store.close()


def test_of_claims_commits_and_events_from_processes_each_counts_once(
    redis_server: RedisProcess, directory: RedisDirectory, prefix: str
) -> None:
    rounds = 15
    directory.create(new())
    arguments = [[redis_server.url, prefix, f"r{n}", str(rounds)] for n in range(3)]
    results = [json.loads(output) for output in race(RIVAL, arguments)]
    assert sorted(epoch for won, _ in results for epoch in won) == list(range(rounds))
    record = directory.get("s1")
    assert record.epoch == rounds
    assert record.next_index == sum(made for _, made in results)
    assert len(directory.digests("s1", 0, 99)) == record.next_index
    assert len(directory.controls("s1")) == 3 * rounds


def test_a_change_that_others_always_overtake_gets_its_turn(
    directory: RedisDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A viewer that writes between every read and write of a seal does not starve the owner."""
    lease = owned(directory)
    sessions = directory._sessions
    sealed, refused = control_log.sealed, []

    def overtaken(record: SessionRecord, lease: Lease, index: int) -> SessionRecord:
        version = sessions.found("s1", sessions._link.run(sessions.read("s1"))[0]).version
        keys = sessions.all_of("s1")
        writes: list[Command] = [("HSET", redis_change.EVENTS, f"e{len(refused)}", "x")]
        done = sessions.write(keys, version, f"v{len(refused)}", writes, told=False)
        refused.append(done == redis_change.OVERTAKEN)
        return sealed(record, lease, index)

    monkeypatch.setattr(control_log, "sealed", overtaken)
    directory.seal(lease, 0)
    assert refused == [False] * (redis_change._PATIENCE + 1) + [True]
    monkeypatch.undo()
    directory.commit(lease, 0, "d", "fp")
    assert directory.append_control("s1", "after", "p").chunk == 1, "the turn was given back"


def test_a_turn_that_is_not_taken_ends(
    redis_server: RedisProcess, directory: RedisDirectory, prefix: str
) -> None:
    lease = owned(directory)
    turn = directory._sessions.all_of("s1")[redis_change.WHAT.index("turn")]
    began = SystemClock().monotonic()
    directory._link.run(("SET", turn, "of somebody who died", "PX", redis_change._TURN_MS))
    directory.seal(lease, 0)
    assert SystemClock().monotonic() - began >= 0.9 * redis_change._TURN_MS / 1000


def test_renewals_do_not_stand_in_the_way_of_commits(
    directory: RedisDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = owned(directory)
    over = threading.Event()
    lost: list[object] = []

    def renew() -> None:
        while not over.is_set():
            lost.extend(directory.renew([lease] * 20, ttl_s=1))

    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        # A commit that met a change in between would have to try again.
        monkeypatch.setattr(redis_change, "_ATTEMPTS", 1)
        produce(directory, lease, *range(30))
    finally:
        over.set()
        renewer.join(20)
    record = directory.get("s1")
    assert lost == []
    assert record.next_index == 30
    assert record.lease_until > record.created_at + 1


def test_a_commit_does_not_undo_a_renewal_that_came_meanwhile(
    redis_server: RedisProcess, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    there = RedisServer(url=redis_server.url, timeout_s=10)
    directory = RedisDirectory(there, clock, prefix=prefix)
    go_by(directory, clock)
    lease = owned(directory)
    directory.seal(lease, 0)
    write = directory._sessions.write

    def renewed_first(*args: object, **named: object) -> bool:
        clock.advance(1)
        assert list(directory.renew([lease], ttl_s=9)) == []
        return write(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(directory._sessions, "write", renewed_first)
    directory.commit(lease, 0, "d", "fp")
    assert directory.get("s1").lease_until == clock.wall() + 9
    directory.close()


def test_a_change_that_is_always_too_late_ends_with_a_clear_error(
    directory: RedisDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned(directory)
    monkeypatch.setattr(redis_change, "_ATTEMPTS", 3)
    monkeypatch.setattr(directory._sessions, "write", lambda *a, **n: False)
    with pytest.raises(StoreUnavailable, match="changed by others in each of 3 attempts"):
        directory.append_control("s1", "e", "p")


def test_a_blob_that_is_replaced_while_it_is_read_is_whole(
    redis_server: RedisProcess, prefix: str
) -> None:
    store = RedisSnapshots(RedisServer(url=redis_server.url, timeout_s=10), prefix=prefix)
    blobs = [bytes([n]) * (2 * PIECE_BYTES + n) for n in range(4)]
    store.put("s1", "p8", blobs[0])
    over = threading.Event()

    def replace() -> None:
        n = 0
        while not over.is_set():
            n += 1
            store.put("s1", "p8", blobs[n % 4])

    writers = [threading.Thread(target=replace) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(10):
            assert store.get("s1", "p8") in blobs
    finally:
        over.set()
        for writer in writers:
            writer.join(20)
    store.delete_session("s1")
    with pytest.raises(SnapshotNotFound):
        store.get("s1", "p8")
    left = redis_server.ask("KEYS", f"{prefix}:*")
    assert left == b"*0\r\n"
    store.close()
