"""A router before real replicas with a fake engine: the two halves speak the same protocol."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from fakes import FakeEngine, undisturbed
from replicas import Replicas, eventually

from echo_ray.client import EchoClient, Segment
from echo_ray.config import HttpSection
from echo_ray.serve.front import Front
from echo_ray.serve.router_service import RouterService
from echo_ray.serve.telemetry import BOTH, ROUTERS, Telemetry

PROMPT = "a red circle"
Test = Callable[[Replicas, EchoClient], Awaitable[None]]


def run(test: Test, **session: Any) -> None:
    """A router, two replicas and a client around `test`."""

    async def whole(replicas: Replicas) -> None:
        rng = random.Random(0)
        front = Front(
            config=replace(replicas.config, http=HttpSection(port=0)),
            shape=FakeEngine().shape,
            directory=replicas.directory,
            snapshots=replicas.snapshots,
            clock=replicas.clock,
            telemetry=Telemetry(ROUTERS + BOTH),
            rng=rng,
        )
        router = RouterService(front, rng)
        try:
            async with asyncio.timeout(55), EchoClient(f"http://{router.address}") as client:
                await test(replicas, client)
        finally:
            await router.stop()

    with Replicas(**session) as replicas:
        asyncio.run(whole(replicas))


def owner(replicas: Replicas, session_id: str) -> Any:
    name = replicas.directory.get(session_id).owner
    return next(g for g in replicas._running if g.host.replica_id == name)


def exact(seen: list[Segment], switches: dict[int, list[str]], start: int = 0) -> None:
    """Each index once, in order, each as an undisturbed run makes it; nothing marked."""
    assert [s.index for s in seen] == list(range(start, start + len(seen)))
    digests = undisturbed(FakeEngine(), PROMPT, 7, start + len(seen), switches)
    assert [s.metadata.digest for s in seen] == digests[start:]
    assert not any(s.metadata.discontinuity for s in seen)


def test_a_crash_after_a_switch_changes_no_bit() -> None:
    async def test(replicas: Replicas, client: EchoClient) -> None:
        replicas.start("a")
        replicas.start("b")
        sid = (await client.create(PROMPT, seed=7, pace="max"))["id"]
        switches: dict[int, list[str]] = {}
        seen = []
        async for segment in client.segments(sid, start=0):
            seen.append(segment)
            if segment.index == 5:
                switches[await client.send_event(sid, "blue")] = ["blue"]
            if segment.index in (9, 21):
                replicas.crash(owner(replicas, sid))
                replicas.start(f"c{segment.index}")
            if segment.index == 40:
                break
        exact(seen, switches)
        assert len({s.metadata.owner for s in seen}) == 3

    run(test)


def test_migrations_change_no_bit() -> None:
    async def test(replicas: Replicas, client: EchoClient) -> None:
        replicas.start("a", FakeEngine(delay_s=0.01))
        replicas.start("b", FakeEngine(delay_s=0.01))
        sid = (await client.create(PROMPT, seed=7, pace="max"))["id"]
        seen = []
        async for segment in client.segments(sid, start=0):
            seen.append(segment)
            if segment.index in (6, 13):
                move = await client.migrate(sid)
                assert move["moved"]
            if segment.index == 30:
                break
        exact(seen, {})
        assert replicas.directory.get(sid).epoch == 3

    run(test)


def test_ignored_words_follow_the_prompt_wherever_a_chunk_comes_from() -> None:
    async def test(replicas: Replicas, client: EchoClient) -> None:
        replicas.start("a")
        replicas.start("b")
        sid = (await client.create("a lovely red circle at sunset", seed=7, pace="max"))["id"]
        switched, back = 99, 99
        seen = []
        async for segment in client.segments(sid, start=0):
            seen.append(segment)
            if segment.index == 5:
                switched = await client.send_event(sid, "blue")
                back = await client.send_event(sid, "sunset", at_chunk=switched + 6)
            if segment.index == 9:
                replicas.crash(owner(replicas, sid))
                replicas.start("c")
            if segment.index == 24:
                await client.migrate(sid)
            if segment.index == 40:
                break
        expected = [
            ("lovely", "sunset") if n < switched else () if n < back else ("sunset",)
            for n in range(41)
        ]
        assert 5 < switched < back < 24
        assert [s.metadata.ignored_words for s in seen] == expected
        assert len({s.metadata.owner for s in seen}) == 3
        again = []
        async for segment in client.segments(sid, start=2):
            again.append(segment.metadata.ignored_words)
            if segment.index == 40:
                break
        assert again == expected[2:]

    run(test)


def test_pause_resume_and_past_segments() -> None:
    async def test(replicas: Replicas, client: EchoClient) -> None:
        replicas.start("a")
        sid = (await client.create(PROMPT, seed=7, pace="max"))["id"]
        seen = []
        async for segment in client.segments(sid, start=0):
            seen.append(segment)
            if segment.index == 10:
                assert (await client.pause(sid))["state"] == "paused"
                break
        replicas.start("b")
        replicas.crash(owner_named(replicas, "a"))
        async for segment in client.segments(sid, start=11):
            seen.append(segment)
            if segment.index == 20:
                break
        exact(seen, {})
        assert await client.segment(sid, 3) == seen[3].data
        assert await asyncio.to_thread(eventually, lambda: replicas.directory.snapshots(sid) != [])
        assert (await client.pin_snapshot(sid))["pinned"] is True
        assert {r["id"] for r in await client.replicas()} >= {"b"}

    run(test)


def owner_named(replicas: Replicas, name: str) -> Any:
    return next(g for g in replicas._running if g.host.replica_id == name)
