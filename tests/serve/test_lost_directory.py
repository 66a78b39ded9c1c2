"""A router whose directory was lost: it fills it again; viewers may be ahead of what came back."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest
from router_rig import Rig, eventually, run
from stored import new

from echo_ray.errors import ArchiveCorrupt, StoreUnavailable
from echo_ray.serve import restorer as errand
from echo_ray.session.forking import Past
from echo_ray.session.records import Pace
from echo_ray.session.restoring import AHEAD_CHUNKS, RAISED
from echo_ray.storage.restore import Report


def back(rig: Rig, next_index: int, **changes: Any) -> str:
    """A session as it is when it has just been brought back."""
    record = new(model="fake", prompt="red", pace=Pace.MAX, epoch=RAISED, **changes)
    record = replace(record, next_index=next_index, sealed=next_index)
    rig.directory.restore(Past(record=record))
    return record.id


def test_a_viewer_that_is_ahead_waits_for_its_next_index() -> None:
    async def test(rig: Rig) -> None:
        fake = rig.replica("a")
        rig.router()
        sid = back(rig, 3)
        async with rig.watch(sid, "&from=9") as ahead:
            await ahead.until(12)
            ahead.check(9)
            # It lies before what this router keeps, and is made again for whoever asks.
            async with rig.watch(sid, "&from=3") as behind:
                await behind.until(12)
                behind.check(3)
        assert fake.pulls[0] == (sid, "raw", 3)

    run(test)


def test_viewers_that_stay_go_on_where_they_were() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(6)
            seen = rig.directory.get(sid)
            past = replace(seen, owner=None, lease_until=0.0, epoch=RAISED, next_index=4, sealed=4)
            rig.directory._sessions[sid].record = past
            await viewer.until(15)
            viewer.check(0)
            epochs = [metadata["epoch"] for metadata, _ in viewer.segments]
            assert epochs[0] == 1
            assert epochs[-1] == RAISED + 1

    run(test)


@pytest.mark.parametrize(
    ("start", "epoch"), [(3 + AHEAD_CHUNKS + 1, RAISED), (4, 5), (10**15, RAISED)]
)
def test_a_foreign_index_is_refused(start: int, epoch: int) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        record = new(model="fake", epoch=epoch, next_index=3, sealed=3)
        rig.directory.restore(Past(record=record))
        async with rig.watch("s1", f"&from={start}") as viewer:
            assert await viewer.until_closed() == 1008
            assert viewer.messages[-1]["code"] == "segment_beyond_end"

    run(test)


class Errand:
    """A restorer that does what it is told."""

    def __init__(self, *outcomes: Report | StoreUnavailable) -> None:
        self.outcomes = list(outcomes)
        self.looks = 0
        self.closed = False

    def lost(self) -> bool:
        self.looks += 1
        return bool(self.outcomes)

    def restore_all(self) -> Report:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome

    def close(self) -> None:
        self.closed = True


def test_a_router_looks_and_tries_until_everything_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = Report(brought_back=["s1"], there=["s2"], refused={"s3": ArchiveCorrupt("damaged")})
    restorer = Errand(StoreUnavailable("S3 is down"), report)
    opened: list[object] = [StoreUnavailable("Redis is down"), restorer]

    def open_restorer(*_: object) -> object:
        found = opened.pop(0)
        if isinstance(found, StoreUnavailable):
            raise found
        return found

    async def test(rig: Rig) -> None:
        router = rig.router()
        await eventually(lambda: restorer.looks >= 4)
        failed = router.front.telemetry.value("echo_ray_store_errors_total", op="restore")
        assert failed == 2
        restored = router.front.telemetry.value
        assert restored("echo_ray_sessions_restored_total", outcome="ok") == 1
        assert restored("echo_ray_sessions_restored_total", outcome="refused") == 1
        await router.stop()
        assert restorer.closed
        rig.routers.clear()

    monkeypatch.setattr(errand, "LOOK_S", 0.01)
    monkeypatch.setattr(errand, "open_restorer", open_restorer)
    with caplog.at_level(logging.INFO):
        run(test)
    told = {r.getMessage(): getattr(r, "fields", {}) for r in caplog.records}
    assert told["session_not_restored"] == {"session": "s3", "reason": "damaged"}
    assert told["directory_restored"] == {"brought_back": 1, "there": 1, "refused": 1}


def test_without_a_store_that_outlives_the_directory_nothing_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def open_restorer(*what: object) -> None:
        asked.append(what)

    async def test(rig: Rig) -> None:
        router = rig.router()
        await eventually(lambda: asked)
        await asyncio.sleep(0.1)
        assert len(asked) == 1
        router.check()

    monkeypatch.setattr(errand, "LOOK_S", 0.001)
    monkeypatch.setattr(errand, "open_restorer", open_restorer)
    run(test)
