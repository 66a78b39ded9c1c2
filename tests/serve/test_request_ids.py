"""What a request is called is in its answer, in its errors and in every line about it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator

import httpx
import pytest
from replicas import Replicas, eventually, watch
from router_rig import Rig, run

from echo_ray.errors import StoreUnavailable
from echo_ray.serve.logs import LOGGER, about, log, log_as_json, request_id

Lines = Callable[[], list[dict[str, object]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger = logging.getLogger(LOGGER)
    before = list(logger.handlers), logger.level, logger.propagate
    stream = io.StringIO()
    log_as_json(stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_lines_are_about_what_surrounds_them(lines: Lines) -> None:
    with about(session="s1", epoch=3, chunk=None):
        with about(chunk=7, request_id="r1"):
            assert request_id() == "r1"
            log(logging.INFO, "inner", chunk=8)
        log(logging.INFO, "outer")
    log(logging.INFO, "none")
    kept = [{k: v for k, v in line.items() if k not in ("time", "level")} for line in lines()]
    assert kept == [
        {"event": "inner", "session": "s1", "epoch": 3, "chunk": 8, "request_id": "r1"},
        {"event": "outer", "session": "s1", "epoch": 3},
        {"event": "none"},
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2:3_", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ('a"b', False)],
)
def test_a_sane_id_is_kept_and_another_replaced(given: str, kept: bool) -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        answer = await rig.call("GET", "/v1/sessions/none", headers={"X-Request-ID": given})
        told = answer.headers["x-request-id"]
        assert (told == given) is kept
        assert answer.json()["error"]["request_id"] == told

    run(test)


def test_each_request_has_an_id_of_its_own() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        ids = {(await rig.call("GET", "/healthz")).headers["x-request-id"] for _ in range(3)}
        assert len(ids) == 3

    run(test)


def test_a_fault_of_the_router_is_logged_under_the_id_that_the_client_is_told(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(rig: Rig) -> None:
        front = rig.router().front
        monkeypatch.setattr(front.directory, "list", lambda: 1 / 0)
        answer = await rig.call("GET", "/v1/sessions", headers={"X-Request-ID": "mine"})
        assert answer.status_code == 500
        assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"] == "mine"

    run(test)
    (failed,) = [line for line in lines() if line["event"] == "request_failed"]
    assert (failed["request_id"], failed["path"]) == ("mine", "/v1/sessions")
    assert "ZeroDivisionError" in str(failed["exception"])


def test_a_replica_logs_the_id_that_the_router_hands_on(lines: Lines) -> None:
    with Replicas() as bench:
        replica = bench.start("r1")
        url = f"http://{replica.address}/v1/own/s1?epoch=9"
        assert httpx.post(url, headers={"X-Request-ID": "r-17"}).status_code == 404
    refused = [line for line in lines() if line["event"] == "refused"]
    assert [(line["request_id"], line["session"]) for line in refused] == [("r-17", "s1")]


def test_a_router_hands_its_id_on() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        router = rig.router()
        sid = await rig.create()
        sent: list[httpx.Request] = []

        async def note(request: httpx.Request) -> None:
            # A router tells replicas of demand as well, on nobody's behalf.
            if "/segments/" in request.url.path:
                sent.append(request)

        router.front.http.event_hooks = {"request": [note]}
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(3)
        await rig.call(
            "GET", f"/v1/sessions/{sid}/segments/1?format=jpeg", headers={"X-Request-ID": "mine"}
        )
        assert [r.headers.get("x-request-id") for r in sent] == ["mine"]

    run(test)


def test_lines_of_the_engine_thread_name_session_epoch_and_chunk(lines: Lines) -> None:
    with Replicas() as bench:
        replica = bench.start("r1")
        bench.session()
        bench.snapshots.put = _failing  # type: ignore[method-assign]
        engine = bench.engines["r1"]
        engine.failing = [3]
        epoch = bench.claim(replica)
        asyncio.run(watch(replica, epoch, 0, 6))
        named = lambda event: [line for line in lines() if line["event"] == event]  # noqa: E731
        assert eventually(lambda: bool(named("snapshot_failed")))
        (failed,) = named("engine_failed")
        assert (failed["session"], failed["epoch"], failed["chunk"]) == ("s1", epoch, 3)
        assert named("snapshot_failed")[0]["epoch"] == epoch


def _failing(*_: object) -> None:
    raise StoreUnavailable("gone")
