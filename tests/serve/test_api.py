"""REST resources: their shapes, and what each refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from fake_replica import SHAPE, digest, frames
from router_rig import CONFIG, Rig, run

from echo_ray.errors import StoreUnavailable

ERROR_KEYS = {"message", "type", "code", "param", "retryable", "retry_after_s", "request_id"}


def refusal(answer: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The error body of an answer, checked."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == ERROR_KEYS
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    return error


def test_a_session_is_created_shown_listed_and_deleted() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        wish = {"prompt": "red", "seed": 2**63 - 1, "labels": {"who": "me"}, "on_idle": "close"}
        made = await rig.call("POST", "/v1/sessions", wish)
        assert made.status_code == 201
        view = made.json()
        assert view["state"] == "live"
        assert (view["fps"], view["width"], view["height"]) == (SHAPE.fps, 4, 4)
        assert view["frames_per_chunk"] == SHAPE.frames_per_chunk
        assert (view["model"], view["seed"], view["next_chunk"]) == ("fake", 2**63 - 1, 0)
        assert view["labels"] == {"who": "me"}
        assert view["created_at"] > 0
        path = f"/v1/sessions/{view['id']}"
        assert (await rig.call("GET", path)).json() == view
        assert (await rig.call("GET", "/v1/sessions")).json() == {"sessions": [view]}
        assert (await rig.call("DELETE", path)).status_code == 204
        refusal(await rig.call("GET", path), 404, "session_not_found")
        refusal(await rig.call("DELETE", path), 404, "session_not_found")

    run(test)


def test_a_missing_seed_is_drawn() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        seeds = set()
        for _ in range(3):
            made = await rig.call("POST", "/v1/sessions", {"prompt": "red", "seed": None})
            seeds.add(made.json()["seed"])
        assert len(seeds) == 3

    run(test)


BAD_WISHES: list[tuple[Any, str, str | None]] = [
    ({}, "invalid_request", "prompt"),
    ({"prompt": ""}, "prompt_invalid", "prompt"),
    ({"prompt": "a" * 101}, "prompt_invalid", "prompt"),
    ({"prompt": "a\u0000b"}, "prompt_invalid", "prompt"),
    ({"prompt": 5}, "invalid_request", "prompt"),
    ({"prompt": "red", "seed": -1}, "invalid_request", "seed"),
    ({"prompt": "red", "seed": 2**63}, "invalid_request", "seed"),
    ({"prompt": "red", "seed": 10**400}, "invalid_request", "seed"),
    ({"prompt": "red", "seed": 1.0}, "invalid_request", "seed"),
    ({"prompt": "red", "seed": True}, "invalid_request", "seed"),
    ({"prompt": "red", "seed": "1"}, "invalid_request", "seed"),
    ({"prompt": "red", "pace": "fast"}, "invalid_request", "pace"),
    ({"prompt": "red", "on_idle": "stop"}, "invalid_request", "on_idle"),
    ({"prompt": "red", "model": "other"}, "model_unknown", "model"),
    ({"prompt": "red", "labels": {"a": 1}}, "invalid_request", "labels.a"),
    ({"prompt": "red", "labels": {"": "x"}}, "invalid_request", "labels"),
    ({"prompt": "red", "sed": 1}, "invalid_request", "sed"),
    ([], "invalid_request", None),
    ("red", "invalid_request", None),
]


def test_a_bad_wish_is_refused_naming_the_field() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        for wish, code, param in BAD_WISHES:
            refusal(await rig.call("POST", "/v1/sessions", wish), 400, code, param)
        assert rig.directory.list() == []

    run(test)


def test_a_body_that_is_not_json_is_refused() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        for body in (b"", b"{", b"\xff\xfe", b"[" * 4000, b'{"prompt": "\\ud800"}'):
            answer = await rig.http.post(
                rig.url("/v1/sessions"), content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 400
            assert set(answer.json()["error"]) == ERROR_KEYS

    run(test)


def test_a_body_over_the_limit_is_refused_however_it_is_sent() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        big = json.dumps({"prompt": "a" * 5000}).encode()

        async def pieces() -> Any:
            for start in range(0, len(big), 1000):
                yield big[start : start + 1000]

        for content in (big, pieces()):
            answer = await rig.http.post(rig.url("/v1/sessions"), content=content)
            refusal(answer, 413, "message_too_large")

    run(test)


def test_no_session_without_a_replica_or_beyond_the_limits() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        wish = {"prompt": "red"}
        answer = await rig.call("POST", "/v1/sessions", wish)
        assert refusal(answer, 503, "no_replica")["retryable"] is True
        assert int(answer.headers["retry-after"]) >= 1
        fake = rig.replica("a")
        fake.chunk_s = 9.0
        fake.register()
        answer = await rig.call("POST", "/v1/sessions", wish)
        assert refusal(answer, 429, "capacity_exhausted")["retryable"] is True
        assert int(answer.headers["retry-after"]) >= 1
        assert (await rig.call("POST", "/v1/sessions", {**wish, "pace": "max"})).status_code == 201
        fake.chunk_s = 0.0
        fake.register()
        assert (await rig.call("POST", "/v1/sessions", wish)).status_code == 201
        refusal(await rig.call("POST", "/v1/sessions", wish), 429, "capacity_exhausted")
        value = rig.routers[0].front.telemetry.value
        assert value("echo_ray_admission_rejections_total", reason="capacity_exhausted") == 2

    run(test, replace(CONFIG, limits=replace(CONFIG.limits, sessions=2)))


def test_events_are_durable_idempotent_and_bounded() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        path = f"/v1/sessions/{sid}/events"
        event = {"event_id": "e1", "event": {"prompt": "blue"}}
        first = await rig.call("POST", path, event)
        assert first.status_code == 202
        assert first.json() == {"event_id": "e1", "effective_chunk": 0}
        assert (await rig.call("POST", path, event)).json() == first.json()
        other = {**event, "event": {"prompt": "green"}}
        refusal(await rig.call("POST", path, other), 409, "event_id_conflict")
        later = await rig.call("POST", path, {**event, "event_id": "e2", "at_chunk": 7})
        assert later.json() == {"event_id": "e2", "effective_chunk": 7}
        refusal(
            await rig.call("POST", path, {**event, "event_id": "e3"}), 429, "capacity_exhausted"
        )
        assert (await rig.call("POST", path, event)).status_code == 202
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(2)
        assert viewer.segments[0][0]["prompt"] == "blue"

    run(test, replace(CONFIG, limits=replace(CONFIG.limits, events_per_session=2)))


BAD_EVENTS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"event_id": ""}, "invalid_request", "event_id"),
    ({"event_id": "a" * 129}, "invalid_request", "event_id"),
    ({"event_id": "a\n"}, "invalid_request", "event_id"),
    ({"event_id": None}, "invalid_request", "event_id"),
    ({"event": {"prompt": ""}}, "prompt_invalid", "event.prompt"),
    ({"event": {"text": "x"}}, "invalid_request", None),
    ({"event": {"prompt": "x", "y": 1}}, "invalid_request", "event.y"),
    ({"at_chunk": -1}, "invalid_request", "at_chunk"),
    ({"at_chunk": "3"}, "invalid_request", "at_chunk"),
    ({"at_chunk": 2**60}, "invalid_request", "at_chunk"),
    ({"at": 3}, "invalid_request", "at"),
]


def test_a_bad_event_is_refused() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        for change, code, param in BAD_EVENTS:
            event = {"event_id": "e1", "event": {"prompt": "blue"}, **change}
            refusal(await rig.call("POST", f"/v1/sessions/{sid}/events", event), 400, code, param)
        assert not rig.directory.controls(sid)

    run(test)


def test_an_event_for_a_generated_chunk_is_refused() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(3)
        event = {"event_id": "e1", "event": {"prompt": "blue"}, "at_chunk": 1}
        answer = await rig.call("POST", f"/v1/sessions/{sid}/events", event)
        refusal(answer, 409, "chunk_already_generated")

    run(test)


def test_snapshots_are_listed_and_the_latest_is_pinned() -> None:
    async def test(rig: Rig) -> None:
        fake = rig.replica("a")
        rig.router()
        sid = await rig.create()
        path = f"/v1/sessions/{sid}/snapshots"
        assert (await rig.call("GET", path)).json() == {"snapshots": []}
        error = refusal(await rig.call("POST", path), 409, "conflict")
        assert "chunk 4" in error["message"]
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(9)
            fake.snapshot(sid, 4)
            fake.snapshot(sid, 8)
        pinned = await rig.call("POST", path)
        assert pinned.status_code == 201
        assert pinned.json()["chunk_index"] == 8
        assert pinned.json()["pinned"] is True
        shown = (await rig.call("GET", path)).json()["snapshots"]
        assert [s["chunk_index"] for s in shown] == [8, 4]
        assert {"id", "chunk_index", "bytes", "digest", "created_at", "store"} <= set(shown[0])

    run(test)


def test_segments_are_values_with_an_address() -> None:
    async def test(rig: Rig) -> None:
        fake = rig.replica("a")
        rig.router()
        sid = await rig.create()
        path = f"/v1/sessions/{sid}/segments"
        refusal(await rig.call("GET", f"{path}/0"), 400, "segment_beyond_end")
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(12)
            held = await rig.call("GET", f"{path}/11?format=raw")
            assert held.content == frames(7, 11, "red")
            old = await rig.call("GET", f"{path}/1?format=raw")
            assert old.content == frames(7, 1, "red")
            for answer, index in ((held, 11), (old, 1)):
                assert answer.headers["x-echo-digest"] == digest(7, index, "red")
                assert answer.headers["content-type"] == "application/octet-stream"
        jpeg = await rig.call("GET", f"{path}/3?format=jpeg")
        assert jpeg.content.startswith(b"\xff\xd8")
        fake.oldest = 5
        refusal(await rig.call("GET", f"{path}/1"), 410, "segment_expired")
        refusal(await rig.call("GET", f"{path}/99999"), 400, "segment_beyond_end", "n")
        refusal(await rig.call("GET", f"{path}/-1"), 400, "invalid_request", "n")
        refusal(await rig.call("GET", f"{path}/x"), 400, "invalid_request", "n")
        refusal(await rig.call("GET", f"{path}/1?format=gif"), 400, "invalid_request", "format")

    run(test)


def test_a_segment_of_a_dead_owner_comes_from_the_next_one() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(20)
        first = rig.owner(sid)
        await first.crash()
        answer = await rig.call("GET", f"/v1/sessions/{sid}/segments/1")
        assert answer.content == frames(7, 1, "red")
        assert rig.owner(sid) is not first

    run(test)


def test_pause_and_resume_are_states() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create(on_idle="continue")
        path = f"/v1/sessions/{sid}"
        assert (await rig.call("POST", f"{path}/pause")).json()["state"] == "paused"
        assert (await rig.call("POST", f"{path}/pause")).json()["state"] == "paused"
        assert (await rig.call("POST", f"{path}/resume")).json()["state"] == "live"
        assert rig.directory.get(sid).owner == "a"
        rig.directory.set_state(sid, state="closed")
        refusal(await rig.call("POST", f"{path}/pause"), 409, "session_closed")
        refusal(await rig.call("POST", f"{path}/resume"), 409, "session_closed")
        event = {"event_id": "e1", "event": {"prompt": "blue"}}
        refusal(await rig.call("POST", f"{path}/events", event), 409, "session_closed")

    run(test)


def test_an_unknown_session_is_not_found_anywhere() -> None:
    event = {"event_id": "e", "event": {"prompt": "x"}}

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        for method, path in (
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/events"),
            ("GET", "/snapshots"),
            ("POST", "/snapshots"),
            ("POST", "/pause"),
            ("POST", "/resume"),
            ("GET", "/segments/0"),
            ("GET", "/stream.mjpeg"),
        ):
            body = event if path == "/events" else None
            answer = await rig.call(method, f"/v1/sessions/ses_nobody{path}", body)
            refusal(answer, 404, "session_not_found")

    run(test)


def test_a_failing_store_is_said_to_fail() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()

        def broken(*given: Any, **named: Any) -> Any:
            raise StoreUnavailable("the store is away; retry", retry_after_s=1.0)

        rig.directory.list = broken  # type: ignore[method-assign]
        assert refusal(await rig.call("GET", "/v1/sessions"), 503, "store_unavailable")["retryable"]

    run(test)
