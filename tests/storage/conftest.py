"""Every store under test, built the same way."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeClock
from redis_server import RedisProcess, go_by

from echo_ray.config import RedisSection, StorageSection
from echo_ray.storage.interface import Directory, SnapshotStore
from echo_ray.storage.open import open_directory, open_snapshots
from echo_ray.storage.redis_directory import RedisDirectory


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One server for all tests that do it no harm; each has a prefix of its own."""
    server = RedisProcess(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", "local", "redis"])
def section(request: pytest.FixtureRequest, tmp_path: Path) -> StorageSection:
    redis = RedisSection()
    if request.param == "redis":
        server: RedisProcess = request.getfixturevalue("redis_server")
        # Generous, for a machine that has other work; what is short is tested on its own.
        redis = RedisSection(url=server.url, prefix=f"t-{uuid.uuid4().hex}", timeout_s=10)
    return StorageSection(
        backend=request.param,
        path=str(tmp_path / "store"),
        snapshot_limit_bytes=4096,
        redis=redis,
    )


@pytest.fixture
def directory(section: StorageSection, clock: FakeClock) -> Iterator[Directory]:
    store = open_directory(section, clock)
    if isinstance(store, RedisDirectory):
        go_by(store, clock)
    yield store
    store.close()


@pytest.fixture
def blobs(section: StorageSection) -> Iterator[SnapshotStore]:
    store = open_snapshots(section)
    yield store
    store.close()
