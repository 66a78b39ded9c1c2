import asyncio

import httpx
from replicas import Replicas, close_code, digests, eventually, pull, truth, watch


def run_to(bench, replica, epoch, count):
    """Stream `count` chunks, so that every point on the way has its snapshot."""

    def written(index):
        return index in [s.chunk_index for s in bench.directory.snapshots("s1")]

    for start in range(0, count, 4):
        asyncio.run(watch(replica, epoch, start, 4))
        assert eventually(lambda n=start + 4: written(n))


def test_a_past_that_cannot_be_made_again_is_expired():
    async def ask(replica, epoch, start):
        async with pull(replica, epoch, start) as end:
            return await close_code(end), end.others[-1]["code"]

    with Replicas(retention_chunks=8, snapshots_kept=1) as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        run_to(bench, one, bench.claim(one), 32)
        assert eventually(lambda: len(bench.directory.snapshots("s1")) == 1)
        bench.crash(one)
        epoch = bench.claim(two)
        for start in (5, 27):
            assert asyncio.run(ask(two, epoch, start)) == (1008, "segment_expired")
        assert digests(asyncio.run(watch(two, epoch, 32, 2))) == truth(34)[32:]


def test_the_past_within_the_retention_is_made_again_beside_a_session_that_goes_on():
    async def both(two, epoch):
        live, past = await asyncio.gather(watch(two, epoch, 24, 20), watch(two, epoch, 9, 35))
        return live, past

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        bench.directory.append_control("s1", "e", "a blue square", at_chunk=10)
        run_to(bench, one, bench.claim(one), 24)
        bench.crash(one)
        live, past = asyncio.run(both(two, bench.claim(two)))
        expected = truth(44, switches={10: ["a blue square"]})
        assert digests(live) == expected[24:]
        assert digests(past) == expected[9:]
        assert past[1]["started_event_ids"] == ["e"]
        assert past[0]["started_event_ids"] == past[0]["active_event_ids"] == []
        assert bench.engines["r2"].loaded[0] == 24
        with httpx.Client() as http:
            url = f"http://{two.address}/v1/segments/s1/13"
            answer = http.get(url, params={"epoch": 2})
            assert answer.headers["x-echo-digest"] == expected[13]


def test_a_past_that_fails_again_and_again_is_expired_and_the_session_goes_on():
    async def ask(replica, epoch):
        async with pull(replica, epoch, 5) as end:
            return await close_code(end), end.others[-1]["code"]

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        run_to(bench, one, bench.claim(one), 8)
        bench.crash(one)
        epoch = bench.claim(two)
        bench.engines["r2"].failing = [4, 5, 4, 4]
        assert asyncio.run(ask(two, epoch)) == (1008, "segment_expired")
        assert digests(asyncio.run(watch(two, epoch, 8, 3))) == truth(11)[8:]


def test_a_lagging_reader_of_a_resumed_session_gets_what_came_before_the_point():
    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        run_to(bench, one, bench.claim(one), 8)
        bench.crash(one)
        epoch = bench.claim(two)
        ahead = asyncio.run(watch(two, epoch, 8, 2))
        lagging = asyncio.run(watch(two, epoch, 6, 6))
        assert digests(ahead) == truth(10)[8:]
        assert digests(lagging) == truth(12)[6:]
