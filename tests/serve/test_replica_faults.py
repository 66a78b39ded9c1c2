import asyncio

import httpx
import pytest
from fakes import FakeClock, FakeEngine
from replicas import (
    Replicas,
    Unreliable,
    close_code,
    digests,
    eventually,
    hello,
    pull,
    truth,
    watch,
)

from echo_ray.errors import StoreFull, StoreUnavailable, UnavailableError
from echo_ray.serve.host import ENGINE_STUCK_S
from echo_ray.session.records import SessionState


def test_a_failed_step_is_repeated_from_the_last_point():
    with Replicas() as bench:
        engine = FakeEngine()
        engine.failing = [6, 6]
        one = bench.start("r1", engine)
        bench.session()
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 9))) == truth(9)
        assert one.telemetry.value("echo_ray_engine_failures_total") == 2
        assert bench.directory.get("s1").epoch == 1


def test_three_failures_in_a_row_release_the_session_with_an_error():
    async def fail(one, epoch):
        async with pull(one, epoch, want=9) as end:
            await hello(end)
            await end.chunks(2)
            return await close_code(end), end.others[-1]["code"]

    with Replicas() as bench:
        engine = FakeEngine()
        engine.failing = [2, 2, 2]
        one = bench.start("r1", engine)
        bench.session()
        assert asyncio.run(fail(one, bench.claim(one))) == (1011, "engine_failed")
        # Its readers hear why before it is given up.
        assert eventually(lambda: bench.directory.get("s1").owner is None)
        record = bench.directory.get("s1")
        assert (record.state, record.next_index) == (SessionState.LIVE, 2)


def test_a_prompt_that_the_engine_refuses_pauses_the_session_with_its_error():
    async def refuse(one, epoch):
        async with pull(one, epoch, want=1) as end:
            return await close_code(end), end.others[-1]["code"]

    with Replicas() as bench:
        one = bench.start("r1")
        bench.session(prompt="refused")
        assert asyncio.run(refuse(one, bench.claim(one))) == (1008, "prompt_invalid")
        assert eventually(lambda: bench.directory.get("s1").state is SessionState.PAUSED)


@pytest.mark.parametrize("method", ["seal", "commit"])
def test_a_store_that_fails_for_a_while_delays_the_chunk_and_nothing_else(method):
    with Replicas() as bench:
        store = Unreliable(bench.directory)
        error = StoreFull("disk full") if method == "commit" else StoreUnavailable("gone")
        store.failures[method] = [None, None, error, error]
        one = bench.start("r1", directory=lambda: store)
        bench.session()
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 6))) == truth(6)
        assert bench.engines["r1"].stepped == list(range(6))
        assert one.telemetry.value("echo_ray_store_errors_total", op="progress") == 2


def test_a_commit_whose_answer_was_lost_is_recognised():
    class Deaf(Unreliable):
        def commit(self, *args):
            self._inner.commit(*args)
            if args[1] == 2:
                raise StoreUnavailable("the answer was lost")

    with Replicas() as bench:
        store = Deaf(bench.directory)
        one = bench.start("r1", directory=lambda: store)
        bench.session()
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 6))) == truth(6)
        assert bench.engines["r1"].stepped == list(range(6))


def test_snapshots_that_cannot_be_written_or_read_cost_time_and_no_chunk():
    with Replicas() as bench:
        blobs = Unreliable(bench.snapshots)
        blobs.failures["put"] = [None, StoreFull("disk full")]
        one = bench.start("r1", store=blobs)
        two = bench.start("r2", store=blobs)
        bench.session()
        epoch = bench.claim(one)
        first = asyncio.run(watch(one, epoch, 0, 5))
        assert eventually(lambda: len(bench.directory.snapshots("s1")) == 1)
        first += asyncio.run(watch(one, epoch, 5, 6))
        wrong = lambda: one.telemetry.value("echo_ray_snapshots_total", outcome="failed")  # noqa: E731
        assert eventually(lambda: wrong() == 1)
        bench.crash(one)
        assert [s.chunk_index for s in bench.directory.snapshots("s1")] == [4]
        ref = bench.directory.snapshots("s1")[0]
        blob = bench.snapshots.get("s1", ref.id)
        bench.snapshots.put("s1", ref.id, blob[:-9])
        second = asyncio.run(watch(two, bench.claim(two), 11, 3))
        assert digests(first + second) == truth(14)
        assert two.telemetry.value("echo_ray_snapshots_total", outcome="unreadable") == 1
        assert bench.engines["r2"].loaded == []


def test_a_snapshot_of_another_point_is_refused():
    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        epoch = bench.claim(one)
        first = asyncio.run(watch(one, epoch, 0, 5))
        assert eventually(lambda: len(bench.directory.snapshots("s1")) == 1)
        early = bench.snapshots.get("s1", bench.directory.snapshots("s1")[0].id)
        first += asyncio.run(watch(one, epoch, 5, 5))
        assert eventually(lambda: len(bench.directory.snapshots("s1")) == 2)
        bench.crash(one)
        bench.snapshots.put("s1", bench.directory.snapshots("s1")[0].id, early)
        second = asyncio.run(watch(two, bench.claim(two), 10, 3))
        assert digests(first + second) == truth(13)
        assert two.telemetry.value("echo_ray_snapshots_total", outcome="refused") == 1
        assert bench.engines["r2"].loaded == [4, 4]


def test_old_snapshots_are_pruned_and_pinned_ones_stay():
    with Replicas(snapshots_kept=2) as bench:
        one = bench.start("r1", FakeEngine(point_every=2))
        bench.session()
        epoch = bench.claim(one)
        asyncio.run(watch(one, epoch, 0, 2))
        assert eventually(lambda: len(bench.directory.snapshots("s1")) == 1)
        pinned = bench.directory.snapshots("s1")[0]
        bench.directory.pin_snapshot("s1", pinned.id)
        for start in range(2, 12, 2):
            asyncio.run(watch(one, epoch, start, 2))
            found = lambda n=start: bench.directory.snapshots("s1")[0].chunk_index == n + 2  # noqa: E731
            assert eventually(found)

        def left():
            return [s.chunk_index for s in bench.directory.snapshots("s1")]

        assert eventually(lambda: left() == [12, 10, 2])
        assert bench.snapshots.get("s1", pinned.id)


def test_another_kind_of_device_is_marked_and_counted():
    with Replicas(resume_policy="compatible") as bench:
        one = bench.start("r1")
        two = bench.start("r2", FakeEngine(fingerprint="fake/other"))
        bench.session()
        asyncio.run(watch(one, bench.claim(one), 0, 6))
        bench.crash(one)
        heads = asyncio.run(watch(two, bench.claim(two), 5, 4))
        assert [h["discontinuity"] for h in heads] == [True, True, False, False]
        assert two.telemetry.value("echo_ray_digest_mismatches_total") == 6
        assert two.telemetry.value("echo_ray_snapshots_total", outcome="refused") == 1


def test_a_replica_whose_engine_hangs_stops_to_look_alive():
    async def hang(bench, one, epoch):
        engine = bench.engines["r1"]
        async with pull(one, epoch, want=2) as end:
            await hello(end)
            await end.chunks(2)
            engine.may_step.clear()
            await end.want(10)
            sealed = lambda: bench.directory.get("s1").sealed == 3  # noqa: E731
            assert await asyncio.to_thread(eventually, sealed)
            closed = asyncio.create_task(close_code(end))
            while not closed.done():
                # Again if a renewal was on its way.
                bench.clock.advance(ENGINE_STUCK_S)
                await asyncio.sleep(0.05)
            return await closed

    with Replicas(clock=FakeClock(), lease_ttl_s=ENGINE_STUCK_S / 2) as bench:
        one = bench.start("r1")
        bench.session()
        one.check()
        assert asyncio.run(hang(bench, one, bench.claim(one))) == 4001
        with pytest.raises(UnavailableError, match="hangs"):
            one.check()
        bench.clock.advance(ENGINE_STUCK_S)
        assert httpx.get(f"http://{one.address}/healthz").status_code == 503
        assert eventually(lambda: bench.directory.replicas() == [])
        bench.engines["r1"].may_step.set()
        assert eventually(lambda: [r.id for r in bench.directory.replicas()] == ["r1"])
