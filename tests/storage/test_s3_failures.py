"""Whatever goes wrong between us and S3 is named, in time, and leaves nothing half done."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from ports import free_port
from s3_server import SECRET, Door, S3Server, answering, error, snapshots

from echo_ray.errors import (
    CapacityError,
    EchoError,
    StoreCorrupt,
    StoreFull,
    StoreUnavailable,
)
from echo_ray.storage.s3_calls import ATTEMPTS, pause_s
from echo_ray.storage.s3_snapshots import S3Snapshots

pytest_plugins = ["s3_fixtures"]

CALLS: list[Callable[[S3Snapshots], object]] = [
    lambda s: s.put("s1", "p8", b"x"),
    lambda s: s.get("s1", "p8"),
    lambda s: s.delete("s1", "p8"),
    lambda s: s.delete_session("s1"),
    lambda s: list(s.list_blobs()),
    lambda s: s.check(),
]
every_call = pytest.mark.parametrize(
    "call", CALLS, ids=["put", "get", "delete", "delete_session", "list", "check"]
)


@pytest.fixture
def checked(s3_server: S3Server) -> Iterator[None]:
    s3_server.check_rights(True)
    yield
    s3_server.check_rights(False)


# -- credentials and rights


@every_call
def test_a_missing_bucket(
    s3_server: S3Server, s3_keys: None, call: Callable[[S3Snapshots], object]
) -> None:
    store = snapshots(s3_server.url, "no-such-bucket")
    with pytest.raises(StoreUnavailable, match=r"'no-such-bucket' at http://.* does not exist.*cr"):
        call(store)
    store.close()


@every_call
def test_unknown_and_wrong_keys(
    s3_server: S3Server,
    s3_keys: None,
    checked: None,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[S3Snapshots], object],
) -> None:
    s3_server.check_rights(False)
    bucket, (key, _) = s3_server.bucket(), user(s3_server, "s3:*")
    s3_server.check_rights(True)
    for id_, told in (("AKIA0000", "access key is unknown"), (key, "secret key does not belong")):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", id_)
        store = snapshots(s3_server.url, bucket)
        with pytest.raises(StoreUnavailable, match=f"{told}.*correct the credentials") as caught:
            call(store)
        assert SECRET not in caught.value.message
        store.close()


@pytest.mark.parametrize("missing", ["s3:PutObject", "s3:GetObject", "s3:DeleteObject"])
def test_check_names_the_right_that_is_missing(
    s3_server: S3Server,
    s3_keys: None,
    checked: None,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    s3_server.check_rights(False)
    bucket, keys = s3_server.bucket(), user(s3_server, "s3:*", denied=missing)
    s3_server.check_rights(True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])
    store = snapshots(s3_server.url, bucket)
    with pytest.raises(StoreUnavailable, match=rf"may not \w+ \({missing}\) under 'echo-ray' in"):
        store.check()
    store.close()


def test_check_names_every_right_that_is_missing(s3_door: Door, door_store: S3Snapshots) -> None:
    s3_door.spoil = answering(error(403, "AccessDenied"), "PUT", "DELETE")
    with pytest.raises(
        StoreUnavailable, match=r"write \(s3:PutObject\) and delete \(s3:DeleteObject\)"
    ):
        door_store.check()


def test_a_bucket_that_may_only_be_read(s3_door: Door, door_store: S3Snapshots) -> None:
    door_store.put("s1", "p8", b"kept")
    s3_door.spoil = answering(error(403, "AccessDenied"), "PUT", "DELETE", "POST")
    for call, right in (
        (lambda: door_store.put("s1", "p8", b"x"), "s3:PutObject"),
        (lambda: door_store.delete("s1", "p8"), "s3:DeleteObject"),
        (lambda: door_store.delete_session("s1"), "s3:DeleteObject"),
    ):
        with pytest.raises(StoreUnavailable, match=f"lack the right {right}.*grant it"):
            call()
    assert door_store.get("s1", "p8") == b"kept"


def test_a_deletion_that_is_refused_for_single_objects(
    s3_door: Door, door_store: S3Snapshots
) -> None:
    door_store.put("s1", "p8", b"kept")
    told = b"<Key>p8</Key><Code>AccessDenied</Code><Message>no</Message>"
    reply = 200, b"<DeleteResult><Error>" + told + b"</Error></DeleteResult>"
    s3_door.spoil = answering(reply, "POST")
    with pytest.raises(StoreUnavailable, match="s3:DeleteObject"):
        door_store.delete_session("s1")


def test_no_credentials_at_all(
    s3_server: S3Server, s3_keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = snapshots(s3_server.url, "bucket")
    with pytest.raises(StoreUnavailable, match="no complete credentials were found; give"):
        store.get("s1", "p8")
    store.close()


# -- the server and the way to it


@every_call
def test_an_endpoint_that_cannot_be_reached(
    s3_keys: None, call: Callable[[S3Snapshots], object]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    store = snapshots(url, "bucket", timeout_s=2.0)
    began_s = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"{url}.*cannot be reached") as caught:
        call(store)
    assert time.monotonic() - began_s < 30
    assert caught.value.retry_after_s
    store.close()


@every_call
def test_a_server_that_never_answers_costs_no_more_than_the_timeout(
    s3_keys: None, call: Callable[[S3Snapshots], object]
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = snapshots(url, "bucket", timeout_s=0.5)
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"in time|within 0\.5 s"):
            call(store)
        assert time.monotonic() - began_s < 30
        store.close()


def test_a_server_that_dribbles_costs_no_more_than_the_timeout(s3_keys: None) -> None:
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as slow:

        def dribble() -> None:
            connection, _ = slow.accept()
            with connection:
                while not stop.wait(0.05):
                    connection.send(b"H")

        thread = threading.Thread(target=dribble, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{slow.getsockname()[1]}"
        store = snapshots(url, "bucket", timeout_s=0.6)
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"did not finish within 0\.6 s; see to"):
            store.get("s1", "p8")
        assert time.monotonic() - began_s < 30
        stop.set()
        thread.join(5)
        store.close()


def test_something_that_is_no_s3_server(
    s3_door: Door, door_store: S3Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echo_ray.storage.s3_calls._FIRST_PAUSE_S", 0.001)
    listing = b"<ListBucketResult><KeyCount>THEIRS</KeyCount></ListBucketResult>"
    for page, told in ((b"<html>THEIRS", "server failed"), (listing, "not that of an S3 server")):
        s3_door.spoil = answering((200, page))
        with pytest.raises(StoreUnavailable, match=told) as caught:
            list(door_store.list_blobs())
        assert "THEIRS" not in caught.value.message


@pytest.mark.parametrize(
    ("status", "code", "kind", "told", "tries"),
    [
        (503, "SlowDown", StoreUnavailable, "slow down.*try later", ATTEMPTS),
        (429, "TooManyRequests", StoreUnavailable, "slow down", ATTEMPTS),
        (500, "InternalError", StoreUnavailable, "the server failed", ATTEMPTS),
        (400, "BadDigest", StoreUnavailable, "400 BadDigest", ATTEMPTS),
        (507, "XMinioStorageFull", StoreFull, "it is full.*raise its quota", 1),
        (403, "QuotaExceeded", StoreFull, "it is full", 1),
        (400, "EntityTooLarge", CapacityError, "refuses its size", 1),
        (501, "NotImplemented", StoreUnavailable, "conditional writes", 1),
        (403, "RequestTimeTooSkewed", StoreUnavailable, "clock is wrong", 1),
        (403, "ExpiredToken", StoreUnavailable, "token has run out", 1),
        (400, "AuthorizationHeaderMalformed", StoreUnavailable, "correct the region", 1),
        (400, "KMS.DisabledException", StoreUnavailable, "told by a test.*correct the settings", 1),
    ],
)
def test_what_the_server_says(
    s3_door: Door,
    door_store: S3Snapshots,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    kind: type[EchoError],
    told: str,
    tries: int,
) -> None:
    monkeypatch.setattr("echo_ray.storage.s3_calls._FIRST_PAUSE_S", 0.001)
    s3_door.spoil = answering(error(status, code))
    with pytest.raises(kind, match=f"'p8' of session 's1' in bucket 'bucket-.*{told}") as caught:
        door_store.put("s1", "p8", b"x")
    assert type(caught.value) is kind
    assert len(s3_door.seen) == tries


def test_a_failure_that_passes_is_not_noticed(s3_door: Door, door_store: S3Snapshots) -> None:
    replies = [error(503, "SlowDown"), error(500, "InternalError"), None, None]
    s3_door.spoil = lambda _: replies.pop(0)
    door_store.put("s1", "p8", b"x")
    assert door_store.get("s1", "p8") == b"x"


def test_pauses_grow_spread_and_end() -> None:
    whole = [pause_s(n, 1.0) for n in range(1, ATTEMPTS)]
    assert sum(whole) == pytest.approx(3.1)
    assert [pause_s(n, 0.0) * 2 for n in range(1, ATTEMPTS)] == whole


def test_tries_end_with_the_time(
    s3_door: Door, door_store: S3Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echo_ray.storage.s3_calls._FIRST_PAUSE_S", 60.0)
    s3_door.spoil = answering(error(503, "SlowDown"))
    with pytest.raises(StoreUnavailable, match="slow down"):
        door_store.put("s1", "p8", b"x")
    assert len(s3_door.seen) == 1


# -- what comes back


def test_an_answer_that_is_cut_is_asked_for_again(s3_door: Door, door_store: S3Snapshots) -> None:
    door_store.put("s1", "p8", b"whole answer")
    cuts = [True, False]
    s3_door.change = lambda what, body: body[:4] if "p8" in what and cuts.pop(0) else body
    assert door_store.get("s1", "p8") == b"whole answer"
    s3_door.change = lambda what, body: body[:4]
    with pytest.raises(StoreUnavailable) as caught:
        door_store.get("s1", "p8")
    assert not isinstance(caught.value, StoreCorrupt)


def test_bytes_changed_on_the_way_or_at_rest(s3_door: Door, door_store: S3Snapshots) -> None:
    door_store.put("s1", "p8", b"good")
    s3_door.change = lambda _, body: body.replace(b"good", b"evil")
    with pytest.raises(StoreCorrupt, match=r"'p8' of session 's1' in bucket.* is damaged"):
        door_store.get("s1", "p8")


def test_an_object_over_the_limit_is_not_read(s3_server: S3Server, s3_keys: None) -> None:
    bucket = s3_server.bucket()
    large, small = snapshots(s3_server.url, bucket), snapshots(s3_server.url, bucket, limit_bytes=9)
    large.put("s1", "p8", bytes(10))
    with pytest.raises(CapacityError, match="has 10 bytes, the limit is 9"):
        small.get("s1", "p8")
    large.close()
    small.close()


def user(server: S3Server, allowed: str, denied: str | None = None) -> tuple[str, str]:
    """Key id and secret of a new user with these rights."""
    iam = server.client("iam")
    name = f"user-{time.monotonic_ns()}"
    statements = [{"Effect": "Allow", "Action": allowed, "Resource": "*"}]
    if denied:
        statements.append({"Effect": "Deny", "Action": denied, "Resource": "*"})
    iam.create_user(UserName=name)
    iam.put_user_policy(
        UserName=name,
        PolicyName="rights",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": statements}),
    )
    key = iam.create_access_key(UserName=name)["AccessKey"]
    iam.close()
    return key["AccessKeyId"], key["SecretAccessKey"]
