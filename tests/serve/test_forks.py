"""Fork, rewind, export and import before real replicas: the chunks are those of a lone engine."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, undisturbed
from replicas import Replicas, eventually
from uploads import mp4
from websockets.asyncio.client import connect

from echo_ray.client import EchoClient, Segment
from echo_ray.config import HttpSection, LimitsSection
from echo_ray.engine.upload import read_clip
from echo_ray.errors import ChunkUnreachable, ClipLost, SessionClosed, SnapshotForeign
from echo_ray.serve.front import Front
from echo_ray.serve.router_service import RouterService
from echo_ray.serve.telemetry import BOTH, ROUTERS, Telemetry
from echo_ray.session.forking import Past, Wish, forked

PROMPT = "a red circle"
CLIP = mp4(11)


class Cluster:
    """Replicas, stores and a router of their own."""

    def __init__(self, replicas: Replicas, router: RouterService, client: EchoClient) -> None:
        self.replicas = replicas
        self.router = router
        self.client = client
        self.directory = replicas.directory

    async def begun(self, chunks: int, **fields: Any) -> str:
        """A session of so many chunks that is paused; it is switched to blue at chunk 5."""
        sid = (await self.client.create(PROMPT, seed=7, pace="max", **fields))["id"]
        await self.client.send_event(sid, "blue", at_chunk=5)
        kept = self.replicas.config.session.snapshots_kept

        def points() -> list[int]:
            return [r.chunk_index for r in self.directory.snapshots(sid)]

        def saved() -> bool:
            newest = self.directory.get(sid).next_index // 4 * 4
            return newest in {0, *points()} and len(points()) <= kept

        async with aclosing(self.client.segments(sid, start=0)) as stream:
            async for segment in stream:
                made = segment.index + 1
                if made % 4 == 0:
                    # A snapshot that waits to be written gives way to the next one.
                    assert await asyncio.to_thread(eventually, lambda n=made: n in points())
                if made == chunks:
                    # Before it is paused: that fences what is being written, or pruned.
                    assert await asyncio.to_thread(eventually, saved)
                    break
        await self.client.pause(sid)
        return sid

    async def watch(self, sid: str, start: int, count: int) -> list[Segment]:
        seen: list[Segment] = []
        async for segment in self.client.segments(sid, start=start):
            seen.append(segment)
            if len(seen) == count:
                break
        assert [s.index for s in seen] == list(range(start, start + count))
        assert not any(s.metadata.discontinuity for s in seen)
        return seen

    async def digests(self, sid: str, start: int, count: int) -> list[str]:
        return [s.metadata.digest for s in await self.watch(sid, start, count)]


@asynccontextmanager
async def cluster(engine: FakeEngine | None = None, **session: Any) -> AsyncIterator[Cluster]:
    with Replicas(**session) as replicas:
        replicas.start("a", engine or FakeEngine())
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
            async with EchoClient(f"http://{router.address}") as client:
                yield Cluster(replicas, router, client)
        finally:
            await router.stop()


def run(test: Callable[..., Awaitable[None]], *arguments: Any, **session: Any) -> None:
    async def whole() -> None:
        async with asyncio.timeout(55), cluster(**session) as here:
            await test(here, *arguments)

    asyncio.run(whole())


def truth(
    count: int, switches: dict[int, list[str]] | None = None, frames: bytes = b""
) -> list[str]:
    engine = FakeEngine()
    return undisturbed(
        engine, PROMPT, 7, count, {5: ["blue"]} if switches is None else switches, frames
    )


@pytest.mark.parametrize("chunk", [0, 3, 4, 5, 6, 17, 20])
def test_a_fork_goes_on_as_its_source_did(chunk: int) -> None:
    async def test(here: Cluster) -> None:
        sid = await here.begun(20)
        before = here.directory.get(sid)
        made = await here.client.fork(sid, chunk)
        assert made["forked_from"] == {"session": sid, "chunk": chunk}
        assert (made["id"] != sid, made["next_chunk"], made["state"]) == (True, chunk, "live")
        assert (made["prompt"], made["seed"], made["epoch"]) == (PROMPT, 7, 0)
        if chunk <= 5:
            # What is pinned at or after the chunk does not come along.
            await here.client.send_event(made["id"], "blue", at_chunk=5)
        start = max(0, chunk - 2)
        got = await here.digests(made["id"], start, 30 - start)
        assert got == truth(30)[start:]
        assert here.directory.digests(made["id"], 0, 30) == dict(enumerate(truth(30)))
        assert here.directory.get(sid) == before
        assert await here.digests(sid, 18, 12) == truth(30)[18:]

    run(test)


def test_a_past_that_is_not_made_again_bit_for_bit_is_marked() -> None:
    async def test(here: Cluster) -> None:
        source = here.directory.get(await here.begun(9))
        digests = here.directory.digests(source.id, 0, 9)
        record = forked(source, 9, new_id="s2", now=1.0, wish=Wish())
        here.directory.restore(Past(record=record, digests=digests | {7: "another"}))
        await here.client.send_event("s2", "blue", at_chunk=9)
        seen = []
        async for segment in here.client.segments("s2", start=4):
            seen.append((segment.index, segment.metadata.discontinuity))
            if segment.index == 8:
                break
        # Without the switch at chunk 5 all but the first is another.
        assert seen == [(4, False), (5, True), (6, True), (7, True), (8, True)]

    run(test)


def test_a_fork_of_a_running_session_disturbs_nobody() -> None:
    async def test(here: Cluster) -> None:
        sid = (await here.client.create(PROMPT, seed=7, pace="max"))["id"]
        forks: list[dict[str, Any]] = []
        seen = []
        async for segment in here.client.segments(sid, start=0):
            seen.append(segment.metadata.digest)
            if segment.index in (6, 11, 14):
                forks.append(await here.client.fork(sid))
            if segment.index == 30:
                break
        assert seen == truth(31, {})
        assert here.directory.get(sid).epoch == 1
        for made in forks:
            assert 6 < made["next_chunk"] <= 31
            assert (
                await here.digests(made["id"], made["next_chunk"], 10)
                == (truth(made["next_chunk"] + 10, {})[-10:])
            )

    run(test, lead_chunks=2)


def test_a_fork_can_take_another_way() -> None:
    async def test(here: Cluster) -> None:
        sid = await here.begun(20)
        made = await here.client.fork(
            sid, 14, prompt="green", labels={"a": "b"}, on_idle="close", pace="max"
        )
        assert (made["labels"], made["on_idle"], made["pace"]) == ({"a": "b"}, "close", "max")
        switches = {5: ["blue"], 14: ["green"]}
        seen = await here.watch(made["id"], 10, 15)
        assert [s.metadata.digest for s in seen] == truth(25, switches)[10:]
        assert [s.metadata.prompt for s in seen] == ["blue"] * 4 + ["green"] * 11
        begins = next(s for s in seen if s.index == 14).metadata
        assert begins.started_event_ids == (f"fork-{made['id']}",)
        again = await here.client.fork(made["id"], 20, prompt="red")
        switches[20] = ["red"]
        assert await here.digests(again["id"], 20, 5) == truth(25, switches)[20:]

    run(test)


def test_closed_sessions_can_be_forked_and_an_old_snapshot_is_enough() -> None:
    async def test(here: Cluster) -> None:
        sid = await here.begun(20)
        here.directory.set_state(sid, state="closed")
        newest = here.directory.snapshots(sid)[0]
        # Its bytes are damaged; the one before leads there as well.
        here.replicas.snapshots.put(sid, newest.id, b"nothing")
        made = await here.client.fork(sid)
        kept = here.directory.snapshots(made["id"])
        assert [r.chunk_index for r in kept] == [newest.chunk_index - 4]
        assert (
            await here.digests(made["id"], made["next_chunk"], 5)
            == (truth(made["next_chunk"] + 5)[-5:])
        )

    run(test)


def test_a_fork_that_is_to_run_without_viewers_begins_at_once() -> None:
    async def test(here: Cluster) -> None:
        sid = await here.begun(10)
        made = (await here.client.fork(sid, on_idle="continue"))["id"]
        going_on = lambda: here.directory.get(made).next_index > 12  # noqa: E731
        assert await asyncio.to_thread(eventually, going_on)
        waiting = await here.client.fork(sid)
        await asyncio.sleep(0.3)
        assert here.directory.get(waiting["id"]).epoch == 0

    run(test)


def test_a_rewound_session_gets_a_successor() -> None:
    async def test(here: Cluster) -> None:
        sid = (await here.client.create(PROMPT, seed=7, pace="max"))["id"]
        await here.client.send_event(sid, "blue", at_chunk=5)
        await here.client.send_event(sid, "green", at_chunk=12)
        url = f"ws://{here.router.address}/v1/sessions/{sid}/stream?from=0&format=raw"
        async with connect(url, max_size=None) as viewer:
            told = [json.loads(await viewer.recv())]
            await here.watch(sid, 0, 15)
            made = await here.client.rewind(sid, 9)
            async for message in viewer:
                if isinstance(message, str):
                    told.append(json.loads(message))
        assert viewer.close_code == 1000
        assert told[-1] == {"type": "session.done", "reason": "rewound", "successor": made["id"]}
        assert made["forked_from"] == {"session": sid, "chunk": 9}
        assert (await here.client.get(sid))["state"] == "closed"
        assert here.directory.digests(sid, 0, 15) == dict(
            enumerate(truth(15, {5: ["blue"], 12: ["green"]}))
        )
        assert await here.digests(made["id"], 7, 13) == truth(20)[7:]
        again = await here.client.rewind(sid, 3)
        assert await here.digests(again["id"], 3, 6) == truth(9, {})[3:]
        with pytest.raises(SessionClosed):
            await here.client.resume(sid)

    run(test)


def test_a_paused_session_is_still_paused_when_it_is_rewound() -> None:
    async def test(here: Cluster) -> None:
        sid = (await here.client.create(PROMPT, seed=7, pace="max", on_idle="continue"))["id"]
        await here.client.send_event(sid, "blue", at_chunk=5)
        await here.watch(sid, 0, 10)
        await here.client.pause(sid)
        made = await here.client.rewind(sid, 8)
        assert (made["state"], made["owner"]) == ("paused", None)
        assert (await here.client.resume(made["id"]))["state"] == "live"
        assert await here.digests(made["id"], 8, 6) == truth(14)[8:]

    run(test)


def test_another_cluster_goes_on_where_an_export_stood(tmp_path: Path) -> None:
    file = tmp_path / "session.echo"

    async def test(here: Cluster) -> None:
        sid = await here.begun(10, labels={"a": "b"})
        stood = here.directory.get(sid).next_index
        await here.client.send_event(sid, "green", at_chunk=stood)
        await here.client.send_event(sid, "red", at_chunk=stood + 9)
        assert await here.client.export(sid, file) == file.stat().st_size
        switches = {5: ["blue"], stood: ["green"], stood + 9: ["red"]}
        async with cluster() as there:
            made = await there.client.import_(file)
            assert (made["labels"], made["next_chunk"], made["state"]) == (
                {"a": "b"},
                stood,
                "paused",
            )
            start = stood - 3
            got = await there.digests(made["id"], start, 20)
            assert got == truth(start + 20, switches)[start:]
            twin = await there.client.import_(file.read_bytes())
            assert twin["id"] != made["id"]
            assert await there.digests(twin["id"], start, 20) == got
            assert list(await asyncio.to_thread(os.listdir, tmp_path)) == [file.name]
        # The session that was exported has noticed nothing.
        assert here.directory.get(sid).next_index == stood
        assert await here.digests(sid, stood, 10) == truth(stood + 10, switches)[stood:]

    run(test)


def test_a_clip_comes_along(tmp_path: Path) -> None:
    frames = read_clip(CLIP, FakeEngine().shape, LimitsSection())
    file = tmp_path / "session.echo"

    async def test(here: Cluster) -> None:
        sid = await here.begun(3, clip=CLIP)
        await here.client.export(sid, file)
        made = await here.client.fork(sid, 2)
        assert made["clip_frames"] == 9
        await here.client.delete(sid)
        expected = truth(12, frames=frames)
        assert await here.digests(made["id"], 0, 5) == expected[:5]
        async with cluster() as there:
            taken = await there.client.import_(file)
            assert taken["clip_frames"] == 9
            # From its very beginning, which is the clip.
            for ref in there.directory.snapshots(taken["id"]):
                there.directory.drop_snapshot(taken["id"], ref.id)
            assert await there.digests(taken["id"], 0, 12) == expected

    run(test)


def test_without_its_clip_only_a_snapshot_leads_on(tmp_path: Path) -> None:
    async def test(here: Cluster) -> None:
        sid = await here.begun(8, clip=CLIP)
        clip = here.directory.get(sid).clip
        assert clip is not None
        here.replicas.snapshots.put(sid, clip.id, CLIP[:-1])
        with pytest.raises(ClipLost, match="not what was uploaded"):
            await here.client.fork(sid, 2)
        here.replicas.snapshots.delete(sid, clip.id)
        with pytest.raises(ClipLost, match="begin at a later chunk"):
            await here.client.fork(sid, 2)
        made = await here.client.fork(sid, 5)
        frames = read_clip(CLIP, FakeEngine().shape, LimitsSection())
        await here.client.send_event(made["id"], "blue", at_chunk=5)
        assert await here.digests(made["id"], 5, 6) == truth(11, frames=frames)[5:]
        await here.client.export(sid, tmp_path / "session.echo")
        async with cluster() as there:
            taken = await there.client.import_(tmp_path / "session.echo")
            stood = taken["next_chunk"]
            expected = truth(stood + 5, frames=frames)
            assert await there.digests(taken["id"], stood, 5) == expected[stood:]

    run(test)


def test_engines_of_another_release_refuse_an_import(tmp_path: Path) -> None:
    file = tmp_path / "session.echo"

    async def test(here: Cluster) -> None:
        await here.client.export(await here.begun(10), file)
        other = FakeEngine(fingerprint="echo-tiny/other/cpu")
        async with cluster(engine=other) as there:
            running = (await there.client.create(PROMPT, pace="max", on_idle="continue"))["id"]
            await there.watch(running, 0, 3)
            with pytest.raises(SnapshotForeign, match="'fake'; here runs 'echo-tiny/other'"):
                await there.client.import_(file)
            assert [r.id for r in there.directory.list()] == [running]

    run(test)


def test_what_is_out_of_reach_is_gone_and_the_rest_is_named() -> None:
    async def test(here: Cluster) -> None:
        sid = await here.begun(60)
        # Retention 8 and a point every 4 chunks: at most 20 are made again.
        kept = sorted(r.chunk_index for r in here.directory.snapshots(sid))
        end = here.directory.get(sid).next_index
        for call, chunk in ((here.client.fork, 21), (here.client.rewind, kept[0] - 1)):
            with pytest.raises(ChunkUnreachable, match=f"0 to 20, {kept[0]} to {end}"):
                await call(sid, chunk)
        assert [r.id for r in here.directory.list()] == [sid]
        assert here.directory.get(sid).state == "paused"
        made = await here.client.fork(sid, kept[0])
        assert await here.digests(made["id"], kept[0], 3) == truth(60)[kept[0] : kept[0] + 3]
        assert (await here.client.fork(sid, 20))["next_chunk"] == 20

    run(test, retention_chunks=8, snapshots_kept=2)
