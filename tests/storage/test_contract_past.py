"""What every session directory promises of a session that begins with a past."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeClock
from redis_server import RedisProcess, Wire
from stored import new, ref

from echo_ray.errors import (
    ChunkSealed,
    ConflictError,
    EventIdConflict,
    InvalidRequestError,
    SessionExists,
    SessionNotFound,
    StoreUnavailable,
)
from echo_ray.session.control_log import DIGESTS_KEPT
from echo_ray.session.forking import Past
from echo_ray.session.records import ClipRef, ControlEntry, OnIdle, Pace, SessionState
from echo_ray.storage import sqlite_rows
from echo_ray.storage.interface import Directory
from echo_ray.storage.local import LocalDirectory
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import RedisServer


def entry(id_: str, chunk: int, prompt: str = "blue") -> ControlEntry:
    return ControlEntry(event_id=id_, chunk=chunk, prompt=prompt)


RECORD = new(
    pace=Pace.MAX,
    on_idle=OnIdle.CONTINUE,
    labels={"team": "a"},
    clip=ClipRef(id="clip-1", sha256="ab" * 32, frames=21),
    created_at=12.25,
    next_index=20,
    sealed=20,
    fingerprint="fp",
)
PAST = Past(
    record=RECORD,
    controls=[entry("e2", 9), entry("e1", 3, "ein \N{SNOWMAN}"), entry("e0", 9), entry("e3", 20)],
    digests={n: f"digest-{n}" for n in range(4, 20)},
    snapshots=[ref("old", 16), ref("p8", 8, pinned=True), ref("new", 16)],
)


def test_it_is_there_as_it_was_given(directory: Directory) -> None:
    directory.restore(PAST)
    assert directory.get("s1") == RECORD
    assert list(directory.list()) == [RECORD]
    assert [e.event_id for e in directory.controls("s1")] == ["e1", "e2", "e0", "e3"]
    assert directory.controls("s1")[0].prompt == "ein \N{SNOWMAN}"
    assert directory.digests("s1", 0, 99) == PAST.digests
    assert [r.id for r in directory.snapshots("s1")] == ["new", "old", "p8"]
    assert directory.snapshots("s1")[2] == ref("p8", 8, pinned=True)


def test_it_goes_on_like_any_other(directory: Directory) -> None:
    directory.restore(PAST)
    lease = directory.claim("s1", "r1", expect_epoch=0, ttl_s=1.5)
    assert lease.epoch == 1
    with pytest.raises(ConflictError):
        directory.seal(lease, 19)
    assert directory.append_control("s1", "e3", "blue").chunk == 20
    assert directory.append_control("s1", "e4", "green").chunk == 20
    assert [e.event_id for e in directory.seal(lease, 20)] == ["e3", "e4"]
    with pytest.raises(ChunkSealed):
        directory.append_control("s1", "e5", "red", at_chunk=20)
    with pytest.raises(EventIdConflict):
        directory.append_control("s1", "e1", "another prompt")
    directory.commit(lease, 20, "digest-20", "fp")
    assert directory.get("s1").next_index == 21
    directory.add_snapshot(lease, ref("p16", 16))
    assert [r.id for r in directory.snapshots("s1")] == ["p16", "new", "old", "p8"]
    directory.drop_snapshot("s1", "old")
    with pytest.raises(ConflictError):
        directory.drop_snapshot("s1", "p8")
    directory.delete("s1")
    with pytest.raises(SessionNotFound):
        directory.digests("s1", 0, 9)


def test_it_may_stand_under_an_epoch_and_be_paused(directory: Directory) -> None:
    record = replace(RECORD, epoch=7, state=SessionState.PAUSED, sealed=21)
    directory.restore(replace(PAST, record=record))
    assert directory.get("s1") == record
    assert directory.claim("s1", "r1", expect_epoch=7, ttl_s=1).epoch == 8


def test_a_long_past_is_kept_whole(directory: Directory) -> None:
    end = 3 * DIGESTS_KEPT
    past = Past(
        record=replace(RECORD, next_index=end, sealed=end),
        controls=[entry(f"e{n}", n) for n in range(5000)],
        digests={n: f"digest-{n}" for n in range(end - DIGESTS_KEPT, end)},
        snapshots=[ref(f"p{n}", n) for n in range(1500)],
    )
    directory.restore(past)
    assert list(directory.controls("s1")) == past.controls
    assert directory.digests("s1", 0, end) == past.digests
    assert len(directory.snapshots("s1")) == 1500
    lease = directory.claim("s1", "r1", expect_epoch=0, ttl_s=1.5)
    directory.seal(lease, end)
    directory.commit(lease, end, "last", "fp")
    kept = directory.digests("s1", 0, end + 1)
    assert sorted(kept) == list(range(end - DIGESTS_KEPT + 1, end + 1))


def test_a_taken_id_is_refused_and_its_session_untouched(directory: Directory) -> None:
    directory.create(new(prompt="first"))
    with pytest.raises(SessionExists, match="s1"):
        directory.restore(PAST)
    assert directory.get("s1").prompt == "first"
    assert list(directory.controls("s1")) == []
    assert directory.digests("s1", 0, 99) == {}
    assert list(directory.snapshots("s1")) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"record": replace(RECORD, owner="r1")},
        {"record": replace(RECORD, sealed=19)},
        {"record": replace(RECORD, prompt="\ud800")},
        {"controls": [entry("e1", 3), entry("e1", 4)]},
        {"controls": [entry("e1", -1)]},
        {"controls": [entry("e1", 2**53)]},
        {"controls": [entry("\ud800", 3)]},
        {"controls": [entry("e1", 3, "\ud800")]},
        {"digests": {20: "d"}},
        {"digests": {-1: "d"}},
        {"digests": {3: "\ud800"}},
        {"record": replace(RECORD, next_index=5000, sealed=5000), "digests": {903: "d"}},
        {"snapshots": [ref("p24", 24)]},
        {"snapshots": [ref("p8", 8, session="s2")]},
        {"snapshots": [ref("p8", 8), ref("p8", 4)]},
        {"snapshots": [ref("\ud800", 8)]},
    ],
)
def test_what_does_not_fit_together_is_refused(
    directory: Directory, wrong: dict[str, object]
) -> None:
    with pytest.raises(InvalidRequestError):
        directory.restore(replace(PAST, **wrong))  # type: ignore[arg-type]
    assert list(directory.list()) == []


def test_sqlite_keeps_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = LocalDirectory(tmp_path / "store.sqlite", FakeClock())

    def broken(_: object) -> str:
        raise sqlite3.OperationalError("the disk fails at the last write")

    with monkeypatch.context() as patched:
        patched.setattr(sqlite_rows, "snapshot_body", broken)
        with pytest.raises(StoreUnavailable):
            directory.restore(PAST)
    assert list(directory.list()) == []
    directory.restore(PAST)
    assert len(directory.controls("s1")) == 4
    directory.close()


CUTS: dict[str, Callable[[Wire], None]] = {
    "the answer": lambda wire: wire.lose_next_answer_to(b"EVALSHA"),
    "nothing": lambda wire: None,
}


@pytest.mark.parametrize("lost", CUTS)
def test_redis_makes_it_once_and_in_one_script(redis_server: RedisProcess, lost: str) -> None:
    wire = Wire(redis_server.port)
    there = RedisServer(url=f"redis://127.0.0.1:{wire.port}/0", timeout_s=5)
    directory = RedisDirectory(there, FakeClock(), prefix=f"past-{lost.split()[-1]}")
    calls = scripts(redis_server)
    CUTS[lost](wire)
    directory.restore(PAST)
    assert wire.lost == (lost != "nothing")
    # The one that was sent again found its own version and wrote nothing.
    assert scripts(redis_server) - calls == 1 + wire.lost
    assert len(directory.controls("s1")) == 4
    assert directory.get("s1") == RECORD
    directory.close()
    wire.close()


def scripts(server: RedisProcess) -> int:
    for line in server.ask("INFO", "commandstats").decode().splitlines():
        if line.startswith("cmdstat_evalsha:calls="):
            return int(line.split("=")[1].split(",")[0])
    return 0
