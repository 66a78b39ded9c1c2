"""`echo-ray restore` on a real Redis and a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes import FakeClock
from ports import free_port
from redis_server import RedisProcess
from replicas import eventually
from s3_server import S3Server
from s3_server import snapshots as s3_snapshots
from stored import new

from echo_ray.cli import main
from echo_ray.clock import SystemClock
from echo_ray.config import StorageSection, from_mapping
from echo_ray.session.sweep import pasts
from echo_ray.storage.interface import Directory
from echo_ray.storage.open import open_directory, open_restorer
from echo_ray.storage.redis_link import RedisLink, RedisServer
from echo_ray.storage.s3_snapshots import S3Snapshots

pytest_plugins = ["s3_fixtures"]


class Deployment:
    """A bucket, a prefix in Redis, and what the command is told of them."""

    def __init__(self, redis: RedisProcess, s3: S3Server) -> None:
        self.bucket = s3.bucket()
        self.settings = {
            "storage.backend": "tiered",
            "storage.redis.url": redis.url,
            "storage.redis.prefix": self.bucket,
            "storage.redis.timeout_s": "10",
            "storage.s3.bucket": self.bucket,
            "storage.s3.endpoint": s3.url,
            "storage.s3.path_style": "true",
        }
        storage = {
            "backend": "tiered",
            "redis": {"url": redis.url, "prefix": self.bucket, "timeout_s": 10},
            "s3": {"bucket": self.bucket, "endpoint": s3.url, "path_style": True},
        }
        self.section = from_mapping(StorageSection, storage)
        self.directory: Directory = open_directory(self.section, SystemClock())
        self.durable: S3Snapshots = s3_snapshots(s3.url, self.bucket)
        self._link = RedisLink(RedisServer(url=redis.url, timeout_s=10))

    def restore(self, *words: str, **changes: str) -> int:
        settings = {**self.settings, **changes}
        return main(
            ["restore", *words, *(w for k, v in settings.items() for w in ("--set", f"{k}={v}"))]
        )

    def create(self, *ids: str) -> None:
        for id_ in ids:
            self.directory.create(new(id_))
        assert eventually(lambda: all(self.pasts(id_) for id_ in ids))

    def pasts(self, session_id: str) -> list[str]:
        return pasts([blob.snapshot_id for blob in self.durable.list_blobs(session_id)])

    def lose(self) -> None:
        keys = self._link.run(("EVAL", "return redis.call('KEYS', ARGV[1])", 0, f"{self.bucket}:*"))
        self._link.run(("DEL", *keys[0]))

    def close(self) -> None:
        self.directory.close()
        self.durable.close()
        self._link.close()


@pytest.fixture
def deployed(
    redis_server: RedisProcess, s3_server: S3Server, s3_keys: None
) -> Iterator[Deployment]:
    deployment = Deployment(redis_server, s3_server)
    yield deployment
    deployment.close()


def test_a_lost_redis_is_filled_again(
    deployed: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deployed.restore() == 0
    assert "S3 holds no session under storage.s3.prefix" in capsys.readouterr().out
    deployed.create("s1", "s2", "s3")
    deployed.durable.put("s2", deployed.pasts("s2")[0], b"rubbish")
    deployed.lose()
    assert deployed.restore() == 1
    said = capsys.readouterr().out.splitlines()
    assert sorted(said)[0] == "s1  brought back"
    assert any(line.startswith("s2  archive_foreign: not the past of a session") for line in said)
    assert {record.id for record in deployed.directory.list()} == {"s1", "s3"}


def test_when_nothing_is_lost_it_says_so_and_brings_back_what_it_is_told(
    deployed: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    deployed.restore()
    deployed.create("s1", "s2")
    past = deployed.pasts("s2")[0]
    blob = deployed.durable.get("s2", past)
    deployed.directory.delete("s2")
    assert eventually(lambda: deployed.pasts("s2") == [])
    deployed.durable.put("s2", past, blob)
    capsys.readouterr()
    assert deployed.restore() == 0
    assert capsys.readouterr().out.splitlines() == [
        "nothing is lost: Redis holds the sessions of this deployment",
        "s2  only in S3: it was deleted; --session s2 brings it back",
    ]
    assert deployed.restore("--session", "s2", "--session", "s1") == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["s1  is there", "s2  brought back"]
    assert deployed.directory.get("s2").prompt == "a red ball"


def test_what_is_refused(deployed: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    deployed.create("s1")
    nowhere = f"127.0.0.1:{free_port()}"
    for words, changes, why in (
        ((), {"storage.backend": "redis"}, "storage.backend: redis keeps nothing that outlives"),
        ((), {"storage.s3.bucket": "nobody-made-this"}, "nobody-made-this"),
        ((), {"storage.s3.endpoint": f"http://{nowhere}"}, nowhere),
        ((), {"storage.redis.url": f"redis://{nowhere}/0"}, nowhere),
        (("--session", "s9"), {}, "nothing of session 's9'"),
        (("--session", "../s9"), {}, "is not allowed"),
    ):
        assert deployed.restore(*words, **changes) == 2
        assert why in capsys.readouterr().err
    # It is as lost as before.
    restorer = open_restorer(deployed.section, FakeClock())
    assert restorer is not None
    assert restorer.lost()
    restorer.close()


def test_backends_without_a_durable_store_have_no_restorer() -> None:
    for backend in ("memory", "local", "redis"):
        assert open_restorer(StorageSection(backend=backend), FakeClock()) is None
