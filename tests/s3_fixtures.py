"""An S3 server for a whole test run: `pytest_plugins = ["s3_fixtures"]` in a test module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import SECRET, Door, S3Server, serve_door, snapshots

from echo_ray.storage.s3_client import MIN_PART_BYTES
from echo_ray.storage.s3_snapshots import S3Snapshots


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials in the environment, and nothing of this machine's own settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "root")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def s3_store(s3_server: S3Server, s3_keys: None) -> Iterator[S3Snapshots]:
    """A store in a bucket of its own."""
    store = snapshots(s3_server.url, s3_server.bucket())
    yield store
    store.close()


@pytest.fixture
def s3_door(s3_server: S3Server, s3_keys: None) -> Iterator[Door]:
    """A door to the server that lets everything pass until told otherwise."""
    door = Door("")
    server = serve_door(s3_server.url, door)
    door.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield door
    server.shutdown()
    server.server_close()


@pytest.fixture
def door_store(s3_server: S3Server, s3_door: Door) -> Iterator[S3Snapshots]:
    store = snapshots(s3_door.url, s3_server.bucket(), timeout_s=6.0)
    yield store
    store.close()


@pytest.fixture
def parts_store(s3_server: S3Server, s3_door: Door) -> Iterator[S3Snapshots]:
    store = snapshots(
        s3_door.url,
        s3_server.bucket(),
        multipart_threshold_bytes=MIN_PART_BYTES,
        part_bytes=MIN_PART_BYTES,
        timeout_s=12.0,
    )
    yield store
    store.close()
