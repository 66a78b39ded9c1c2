"""What every session directory promises of tenants and their quotas."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeClock
from stored import new

from echo_ray.errors import QuotaExceeded
from echo_ray.session import restoring
from echo_ray.session.access import CREATE_WINDOW_S, Quota
from echo_ray.session.forking import Past
from echo_ray.session.records import Pace, SessionState
from echo_ray.storage import redis_rows, sqlite_rows
from echo_ray.storage.interface import Directory
from echo_ray.storage.redis_directory import RedisDirectory


def create(directory: Directory, id_: str, tenant: str = "acme", **quota: int) -> None:
    directory.create(new(id_, tenant=tenant), quota=Quota(**quota))


def refused(directory: Directory, param: str, tenant: str = "acme", **quota: int) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        create(directory, "one too many", tenant, **quota)
    assert caught.value.param == param
    assert "one too many" not in {r.id for r in directory.list()}
    return caught.value


def test_a_session_keeps_its_tenant(directory: Directory) -> None:
    directory.create(new("a", tenant="acme"))
    directory.create(new("b"))
    assert directory.get("a").tenant == "acme"
    assert directory.get("b").tenant == ""
    directory.claim("a", "r1", expect_epoch=0, ttl_s=1.0)
    directory.set_state("a", state="paused")
    assert {r.id: r.tenant for r in directory.list()} == {"a": "acme", "b": ""}


def test_open_sessions_of_one_tenant_are_limited(directory: Directory) -> None:
    create(directory, "a", sessions=2)
    create(directory, "b", sessions=2)
    error = refused(directory, "sessions", sessions=2)
    assert "2 sessions are open" in error.message
    create(directory, "other", "initech", sessions=2)
    refused(directory, "sessions", sessions=0)


@pytest.mark.parametrize("how", ["closed", "deleted", "released"])
def test_who_is_closed_or_gone_makes_room_at_once(directory: Directory, how: str) -> None:
    create(directory, "a", sessions=1)
    if how == "closed":
        directory.set_state("a", state="closed")
    elif how == "deleted":
        directory.delete("a")
    else:
        directory.release(directory.claim("a", "r", expect_epoch=0, ttl_s=1), state="closed")
    create(directory, "b", sessions=1)
    refused(directory, "sessions", sessions=1)


def test_a_paused_session_counts(directory: Directory) -> None:
    create(directory, "a", realtime=1)
    directory.set_state("a", state="paused")
    refused(directory, "realtime_sessions", realtime=1)


def test_only_realtime_sessions_take_a_gpu_slot(directory: Directory) -> None:
    fast = new("fast", tenant="acme", pace=Pace.MAX)
    directory.create(fast, quota=Quota(realtime=1))
    create(directory, "a", realtime=1)
    refused(directory, "realtime_sessions", realtime=1)
    directory.create(replace(fast, id="faster"), quota=Quota(realtime=1))
    directory.delete("a")
    create(directory, "b", realtime=1)


def test_the_rate_of_creations_is_limited_deleted_or_not(
    directory: Directory, clock: FakeClock
) -> None:
    create(directory, "a", creates=2)
    directory.delete("a")
    clock.advance(20)
    create(directory, "b", creates=2)
    error = refused(directory, "creates_per_minute", creates=2)
    assert error.retry_after_s == pytest.approx(CREATE_WINDOW_S - 20, abs=0.2)
    create(directory, "other", "initech", creates=1)
    clock.advance(CREATE_WINDOW_S - 20 + 0.1)
    create(directory, "c", creates=2)
    refused(directory, "creates_per_minute", creates=2)


def test_a_session_with_a_past_counts_and_a_closed_one_does_not(directory: Directory) -> None:
    past = Past(record=new("fork", tenant="acme", next_index=3, sealed=3))
    directory.restore(past, quota=Quota(sessions=1))
    refused(directory, "sessions", sessions=1)
    over = Past(record=new("over", tenant="acme"))
    with pytest.raises(QuotaExceeded):
        directory.restore(over, quota=Quota(sessions=1))
    directory.restore(over)
    ended = new("ended", tenant="initech", state=SessionState.CLOSED)
    directory.restore(Past(record=ended))
    create(directory, "first", "initech", sessions=1)


def test_no_quota_is_overrun_however_many_create_at_once(directory: Directory) -> None:
    made: list[str] = []
    turned_away: list[str] = []

    def several(name: str) -> None:
        for n in range(4):
            try:
                create(directory, f"{name}{n}", sessions=5, creates=100)
                made.append(name)
            except QuotaExceeded:
                turned_away.append(name)

    threads = [threading.Thread(target=several, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(turned_away)) == (5, 11)
    assert directory.count_open() == 5


def test_names_without_a_session_are_found_when_the_quota_is_full(
    directory: Directory, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(directory, RedisDirectory):
        pytest.skip("others count in the transaction that adds the session")

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directory._sessions, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            create(directory, "half", sessions=1)
    refused(directory, "sessions", sessions=1)
    clock.advance(61)
    create(directory, "a", sessions=1)
    # One that was closed by a process that died before it said so.
    monkeypatch.setattr(directory._open, "follow", lambda *_: None)
    directory.set_state("a", state="closed")
    create(directory, "b", sessions=1)


def test_a_past_keeps_the_tenant_and_one_of_an_older_release_has_none() -> None:
    for tenant in ("acme", ""):
        blob = restoring.encode(Past(record=new(tenant=tenant)))
        assert (b"tenant" in blob) == bool(tenant)
        past = restoring.decode(blob, store="s3", limit_bytes=2**20)
        assert past.record.tenant == tenant


def test_rows_of_older_releases_have_no_tenant() -> None:
    fields = redis_rows.session_fields(new(tenant="acme"))
    del fields["tenant"]
    pairs = {**fields, "seq": "1", "appended": "0", "recorded": "0", "version": "v"}
    reply = [part.encode() for pair in pairs.items() for part in pair]
    stored = redis_rows.stored_from(reply)
    assert stored is not None
    assert stored.record.tenant == ""
    row = list(sqlite_rows.session_values(new(tenant="acme")))
    row[2] = row[2].replace(', "tenant": "acme"', "")
    assert "tenant" not in row[2]
    assert sqlite_rows.session_from((1, *row))[1].tenant == ""
