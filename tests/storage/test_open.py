"""From configuration to stores on Redis and S3: which are opened, and what is checked before."""

from __future__ import annotations

import dataclasses

import pytest
from fakes import FakeClock
from ports import free_port
from redis_server import RedisProcess
from s3_server import S3Server
from stored import owned

from echo_ray.config import RedisSection, S3Section, StorageSection, from_mapping
from echo_ray.errors import ConfigError, StoreUnavailable
from echo_ray.storage.open import check_stores, open_directory, open_snapshots
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_snapshots import RedisSnapshots
from echo_ray.storage.s3_snapshots import S3Snapshots
from echo_ray.storage.tiered import TieredSnapshots

pytest_plugins = ["s3_fixtures"]


@pytest.fixture
def section(redis_server: RedisProcess, s3_server: S3Server, s3_keys: None) -> StorageSection:
    bucket = s3_server.bucket()
    return from_mapping(
        StorageSection,
        {
            "backend": "tiered",
            "redis": {"url": redis_server.url, "prefix": bucket, "timeout_s": 10},
            "s3": {"bucket": bucket, "endpoint": s3_server.url, "path_style": True},
        },
    )


def test_tiered_keeps_the_first_snapshot_in_both(section: StorageSection) -> None:
    check_stores(section, FakeClock())
    directory, store = open_directory(section, FakeClock()), open_snapshots(section)
    assert isinstance(directory, RedisDirectory)
    assert isinstance(store, TieredSnapshots)
    owned(directory)
    store.put("s1", "p8", b"first")
    store.put("s1", "p16", b"second")
    store.make_durable("s1", "p8")
    assert list(store.where("s1", "p8")) == ["hot", "durable"]
    assert list(store.where("s1", "p16")) == ["hot"]
    store.close()
    directory.close()
    for tier in store.tiers.values():
        with pytest.raises(StoreUnavailable, match="is closed"):
            tier.get("s1", "p8")


def test_s3_keeps_snapshots_there_only(section: StorageSection) -> None:
    section = dataclasses.replace(section, backend="s3")
    store = open_snapshots(section)
    assert isinstance(store, S3Snapshots)
    store.put("s1", "p8", b"blob")
    assert store.get("s1", "p8") == b"blob"
    directory = open_directory(section, FakeClock())
    assert isinstance(directory, RedisDirectory)
    directory.close()
    store.close()


def test_stores_that_do_not_answer_are_found_before_the_start(section: StorageSection) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    without_redis = dataclasses.replace(section, redis=RedisSection(url=f"redis://{nowhere}/0"))
    with pytest.raises(StoreUnavailable, match=nowhere):
        check_stores(without_redis, FakeClock())
    without_bucket = dataclasses.replace(section.s3, bucket="nobody-made-this")
    with pytest.raises(StoreUnavailable, match="nobody-made-this"):
        check_stores(dataclasses.replace(section, s3=without_bucket), FakeClock())


@pytest.mark.parametrize("backend", ["s3", "tiered"])
def test_a_bucket_must_be_named(backend: str) -> None:
    with pytest.raises(ConfigError, match=r"storage\.s3\.bucket"):
        StorageSection(backend=backend)


@pytest.mark.parametrize(
    "wrong", [{"encryption": "rot13"}, {"timeout_s": 0.0}, {"durable_every": 0}]
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"storage\.s3"):
        S3Section(**wrong)  # type: ignore[arg-type]


def test_only_what_a_backend_uses_is_opened() -> None:
    store = open_snapshots(StorageSection(backend="redis"))
    assert isinstance(store, RedisSnapshots)
    store.close()
