"""Socket messages both ways: what each does, and what each refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from router_rig import Rig, Watch, eventually, run


async def begun(rig: Rig) -> tuple[str, Watch]:
    rig.replica("a")
    rig.replica("b")
    rig.router()
    sid = await rig.create()
    viewer = await rig.open(sid, "&from=0")
    await viewer.until(5)
    return sid, viewer


def test_the_first_messages_tell_the_session_and_the_video() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        created, start = viewer.messages[:2]
        assert created["session"]["id"] == sid
        assert created["session"]["state"] == "live"
        assert start == {
            "type": "video.start",
            "format": "raw",
            "fps": 16,
            "width": 4,
            "height": 4,
            "mime": "application/octet-stream",
            "from": 0,
        }

    run(test)


def test_an_interaction_is_queued_once_and_refused_with_another_body() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        message: dict[str, Any] = {
            "type": "session.interaction",
            "event_id": "e1",
            "event": {"prompt": "blue"},
        }
        await viewer.send(message)
        first = await viewer.until_type("session.interaction.queued")
        assert rig.directory.controls(sid)[0].chunk == first["effective_chunk"]
        await viewer.send(message)
        assert await viewer.until_type("session.interaction.queued") == first
        await viewer.send({**message, "event": {"prompt": "green"}})
        refused = await viewer.until_type("error")
        assert (refused["code"], refused["event_id"]) == ("event_id_conflict", "e1")
        await viewer.send({**message, "event_id": "e2", "at_chunk": 0})
        assert (await viewer.until_type("error"))["code"] == "chunk_already_generated"
        await viewer.send({**message, "event_id": "e3", "event": {"prompt": " "}})
        assert (await viewer.until_type("error"))["code"] == "prompt_invalid"
        assert len(rig.directory.controls(sid)) == 1

    run(test)


MALFORMED: list[str | bytes] = [
    "not json",
    "[]",
    "[" * 3000,
    '{"type": 5}',
    '{"type": "session.ack"}',
    '{"type": "session.ack", "chunk_index": -1}',
    '{"type": "session.ack", "chunk_index": 1e3}',
    '{"type": "session.ack", "chunk_index": 1000000}',
    '{"type": "session.ping", "surplus": 1}',
    '{"type": "session.interaction", "event_id": "e", "event": {"prompt": 3}}',
    '{"type": "session.ping", "type": "session.stop"}',
    b"binary",
]


def test_malformed_messages_are_answered_and_nothing_else_happens() -> None:
    async def test(rig: Rig) -> None:
        _, viewer = await begun(rig)
        for bad in MALFORMED:
            await viewer.send(bad)
            assert (await viewer.until_type("error"))["code"] == "message_invalid"
        await viewer.until(viewer.indices[-1] + 3)
        viewer.check(0)

    run(test)


def test_many_malformed_messages_close_the_socket() -> None:
    async def test(rig: Rig) -> None:
        _, viewer = await begun(rig)
        for _ in range(16):
            await viewer.send("not json")
        assert await viewer.until_closed() == 1008
        assert viewer.messages[-1]["code"] == "message_invalid"

    run(test)


@pytest.mark.parametrize("size", [4097, 60_000])
def test_an_oversized_message_closes_the_socket(size: int) -> None:
    async def test(rig: Rig) -> None:
        _, viewer = await begun(rig)
        await viewer.send(json.dumps({"type": "session.ping", "x": "a" * size}))
        assert await viewer.until_closed() == 1009
        if size < 8192:
            assert viewer.messages[-1]["code"] == "message_too_large"

    run(test)


def test_unknown_types_are_ignored_and_ping_is_answered() -> None:
    async def test(rig: Rig) -> None:
        _, viewer = await begun(rig)
        await viewer.send({"type": "session.dance", "with": "anything"})
        for name in ("ping", "session.ping"):
            await viewer.send({"type": name})
            await viewer.until_type("pong")
        assert "error" not in viewer.types

    run(test)


def test_a_snapshot_pins_the_latest_point() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        await viewer.send({"type": "session.snapshot"})
        refused = await viewer.until_type("error")
        assert refused["code"] == "conflict"
        assert "chunk 4" in refused["message"]
        rig.owner(sid).snapshot(sid, 4)
        await viewer.send({"type": "session.snapshot"})
        committed = await viewer.until_type("session.snapshot.committed")
        assert committed["snapshot"]["chunk_index"] == 4
        assert rig.directory.snapshots(sid)[0].pinned

    run(test)


def test_pause_holds_the_stream_and_resume_goes_on_at_the_next_index() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        await viewer.send({"type": "session.pause"})
        await viewer.until_type("session.paused")
        assert rig.directory.get(sid).state == "paused"
        assert rig.directory.get(sid).owner is None
        await viewer.send({"type": "session.resume"})
        await viewer.until_type("session.resumed")
        await viewer.until(viewer.indices[-1] + 4)
        viewer.check(0)
        assert rig.directory.get(sid).state == "live"

    run(test)


def test_watching_a_paused_session_resumes_it() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        await rig.call("POST", f"/v1/sessions/{sid}/pause")
        await viewer.until_type("session.paused")
        async with rig.watch(sid) as late:
            await late.until(rig.directory.get(sid).next_index + 2)
            await viewer.until(late.indices[-1])
        viewer.check(0)

    run(test)


def test_a_session_paused_for_want_of_readers_wakes_for_the_one_it_has() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        fake = rig.owner(sid)
        lease = fake.sessions[sid].lease
        rig.directory.release(lease, state="paused")
        fake._lose(lease)
        await viewer.until(viewer.indices[-1] + 20)
        viewer.check(0)
        assert "session.paused" not in viewer.types

    run(test)


def test_stop_ends_the_session_for_everybody() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        async with rig.watch(sid) as other:
            await other.read()
            await viewer.send({"type": "session.stop"})
            assert await viewer.until_closed() == 1000
            assert await other.until_closed() == 1000
        assert viewer.messages[-1] == {"type": "session.done", "reason": "closed"}
        assert other.messages[-1] == {"type": "session.done", "reason": "closed"}
        async with rig.watch(sid) as late:
            assert await late.until_closed() == 1000
            assert late.types[-1] == "session.done"

    run(test)


def test_deletion_ends_viewers_of_every_router() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        rig.router()
        async with rig.watch(sid, router=1) as other:
            await other.until_type("video.start")
            await rig.call("DELETE", f"/v1/sessions/{sid}")
            assert await viewer.until_closed() == 1000
            assert await other.until_closed() == 1000
        assert viewer.messages[-1] == {"type": "session.done", "reason": "deleted"}
        assert other.messages[-1] == {"type": "session.done", "reason": "deleted"}

    run(test)


def test_attach_moves_the_cursor() -> None:
    async def test(rig: Rig) -> None:
        _, viewer = await begun(rig)
        await viewer.until(12)
        await viewer.send({"type": "session.attach", "from": 1})
        while (await viewer.until_type("video.start"))["from"] != 1:
            pass
        viewer.segments.clear()
        await viewer.until(10)
        viewer.check(1)
        await viewer.send({"type": "session.attach", "from": 10**6})
        assert (await viewer.until_type("error"))["code"] == "segment_beyond_end"

    run(test)


def test_an_unknown_session_is_refused_on_the_socket() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        async with rig.watch("ses_nobody") as viewer:
            assert await viewer.until_closed() == 1008
        assert viewer.messages[0]["code"] == "session_not_found"

    run(test)


def test_a_router_that_stops_sends_its_viewers_away() -> None:
    async def test(rig: Rig) -> None:
        sid, viewer = await begun(rig)
        rig.router()
        await rig.routers.pop(0).stop()
        assert await viewer.until_closed() == 1012
        assert viewer.types[-1] == "session.going_away"
        done = viewer.indices[-1] + 1
        async with rig.watch(sid, f"&from={done}") as again:
            await again.until(done + 5)
        again.check(done)
        await eventually(lambda: rig.directory.get(sid).epoch >= 1)

    run(test)
