"""What was acknowledged is there after the server, or the connection to it, was killed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import FakeClock
from redis_server import RedisProcess, Wire
from replicas import eventually
from stored import new, owned, produce, ref

from echo_ray.errors import EchoError, Fenced, SessionNotFound, StoreUnavailable
from echo_ray.session.records import Lease, SessionState
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import RedisServer
from echo_ray.storage.redis_snapshots import PIECE_BYTES, RedisSnapshots

MODES = ["always", "everysec"]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(tmp_path: Path, mode: str) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path / "redis", appendfsync=mode).start()
    yield process
    process.kill()


def opened(port: int, mode: str = "always") -> RedisDirectory:
    there = RedisServer(url=f"redis://127.0.0.1:{port}/0", timeout_s=20)
    return RedisDirectory(there, FakeClock(), durability=mode)


def test_what_was_acknowledged_survives_a_killed_server(server: RedisProcess, mode: str) -> None:
    directory = opened(server.port, mode)
    lease = owned(directory)
    produce(directory, lease, 0)
    sealed = directory.append_control("s1", "before", "blue")
    assert list(directory.seal(lease, 1)) == [sealed]
    directory.add_snapshot(lease, ref())
    directory.pin_snapshot("s1", "p8")
    open_ = directory.append_control("s1", "after", "green")
    assert open_.chunk == 2
    server.kill()
    with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{server.port}"):
        directory.get("s1")
    server.start()
    record = directory.get("s1")
    assert (record.next_index, record.sealed, record.epoch) == (1, 2, 1)
    assert list(directory.controls("s1")) == [sealed, open_]
    assert list(directory.snapshots("s1")) == [ref(pinned=True)]
    assert list(directory.seal(lease, 1)) == [sealed]
    directory.commit(lease, 1, "digest-1", "fp")
    assert directory.digests("s1", 0, 9) == {0: "digest-0", 1: "digest-1"}
    directory.close()


@pytest.mark.parametrize("mode", ["always"], indirect=True)
def test_a_stream_whose_server_is_killed_again_and_again_loses_nothing(
    server: RedisProcess,
) -> None:
    directory, killer = opened(server.port), opened(server.port)
    lease = owned(directory)
    told: dict[str, int] = {}
    sealed: dict[int, list[str]] = {}
    made, over = [0], threading.Event()

    def speak() -> None:
        n = 0
        while not over.is_set():
            try:
                told[f"e{n}"] = killer.append_control("s1", f"e{n}", "p").chunk
            except EchoError:
                continue
            n += 1

    speaker = threading.Thread(target=speak)
    speaker.start()

    def kill_after(chunks: int, events: int) -> None:
        """In the middle of whatever comes next, once there is so much more."""
        assert eventually(lambda: made[0] >= chunks and len(told) >= events)
        server.kill()

    for crash in range(3):
        timer = threading.Thread(target=kill_after, args=(made[0] + 2, len(told) + 2))
        timer.start()
        while True:
            try:
                index = made[0]
                sealed[index] = [e.event_id for e in directory.seal(lease, index)]
                directory.commit(lease, index, f"d{index}", "fp")
                made[0] = index + 1
            except EchoError:
                break
        timer.join()
        server.start()
        record = directory.get("s1")
        assert made[0] <= record.next_index <= made[0] + 1, crash
        made[0] = record.next_index
    over.set()
    speaker.join(50)
    log = directory.controls("s1")
    for index in range(made[0]):
        assert sealed[index] == [e.event_id for e in log if e.chunk == index]
    assert told.items() <= {e.event_id: e.chunk for e in log}.items()
    assert len(told) > 3
    assert made[0] > 3
    directory.close()
    killer.close()


@pytest.mark.parametrize("mode", ["always"], indirect=True)
def test_a_crash_inside_create_loses_no_session_and_lists_no_ghost(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = opened(server.port)
    write = directory._sessions.write

    def killed_first(*args: object, **named: object) -> bool:
        server.kill()
        return write(*args, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(directory._sessions, "write", killed_first)
        with pytest.raises(StoreUnavailable):
            directory.create(new())
    server.start()
    assert server.ask("SISMEMBER", "echo:sessions", "s1") == b":1\r\n"
    assert list(directory.list()) == []
    with pytest.raises(SessionNotFound):
        directory.get("s1")
    directory.create(new())
    server.kill()
    server.start()
    assert [r.id for r in directory.list()] == ["s1"]
    # A crash inside delete, after the session and before its name.
    server.ask("DEL", "echo:s:{s1}:session")
    assert list(directory.list()) == []
    with pytest.raises(SessionNotFound):
        directory.delete("s1")
    assert server.ask("EXISTS", "echo:sessions") == b":0\r\n"
    directory.close()


def claimed(directory: RedisDirectory) -> None:
    lease = directory.claim("s1", "r2", expect_epoch=1, ttl_s=1)
    assert lease == Lease("s1", "r2", 2)


CHANGES: dict[str, Callable[[RedisDirectory, Lease], object]] = {
    "claim": lambda d, _: claimed(d),
    "seal": lambda d, lease: d.seal(lease, 1),
    "commit": lambda d, lease: (d.seal(lease, 1), d.commit(lease, 1, "d1", "fp")),
    "append": lambda d, _: d.append_control("s1", "e9", "blue"),
    "release": lambda d, lease: d.release(lease, state="paused"),
    "state": lambda d, _: d.set_state("s1", state="closed"),
    "snapshot": lambda d, lease: d.add_snapshot(lease, ref("p16", 16)),
    "pin": lambda d, _: d.pin_snapshot("s1", "p8"),
    "create": lambda d, _: d.create(new("s2")),
    "renew": lambda d, lease: d.renew([lease], ttl_s=1),
}


@pytest.mark.parametrize(
    ("mode", "name"),
    [*(("always", name) for name in CHANGES), ("everysec", "create"), ("everysec", "append")],
    indirect=["mode"],
)
def test_a_change_whose_answer_is_lost_is_made_once(
    server: RedisProcess, mode: str, name: str
) -> None:
    wire = Wire(server.port)
    directory = opened(wire.port, mode)
    lease = owned(directory)
    produce(directory, lease, 0)
    directory.add_snapshot(lease, ref())
    waited = waits(server)
    wire.lose_next_answer_to(b"EVALSHA")
    CHANGES[name](directory, lease)
    assert wire.lost == 1
    if mode == "everysec":
        # The second try wrote nothing to wait for, so a third write was made for that.
        assert waits(server) - waited == 3
    record = directory.get("s1")
    assert record.epoch <= 2
    assert len(directory.controls("s1")) == (name == "append")
    assert len(directory.list()) == 1 + (name == "create")
    directory.close()
    wire.close()


def waits(server: RedisProcess) -> int:
    for line in server.ask("INFO", "commandstats").decode().splitlines():
        if line.startswith("cmdstat_waitaof:calls="):
            return int(line.split("=")[1].split(",")[0])
    return 0


@pytest.mark.parametrize("mode", ["everysec"], indirect=True)
def test_who_is_told_waits_for_the_disk_and_chunks_do_not(server: RedisProcess) -> None:
    directory = opened(server.port, "everysec")
    lease = owned(directory)
    before = waits(server)
    produce(directory, lease, 0)
    directory.renew([lease], ttl_s=1)
    assert waits(server) == before
    directory.append_control("s1", "e1", "blue")
    assert waits(server) == before + 1
    # The first try may have been cut off before the disk had it.
    directory.append_control("s1", "e1", "blue")
    assert waits(server) == before + 2
    directory.close()


@pytest.mark.parametrize("mode", ["always"], indirect=True)
def test_a_claim_that_was_lost_with_the_log_fences_both_owners_apart(
    server: RedisProcess,
) -> None:
    """As if a crash had cut the claim off: the epoch is used again, by another owner."""
    directory = opened(server.port)
    owned(directory)
    lost = Lease("s1", "r2", 2)
    again = directory.claim("s1", "r3", expect_epoch=1, ttl_s=1)
    assert again.epoch == lost.epoch
    with pytest.raises(Fenced):
        directory.seal(lost, 0)
    assert directory.renew([lost], ttl_s=1) == [lost]
    directory.seal(again, 0)
    directory.close()


@pytest.mark.parametrize("mode", ["always"], indirect=True)
def test_blobs_survive_and_half_written_ones_vanish(
    server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisSnapshots(RedisServer(url=server.url))
    blob = bytes(range(256)) * (PIECE_BYTES // 256 * 2 + 3)
    store.put("s1", "kept", blob)
    run, left = store._link.run, [3]

    def dying(*commands: tuple[object, ...], **named: object) -> list[object]:
        left[0] -= 1
        if left[0] < 0:
            raise StoreUnavailable("the writer dies here")
        return run(*commands, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(store._link, "run", dying)
        with pytest.raises(StoreUnavailable):
            store.put("s1", "half", blob)
    server.kill()
    server.start()
    assert store.get("s1", "kept") == blob
    keys = [k for k in server.ask("KEYS", "*piece*").split(b"\r\n") if k.startswith(b"echo:")]
    expiries = sorted(server.ask("TTL", key.decode()) for key in keys)
    assert len(keys) == 5
    assert expiries.count(b":-1\r\n") == 3
    assert all(int(e[1:]) > 0 for e in expiries if e != b":-1\r\n")
    store.close()


@pytest.mark.parametrize("mode", ["always"], indirect=True)
def test_a_closed_session_stays_closed_over_a_crash(server: RedisProcess) -> None:
    directory = opened(server.port)
    owned(directory)
    directory.set_state("s1", state="closed")
    server.kill()
    server.start()
    assert directory.get("s1").state is SessionState.CLOSED
    directory.delete("s1")
    server.kill()
    server.start()
    assert list(directory.list()) == []
    directory.close()
