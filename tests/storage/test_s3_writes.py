"""Writes to S3: conditional, so that a late one covers nothing; in parts, whole or not there."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from typing import Any

import pytest
from s3_server import Door, S3Server, answering, error, snapshots

from echo_ray.errors import SnapshotNotFound, StoreUnavailable
from echo_ray.storage.s3_client import MIN_PART_BYTES
from echo_ray.storage.s3_snapshots import S3Snapshots

pytest_plugins = ["s3_fixtures"]

# -- conditional writes


def test_checksum_and_condition_go_with_every_write(s3_door: Door, door_store: S3Snapshots) -> None:
    door_store.put("s1", "p8", b"x")
    sent = s3_door.headers[0]
    assert sent["if-none-match"] == "*"
    digest = base64.b64encode(hashlib.sha256(b"x").digest()).decode()
    assert sent["x-amz-checksum-sha256"] == digest
    door_store.put("s1", "p8", b"y")
    assert s3_door.headers[-1]["if-match"].startswith('"')
    door_store.delete_session("s1")
    assert "content-md5" in s3_door.headers[-1]


def test_a_late_write_covers_nothing_written_since(
    s3_server: S3Server, s3_door: Door, s3_keys: None
) -> None:
    bucket = s3_server.bucket()
    old = snapshots(s3_door.url, bucket, timeout_s=0.3)
    new = snapshots(s3_server.url, bucket)
    arrived, may_go = threading.Event(), threading.Event()

    def hold(what: str) -> None:
        arrived.set()
        may_go.wait(50)

    s3_door.spoil = hold
    with pytest.raises(StoreUnavailable, match=r"0\.3 s|in time"):
        old.put("s1", "p8", b"of an owner that slept")
    assert arrived.wait(50)
    new.put("s1", "p8", b"newer")
    may_go.set()
    old._calls._pool.shutdown(wait=True)
    assert new.get("s1", "p8") == b"newer"
    old.close()
    new.close()


def test_a_server_without_conditions_is_told_at_the_check(
    s3_server: S3Server, s3_keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = snapshots(s3_server.url, s3_server.bucket())
    plain = store._client.put_object
    monkeypatch.setattr(store._client, "put_object", lambda IfNoneMatch=None, **rest: plain(**rest))
    with pytest.raises(StoreUnavailable, match=r"ignores conditional writes.*turn"):
        store.check()
    store.close()


def test_a_write_that_always_loses_gives_up(s3_door: Door, door_store: S3Snapshots) -> None:
    s3_door.spoil = answering(error(412, "PreconditionFailed"), "PUT")
    with pytest.raises(StoreUnavailable, match="changed by others during each of 3 tries"):
        door_store.put("s1", "p8", b"x")


# -- parts


def uploads(server: S3Server, store: S3Snapshots) -> list[Any]:
    client = server.client()
    found = client.list_multipart_uploads(Bucket=store._bucket).get("Uploads", [])
    client.close()
    return list(found)


@pytest.mark.parametrize(
    "broken", [("PUT", "partNumber=2"), ("POST", "uploadId=")], ids=["part", "completion"]
)
def test_an_upload_that_fails_leaves_nothing(
    s3_server: S3Server,
    s3_door: Door,
    parts_store: S3Snapshots,
    monkeypatch: pytest.MonkeyPatch,
    broken: tuple[str, str],
) -> None:
    monkeypatch.setattr("echo_ray.storage.s3_calls._FIRST_PAUSE_S", 0.001)
    method, query = broken
    s3_door.spoil = lambda what: (
        error(500, "InternalError") if what.startswith(method) and query in what else None
    )
    with pytest.raises(StoreUnavailable, match="the server failed"):
        parts_store.put("s1", "p8", bytes(12 * 2**20))
    with pytest.raises(SnapshotNotFound):
        parts_store.get("s1", "p8")
    assert uploads(s3_server, parts_store) == []
    assert any(what.startswith("DELETE") for what in s3_door.seen)


def test_an_upload_is_aborted_when_no_part_is_under_way(
    s3_door: Door, parts_store: S3Snapshots
) -> None:
    ended = []
    begun = threading.Event()

    def spoil(what: str) -> tuple[int, bytes] | None:
        if "partNumber=1" in what:
            assert begun.wait(50)
            return error(403, "AccessDenied")
        if "partNumber=2" in what:
            begun.set()
            time.sleep(0.3)
            ended.append("part")
        elif what.startswith("DELETE"):
            ended.append("abort")
        return None

    s3_door.spoil = spoil
    with pytest.raises(StoreUnavailable, match="s3:PutObject"):
        parts_store.put("s1", "p8", bytes(2 * MIN_PART_BYTES))
    assert ended == ["part", "abort"]


def test_an_upload_that_is_late_leaves_nothing(s3_server: S3Server, s3_door: Door) -> None:
    store = snapshots(
        s3_door.url,
        s3_server.bucket(),
        multipart_threshold_bytes=MIN_PART_BYTES,
        part_bytes=MIN_PART_BYTES,
        timeout_s=3.0,
    )
    s3_door.spoil = lambda what: time.sleep(2.4) if "partNumber=3" in what else None
    began_s = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.put("s1", "p8", bytes(12 * 2**20))
    assert time.monotonic() - began_s < 30
    assert list(store.list_blobs()) == []
    assert uploads(s3_server, store) == []
    store.close()


def test_an_upload_in_parts_replaces_only_what_it_saw(
    s3_door: Door, parts_store: S3Snapshots
) -> None:
    parts_store.put("s1", "p8", b"small")
    parts_store.put("s1", "p8", bytes(MIN_PART_BYTES))
    finished = [h for w, h in zip(s3_door.seen, s3_door.headers, strict=True) if "uploadId" in w]
    assert any(h.get("if-none-match") == "*" for h in finished)
    assert any("if-match" in h for h in finished)
    assert parts_store.get("s1", "p8") == bytes(MIN_PART_BYTES)
