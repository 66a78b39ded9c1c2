"""Failover: viewers keep their socket and get every index once, whatever dies behind it."""

from __future__ import annotations

import asyncio

import pytest
from router_rig import Rig, eventually, run

from echo_ray.errors import CapacityError, EngineError, PromptError


def test_a_stream_without_trouble_is_in_order_and_exact() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(20)
        viewer.check(0)
        assert viewer.types[:2] == ["session.created", "video.start"]

    run(test)


def test_a_crash_costs_the_viewer_nothing_but_time() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(5)
            first = rig.owner(sid)
            await first.crash()
            await viewer.until_made_by(2)
            assert rig.owner(sid) is not first
            await viewer.until(15)
        viewer.check(0)
        assert viewer.types == ["session.created", "video.start"]
        telemetry = rig.routers[0].front.telemetry
        assert telemetry.value("echo_ray_failovers_total", cause="broken") == 1
        assert telemetry.value("echo_ray_failover_seconds_count") == 1

    run(test)


def test_a_hung_owner_is_given_up_and_writes_nothing_when_it_wakes() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(5)
            first = rig.owner(sid)
            first.hang()
            await viewer.until_made_by(2)
            epoch = rig.directory.get(sid).epoch
            first.wake()
            await viewer.until(viewer.indices[-1] + 8)
            await eventually(lambda: sid not in first.sessions)
            assert rig.directory.get(sid).epoch == epoch
            assert rig.owner(sid) is not first
        viewer.check(0)

    run(test)


def test_silence_on_an_open_socket_counts_as_loss() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(3)
            first = rig.owner(sid)
            first.silent.add(sid)
            await viewer.until_made_by(2)
            assert rig.owner(sid) is not first
        viewer.check(0)
        telemetry = rig.routers[0].front.telemetry
        assert telemetry.value("echo_ray_failovers_total", cause="silent") == 1

    run(test)


def test_a_slow_owner_that_beats_is_left_alone() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a").chunk_s = 0.6
        rig.replica("b").chunk_s = 0.6
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(1)
        assert rig.directory.get(sid).epoch == 1

    run(test)


def test_a_fenced_owner_is_followed_by_whoever_claimed() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(3)
            first = rig.owner(sid).name
            other = "b" if first == "a" else "a"
            rig.directory.claim(sid, other, expect_epoch=1, ttl_s=0.9)
            await viewer.until_made_by(2)
            assert rig.owner(sid).name == other
            assert rig.directory.get(sid).epoch == 2
            # Its viewers hear where it went, although nobody told this router.
            while "session.migrated" not in viewer.types:
                await viewer.read()
            await viewer.until(viewer.indices[-1] + 9)
        told = [m for m in viewer.messages if m["type"] == "session.migrated"]
        assert told == [{"type": "session.migrated", "owner": other, "epoch": 2}]
        viewer.check(0)

    run(test)


def test_going_away_moves_the_session_at_once() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(3)
            first = rig.owner(sid)
            await first.go_away()
            await viewer.until_made_by(2)
            assert rig.owner(sid) is not first
        viewer.check(0)

    run(test)


@pytest.mark.parametrize("error", [EngineError("broken engine"), CapacityError("full")])
def test_a_refusing_replica_is_avoided(error: EngineError | CapacityError) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a").refuse = error
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(5)
        viewer.check(0)
        assert rig.owner(sid).name == "b"
        assert viewer.types == ["session.created", "video.start"]

    run(test)


def test_every_replica_may_die_as_long_as_one_comes_back() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(3)
            await rig.owner(sid).crash()
            await asyncio.sleep(0.2)
            rig.replica("b")
            await viewer.until_made_by(2)
        viewer.check(0)

    run(test)


def test_two_routers_follow_each_other_over_one_claim() -> None:
    async def test(rig: Rig) -> None:
        for name in "abc":
            rig.replica(name)
        rig.router()
        rig.router()
        sid = await rig.create()
        async with (
            rig.watch(sid, "&from=0") as one,
            rig.watch(sid, "&from=0", router=1) as two,
        ):
            await asyncio.gather(one.until(5), two.until(5))
            assert rig.directory.get(sid).epoch == 1
            await rig.owner(sid).crash()
            await asyncio.gather(one.until_made_by(2), two.until_made_by(2))
            await asyncio.gather(one.until(15), two.until(15))
            assert rig.directory.get(sid).epoch == 2
        one.check(0)
        two.check(0)

    run(test)


def test_formats_of_one_session_share_its_owner_through_a_crash() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as raw, rig.watch(sid, "&from=0", fmt="jpeg") as jpeg:
            await asyncio.gather(raw.until(4), jpeg.until(4))
            await rig.owner(sid).crash()
            await asyncio.gather(raw.until_made_by(2), jpeg.until_made_by(2))
        raw.check(0)
        assert jpeg.indices == list(range(len(jpeg.segments)))
        assert rig.directory.get(sid).epoch == 2

    run(test)


def test_a_prompt_switch_survives_the_crash_after_it() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(3)
            await viewer.send(
                {"type": "session.interaction", "event_id": "e1", "event": {"prompt": "blue"}}
            )
            queued = await viewer.until_type("session.interaction.queued")
            await rig.owner(sid).crash()
            await viewer.until(queued["effective_chunk"] + 4)
        switched = queued["effective_chunk"]
        assert viewer.indices == list(range(len(viewer.segments)))
        for metadata, _ in viewer.segments:
            due = "red" if metadata["chunk_index"] < switched else "blue"
            assert metadata["prompt"] == due
            assert metadata["started_event_ids"] == (
                ["e1"] if metadata["chunk_index"] == switched else []
            )

    run(test)


def test_a_session_that_continues_is_adopted_without_viewers() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create(on_idle="continue")
        idle = await rig.create(on_idle="pause")
        for session_id in (sid, idle):
            async with rig.watch(session_id, "&from=0") as viewer:
                await viewer.until(1)
        await eventually(lambda: not rig.routers[0].front.relays.sessions())
        for fake in tuple(rig.replicas.values()):
            await fake.crash()
            # As when its heartbeat has run out.
            rig.directory.remove_replica(fake.name)
        survivor = rig.replica("c")
        await eventually(lambda: sid in survivor.owned)
        assert idle not in survivor.owned

    run(test)


def test_a_session_that_every_replica_refuses_harms_no_other() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        for name in "ab":
            rig.replica(name)
        bad = await rig.create()
        good = await rig.create()
        for fake in rig.replicas.values():
            fake.refuse, fake.refuse_only = EngineError("broken"), {bad}
        async with rig.watch(bad, "&from=0"), rig.watch(good, "&from=0") as viewer:
            await viewer.until(3)
            pulls = [fake.pulls for fake in rig.replicas.values()]
            await eventually(lambda: {sid for one in pulls for sid, _, _ in one} == {bad, good})
            await eventually(lambda: rig.directory.get(bad).epoch == 2)
            await rig.owner(good).go_away()
            await viewer.until(10)
        viewer.check(0)

    run(test)


def test_a_prompt_that_the_model_refuses_ends_the_stream_with_its_reason() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a").refuse = PromptError("no words known", param="prompt")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            assert await viewer.until_closed() == 1008
        assert viewer.messages[-1]["code"] == "prompt_invalid"

    run(test)
