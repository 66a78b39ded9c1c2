"""A Redis directory that loses everything, on a real server: what it says, and how it is filled."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import FakeClock
from redis_server import RedisProcess
from replicas import eventually
from stored import new, owned, produce, ref

from echo_ray.clock import SystemClock
from echo_ray.errors import SessionNotFound, StoreUnavailable
from echo_ray.session import restoring
from echo_ray.session.sweep import pasts
from echo_ray.storage.kept_directory import KeptDirectory
from echo_ray.storage.memory import MemorySnapshots
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_identity import Identity
from echo_ray.storage.redis_link import RedisLink, RedisServer
from echo_ray.storage.restore import Restorer


class Deployment:
    """One prefix of a server, and the store that outlives it."""

    def __init__(self, redis: RedisProcess) -> None:
        self.redis = redis
        self.prefix = f"t-{uuid.uuid4().hex}"
        self.server = RedisServer(url=redis.url, timeout_s=10)
        self.store = MemorySnapshots()
        self.link = RedisLink(self.server)
        self.identity = Identity(self.link, self.prefix)
        self.clock = SystemClock()
        self.directory = KeptDirectory(
            self.server, self.clock, lambda: self.store, prefix=self.prefix
        )

    def restorer(self) -> Restorer:
        raw = RedisDirectory(self.server, self.clock, prefix=self.prefix)
        return Restorer(raw, self.store, self.identity, self.clock, limit_bytes=2**20)

    def kept(self, session_id: str = "s1") -> list[str]:
        return pasts([blob.snapshot_id for blob in self.store.list_blobs(session_id)])

    def newest(self, session_id: str = "s1") -> restoring.Past:
        blob = self.store.get(session_id, self.kept(session_id)[0])
        return restoring.decode(blob, store="memory", limit_bytes=2**20)

    def lose(self) -> None:
        """Everything of this deployment is gone from the server."""
        keys = self.link.run(("EVAL", "return redis.call('KEYS', ARGV[1])", 0, f"{self.prefix}:*"))
        self.link.run(("DEL", *keys[0]))

    def close(self) -> None:
        self.directory.close()
        self.link.close()


@pytest.fixture
def deployed(redis_server: RedisProcess) -> Iterator[Deployment]:
    deployment = Deployment(redis_server)
    deployment.identity.set()
    yield deployment
    deployment.close()


def test_what_was_lost_is_not_said_to_be_gone(deployed: Deployment) -> None:
    directory = deployed.directory
    lease = owned(directory)
    produce(directory, lease, 0)
    deployed.lose()
    assert deployed.identity.lost()
    calls: list[Callable[[], object]] = [
        lambda: directory.get("s1"),
        lambda: directory.list(),
        lambda: directory.controls("s1"),
        lambda: directory.snapshots("s1"),
        lambda: directory.digests("s1", 0, 9),
        lambda: directory.seal(lease, 1),
        lambda: directory.renew([lease], ttl_s=1),
        lambda: directory.release(lease, state="live"),
        lambda: directory.claim("s1", "r2", expect_epoch=1, ttl_s=1),
        lambda: directory.append_control("s1", "e1", "blue"),
        lambda: directory.set_state("s1", state="paused"),
        lambda: directory.delete("s1"),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="has lost its sessions or is new") as failure:
            call()
        assert failure.value.retryable
    deployed.identity.set()
    assert list(directory.list()) == []
    assert list(directory.renew([lease], ttl_s=1)) == [lease]
    for call in (calls[0], calls[2], calls[5], calls[11]):
        with pytest.raises(SessionNotFound):
            call()


def test_what_is_brought_back_between_two_looks_is_not_said_to_be_gone(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = deployed.directory
    directory.create(new())
    assert eventually(lambda: deployed.kept() != [])
    deployed.lose()
    plain = directory._sure.check_gone

    def check_gone(session_id: str) -> None:
        # All of it between the look that found nothing and the question why.
        deployed.restorer().restore_all()
        plain(session_id)

    monkeypatch.setattr(directory._sure, "check_gone", check_gone)
    with pytest.raises(StoreUnavailable, match="was brought back a moment ago"):
        directory.get("s1")
    assert directory.get("s1").prompt == "a red ball"


def test_a_loss_during_a_look_is_noticed(deployed: Deployment) -> None:
    def lose_and_refill() -> None:
        with deployed.identity.unbroken():
            deployed.lose()
            deployed.identity.set()

    with pytest.raises(StoreUnavailable, match="has lost its sessions"):
        lose_and_refill()


def test_an_identity_is_set_once(deployed: Deployment) -> None:
    (before,) = deployed.link.run(("GET", f"{deployed.prefix}:identity"))
    deployed.identity.set()
    assert deployed.link.run(("GET", f"{deployed.prefix}:identity")) == [before]


def test_every_change_that_somebody_is_told_of_is_kept(deployed: Deployment) -> None:
    directory = deployed.directory

    def follows(change: Callable[[], object]) -> restoring.Past:
        # The newest only: the one before it is deleted a moment after the newest is there.
        before = deployed.kept()[:1]
        change()
        assert eventually(lambda: deployed.kept()[:1] not in ([], before))
        return deployed.newest()

    assert follows(lambda: directory.create(new())).record == new()
    lease = directory.claim("s1", "r1", expect_epoch=0, ttl_s=60)
    produce(directory, lease, *range(8))
    past = follows(lambda: directory.append_control("s1", "e1", "blue"))
    assert [(e.event_id, e.chunk) for e in past.controls] == [("e1", 8)]
    assert (past.record.next_index, len(past.digests)) == (8, 8)
    directory.add_snapshot(lease, ref("p0000000008-e1", 8))
    past = follows(lambda: directory.pin_snapshot("s1", "p0000000008-e1"))
    assert [(s.id, s.pinned) for s in past.snapshots] == [("p0000000008-e1", True)]
    assert follows(lambda: directory.release(lease, state="paused")).record.state == "paused"
    assert follows(lambda: directory.set_state("s1", state="live")).record.state == "live"
    assert follows(lambda: directory.set_state("s1", state="closed")).record.state == "closed"
    directory.delete("s1")
    assert eventually(lambda: deployed.kept() == [])


def test_a_stream_that_goes_on_is_kept_with_its_snapshots(
    deployed: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployed.directory._keeper, "_every_s", 0.3)
    lease = owned(deployed.directory)
    produce(deployed.directory, lease, *range(4))
    deployed.directory.add_snapshot(lease, ref("p0000000004-e1", 4))
    assert eventually(lambda: deployed.kept() and deployed.newest().record.next_index == 4)
    produce(deployed.directory, lease, *range(4, 8))
    deployed.directory.add_snapshot(lease, ref("p0000000008-e1", 8))
    assert eventually(lambda: deployed.newest().record.next_index == 8)


def test_sessions_come_back_whoever_does_it_and_how_often(deployed: Deployment) -> None:
    directory = deployed.directory
    for n in range(20):
        directory.create(new(f"s{n}"))
    assert eventually(lambda: all(deployed.kept(f"s{n}") for n in range(20)))
    deployed.lose()
    reports = [deployed.restorer().restore_all(), deployed.restorer().restore_all()]
    assert sorted(reports[0].brought_back) == sorted(f"s{n}" for n in range(20))
    assert (len(reports[1].there), reports[1].brought_back) == (20, [])
    assert len(directory.list()) == 20


def test_an_append_only_log_that_is_gone(tmp_path: Path) -> None:
    redis = RedisProcess(tmp_path / "redis").start()
    deployed = Deployment(redis)
    try:
        deployed.identity.set()
        lease = owned(deployed.directory)
        produce(deployed.directory, lease, *range(6))
        deployed.directory.append_control("s1", "e1", "blue")
        assert eventually(lambda: deployed.kept() and deployed.newest().record.next_index == 6)
        redis.kill()
        shutil.rmtree(tmp_path / "redis" / "appendonlydir")
        redis.start()
        with pytest.raises(StoreUnavailable, match="has lost its sessions"):
            deployed.directory.get("s1")
        assert deployed.restorer().restore_all().brought_back == ["s1"]
        record = deployed.directory.get("s1")
        assert (record.next_index, record.owner) == (6, None)
        assert [e.event_id for e in deployed.directory.controls("s1")] == ["e1"]
        assert list(deployed.directory.renew([lease], ttl_s=1)) == [lease]
    finally:
        deployed.close()
        redis.kill()


def test_a_directory_that_cannot_be_opened_leaves_nothing_behind() -> None:
    with pytest.raises(StoreUnavailable):
        KeptDirectory(
            RedisServer(url="redis://127.0.0.1:1/0", timeout_s=0.2), FakeClock(), MemorySnapshots
        )
