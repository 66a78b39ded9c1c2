import asyncio
import json

import httpx
import pytest
from fakes import FakeClock, FakeEngine
from replicas import LIMIT_S, PullEnd, Replicas, close_code, eventually, hello, pull, truth
from websockets.asyncio.client import connect

from echo_ray.serve.stepper import LONGEST_WAIT_S
from echo_ray.session.chunk import frames_digest
from echo_ray.session.records import OnIdle, Pace, SessionState


def test_a_stream_arrives_in_order_and_is_what_an_undisturbed_run_makes():
    async def stream(bench, replica, epoch):
        async with pull(replica, epoch, want=10) as end:
            greeting = await hello(end)
            assert (greeting["epoch"], greeting["first_index"]) == (epoch, 0)
            assert 0 <= greeting["next_index"] <= 10
            return [await end.chunk() for _ in range(10)]

    with Replicas() as bench:
        replica = bench.start("r1")
        bench.session()
        epoch = bench.claim(replica)
        chunks = asyncio.run(stream(bench, replica, epoch))
        heads = [head for head, _ in chunks]
        assert [h["chunk_index"] for h in heads] == list(range(10))
        assert [h["digest"] for h in heads] == truth(10)
        assert [frames_digest(data) for _, data in chunks] == truth(10)
        assert [h["byte_length"] for h in heads] == [len(data) for _, data in chunks]
        assert [h["num_frames"] for h in heads] == [1] + [4] * 9
        assert [h["pts_ms"] for h in heads[:3]] == [0, 62, 312]
        assert {h["owner"] for h in heads} == {"r1"}
        assert {h["epoch"] for h in heads} == {epoch}
        assert not any(h["discontinuity"] for h in heads)
        assert bench.directory.get("s1").next_index == 10
        assert bench.directory.digests("s1", 0, 10) == dict(enumerate(truth(10)))


def test_nothing_is_generated_before_the_first_want_and_no_more_than_wanted():
    async def stream(replica, epoch):
        async with pull(replica, epoch) as end:
            await hello(end)
            for _ in range(3):
                assert '"beat"' in await end.socket.recv()
            assert replica.host.engine.stepped == []
            await end.want(3)
            got = await end.chunks(3)
            for _ in range(3):
                assert '"beat"' in await end.socket.recv()
            assert replica.host.engine.stepped == [0, 1, 2]
            return got

    with Replicas() as bench:
        replica = bench.start("r1")
        bench.session()
        asyncio.run(stream(replica, bench.claim(replica)))


def test_a_switch_takes_effect_at_its_chunk_and_the_metadata_names_it():
    async def stream(bench, replica, epoch):
        async with pull(replica, epoch, want=2) as end:
            await hello(end)
            heads = await end.chunks(2)
            entry = bench.directory.append_control("s1", "e1", "a blue square")
            assert entry.chunk == 2
            bench.directory.append_control("s1", "e3", "a green star", at_chunk=4)
            bench.directory.append_control("s1", "e2", "a white dot", at_chunk=4)
            await end.want(7)
            return heads + await end.chunks(5)

    with Replicas() as bench:
        replica = bench.start("r1")
        bench.session()
        heads = asyncio.run(stream(bench, replica, bench.claim(replica)))
        expected = truth(7, switches={2: ["a blue square"], 4: ["a green star", "a white dot"]})
        assert [h["digest"] for h in heads] == expected
        assert [h["started_event_ids"] for h in heads] == [[], [], ["e1"], [], ["e3", "e2"], [], []]
        assert [h["active_event_ids"] for h in heads] == (
            [[], [], ["e1"], ["e1"], ["e2"], ["e2"], ["e2"]]
        )
        assert heads[4]["completed_event_ids"] == ["e1", "e3"]
        assert heads[5]["completed_event_ids"] == []
        assert heads[4]["prompt"] == "a white dot"


def test_realtime_is_made_at_most_the_lead_ahead_of_playout():
    async def stream(bench, replica, epoch):
        async with pull(replica, epoch, want=1000) as end:
            await hello(end)
            # Chunk n begins to play at (1 + 4 (n - 1)) / 20 s and may be made 2 chunks (0.4 s)
            # earlier: the first three at once, the next one 0.05 s after them.
            await end.chunks(3)
            for advance_s in (0.04, 0.02, 0.2, 0.2):
                bench.clock.advance(advance_s)
                now_s = bench.clock.monotonic() - began_s
                due = 3 + sum((1 + 4 * (n - 1)) / 20 - 0.4 <= now_s for n in (3, 4, 5))
                while len(engine.stepped) < due:
                    await end.chunk()
                await asyncio.sleep(1.2 * LONGEST_WAIT_S)
                assert engine.stepped == list(range(due))

    with Replicas(clock=FakeClock(), lead_chunks=2) as bench:
        began_s = bench.clock.monotonic()
        engine = FakeEngine(fps=20, frames_per_chunk=4)
        replica = bench.start("r1", engine)
        bench.session(pace=Pace.REALTIME)
        asyncio.run(stream(bench, replica, bench.claim(replica)))


def test_two_readers_share_one_generation_and_a_late_one_gets_the_past():
    async def stream(replica, epoch):
        async with pull(replica, epoch, want=6) as one:
            await hello(one)
            first = await one.chunks(6)
            async with pull(replica, epoch, 2) as two:
                assert (await hello(two))["next_index"] == 6
                second = await two.chunks(4)
        assert first[2:] == second

    with Replicas() as bench:
        replica = bench.start("r1")
        bench.session()
        asyncio.run(stream(replica, bench.claim(replica)))
        assert replica.host.engine.stepped == list(range(6))


@pytest.mark.parametrize("fmt", ["jpeg", "fmp4"])
def test_other_formats_carry_the_same_digest(fmt):
    async def stream(replica, epoch):
        async with pull(replica, epoch, fmt=fmt, want=2) as end:
            await hello(end)
            return [await end.chunk() for _ in range(2)]

    with Replicas() as bench:
        replica = bench.start("r1", FakeEngine())
        bench.session()
        chunks = asyncio.run(stream(replica, bench.claim(replica)))
        assert [head["digest"] for head, _ in chunks] == truth(2)
        marks = {"jpeg": b"\xff\xd8", "fmp4": b"ftyp"}
        assert all(marks[fmt] in data[:16] for _, data in chunks)


@pytest.mark.parametrize(
    ("query", "code", "close"),
    [
        ("epoch=9&from=0&format=raw", "fenced", 4001),
        ("epoch=0&from=0&format=raw", "fenced", 4001),
        ("epoch=1&from=0&format=gif", "invalid_request", 1008),
        ("epoch=1&from=-1&format=raw", "invalid_request", 1008),
        ("epoch=1&from=1e3&format=raw", "invalid_request", 1008),
        ("epoch=1&format=raw", "invalid_request", 1008),
        ("from=0&format=raw", "invalid_request", 1008),
        ("epoch=1&from=1&format=raw", "segment_beyond_end", 1008),
        ("epoch=1&from=99999999999999999999", "invalid_request", 1008),
    ],
)
def test_a_pull_that_cannot_be_is_told_why(query, code, close):
    async def ask(replica):
        url = f"ws://{replica.address}/v1/pull/s1?{query}"
        async with asyncio.timeout(LIMIT_S), connect(url) as socket:
            end = PullEnd(socket)
            return await close_code(end), end.others

    with Replicas() as bench:
        replica = bench.start("r1")
        bench.session()
        bench.claim(replica)
        got, messages = asyncio.run(ask(replica))
        assert got == close
        assert messages[-1]["type"] == "error"
        assert messages[-1]["code"] == code
        assert messages[-1]["message"]


def test_an_unknown_session_and_a_session_of_another_owner_are_refused():
    async def ask(replica, session_id, epoch):
        async with pull(replica, epoch, session_id=session_id) as end:
            return await close_code(end), end.others[-1]["code"]

    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        epoch = bench.claim(one)
        assert asyncio.run(ask(one, "nobody", 1)) == (1008, "session_not_found")
        assert asyncio.run(ask(two, "s1", epoch)) == (4001, "fenced")
        bench.directory.set_state("s1", state="closed")
        assert asyncio.run(ask(one, "s1", epoch + 1))[1] == "session_closed"


@pytest.mark.parametrize(
    ("message", "closes"),
    [
        ("{", True),
        ('{"type": "want", "until": -1}', True),
        ('{"type": "want", "until": true}', True),
        ('{"type": "want"}', True),
        ("[" * 5000, True),
        (b"\x00", True),
        ('{"type": "something.new"}', False),
    ],
)
def test_malformed_messages_close_the_pull_and_unknown_ones_do_not(message, closes):
    async def ask(replica, epoch):
        async with pull(replica, epoch) as end:
            await hello(end)
            await end.socket.send(message)
            if closes:
                assert await close_code(end) == 1008
                assert end.others[-1]["code"] == "message_invalid"
            await_next = None
            if not closes:
                await end.want(1)
                await_next = await end.chunk()
            return await_next

    with Replicas() as bench:
        replica = bench.start("r1")
        bench.session()
        assert (asyncio.run(ask(replica, bench.claim(replica))) is None) is closes


def test_a_session_nobody_watches_is_paused_with_its_state_and_goes_on_later():
    async def watch(replica, epoch, start, count):
        async with pull(replica, epoch, start, want=start + count) as end:
            await hello(end)
            return [h["digest"] for h in await end.chunks(count)]

    with Replicas() as bench:
        replica = bench.start("r1")
        bench.session()
        first = asyncio.run(watch(replica, bench.claim(replica), 0, 6))
        bench.idle(replica)
        paused = lambda: bench.directory.get("s1").state is SessionState.PAUSED  # noqa: E731
        assert eventually(paused)
        assert bench.directory.get("s1").owner is None
        assert [s.chunk_index for s in bench.directory.snapshots("s1")] == [4]
        assert eventually(lambda: replica.host.runners() == [])
        bench.idle(replica, 30.0)
        again = asyncio.run(watch(replica, bench.claim(replica), 6, 4))
        assert first + again == truth(10)
        assert replica.host.engine.loaded == [4]


def test_idle_sessions_close_or_go_on_as_they_were_told():
    async def watch(replica, epoch, session_id):
        async with pull(replica, epoch, session_id=session_id, want=2) as end:
            await hello(end)
            await end.chunks(2)

    with Replicas() as bench:
        replica = bench.start("r1", FakeEngine(fps=80))
        bench.session("ends", on_idle=OnIdle.CLOSE)
        bench.session("lives", on_idle=OnIdle.CONTINUE, pace=Pace.REALTIME)
        asyncio.run(watch(replica, bench.claim(replica, "ends"), "ends"))
        asyncio.run(watch(replica, bench.claim(replica, "lives"), "lives"))
        bench.idle(replica)
        assert eventually(lambda: bench.directory.get("ends").state is SessionState.CLOSED)
        assert eventually(lambda: bench.directory.get("lives").next_index > 8)
        assert bench.directory.get("lives").owner == "r1"


def test_own_starts_a_session_without_a_reader_and_refuses_another_epoch():
    with Replicas() as bench, httpx.Client() as http:
        replica = bench.start("r1", FakeEngine(fps=80))
        bench.session(on_idle=OnIdle.CONTINUE, pace=Pace.REALTIME)
        epoch = bench.claim(replica)
        url = f"http://{replica.address}/v1/own/s1"
        assert http.post(url, params={"epoch": epoch + 1}).status_code == 409
        assert http.post(url).status_code == 400
        answer = http.post(url, params={"epoch": epoch})
        assert (answer.status_code, answer.json()) == (202, {})
        assert eventually(lambda: bench.directory.get("s1").next_index > 3)


def test_single_segments_over_http_and_what_they_refuse():
    async def watch(replica, epoch):
        async with pull(replica, epoch) as end:
            await hello(end)
            for until in (4, 8, 12):
                await end.want(until)
                await end.chunks(4)

    with Replicas(retention_chunks=8) as bench, httpx.Client() as http:
        replica = bench.start("r1")
        bench.session()
        bench.directory.append_control("s1", "e", "a lovely dot", at_chunk=9)
        epoch = bench.claim(replica)
        asyncio.run(watch(replica, epoch))

        def get(n, **query):
            url = f"http://{replica.address}/v1/segments/s1/{n}"
            return http.get(url, params={"epoch": epoch, **query})

        answer = get(9)
        assert answer.status_code == 200
        digest = truth(10, switches={9: ["a lovely dot"]})[9]
        assert frames_digest(answer.content) == digest == answer.headers["x-echo-digest"]
        assert answer.headers["x-echo-chunk-index"] == "9"
        head = json.loads(answer.headers["x-echo-metadata"])
        assert (head["type"], head["ignored_words"]) == ("video.chunk_metadata", ["lovely"])
        assert get(9, format="jpeg").headers["content-type"].startswith("video/")
        for n, query, status, code in [
            (12, {}, 400, "segment_beyond_end"),
            (13, {}, 400, "segment_beyond_end"),
            (0, {}, 410, "segment_expired"),
            (9, {"epoch": 5}, 409, "fenced"),
            (9, {"format": "gif"}, 400, "invalid_request"),
            ("x", {}, 400, "invalid_request"),
        ]:
            refused = get(n, **query)
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert bench.directory.get("s1").next_index == 12


def test_health_metrics_and_the_replica_record():
    async def watch(replica, epoch):
        async with pull(replica, epoch, want=5) as end:
            await hello(end)
            await end.chunks(5)

    with Replicas() as bench, httpx.Client() as http:
        replica = bench.start("r1")
        bench.session()
        asyncio.run(watch(replica, bench.claim(replica)))
        base = f"http://{replica.address}"
        assert http.get(f"{base}/healthz").json() == {"status": "ok", "replica": "r1"}
        # A chunk is counted after its readers have it.
        made = lambda: http.get(f"{base}/metrics").text  # noqa: E731
        assert eventually(lambda: "echo_ray_frames_generated_total 17.0" in made())
        assert "s1" not in made()
        assert eventually(lambda: bench.directory.replicas()[0].sessions == ("s1",))
        assert eventually(lambda: bench.directory.replicas()[0].chunk_seconds > 0)
        record = bench.directory.replicas()[0]
        assert (record.address, record.model, record.state) == (
            replica.address,
            "echo-tiny",
            "ready",
        )
        assert http.get(f"{base}/nothing").status_code == 404


def test_more_sessions_than_the_limit_are_refused():
    async def ask(replica, epoch, session_id):
        async with pull(replica, epoch, session_id=session_id) as end:
            return await close_code(end), end.others[-1]["code"]

    with Replicas() as bench:
        replica = bench.start("r1")
        limit = bench.config.limits.sessions_per_replica
        for n in range(limit + 1):
            bench.session(f"n{n}")
            epoch = bench.claim(replica, f"n{n}")
            if n < limit:
                replica.host.own(f"n{n}", epoch)
        assert asyncio.run(ask(replica, epoch, f"n{limit}")) == (1013, "capacity_exhausted")
