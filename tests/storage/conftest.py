"""Every store under test, built the same way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeClock

from echo_ray.config import StorageSection
from echo_ray.storage.interface import Directory, SnapshotStore
from echo_ray.storage.open import open_directory, open_snapshots


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["memory", "local"])
def section(request: pytest.FixtureRequest, tmp_path: Path) -> StorageSection:
    return StorageSection(
        backend=request.param, path=str(tmp_path / "store"), snapshot_limit_bytes=4096
    )


@pytest.fixture
def directory(section: StorageSection, clock: FakeClock) -> Iterator[Directory]:
    store = open_directory(section, clock)
    yield store
    store.close()


@pytest.fixture
def blobs(section: StorageSection) -> SnapshotStore:
    return open_snapshots(section)
