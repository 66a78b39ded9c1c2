"""Fan-out: one upstream for any number of viewers, each with its own place in the stream."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fake_replica import SHAPE
from router_rig import CONFIG, Rig, eventually, run

from echo_ray.serve import viewers
from echo_ray.serve.cursor import Ring, Viewer
from echo_ray.serve.relay import wanted_until
from echo_ray.serve.upstream import WireSegment
from echo_ray.session.records import Pace


def test_viewers_of_one_format_share_one_upstream() -> None:
    async def test(rig: Rig) -> None:
        fake = rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as one, rig.watch(sid, "&from=0") as two:
            await asyncio.gather(one.until(6), two.until(6))
            # Else the stream might get beyond the edge by more than is kept, before it is joined.
            fake.hold()
            async with rig.watch(sid) as late:
                await late.until_type("video.start")
                fake.go_on()
                start = late.messages[1]["from"]
                last = max(start, one.indices[-1], two.indices[-1]) + 6
                await asyncio.gather(one.until(last), two.until(last), late.until(last))
        assert fake.pulls == [(sid, "raw", 0)]
        one.check(0)
        two.check(0)
        late.check(start)
        assert start > 0

    run(test)


def test_an_index_older_than_the_ring_is_caught_up_through_a_pull_of_its_own() -> None:
    async def test(rig: Rig) -> None:
        fake = rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as one:
            await one.until(20)
            async with rig.watch(sid, "&from=2") as late:
                await asyncio.gather(one.until(40), late.until(40))
            assert fake.pulls == [(sid, "raw", 0), (sid, "raw", 2)]
            await eventually(lambda: len(fake.open_pulls) == 1)
        one.check(0)
        late.check(2)

    run(test)


def test_catching_up_survives_a_crash() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a", padding=200_000)
        rig.replica("b", padding=200_000)
        rig.router()
        sid = await rig.create(pace="realtime")
        async with rig.watch(sid, "&from=0") as one:
            await one.until(30)
            async with rig.watch(sid, "&from=1") as late:
                await late.until(3)
                await rig.owner(sid).crash()
                await asyncio.gather(one.until(40), late.until(40))
        assert one.indices == list(range(41)) or one.indices == list(range(len(one.indices)))
        assert late.indices == list(range(1, 1 + len(late.indices)))

    run(test)


def test_an_expired_index_is_refused_and_others_go_on() -> None:
    async def test(rig: Rig) -> None:
        fake = rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as one:
            await one.until(20)
            fake.oldest = 10
            async with rig.watch(sid, "&from=3") as late:
                assert await late.until_closed() == 1008
                assert late.messages[-1]["code"] == "segment_expired"
                assert late.segments == []
            await one.until(30)
        one.check(0)

    run(test)


def test_a_start_that_cannot_be_is_refused_on_the_socket() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        for query, code in (
            ("from=5", "segment_beyond_end"),
            ("from=-1", "invalid_request"),
            ("from=x", "invalid_request"),
            ("from=", "invalid_request"),
            ("from=99999999999999999999", "invalid_request"),
            ("format=gif", "invalid_request"),
        ):
            async with rig.watch(sid, query, fmt="") as viewer:
                assert await viewer.until_closed() == 1008
            assert [m["type"] for m in viewer.messages] == ["error"]
            assert viewer.messages[0]["code"] == code

    run(test)


def test_the_live_edge_is_the_default_and_the_end_waits() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as one:
            await one.until(4)
        await eventually(lambda: not rig.routers[0].front.relays.sessions())
        edge = rig.directory.get(sid).next_index
        async with rig.watch(sid) as live, rig.watch(sid, f"&from={edge}") as exact:
            await asyncio.gather(live.until(edge + 3), exact.until(edge + 3))
        live.check(edge)
        exact.check(edge)

    run(test)


def test_reading_speed_is_the_backpressure_of_pace_max() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(0)
            await viewer.send({"type": "session.ack", "chunk_index": 0})
            await viewer.send({"type": "ping"})
            await viewer.until_type("pong")
            # What was wanted before the acknowledgement came is still made.
            held = 0
            while held != rig.directory.get(sid).next_index:
                held = rig.directory.get(sid).next_index
                await viewer.until(held - 1)
                await asyncio.sleep(0.5)
            await viewer.send({"type": "session.ack", "chunk_index": held - 1})
            await viewer.until(held + 1)
            assert rig.directory.get(sid).next_index == held + 2
        viewer.check(0)

    run(test)


def test_a_viewer_slower_than_the_retention_is_let_go_and_others_are_not_held_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It hears why when it reads at last, which is after the other one has seen it all.
    monkeypatch.setattr(viewers, "FAREWELL_S", 50.0)

    async def test(rig: Rig) -> None:
        rig.replica("a", padding=2_000_000)
        rig.router()
        sid = await rig.create(pace="realtime")
        async with rig.watch(sid, "&from=0") as quick, rig.watch(sid, "&from=0") as slow:
            await quick.until(40)
            code = await slow.until_closed()
            assert code == 1013
            assert slow.messages[-1]["code"] == "viewer_too_slow"
            assert slow.messages[-1]["retryable"] is True
            assert slow.indices == list(range(len(slow.indices)))
            assert len(slow.indices) < 40

    run(test)


def test_one_viewer_too_many_is_refused_with_a_retryable_code() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as one:
            await one.until(0)
            async with rig.watch(sid) as two:
                assert await two.until_closed() == 1013
            assert two.messages[-1]["code"] == "capacity_exhausted"
        await eventually(lambda: not rig.routers[0].front.relays.sessions())

    run(test, replace(CONFIG, limits=replace(CONFIG.limits, viewers_per_session=1)))


def test_an_upstream_without_viewers_is_closed() -> None:
    async def test(rig: Rig) -> None:
        fake = rig.replica("a")
        router = rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(2)
            gauge = router.front.telemetry.value("echo_ray_viewers", transport="websocket")
            assert gauge == 1
        await eventually(lambda: not fake.open_pulls)
        assert router.front.telemetry.value("echo_ray_viewers", transport="websocket") == 0
        assert router.front.relays.sessions() == set()

    run(test)


def test_motion_jpeg_is_a_stream_of_parts() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        body = b""
        url = rig.url(f"/v1/sessions/{sid}/stream.mjpeg?from=0")
        async with rig.http.stream("GET", url) as answer:
            assert answer.headers["content-type"].startswith("multipart/x-mixed-replace")
            async for part in answer.aiter_bytes():
                body += part
                if body.count(b"Content-Type: image/jpeg") > 4:
                    break
        assert body.count(b"\xff\xd8\xff") >= 4
        await eventually(lambda: not rig.routers[0].front.relays.sessions())
        for query in ("from=99", "from=x"):
            assert (await rig.http.get(url.replace("from=0", query))).status_code == 400
        missing = rig.url("/v1/sessions/nobody/stream.mjpeg")
        assert (await rig.http.get(missing)).status_code == 404

    run(test)


def test_a_long_outage_is_told_as_a_retryable_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(1)
            fake = rig.replicas["a"]
            await fake.crash()
            rig.directory.remove_replica("a")
            told = await viewer.until_type("error")
            while told["code"] == "unavailable":
                # That it cannot be reached comes first where that took long.
                told = await viewer.until_type("error")
            assert told["code"] == "no_replica"
            assert told["retryable"] is True
            rig.replica("b")
            await viewer.until(5)
        viewer.check(0)

    monkeypatch.setattr("echo_ray.serve.upstream.PATIENCE_S", 0.3)
    run(test)


def test_the_ring_keeps_the_latest_without_gaps() -> None:
    ring = Ring(5, 3)
    for index in range(5, 10):
        ring.append(WireSegment(index, "{}", b""))
    assert (ring.first, ring.next) == (7, 10)
    assert ring.get(6) is None
    assert ring.get(10) is None
    kept = ring.get(7)
    assert kept is not None
    assert kept.index == 7
    with pytest.raises(ValueError, match="does not follow"):
        ring.append(WireSegment(12, "{}", b""))


def test_what_may_be_generated_follows_the_slowest_or_the_fastest() -> None:
    assert wanted_until(Pace.MAX, [3, 9], 2) == 5
    assert wanted_until(Pace.REALTIME, [3, 9], 2) == 11
    assert wanted_until(Pace.MAX, [], 2) is None


def test_a_viewer_that_never_reads_its_messages_is_let_go() -> None:
    async def test() -> None:
        from echo_ray import wire

        viewer = Viewer(0)
        for _ in range(1001):
            viewer.tell(wire.Pong())
        assert viewer.over.is_set()

    asyncio.run(test())


def test_the_rig_makes_chunks_of_the_shape() -> None:
    assert (SHAPE.frames_in(0), SHAPE.frames_in(1)) == (1, 2)
