"""Metrics move when what they measure happens, in replicas and routers that run."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path

import pytest
from fake_replica import SHAPE
from fakes import FakeClock, FakeEngine
from replicas import Replicas, Unreliable, eventually, hello, pull, watch
from router_rig import Rig, run
from router_rig import eventually as soon

from echo_ray.errors import ConfigError, SnapshotNotFound, StoreUnavailable
from echo_ray.serve.accounts import tell_store_calls
from echo_ray.serve.stream_accounts import StreamAccounts
from echo_ray.serve.sweep import sweep_once
from echo_ray.serve.telemetry import BOTH, REPLICAS, ROUTERS, TABLE, Telemetry
from echo_ray.session.chunk import DriftReading
from echo_ray.session.records import OnIdle, Pace
from echo_ray.storage.memory import MemorySnapshots
from echo_ray.storage.timed import TimedSnapshots

SERVE = Path(__file__).parents[2] / "echo_ray" / "serve"


def test_every_row_of_the_table_is_set_somewhere():
    sources = "\n".join(f.read_text() for f in SERVE.glob("*.py"))
    setters = r"\.(count|set|observe)\(\s*\"([a-z_]+)\""
    assert {name for _, name in re.findall(setters, sources)} >= {spec.name for spec in TABLE}


def test_a_row_is_where_somebody_sets_it_and_known_series_begin_at_zero():
    router, replica = Telemetry(ROUTERS + BOTH), Telemetry(REPLICAS + BOTH)
    assert "echo_ray_playout_slack_seconds" not in router.render().decode()
    assert "echo_ray_sessions_open" not in replica.render().decode()
    assert 'echo_ray_chunks_total{on_time="false"} 0.0' in replica.render().decode()
    assert 'echo_ray_failovers_total{cause="silent"} 0.0' in router.render().decode()
    with pytest.raises(ConfigError, match="stalls"):
        router.count("stalls")
    assert all(len(spec.labels) == 1 for spec in TABLE if spec.values)


class Drifting(FakeEngine):
    """An engine whose meter has parts, one of them without a value."""

    def step(self, state, prompts=()):
        chunk = super().step(state, prompts)
        parts = {"luminance": 0.25, "motion": math.nan}
        object.__setattr__(chunk, "drift", DriftReading(1.0, parts))
        return chunk


async def becomes(condition):
    """The gauges are set one after another, round after round."""
    assert await asyncio.to_thread(eventually, condition)


def test_a_stream_moves_slack_state_memory_and_parts():
    async def view(replica, epoch, value):
        async with pull(replica, epoch, want=6) as end:
            await hello(end)
            await end.chunks(6)
            # Nobody wants chunk 6: nothing is short, and no snapshot grows old.
            await becomes(lambda: value("echo_ray_playout_slack_seconds") == math.inf)
            saved_at = lambda: value("echo_ray_oldest_snapshot_timestamp_seconds")  # noqa: E731
            await becomes(lambda: saved_at() == math.inf)
            await end.want(1000)
            await end.chunks(2)
            await becomes(lambda: -1 < value("echo_ray_playout_slack_seconds") < 2)
            await becomes(lambda: abs(saved_at() - replica.host.clock.wall()) < 60)
            await becomes(lambda: value("echo_ray_state_bytes") == 32)

    with Replicas() as bench:
        engine = Drifting(point_every=2)
        engine.fell_back = {"rms_norm": 3}
        replica = bench.start("r1", engine)
        value = replica.telemetry.value
        bench.session(pace=Pace.REALTIME)
        asyncio.run(view(replica, bench.claim(replica), value))
        assert value("echo_ray_device_memory_bytes", kind="resident") == 4096
        assert eventually(lambda: value("echo_ray_kernel_fallbacks_total", kernel="rms_norm") == 3)

        def made():
            return sum(value("echo_ray_chunks_total", on_time=known) for known in ("true", "false"))

        # The chunk that was in work when the reader left is counted, too.
        parts = lambda: value("echo_ray_drift_parts_total", part="luminance")  # noqa: E731
        assert eventually(lambda: parts() == 0.25 * made() > 0)
        assert value("echo_ray_drift_parts_total", part="motion") == 0
        bench.directory.delete("s1")
        assert eventually(lambda: value("echo_ray_state_bytes") == 0)


def test_a_session_that_cannot_be_brought_back_counts_as_a_failed_resume():
    with Replicas() as bench:
        one = bench.start("r1")
        bench.session()
        asyncio.run(watch(one, bench.claim(one), 0, 5))
        bench.crash(one)
        directory = Unreliable(bench.directory)
        directory.failures["digests"] = [StoreUnavailable("gone"), StoreUnavailable("gone")]
        two = bench.start("r2", directory=lambda: directory)
        asyncio.run(watch(two, bench.claim(two), 5, 1))
        assert two.telemetry.value("echo_ray_session_resumes_total", outcome="failed") == 2
        assert two.telemetry.value("echo_ray_session_resumes_total", outcome="ok") == 1


def test_a_new_session_that_fails_is_no_failed_resume():
    engine = FakeEngine()
    engine.failing = [0]
    with Replicas() as bench:
        one = bench.start("r1", engine)
        bench.session()
        asyncio.run(watch(one, bench.claim(one), 0, 2))
        assert one.telemetry.value("echo_ray_engine_failures_total") == 1
        assert one.telemetry.value("echo_ray_session_resumes_total", outcome="failed") == 0


def test_store_calls_are_told_by_tier_and_by_how_they_ended():
    telemetry = Telemetry()
    inner = Unreliable(MemorySnapshots(2**20))
    store = TimedSnapshots(inner, "hot", tell_store_calls(telemetry))
    store.put("s1", "p8", b"12345")
    assert store.get("s1", "p8") == b"12345"
    with pytest.raises(SnapshotNotFound):
        store.get("s1", "p9")
    inner.failures = {"put": [StoreUnavailable("x")], "get": [StoreUnavailable("x")]}
    with pytest.raises(StoreUnavailable):
        store.put("s1", "p8", b"12345")
    with pytest.raises(StoreUnavailable):
        store.get("s1", "p8")
    calls = {
        (op, outcome): telemetry.value(
            "echo_ray_snapshot_store_calls_total", tier="hot", op=op, outcome=outcome
        )
        for op in ("write", "read")
        for outcome in ("ok", "missing", "failed")
    }
    assert calls == {
        ("write", "ok"): 1,
        ("write", "missing"): 0,
        ("write", "failed"): 1,
        ("read", "ok"): 1,
        ("read", "missing"): 1,
        ("read", "failed"): 1,
    }
    assert telemetry.value("echo_ray_snapshot_store_bytes_total", tier="hot", op="read") == 5
    count = telemetry.value("echo_ray_snapshot_store_seconds_count", tier="hot", op="write")
    assert count == 2
    assert [b.snapshot_id for b in store.list_blobs()] == ["p8"]
    store.delete("s1", "p8")
    store.delete_session("s1")
    assert not list(store.list_blobs())


def accounts() -> tuple[StreamAccounts, FakeClock, Telemetry]:
    clock, telemetry = FakeClock(), Telemetry()
    return StreamAccounts(SHAPE, Pace.REALTIME, clock, telemetry), clock, telemetry


def test_a_viewer_stalls_when_a_segment_comes_after_playout_and_not_otherwise():
    stream, clock, telemetry = accounts()
    stream.asked(0, 4)
    stream.delivered(0)
    clock.advance(SHAPE.start_s(1))
    stream.delivered(1)
    assert telemetry.value("echo_ray_viewer_stalls_total") == 0
    clock.advance(SHAPE.chunk_s + 0.5)
    stream.delivered(2)
    assert telemetry.value("echo_ray_viewer_stalls_total") == 1
    assert telemetry.value("echo_ray_viewer_stall_seconds_total") == pytest.approx(0.5)
    clock.advance(SHAPE.chunk_s)
    stream.delivered(3)
    assert telemetry.value("echo_ray_viewer_stalls_total") == 1


def test_what_nobody_asked_for_in_time_and_pauses_are_no_stalls():
    stream, clock, telemetry = accounts()
    stream.asked(0, 1)
    stream.delivered(0)
    clock.advance(9)
    stream.asked(1, None)
    stream.asked(1, 3)
    stream.delivered(1)
    stream.paused()
    clock.advance(9)
    stream.delivered(2)
    assert telemetry.value("echo_ray_viewer_stalls_total") == 0


def test_of_acknowledged_events_a_bounded_number_is_awaited():
    stream, clock, telemetry = accounts()
    for chunk in range(100):
        stream.acknowledged(chunk)
    clock.advance(2)
    for chunk in range(100):
        stream.delivered(chunk)
    assert telemetry.value("echo_ray_event_to_frame_seconds_count") == 64
    assert telemetry.value("echo_ray_event_to_frame_seconds_sum") == 128


def test_events_handovers_and_waiting_sessions_at_a_router():
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        front = rig.router().front
        value = front.telemetry.value
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(3)
            event = {"event_id": "e1", "event": {"prompt": "blue"}}
            # Its chunk does not come before the router has heard which one it is.
            rig.owner(sid).hold()
            answer = await rig.call("POST", f"/v1/sessions/{sid}/events", event)
            rig.owner(sid).go_on()
            await viewer.until(answer.json()["effective_chunk"])
            assert value("echo_ray_event_to_frame_seconds_count") == 1
            await rig.call("POST", f"/v1/admin/sessions/{sid}/migrate")
            # What the old owner made may still be on its way to the viewer.
            while value("echo_ray_handover_gap_seconds_count", cause="move") == 0:
                await viewer.until(viewer.indices[-1] + 1)
            await rig.owner(sid).crash()
            while value("echo_ray_handover_gap_seconds_count", cause="failover") == 0:
                await viewer.until(viewer.indices[-1] + 1)
            assert value("echo_ray_handover_gap_seconds_count", cause="move") == 1
            await sweep_once(front)
            assert value("echo_ray_sessions_waiting", watched="true") == 0
            assert value("echo_ray_sessions_open") == 1
            await rig.owner(sid).crash()
            await soon(lambda: value("echo_ray_sessions_waiting", watched="true") == 1)

    run(test)


def test_a_session_that_nobody_watches_waits_until_somebody_has_room():
    async def test(rig: Rig) -> None:
        lone = rig.replica("a")
        front = rig.router().front
        value = front.telemetry.value
        sid = await rig.create(on_idle=OnIdle.CONTINUE.value)
        await front.adopt(sid)
        await lone.crash()
        await soon(lambda: value("echo_ray_sessions_waiting", watched="false") == 1)
        # As when its heartbeat has run out.
        rig.directory.remove_replica("a")
        rig.replica("b")
        await soon(lambda: value("echo_ray_sessions_waiting", watched="false") == 0)

    run(test)


def test_a_router_says_where_prometheus_finds_the_replicas():
    async def test(rig: Rig) -> None:
        rig.router()
        assert (await rig.call("GET", "/metrics/targets")).json() == []
        one, two = rig.replica("a"), rig.replica("b")
        found = await rig.call("GET", "/metrics/targets")
        assert found.headers["content-type"] == "application/json"
        assert sorted(found.json(), key=lambda t: t["labels"]["replica"]) == [
            {"targets": [r.address], "labels": {"replica": r.name, "node": "node"}}
            for r in (one, two)
        ]
        assert (await rig.call("POST", "/metrics/targets")).status_code == 405

    run(test)
