"""What a router does with its snapshot store: pins, pauses, clips, the sweep, the end."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeClock
from router_rig import CONFIG, Rig, eventually, run
from uploads import still

from echo_ray.config import StorageSection
from echo_ray.errors import StoreUnavailable
from echo_ray.serve.router_service import RouterService
from echo_ray.storage.memory import MemorySnapshots
from echo_ray.storage.tiered import TieredSnapshots

QUICK = replace(CONFIG, storage=StorageSection(sweep_s=0.05))
LONG_AGO = 1_700_000_000.0


class Durable(MemorySnapshots):
    down = False
    closed = 0

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        if self.down:
            raise StoreUnavailable("down, as told by a test", retry_after_s=1.0)
        super().put(session_id, snapshot_id, blob)

    def close(self) -> None:
        self.closed += 1


def tiered(rig: Rig) -> tuple[TieredSnapshots, Durable]:
    """Let the rig's routers keep snapshots in two tiers, the hot one being the rig's."""
    durable = Durable()
    store = TieredSnapshots(rig.snapshots, durable, durable_every=1000)
    rig.snapshots = store  # type: ignore[assignment]
    return store, durable


async def with_two_snapshots(rig: Rig, store: TieredSnapshots) -> str:
    """A session whose first snapshot is durable already and whose second is not."""
    fake = rig.replica("a")
    rig.router()
    sid = await rig.create()
    async with rig.watch(sid, "&from=0") as viewer:
        await viewer.until(9)
        for index in (4, 8):
            store.put(sid, fake.snapshot(sid, index).id, b"state")
    store.pay()
    return sid


def held(durable: Durable) -> set[str]:
    return {blob.snapshot_id for blob in durable.list_blobs()}


def telemetry(rig: Rig, series: str, **labels: str) -> float:
    return rig.routers[0].front.telemetry.value(series, **labels)


def test_a_pinned_snapshot_is_durable_before_it_is_answered() -> None:
    async def test(rig: Rig) -> None:
        store, durable = tiered(rig)
        path = f"/v1/sessions/{await with_two_snapshots(rig, store)}/snapshots"
        assert held(durable) == {"snap-4"}
        assert (await rig.call("POST", path)).status_code == 201
        assert held(durable) == {"snap-4", "snap-8"}

    run(test)


def test_a_pin_that_cannot_be_durable_now_says_so_and_stays() -> None:
    async def test(rig: Rig) -> None:
        store, durable = tiered(rig)
        path = f"/v1/sessions/{await with_two_snapshots(rig, store)}/snapshots"
        durable.down = True
        answer = await rig.call("POST", path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert (await rig.call("GET", path)).json()["snapshots"][0]["pinned"] is True
        assert store.debt() == 1
        durable.down = False
        assert (await rig.call("POST", path)).status_code == 201
        assert held(durable) == {"snap-4", "snap-8"}

    run(test)


def test_a_pause_lets_the_newest_snapshot_become_durable_and_waits_for_nothing() -> None:
    async def test(rig: Rig) -> None:
        store, durable = tiered(rig)
        sid = await with_two_snapshots(rig, store)
        durable.down = True
        assert (await rig.call("POST", f"/v1/sessions/{sid}/pause")).status_code == 200
        assert store.debt() == 1
        assert telemetry(rig, "echo_ray_store_errors_total", op="durable") == 0
        await eventually(lambda: telemetry(rig, "echo_ray_snapshot_debt") == 1)
        durable.down = False
        assert store.pay() == 0
        assert held(durable) == {"snap-4", "snap-8"}
        event = {"event": "paid"}
        await eventually(lambda: telemetry(rig, "echo_ray_snapshot_tier_events_total", **event) > 0)

    run(test)


def test_a_pause_stands_when_its_snapshots_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        store, _ = tiered(rig)
        sid = await with_two_snapshots(rig, store)

        def fail(session_id: str) -> None:
            raise StoreUnavailable("gone for now")

        monkeypatch.setattr(rig.directory, "snapshots", fail)
        answer = await rig.call("POST", f"/v1/sessions/{sid}/pause")
        assert (answer.status_code, answer.json()["state"]) == (200, "paused")
        assert telemetry(rig, "echo_ray_store_errors_total", op="durable") == 1

    run(test)


WISH = ("session", (None, json.dumps({"prompt": "red", "seed": 7, "pace": "max"})))


def test_a_clip_is_durable_before_its_session_exists() -> None:
    async def test(rig: Rig) -> None:
        _, durable = tiered(rig)
        rig.replica("a")
        rig.router()
        files: Any = [WISH, ("clip", ("a.png", still()))]
        answer = await rig.http.post(rig.url("/v1/sessions"), files=files)
        assert answer.status_code == 201, answer.text
        clip = rig.directory.get(answer.json()["id"]).clip
        assert clip is not None
        assert held(durable) == {clip.id}

    run(test)


def test_a_clip_that_cannot_be_durable_is_refused_and_leaves_nothing() -> None:
    async def test(rig: Rig) -> None:
        store, durable = tiered(rig)
        durable.down = True
        rig.replica("a")
        rig.router()
        files: Any = [WISH, ("clip", ("a.png", still()))]
        answer = await rig.http.post(rig.url("/v1/sessions"), files=files)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert not rig.directory.list()
        assert not list(store.list_blobs())
        assert store.debt() == 0

    run(test)


def test_a_router_that_stops_closes_its_store() -> None:
    async def test(rig: Rig) -> None:
        _, durable = tiered(rig)
        rig.router()
        await rig.routers.pop().stop()
        assert durable.closed == 1

    run(test)


async def with_an_orphan(rig: Rig) -> str:
    """A session, and a blob of it that nothing names and that is older than any writer."""
    rig.snapshots = MemorySnapshots(clock=FakeClock(LONG_AGO))
    rig.replica("a")
    rig.router()
    sid = await rig.create()
    rig.snapshots.put(sid, "p4", b"of a writer that died")
    rig.snapshots.put(sid, "p8", b"the newest, kept in case")
    return sid


def test_blobs_that_nothing_names_are_swept() -> None:
    async def test(rig: Rig) -> None:
        sid = await with_an_orphan(rig)
        await eventually(lambda: [b.snapshot_id for b in rig.snapshots.list_blobs(sid)] == ["p8"])
        rig.routers[0].check()

    run(test, QUICK)


def test_a_sweep_that_fails_is_counted_and_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        sid = await with_an_orphan(rig)
        listing = rig.snapshots.list_blobs
        failures: list[Exception] = [StoreUnavailable("gone for now"), ValueError("unforeseen")]

        def fail(session_id: str | None = None) -> Any:
            if failures:
                raise failures.pop()
            return listing(session_id)

        monkeypatch.setattr(rig.snapshots, "list_blobs", fail)
        await eventually(lambda: len(list(listing(sid))) == 1)
        assert telemetry(rig, "echo_ray_store_errors_total", op="sweep") == 2
        rig.routers[0].check()

    run(test, QUICK)


def test_a_router_sweeps_once_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = []
    most: list[int] = []

    def slow(*_: Any) -> dict[str, Any]:
        under_way.append(1)
        most.append(len(under_way))
        threading.Event().wait(0.01)
        under_way.pop()
        return {}

    async def test(rig: Rig) -> None:
        monkeypatch.setattr("echo_ray.serve.sweep.sweep", slow)
        rig.router()
        await eventually(lambda: len(most) >= 4)
        assert set(most) == {1}

    run(test, replace(CONFIG, storage=StorageSection(sweep_s=0.001)))


def test_no_sweep_where_there_is_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        called: list[object] = []
        monkeypatch.setattr("echo_ray.serve.sweep.sweep", lambda *a: called.append(a) or {})
        service: RouterService = rig.router()
        await asyncio.sleep(0.1)
        assert called == []
        service.check()

    run(test, replace(CONFIG, storage=StorageSection(sweep_s=0)))
