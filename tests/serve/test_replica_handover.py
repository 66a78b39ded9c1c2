import asyncio

import httpx
import pytest
from fakes import FakeClock, FakeEngine
from replicas import (
    LIMIT_S,
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

from echo_ray.errors import StoreUnavailable
from echo_ray.session.records import Lease, SessionState

SWITCHES = {3: ["a blue square"], 9: ["a green star"]}


@pytest.mark.parametrize("point_every", [1, 3, 4])
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 9])
def test_another_replica_goes_on_after_a_loss_without_goodbye(cut, point_every):
    with Replicas() as bench:
        one = bench.start("r1", FakeEngine(point_every=point_every))
        two = bench.start("r2", FakeEngine(point_every=point_every))
        bench.session()
        for chunk, prompts in SWITCHES.items():
            bench.directory.append_control("s1", f"e{chunk}", prompts[0], at_chunk=chunk)
        first = asyncio.run(watch(one, bench.claim(one), 0, cut, want=cut + 1))
        bench.crash(one)
        second = asyncio.run(watch(two, bench.claim(two), cut, 12 - cut))
        heads = first + second
        assert [h["chunk_index"] for h in heads] == list(range(12))
        assert digests(heads) == truth(12, point_every, SWITCHES)
        assert not any(h["discontinuity"] for h in heads)
        resumed = next(h for h in second if h["chunk_index"] == max(cut, 3))
        assert resumed["active_event_ids"] == (["e9"] if cut == 9 else ["e3"])
        assert two.telemetry.value("echo_ray_digest_mismatches_total") == 0


def test_resuming_replays_only_what_came_after_the_last_point():
    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        epoch = bench.claim(one)
        for start, count in [(0, 4), (4, 4), (8, 3)]:
            asyncio.run(watch(one, epoch, start, count))
            points = start // 4 + (1 if count == 4 else 0)
            assert eventually(lambda n=points: len(bench.directory.snapshots("s1")) == n)
        bench.crash(one)
        assert digests(asyncio.run(watch(two, bench.claim(two), 11, 1))) == truth(12)[11:]
        assert bench.engines["r2"].loaded == [8]
        assert bench.engines["r2"].stepped == [8, 9, 10, 11]
        assert two.telemetry.value("echo_ray_session_resumes_total", outcome="ok") == 1


def test_a_crash_between_commit_and_delivery_loses_nothing():
    async def make(bench, one, epoch):
        async with pull(one, epoch, want=7) as end:
            await hello(end)
            made = lambda: bench.directory.get("s1").next_index == 7  # noqa: E731
            assert await asyncio.to_thread(eventually, made)

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        asyncio.run(make(bench, one, bench.claim(one)))
        bench.crash(one)
        assert digests(asyncio.run(watch(two, bench.claim(two), 2, 8))) == truth(10)[2:]


def test_a_crash_between_seal_and_commit_keeps_what_was_sealed():
    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        epoch = bench.claim(one)
        asyncio.run(watch(one, epoch, 0, 2))
        bench.directory.append_control("s1", "e2", "a blue square")
        bench.directory.seal(Lease("s1", "r1", epoch), 2)
        bench.crash(one)
        assert bench.directory.append_control("s1", "e3", "a white dot").chunk == 3
        heads = asyncio.run(watch(two, bench.claim(two), 2, 3))
        expected = truth(5, switches={2: ["a blue square"], 3: ["a white dot"]})
        assert digests(heads) == expected[2:]


def test_a_fenced_owner_closes_its_readers_and_writes_nothing_more():
    async def fence(bench, one, two, epoch):
        async with pull(one, epoch, want=3) as end:
            await hello(end)
            await end.chunks(3)
            taken = bench.claim(two)
            await end.want(50)
            assert await close_code(end) == 4001
            assert end.others[-1]["code"] == "fenced"
            assert not [m for m in end.others if m["type"] == "video.chunk_metadata"]
        return taken

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        epoch = bench.claim(one)
        asyncio.run(fence(bench, one, two, epoch))
        assert bench.directory.get("s1").next_index == 3
        assert eventually(lambda: one.host.runners() == [])


def test_an_owner_with_nothing_to_do_learns_at_its_next_renewal_that_it_is_fenced():
    async def fence(bench, one, two, epoch):
        async with pull(one, epoch, want=3) as end:
            await hello(end)
            await end.chunks(3)
            bench.claim(two)
            return await close_code(end), [m["type"] for m in end.others]

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        assert asyncio.run(fence(bench, one, two, bench.claim(one))) == (4001, ["error"])
        # Its reader hears of it before it is counted.
        lost = lambda: one.telemetry.value("echo_ray_leases_lost_total", reason="taken")  # noqa: E731
        assert eventually(lambda: lost() == 1)


def test_an_owner_whose_lease_ran_out_by_its_own_clock_stops_before_it_writes():
    async def outlive(bench, one, epoch):
        engine = bench.engines["r1"]
        async with pull(one, epoch, want=2) as end:
            await hello(end)
            await end.chunks(2)
            engine.may_step.clear()
            await end.want(10)
            assert await asyncio.to_thread(eventually, lambda: store.calls.count("seal") == 3)
            store.failures["renew"] = [StoreUnavailable("the store is gone")] * 100_000
            bench.clock.advance(bench.config.session.lease_ttl_s)
            assert await close_code(end) == 4001
            engine.may_step.set()

    with Replicas(clock=FakeClock(), lease_ttl_s=9.0) as bench:
        store = Unreliable(bench.directory)
        one = bench.start("r1", directory=lambda: store)
        bench.session()
        asyncio.run(outlive(bench, one, bench.claim(one)))
        assert eventually(lambda: bench.engines["r1"].stepped[-1] == 2)
        # The engine thread is at nothing: it has come back from the step, and written what it may.
        assert eventually(lambda: one.host._stepper.busy_s() == 0.0)
        assert store.calls.count("commit") == 2
        assert store.calls.count("seal") == 3
        lost = lambda: one.telemetry.value("echo_ray_leases_lost_total", reason="expired")  # noqa: E731
        assert eventually(lambda: lost() == 1)


def test_a_stopped_engine_thread_that_wakes_up_is_refused_by_the_store_too():
    async def steal(bench, one, two, epoch):
        engine = bench.engines["r1"]
        async with pull(one, epoch, want=2) as end:
            await hello(end)
            await end.chunks(2)
            engine.may_step.clear()
            await end.want(10)
            assert await asyncio.to_thread(
                eventually, lambda: bench.directory.get("s1").sealed == 3
            )
            return await watch(two, bench.claim(two), 2, 4)

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        heads = asyncio.run(steal(bench, one, two, bench.claim(one)))
        bench.engines["r1"].may_step.set()
        assert digests(heads) == truth(6)[2:]
        assert eventually(lambda: one.host.runners() == [])
        assert bench.directory.get("s1").next_index == 6
        assert bench.directory.digests("s1", 0, 9) == dict(enumerate(truth(6)))


def test_prepare_then_take_over_replays_nothing_and_changes_nothing():
    async def migrate(bench, one, two, epoch):
        async with pull(one, epoch, want=10) as end:
            await hello(end)
            heads = await end.chunks(10)
            points = lambda: [s.chunk_index for s in bench.directory.snapshots("s1")]  # noqa: E731
            assert await asyncio.to_thread(eventually, lambda: 8 in points())
            async with httpx.AsyncClient(timeout=LIMIT_S) as http:
                answer = await http.post(f"http://{two.address}/v1/prepare/s1")
            assert answer.json() == {"next_index": 10}
            await end.want(13)
            heads += await end.chunks(3)
            shadow = bench.engines["r2"]
            assert await asyncio.to_thread(
                eventually, lambda: shadow.stepped and shadow.stepped[-1] == 12
            )
            made = list(shadow.stepped)
            taken = bench.claim(two)
            heads += await watch(two, taken, 13, 4)
            assert await close_code(end) == 4001
        assert shadow.stepped == [*made, 13, 14, 15, 16]
        return heads

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        heads = asyncio.run(migrate(bench, one, two, bench.claim(one)))
        assert digests(heads) == truth(17)
        assert [h["owner"] for h in heads] == ["r1"] * 13 + ["r2"] * 4
        assert bench.engines["r2"].loaded == [8]


def test_prepare_refuses_unknown_and_closed_sessions():
    with Replicas() as bench:
        one = bench.start("r1")
        bench.session()
        bench.directory.set_state("s1", state="closed")
        for session_id, status in [("nobody", 404), ("s1", 409)]:
            url = f"http://{one.address}/v1/prepare/{session_id}"
            assert httpx.post(url).status_code == status
        assert one.host.runners() == []


def test_the_same_replica_goes_on_under_a_newer_epoch_without_loading():
    async def twice(bench, one):
        async with pull(one, bench.claim(one), want=3) as end:
            await hello(end)
            heads = await end.chunks(3)
            heads += await watch(one, bench.claim(one), 3, 3)
            assert await close_code(end) == 4001
            assert [m["type"] for m in end.others] == ["error"]
        return heads

    with Replicas(lease_ttl_s=60.0, lease_renew_s=20.0) as bench:
        one = bench.start("r1")
        bench.session()
        heads = asyncio.run(twice(bench, one))
        assert digests(heads) == truth(6)
        assert [h["epoch"] for h in heads] == [1, 1, 1, 2, 2, 2]
        assert bench.engines["r1"].stepped == list(range(6))


def test_a_chunk_in_work_under_an_old_epoch_is_committed_under_the_new_one_before_anybody_gets_it():
    async def reclaim(bench, store, one):
        engine = bench.engines["r1"]
        async with pull(one, bench.claim(one), want=2) as end:
            await hello(end)
            await end.chunks(2)
            engine.may_step.clear()
            await end.want(10)
            sealed = lambda: bench.directory.get("s1").sealed == 3  # noqa: E731
            assert await asyncio.to_thread(eventually, sealed)
        store.failures["commit"] = [StoreUnavailable("busy")] * 4
        async with pull(one, bench.claim(one), 2, want=3) as end:
            engine.may_step.set()
            await hello(end)
            head, _ = await end.chunk()
            return head, bench.directory.get("s1").next_index

    with Replicas(lease_ttl_s=60.0, lease_renew_s=20.0) as bench:
        store = Unreliable(bench.directory)
        one = bench.start("r1", directory=lambda: store)
        bench.session()
        head, next_index = asyncio.run(reclaim(bench, store, one))
        assert (head["digest"], head["epoch"], next_index) == (truth(3)[2], 2, 3)
        assert bench.engines["r1"].stepped == [0, 1, 2]


@pytest.mark.parametrize("other", ["fake", "fake/other"])
def test_an_owner_that_comes_back_before_it_noticed_takes_in_what_another_did(other):
    async def there_and_back(bench, one, two):
        engine = bench.engines["r1"]
        async with pull(one, bench.claim(one), want=2) as end:
            await hello(end)
            heads = await end.chunks(2)
            engine.may_step.clear()
            await end.want(10)
            sealed = lambda: bench.directory.get("s1").sealed == 3  # noqa: E731
            assert await asyncio.to_thread(eventually, sealed)
            heads += await watch(two, bench.claim(two), 2, 4)
            engine.may_step.set()
            return heads + await watch(one, bench.claim(one), 6, 3)

    with Replicas(lease_ttl_s=60.0, lease_renew_s=20.0, resume_policy="compatible") as bench:
        one, two = bench.start("r1"), bench.start("r2", FakeEngine(fingerprint=other))
        bench.session()
        heads = asyncio.run(there_and_back(bench, one, two))
        assert [h["epoch"] for h in heads] == [1, 1, 2, 2, 2, 2, 3, 3, 3]
        mine = [h for h in heads if h["owner"] == "r1"]
        assert digests(mine) == truth(2) + truth(9)[6:]
        same = other == "fake"
        assert (digests(heads) == truth(9)) is same
        assert [h["discontinuity"] for h in heads[6:]] == [not same, False, False]
        assert bench.directory.digests("s1", 6, 9) == dict(enumerate(truth(9)[6:], 6))


def test_closing_gives_sessions_up_and_says_so():
    async def leave(one, epoch):
        async with pull(one, epoch, want=6) as end:
            await hello(end)
            heads = await end.chunks(6)
            closing = asyncio.create_task(asyncio.to_thread(one.close))
            code = await close_code(end)
            await closing
            return heads, code, [m["type"] for m in end.others]

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        heads, code, types = asyncio.run(leave(one, bench.claim(one)))
        assert (code, types) == (1012, ["session.going_away", "error"])
        record = bench.directory.get("s1")
        assert (record.owner, record.state, record.lease_until) == (None, SessionState.LIVE, 0.0)
        assert [r.id for r in bench.directory.replicas()] == ["r2"]
        heads += asyncio.run(watch(two, bench.claim(two), 6, 4))
        assert digests(heads) == truth(10)


def test_a_deleted_session_ends_for_its_readers():
    async def delete(bench, one, epoch):
        async with pull(one, epoch, want=2) as end:
            await hello(end)
            await end.chunks(2)
            bench.directory.delete("s1")
            await end.want(5)
            return await close_code(end)

    with Replicas() as bench:
        one = bench.start("r1")
        bench.session()
        assert asyncio.run(delete(bench, one, bench.claim(one))) in (1008, 4001)
        assert eventually(lambda: one.host.runners() == [])
