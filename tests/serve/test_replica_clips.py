"""Sessions that begin with a clip, on replicas: it counts at every return to the beginning."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fakes import FakeEngine, undisturbed
from replicas import Replicas, Unreliable, close_code, digests, eventually, pull, watch
from uploads import mp4, still

from echo_ray.config import LimitsSection
from echo_ray.engine.upload import read_clip
from echo_ray.errors import StoreCorrupt, StoreUnavailable
from echo_ray.session.records import ClipRef, SessionRecord, SessionState

CLIP = mp4(11)
SHAPE = FakeEngine().shape
FRAMES = read_clip(CLIP, SHAPE, LimitsSection())


def session_with_clip(bench: Replicas, clip: bytes = CLIP, **changes: Any) -> SessionRecord:
    """As a router makes it: the blob first."""
    digest = hashlib.sha256(clip).hexdigest()
    count = len(read_clip(clip, SHAPE, LimitsSection())) // (8 * 8 * 3)
    ref = ClipRef(id=f"clip-{digest[:16]}", sha256=digest, frames=count)
    bench.snapshots.put("s1", ref.id, clip)
    record = SessionRecord(
        id="s1", model="echo-tiny", prompt="a red circle", seed=7, clip=replace(ref, **changes)
    )
    bench.directory.create(record)
    return record


def truth(count: int, first_frames: bytes = FRAMES) -> list[str]:
    return undisturbed(FakeEngine(), "a red circle", 7, count, {}, first_frames)


def written(bench: Replicas, index: int) -> bool:
    return index in [s.chunk_index for s in bench.directory.snapshots("s1")]


def test_the_engine_is_opened_with_the_frames_of_the_clip() -> None:
    with Replicas() as bench:
        one = bench.start("r1")
        session_with_clip(bench)
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 6))) == truth(6)
        assert truth(6)[0] != truth(6, b"")[0]
        assert bench.engines["r1"].opened_with == [9]


def test_a_picture_is_a_clip_of_the_first_chunk() -> None:
    with Replicas() as bench:
        one = bench.start("r1")
        session_with_clip(bench, still())
        frames = read_clip(still(), SHAPE, LimitsSection())
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 3))) == truth(3, frames)


def test_a_crash_before_the_first_point_begins_with_the_clip_again() -> None:
    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        session_with_clip(bench)
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 3))) == truth(3)
        bench.crash(one)
        assert not bench.directory.snapshots("s1")
        assert digests(asyncio.run(watch(two, bench.claim(two), 3, 6))) == truth(9)[3:]
        assert bench.engines["r2"].opened_with == [9]
        assert two.telemetry.value("echo_ray_digest_mismatches_total") == 0


def test_other_limits_by_then_change_nothing() -> None:
    with Replicas() as bench:
        bench.config = replace(
            bench.config, limits=LimitsSection(clip_bytes=1, clip_seconds=1, clip_side=1)
        )
        one = bench.start("r1")
        session_with_clip(bench)
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 3))) == truth(3)


def test_the_past_before_a_point_is_made_again_from_the_clip() -> None:
    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        session_with_clip(bench)
        asyncio.run(watch(one, bench.claim(one), 0, 5))
        assert eventually(lambda: written(bench, 4))
        bench.crash(one)
        epoch = bench.claim(two)
        assert digests(asyncio.run(watch(two, epoch, 1, 6))) == truth(7)[1:]
        assert bench.engines["r2"].loaded == [4]
        assert bench.engines["r2"].opened_with == [9]


DAMAGE = {
    "gone": lambda bench, ref: bench.snapshots.delete("s1", ref.id),
    "changed": lambda bench, ref: bench.snapshots.put("s1", ref.id, CLIP[:-1] + b"?"),
    "emptied": lambda bench, ref: bench.snapshots.put("s1", ref.id, b""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_lost_clip_pauses_the_session_and_tells_its_viewers(damage: Any) -> None:
    async def refused(replica: Any, epoch: int) -> tuple[int | None, str, str]:
        async with pull(replica, epoch) as end:
            code = await close_code(end)
            return code, end.others[-1]["code"], end.others[-1]["message"]

    with Replicas() as bench:
        one = bench.start("r1")
        record = session_with_clip(bench)
        damage(bench, record.clip)
        code, name, words = asyncio.run(refused(one, bench.claim(one)))
        assert (code, name) == (1008, "clip_lost")
        assert "create the session again" in words
        assert bench.engines["r1"].opened_with == []
        assert eventually(lambda: bench.directory.get("s1").state is SessionState.PAUSED)
        # Restored, it goes on.
        assert record.clip is not None
        bench.snapshots.put("s1", record.clip.id, CLIP)
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 3))) == truth(3)


def test_a_clip_that_reads_otherwise_than_when_it_was_taken_is_lost() -> None:
    async def refused(replica: Any, epoch: int) -> str:
        async with pull(replica, epoch) as end:
            await close_code(end)
            return str(end.others[-1]["message"])

    with Replicas() as bench:
        one = bench.start("r1")
        session_with_clip(bench, frames=13)
        words = asyncio.run(refused(one, bench.claim(one)))
        assert "gives 11 frames where it gave 13" in words


def test_a_session_that_has_a_point_goes_on_without_its_clip() -> None:
    async def past(replica: Any, epoch: int) -> tuple[int | None, str]:
        async with pull(replica, epoch, 1) as end:
            return await close_code(end), end.others[-1]["code"]

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        record = session_with_clip(bench)
        asyncio.run(watch(one, bench.claim(one), 0, 5))
        assert eventually(lambda: written(bench, 4))
        bench.crash(one)
        assert record.clip is not None
        bench.snapshots.delete("s1", record.clip.id)
        epoch = bench.claim(two)
        assert digests(asyncio.run(watch(two, epoch, 5, 4))) == truth(9)[5:]
        assert asyncio.run(past(two, epoch)) == (1008, "segment_expired")
        assert digests(asyncio.run(watch(two, epoch, 9, 2))) == truth(11)[9:]


def test_a_store_that_cannot_answer_for_a_while_delays_the_clip_and_no_more() -> None:
    with Replicas() as bench:
        store = Unreliable(bench.snapshots)
        store.failures["get"] = [StoreUnavailable("gone for now"), StoreUnavailable("still")]
        one = bench.start("r1", store=store)
        session_with_clip(bench)
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 3))) == truth(3)
        assert store.calls.count("get") == 3


def test_a_damaged_store_is_a_lost_clip() -> None:
    async def refused(replica: Any, epoch: int) -> str:
        async with pull(replica, epoch) as end:
            await close_code(end)
            return str(end.others[-1]["code"])

    with Replicas() as bench:
        store = Unreliable(bench.snapshots)
        store.failures["get"] = [StoreCorrupt("the disk says no")]
        one = bench.start("r1", store=store)
        session_with_clip(bench)
        assert asyncio.run(refused(one, bench.claim(one))) == "clip_lost"


def test_a_session_without_readers_is_paused_too_when_its_clip_is_lost() -> None:
    with Replicas() as bench:
        one = bench.start("r1")
        record = session_with_clip(bench)
        assert record.clip is not None
        bench.snapshots.delete("s1", record.clip.id)
        epoch = bench.claim(one)
        with httpx.Client() as http:
            http.post(f"http://{one.address}/v1/own/s1", params={"epoch": epoch})
        assert eventually(lambda: bench.directory.get("s1").state is SessionState.PAUSED)
        assert bench.engines["r1"].stepped == []
