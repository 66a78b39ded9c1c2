"""A server that is gone, hangs, is full, refuses us or holds nonsense is named."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import FakeClock
from ports import free_port
from redis_server import RedisProcess, go_by
from stored import new, owned, produce, ref

from echo_ray.config import RedisSection, StorageSection
from echo_ray.errors import (
    ConfigError,
    EchoError,
    StoreCorrupt,
    StoreFull,
    StoreUnavailable,
)
from echo_ray.session.records import ReplicaRecord
from echo_ray.storage import redis_durability
from echo_ray.storage.open import open_directory, open_snapshots
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import RedisServer
from echo_ray.storage.redis_snapshots import PIECE_BYTES, RedisSnapshots

RIGHTS = (
    "+hgetall +hget +hset +hdel +hmget +hvals +zadd +zrangebyscore +zrandmember "
    "+zremrangebyscore +zrem +zscore +zcard +sadd +srem +smembers +get +mget +set +incr +del "
    "+unlink +exists +pexpire +persist +evalsha +script|load +time +info +config|get +ping +wait "
    "+waitaof"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path / "redis").start()
    yield process
    process.kill()


def _replica(id_: str = "r1") -> ReplicaRecord:
    return ReplicaRecord(id=id_, node_id="n", pid=1, address="127.0.0.1:1")


def opened(server: RedisProcess, timeout_s: float = 5.0, **options: object) -> RedisDirectory:
    there = RedisServer(url=server.url, timeout_s=timeout_s)
    return RedisDirectory(there, FakeClock(), **options)  # type: ignore[arg-type]


CALLS: list[Callable[[RedisDirectory], object]] = [
    lambda d: d.get("s1"),
    lambda d: d.append_control("s1", "e", "p"),
    lambda d: d.renew([], ttl_s=1),
    lambda d: d.replicas(),
]


def test_a_server_that_is_gone_is_named_and_found_again(server: RedisProcess) -> None:
    directory = opened(server)
    owned(directory)
    server.kill()
    for call in CALLS:
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{server.port}") as caught:
            call(directory)
        assert type(caught.value) is StoreUnavailable
        assert caught.value.retry_after_s == 1
    server.start()
    for call in CALLS:
        call(directory)
    directory.close()


def test_a_server_that_hangs_costs_one_timeout_and_is_found_again(server: RedisProcess) -> None:
    directory = opened(server, timeout_s=0.2)
    lease = owned(directory)
    produce(directory, lease, 0)
    server.pause()
    try:
        for call in (*CALLS, lambda d: d.seal(lease, 1)):
            with pytest.raises(StoreUnavailable, match=r"no answer within 0.2 s"):
                call(directory)
    finally:
        server.go_on()
    # What was asked while it hung may be done now, or not: both are whole.
    directory.seal(lease, 1)
    directory.commit(lease, 1, "d", "fp")
    assert directory.append_control("s1", "e", "p").chunk in (1, 2)
    assert len(directory.controls("s1")) == 1
    directory.close()


def test_a_server_that_is_not_there_cannot_be_opened() -> None:
    port = free_port()
    with pytest.raises(StoreUnavailable, match=f"{port}.*see to the server"):
        RedisDirectory(RedisServer(url=f"redis://127.0.0.1:{port}/0"), FakeClock())


def test_a_closed_directory_is_unavailable(server: RedisProcess) -> None:
    directory = opened(server)
    directory.close()
    for call in CALLS:
        with pytest.raises(StoreUnavailable, match="closed"):
            call(directory)


def test_closing_ends_calls_that_wait(server: RedisProcess) -> None:
    for _ in range(5):
        directory = opened(server, timeout_s=0.4)
        server.pause()
        errors: list[Exception] = []

        def ask(directory: RedisDirectory = directory, errors: list[Exception] = errors) -> None:
            try:
                directory.get("s1")
            except Exception as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.02)
        directory.close()
        asking.join(50)
        server.go_on()
        assert [type(e) for e in errors] == [StoreUnavailable]


def test_a_server_that_forgot_the_scripts_learns_them_again(server: RedisProcess) -> None:
    directory, store = opened(server), RedisSnapshots(RedisServer(url=server.url, timeout_s=10))
    lease = owned(directory)
    server.ask("SCRIPT", "FLUSH")
    assert list(directory.renew([lease, lease], ttl_s=1)) == []
    server.ask("SCRIPT", "FLUSH")
    produce(directory, lease, 0)
    store.put("s1", "p8", b"x")
    server.ask("SCRIPT", "FLUSH")
    store.delete("s1", "p8")
    assert directory.get("s1").next_index == 1
    directory.close()
    store.close()


def test_a_full_server_refuses_and_keeps_what_it_has(server: RedisProcess) -> None:
    directory, store = opened(server), RedisSnapshots(RedisServer(url=server.url, timeout_s=10))
    lease = owned(directory)
    produce(directory, lease, 0)
    store.put("s1", "kept", b"kept")
    directory.add_snapshot(lease, ref())
    server.ask("CONFIG", "SET", "maxmemory", "1")
    before = directory.get("s1")
    refused: list[Callable[[], object]] = [
        lambda: directory.append_control("s1", "e", "p"),
        lambda: directory.seal(lease, 1),
        lambda: directory.create(new("s2")),
        lambda: directory.claim("s1", "r2", expect_epoch=1, ttl_s=1),
        lambda: store.put("s1", "p8", b"x" * 3 * PIECE_BYTES),
    ]
    for call in refused:
        with pytest.raises(StoreFull, match="maxmemory"):
            call()
    assert list(directory.renew([lease], ttl_s=9)) == []
    assert directory.get("s1").lease_until > before.lease_until
    assert list(directory.controls("s1")) == []
    assert store.get("s1", "kept") == b"kept"
    directory.drop_snapshot("s1", "p8")
    store.delete_session("s1")
    server.ask("CONFIG", "SET", "maxmemory", "0")
    directory.seal(lease, 1)
    assert directory.append_control("s1", "e", "p").chunk == 2
    assert [r.id for r in directory.list()] == ["s1"]
    directory.close()
    store.close()


def test_a_log_that_cannot_be_written_is_a_full_disk(server: RedisProcess) -> None:
    directory = opened(server)
    meaning = directory._link._meaning
    error = ValueError("MISCONF Errors writing to the AOF file: No space left on device")
    assert isinstance(meaning(error), StoreFull)
    assert "free disk space" in meaning(error).message
    directory.close()


# -- who we are


def test_wrong_credentials_are_refused_without_telling_them(tmp_path: Path) -> None:
    server = RedisProcess(tmp_path, requirepass="right-secret").start()
    try:
        for password in (None, "wrong-secret"):
            there = RedisServer(url=server.url, password=password)
            with pytest.raises(StoreUnavailable, match=r"check storage\.redis\.username") as caught:
                RedisDirectory(there, FakeClock())
            assert f"127.0.0.1:{server.port}" in caught.value.message
            assert "secret" not in caught.value.message
            assert "secret" not in repr(there)
        right = RedisServer(url=server.url, password="right-secret")
        RedisDirectory(right, FakeClock()).close()
    finally:
        server.kill()


def test_a_user_with_the_documented_rights_can_do_everything(server: RedisProcess) -> None:
    rights = ["reset", "on", ">pw", "~ours:*", *RIGHTS.split()]
    assert server.ask("ACL", "SETUSER", "echo", *rights) == b"+OK\r\n"
    there = RedisServer(url=server.url, username="echo", password="pw")
    directory = RedisDirectory(there, FakeClock(), prefix="ours")
    store = RedisSnapshots(there, prefix="ours")
    lease = owned(directory)
    produce(directory, lease, 0)
    directory.append_control("s1", "e", "p")
    directory.append_control("s1", "e", "p")
    assert directory.digests("s1", 0, 1) == {0: "digest-0"}
    directory.add_snapshot(lease, ref())
    directory.pin_snapshot("s1", "p8")
    assert [len(directory.snapshots("s1")), len(directory.controls("s1"))] == [1, 1]
    directory.renew([lease], ttl_s=1)
    directory.put_replica(replica := _replica(), ttl_s=5)
    assert [r.id for r in directory.replicas()] == [replica.id]
    assert [r.id for r in directory.replicas(among=1)] == [replica.id]
    directory.remove_replica(replica.id)
    directory.release(lease, state="live")
    store.put("s1", "p8", b"x")
    store.put("s1", "p8", b"y")
    assert store.get("s1", "p8") == b"y"
    store.delete_session("s1")
    assert len(directory.list()) == directory.count_open() == 1
    assert directory.orphans() == []
    directory.delete("s1")
    with pytest.raises(StoreUnavailable, match=r"rights in docs/operations\.md"):
        RedisSnapshots(there, prefix="theirs").put("s1", "p8", b"x")
    server.ask("ACL", "SETUSER", "echo", "-info")
    with pytest.raises(StoreUnavailable, match=r"info.*rights"):
        RedisDirectory(there, FakeClock(), prefix="ours")
    directory.close()


# -- a server that cannot keep the promise


@pytest.mark.parametrize(
    ("options", "durability", "told"),
    [
        ({"appendonly": "no"}, "always", "appendonly yes"),
        ({"appendonly": "no"}, "everysec", "appendonly yes"),
        ({"appendfsync": "everysec"}, "always", "appendfsync always"),
        ({"maxmemory_policy": "allkeys-lru"}, "memory", "noeviction"),
        ({"cluster_enabled": "yes"}, "always", "Redis Cluster"),
    ],
)
def test_such_a_server_is_refused_with_a_remedy(
    tmp_path: Path, options: dict[str, str], durability: str, told: str
) -> None:
    if "cluster_enabled" in options:
        options = options | {"cluster_port": str(free_port())}
    server = RedisProcess(tmp_path, **options).start()
    try:
        with pytest.raises(ConfigError, match=told) as caught:
            opened(server, durability=durability)
        assert server.url in caught.value.message
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("version", "durability", "accepted"),
    [("6.2.5", "always", False), ("7.0.15", "always", True), ("7.0.15", "everysec", False)],
)
def test_an_old_server_is_refused(version: str, durability: str, accepted: bool) -> None:
    class Old:
        address = "redis://old"

        def run(self, *commands: tuple[object, ...]) -> list[object]:
            if commands[0][0] == "CONFIG":
                return [[b"appendfsync", b"always"]]
            return [f"redis_version:{version}\r\naof_enabled:1\r\n".encode()]

    if accepted:
        redis_durability.check_server(Old(), durability)  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match=rf"Redis {version} is too old"):
        redis_durability.check_server(Old(), durability)  # type: ignore[arg-type]


def test_what_can_be_lost_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = RedisProcess(tmp_path, appendonly="no").start()
    try:
        for _ in range(2):
            opened(server, durability="memory").close()
        (record,) = [r for r in caplog.records if server.url in r.message]
        assert "accepted events since its last save are lost" in record.message
    finally:
        server.kill()


def test_a_replica_must_have_the_change_and_is_no_primary(
    server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = opened(server, replicas=1, timeout_s=50.0)
    with monkeypatch.context() as patch:
        patch.setattr(redis_durability, "FSYNC_WAIT_S", 0.2)
        with pytest.raises(StoreUnavailable, match="only on 0 of 1 replicas"):
            directory.create(new())
    monkeypatch.setattr(redis_durability, "FSYNC_WAIT_S", 40.0)
    server.ask("CONFIG", "SET", "repl-diskless-sync-delay", 0)
    second = RedisProcess(tmp_path / "second", replicaof=f"127.0.0.1 {server.port}").start()
    try:
        deadline = time.monotonic() + 50
        while b"state=online" not in server.ask("INFO", "replication"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lease = directory.claim("s1", "r1", expect_epoch=0, ttl_s=1)
        produce(directory, lease, 0)
        assert b"next_index" in second.ask("HGETALL", "echo:s:{s1}:session")
        on_second = opened(second)
        with pytest.raises(StoreUnavailable, match="name the primary"):
            on_second.create(new("s2"))
        on_second.close()
    finally:
        second.kill()
    directory.close()


# -- nonsense in the keys

NONSENSE: dict[str, tuple[list[object], Callable[[RedisDirectory], object]]] = {
    "kind": (["SET", "echo:s:{s1}:session", "x"], lambda d: d.get("s1")),
    "json": (["HSET", "echo:s:{s1}:session", "epoch", "{"], lambda d: d.list()),
    "state": (["HSET", "echo:s:{s1}:session", "state", '"asleep"'], lambda d: d.get("s1")),
    "clip": (["HSET", "echo:s:{s1}:session", "clip", "7"], lambda d: d.get("s1")),
    "field": (["HDEL", "echo:s:{s1}:session", "version"], lambda d: d.get("s1")),
    "entry": (["ZADD", "echo:s:{s1}:log", 9, "x"], lambda d: d.controls("s1")),
    "log kind": (["SET", "echo:s:{s1}:log", "x"], lambda d: d.append_control("s1", "n", "p")),
    "event": (
        ["HSET", "echo:s:{s1}:events", "lost", "5"],
        lambda d: d.append_control("s1", "lost", "p"),
    ),
    "number": (
        ["HSET", "echo:s:{s1}:events", "odd", "x"],
        lambda d: d.append_control("s1", "odd", "p"),
    ),
    "snapshot": (["HSET", "echo:s:{s1}:snapshots", "p", "{}"], lambda d: d.snapshots("s1")),
    "pin": (["HSET", "echo:s:{s1}:snapshots", "p", "7"], lambda d: d.pin_snapshot("s1", "p")),
    "replica": (["SET", "echo:r:{live}:at:r1", "[]"], lambda d: d.replicas()),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_key_that_makes_no_sense_is_damage(server: RedisProcess, name: str) -> None:
    directory = opened(server)
    lease = owned(directory)
    produce(directory, lease, 0)
    directory.put_replica(_replica(), ttl_s=60)
    directory.create(new("s2"))
    words, call = NONSENSE[name]
    if words[0] == "SET":
        server.ask("DEL", words[1])
    server.ask(*words)
    with pytest.raises(StoreCorrupt, match="backup"):
        call(directory)
    assert directory.get("s2").id == "s2"
    if name == "log kind":
        assert server.ask("HGET", "echo:s:{s1}:session", "appended") == b"$1\r\n0\r\n"
        assert server.ask("EXISTS", "echo:s:{s1}:events") == b":0\r\n"
    directory.close()


def test_fields_of_a_newer_release_are_left_alone(server: RedisProcess) -> None:
    directory = opened(server)
    lease = owned(directory)
    directory.put_replica(_replica(), ttl_s=60)
    server.ask("HSET", "echo:s:{s1}:session", "mood", '"good"')
    server.ask(
        "SET",
        "echo:r:{live}:at:r1",
        '{"id": "r1", "node_id": "n", "pid": 1, "address": "a", "sessions": [], "mood": 1, '
        '"alive_until": 9e99}',
    )
    produce(directory, lease, 0)
    assert [r.address for r in directory.replicas()] == ["a"]
    assert server.ask("HGET", "echo:s:{s1}:session", "mood") == b'$6\r\n"good"\r\n'
    directory.close()


def test_dead_replicas_vanish_from_the_server(server: RedisProcess) -> None:
    clock = FakeClock()
    directory = RedisDirectory(RedisServer(url=server.url, timeout_s=10), clock)
    go_by(directory, clock)
    directory.put_replica(_replica("r1"), ttl_s=2)
    for key in ("echo:r:{live}:at:r1", "echo:r:{live}:until"):
        assert 10_000 < int(server.ask("PTTL", key)[1:]) <= 62_000
    clock.advance(70)
    directory.put_replica(_replica("r2"), ttl_s=2)
    assert server.ask("ZRANGE", "echo:r:{live}:until", 0, -1) == b"*1\r\n$2\r\nr2\r\n"
    directory.close()


# -- blobs


def test_a_blob_in_pieces_leaves_nothing_behind(server: RedisProcess) -> None:
    store = RedisSnapshots(RedisServer(url=server.url, timeout_s=10))
    for size in (0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES):
        blob = bytes(n % 251 for n in range(size))
        store.put("s1", "p8", blob)
        assert store.get("s1", "p8") == blob
        pieces = -(-size // PIECE_BYTES)
        assert server.ask("DBSIZE") == b":%d\r\n" % (2 + pieces)
    store.put("s1", "p16", b"x")
    store.delete("s1", "p8")
    assert server.ask("DBSIZE") == b":3\r\n"
    store.delete_session("s1")
    assert server.ask("DBSIZE") == b":0\r\n"
    store.close()


def test_blobs_are_listed_with_the_time_by_the_servers_clock(server: RedisProcess) -> None:
    store = RedisSnapshots(RedisServer(url=server.url, timeout_s=10))
    began = time.time()
    for session, id_ in (("s1", "p8"), ("s1", "p16"), ("s2", "p8")):
        store.put(session, id_, id_.encode())
    listed = {(b.session_id, b.snapshot_id, b.size_bytes) for b in store.list_blobs()}
    assert listed == {("s1", "p8", 2), ("s1", "p16", 3), ("s2", "p8", 2)}
    assert all(began - 1 <= b.stored_at <= time.time() + 1 for b in store.list_blobs())
    assert [b.snapshot_id for b in store.list_blobs("s2")] == ["p8"]
    assert list(store.list_blobs("ghost")) == []
    with pytest.raises(EchoError, match="not allowed"):
        list(store.list_blobs("../s"))
    store.delete("s1", "p8")
    store.delete_session("s2")
    assert [b.snapshot_id for b in store.list_blobs()] == ["p16"]
    store.close()


def test_a_blob_that_lacks_a_piece_is_damage(server: RedisProcess) -> None:
    store = RedisSnapshots(RedisServer(url=server.url, timeout_s=10))
    store.put("s1", "p8", b"x" * 2 * PIECE_BYTES)
    (key,) = [k for k in server.ask("KEYS", "*piece*:1").split(b"\r\n") if k.startswith(b"echo")]
    server.ask("DEL", key.decode())
    with pytest.raises(StoreCorrupt, match="lacks bytes"):
        store.get("s1", "p8")
    server.ask("HSET", "echo:s:{s1}:blobs", "p8", "{}")
    with pytest.raises(StoreCorrupt, match="table of blobs"):
        store.get("s1", "p8")
    store.close()


def test_a_blob_that_took_too_long_is_not_entered(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisSnapshots(RedisServer(url=server.url, timeout_s=10))
    store.put("s1", "p8", b"old")
    run = store._link.run

    def expired(*commands: tuple[object, ...], **named: object) -> list[object]:
        if commands[0][0] == "EVALSHA":
            for key in commands[0][4:5]:
                server.ask("DEL", key)
        return run(*commands, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(store._link, "run", expired)
        with pytest.raises(StoreUnavailable, match="took more than 600 s"):
            store.put("s1", "p8", b"new")
    assert store.get("s1", "p8") == b"old"
    store.close()


# -- configuration


def section(**redis: object) -> StorageSection:
    return StorageSection(backend="redis", redis=RedisSection(**redis))  # type: ignore[arg-type]


def test_the_password_comes_from_where_the_configuration_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisProcess(tmp_path / "redis", requirepass="hidden").start()
    file = tmp_path / "password"
    file.write_text("hidden\n")
    monkeypatch.setenv("ECHO_REDIS", "hidden")
    try:
        for source in ({"password_env": "ECHO_REDIS"}, {"password_file": str(file)}):
            config = section(url=server.url, **source)
            assert "hidden" not in repr(config)
            open_directory(config, FakeClock()).close()
            store = open_snapshots(config)
            assert isinstance(store, RedisSnapshots)
            store.put("s1", "p8", b"x")
            store.close()
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"password_env": "NOBODY_SET_THIS"}, "NOBODY_SET_THIS"),
        ({"password_file": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_a_password_that_is_not_there_is_told(source: dict[str, str], told: str) -> None:
    for open_it in (lambda c: open_directory(c, FakeClock()), open_snapshots):
        with pytest.raises(ConfigError, match=told):
            open_it(section(**source))


def test_an_address_with_a_password_is_refused_without_telling_it() -> None:
    for url in ("redis://:hidden@h:6379/0", "redis://u:hidden@h", "hidden", "unix:///hidden"):
        with pytest.raises(ConfigError, match=r"storage\.redis\.username") as caught:
            RedisSection(url=url)
        assert "hidden" not in caught.value.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"durability": "sometimes"},
        {"prefix": "a b"},
        {"prefix": "{s}"},
        {"timeout_s": 0.0},
        {"replicas": -1},
        {"password_env": "A", "password_file": "b"},
        {"cert_file": "c.pem"},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"storage\.redis"):
        section(**wrong)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "echo_ray.storage.redis_link", None)
    with pytest.raises(ConfigError, match=r"pip install 'echo-ray\[cluster\]'"):
        open_directory(section(), FakeClock())


def test_ids_without_utf8_are_refused_in_any_place(server: RedisProcess) -> None:
    directory = opened(server)
    owned(directory)
    calls: list[Callable[[], object]] = [
        lambda: directory.get("\ud800"),
        lambda: directory.delete("\ud800"),
        lambda: directory.pin_snapshot("s1", "\ud800"),
        lambda: directory.remove_replica("\ud800"),
    ]
    for call in calls:
        with pytest.raises(EchoError, match="surrogate"):
            call()
    directory.close()
