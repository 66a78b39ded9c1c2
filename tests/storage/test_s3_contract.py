"""The contract of snapshot stores, on S3 and on memory over S3; and what S3 adds to it."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from s3_server import SECRET, S3Server, snapshots
from storage import test_contract_blobs as contract

from echo_ray.errors import ConfigError, StoreCorrupt
from echo_ray.storage import s3_snapshots
from echo_ray.storage.interface import SweptStore
from echo_ray.storage.memory import MemorySnapshots
from echo_ray.storage.s3_client import MIN_PART_BYTES
from echo_ray.storage.s3_snapshots import S3Snapshots
from echo_ray.storage.tiered import TieredSnapshots

pytest_plugins = ["s3_fixtures"]

for _name, _test in vars(contract).items():
    if _name.startswith("test_") and "blobs" in inspect.signature(_test).parameters:
        globals()[_name] = _test

LIMIT = 4096


@dataclass(frozen=True)
class Section:
    """What the contract's tests read of a configuration."""

    backend: str
    snapshot_limit_bytes: int = LIMIT


@pytest.fixture(params=["s3", "s3-unconditional", "tiered"])
def blobs(
    request: pytest.FixtureRequest, s3_server: S3Server, s3_keys: None
) -> Iterator[SweptStore]:
    durable = snapshots(
        s3_server.url,
        s3_server.bucket(),
        limit_bytes=LIMIT,
        conditional_writes=request.param != "s3-unconditional",
    )
    if request.param == "tiered":
        store = TieredSnapshots(MemorySnapshots(LIMIT), durable, durable_every=1)
        yield store
        store.close()
    else:
        yield durable
        durable.close()


@pytest.fixture
def section(blobs: SweptStore) -> Section:
    return Section(blobs.name)


def test_the_whole_contract_is_here() -> None:
    names = [n for n in globals() if n.startswith("test_") and hasattr(contract, n)]
    assert len(names) >= 7


def test_listing(blobs: SweptStore) -> None:
    assert list(blobs.list_blobs()) == []
    blobs.put("s1", "p8", b"12")
    blobs.put("s1", "p16", b"123")
    blobs.put("s10", "p8", b"1")
    listed = {(b.session_id, b.snapshot_id): b.size_bytes for b in blobs.list_blobs()}
    assert listed == {("s1", "p8"): 2, ("s1", "p16"): 3, ("s10", "p8"): 1}
    assert {b.snapshot_id for b in blobs.list_blobs("s1")} == {"p8", "p16"}
    assert list(blobs.list_blobs("ghost")) == []
    with pytest.raises(contract.InvalidRequestError):
        list(blobs.list_blobs("../s1"))


def test_objects_of_others_are_passed_over(s3_store: S3Snapshots, s3_server: S3Server) -> None:
    bucket = s3_store._bucket
    client = s3_server.client()
    for key in ("theirs", "echo-ray/sessions/-/p", "echo-ray/sessions/s1/a/b", "other/s1/p8"):
        client.put_object(Bucket=bucket, Key=key, Body=b"x")
    s3_store.put("s1", "p8", b"1")
    assert [(b.session_id, b.snapshot_id) for b in s3_store.list_blobs()] == [("s1", "p8")]
    client.close()


def test_a_session_of_many_blobs_is_listed_and_deleted_by_pages(
    s3_store: S3Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert s3_snapshots._BATCH == 1000
    monkeypatch.setattr(s3_snapshots, "_BATCH", 10)
    for n in range(23):
        s3_store.put("s1", f"p{n}", b"")
    s3_store.put("s2", "p8", b"kept")
    assert sum(1 for _ in s3_store.list_blobs("s1")) == 23
    s3_store.delete_session("s1")
    assert [b.session_id for b in s3_store.list_blobs()] == ["s2"]


def test_prefixes_divide_a_bucket(s3_server: S3Server, s3_keys: None) -> None:
    bucket = s3_server.bucket()
    one, two = (snapshots(s3_server.url, bucket, prefix=p) for p in ("a/one", "a/two"))
    one.put("s1", "p8", b"1")
    assert list(two.list_blobs()) == []
    two.delete_session("s1")
    assert one.get("s1", "p8") == b"1"
    one.close()
    two.close()


def test_a_large_blob_goes_in_parts(s3_server: S3Server, s3_keys: None) -> None:
    store = snapshots(
        s3_server.url,
        s3_server.bucket(),
        multipart_threshold_bytes=MIN_PART_BYTES,
        part_bytes=MIN_PART_BYTES,
    )
    blob = os.urandom(12 * 2**20)
    store.put("s1", "p8", blob)
    assert store.get("s1", "p8") == blob
    client = s3_server.client()
    head = client.head_object(Bucket=store._bucket, Key="echo-ray/sessions/s1/p8")
    assert head["ETag"].endswith('-3"')
    assert head["Metadata"]["sha256"] == hashlib.sha256(blob).hexdigest()
    store.put("s1", "p8", blob[::-1])
    assert store.get("s1", "p8") == blob[::-1]
    client.close()
    store.close()


@pytest.mark.parametrize(
    ("settings", "algorithm", "key"),
    [
        ({"encryption": "AES256"}, "AES256", None),
        ({"encryption": "aws:kms", "kms_key_id": "key-1"}, "aws:kms", "key-1"),
        ({}, None, None),
    ],
)
@pytest.mark.parametrize("size", [3, MIN_PART_BYTES])
def test_every_object_is_encrypted_as_told(
    s3_server: S3Server,
    s3_keys: None,
    settings: dict[str, str],
    algorithm: str | None,
    key: str | None,
    size: int,
) -> None:
    store = snapshots(
        s3_server.url, s3_server.bucket(), multipart_threshold_bytes=MIN_PART_BYTES, **settings
    )
    store.put("s1", "p8", bytes(size))
    client = s3_server.client()
    head = client.head_object(Bucket=store._bucket, Key="echo-ray/sessions/s1/p8")
    assert (head.get("ServerSideEncryption"), head.get("SSEKMSKeyId")) == (algorithm, key)
    client.close()
    store.close()


@pytest.mark.parametrize("metadata", [{}, {"sha256": "ab" * 32}])
def test_bytes_that_are_not_those_that_were_put(
    s3_store: S3Snapshots, s3_server: S3Server, metadata: dict[str, str]
) -> None:
    client = s3_server.client()
    client.put_object(
        Bucket=s3_store._bucket, Key="echo-ray/sessions/s1/p8", Body=b"bad", Metadata=metadata
    )
    with pytest.raises(StoreCorrupt, match=r"'p8' of session 's1'.*3 bytes.*write it again"):
        s3_store.get("s1", "p8")
    s3_store.put("s1", "p8", b"good")
    assert s3_store.get("s1", "p8") == b"good"
    client.close()


def test_check_leaves_nothing_behind(s3_store: S3Snapshots, s3_server: S3Server) -> None:
    s3_store.check()
    client = s3_server.client()
    assert client.list_objects_v2(Bucket=s3_store._bucket)["KeyCount"] == 0
    client.close()


def test_a_named_profile_gives_the_credentials(
    s3_server: S3Server, s3_keys: None, monkeypatch: pytest.MonkeyPatch, tmp_path: contract.Path
) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[team]\naws_access_key_id=root\naws_secret_access_key={SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = snapshots(s3_server.url, s3_server.bucket(), profile="team")
    store.check()
    store.close()


def test_credentials_are_in_no_log(s3_store: S3Snapshots, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    s3_store.put("s1", "p8", b"x")
    assert s3_store.get("s1", "p8") == b"x"
    assert SECRET not in caplog.text
    assert "Signature" not in caplog.text


REFUSED = [
    ({"bucket": "B"}, "bucket 'B'"),
    ({"bucket": "a/b"}, "bucket 'a/b'"),
    ({"prefix": ""}, "prefix ''"),
    ({"prefix": "/a"}, "prefix '/a'"),
    ({"prefix": "a//b"}, "prefix 'a//b'"),
    ({"prefix": "a" * 257}, "up to 256"),
    ({"endpoint": "minio:9000"}, "endpoint 'minio:9000'"),
    ({"endpoint": "ftp://minio"}, "http"),
    ({"encryption": "rot13"}, "'rot13' is unknown: use none, AES256, aws:kms"),
    ({"kms_key_id": "k"}, "goes with encryption 'aws:kms'"),
    ({"part_bytes": 5 * 2**20 - 1}, "part_bytes is 5242879"),
    ({"multipart_threshold_bytes": 0}, "multipart_threshold_bytes is 0"),
    ({"limit_bytes": 2**50}, "limit_bytes is 1125899906842624"),
    ({"threads": 0}, "threads is 0"),
    ({"timeout_s": 0.0}, "timeout_s is 0.0"),
    ({"profile": "nobody"}, "'nobody'"),
]


@pytest.mark.parametrize(("settings", "told"), REFUSED)
def test_settings_that_cannot_be(s3_keys: None, settings: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        S3Snapshots(**{"bucket": "bucket", "region": "us-east-1", **settings})


def test_a_password_in_the_endpoint_is_refused_and_not_repeated(s3_keys: None) -> None:
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        S3Snapshots("bucket", endpoint="https://me:hush@minio:9000")
    assert "hush" not in caught.value.message
