"""What fork, rewind, export and import refuse, and that nothing is left behind then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from forking_rig import ARCHIVE, BLOB, OTHER, file_of, imported, only, planted, refusal
from router_rig import CONFIG, Rig, run

from echo_ray.errors import ConflictError, Draining, EchoError, StoreFull, StoreUnavailable
from echo_ray.serve import forks
from echo_ray.session.forking import Past
from echo_ray.session.records import SessionRecord, SessionState


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        ({"chunk": 31}, "segment_beyond_end", "the next chunk of session s1 is 30"),
        ({"chunk": -1}, "invalid_request", "chunk"),
        ({"chunk": 2**53}, "invalid_request", "chunk"),
        ({"chunk": "3"}, "invalid_request", "chunk"),
        ({"chunk": True}, "invalid_request", "chunk"),
        ({"chunk": 3, "at": 3}, "invalid_request", "at is unknown"),
        ([], "invalid_request", "body"),
    ],
)
def test_chunks_that_make_no_sense(body: Any, code: str, word: str) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        for verb in ("fork", "rewind"):
            answer = await rig.call("POST", f"/v1/sessions/s1/{verb}", body)
            refusal(answer, 400, code, word)
        assert only(rig, "s1")

    run(test)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": ""}, "prompt_invalid"),
        ({"prompt": "x" * 101}, "prompt_invalid"),
        ({"prompt": "a\u0000"}, "prompt_invalid"),
        ({"prompt": 5}, "invalid_request"),
        ({"pace": "walk"}, "invalid_request"),
        ({"on_idle": "sleep"}, "invalid_request"),
        ({"labels": {"a": "x" * 200}}, "invalid_request"),
        ({"labels": {"": "x"}}, "invalid_request"),
        ({"labels": []}, "invalid_request"),
        ({"seed": 7}, "invalid_request"),
    ],
)
def test_what_a_fork_cannot_have(body: Any, code: str) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        refusal(await rig.call("POST", "/v1/sessions/s1/fork", body), 400, code)
        assert only(rig, "s1")

    run(test)


def test_a_rewind_needs_a_chunk_and_takes_nothing_else() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        for body in (None, {}, {"chunk": None}, {"chunk": 25, "prompt": "red"}):
            answer = await rig.call("POST", "/v1/sessions/s1/rewind", body)
            refusal(answer, 400, "invalid_request")
        assert only(rig, "s1")
        assert rig.directory.get("s1").state is SessionState.PAUSED

    run(test)


def test_sessions_that_are_not_there() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        for method, path, body in (
            ("POST", "fork", {}),
            ("POST", "rewind", {"chunk": 0}),
            ("GET", "export", None),
        ):
            answer = await rig.call(method, f"/v1/sessions/ghost/{path}", body)
            refusal(answer, 404, "session_not_found", "ghost")

    run(test)


def test_what_no_snapshot_leads_to_is_gone() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig, end=60)
        # Retention 8 and a point every 4 chunks: 20 chunks are made again at most.
        for verb, chunk in (("fork", 22), ("rewind", 50), ("fork", None)):
            body = {} if chunk is None else {"chunk": chunk}
            answer = await rig.call("POST", f"/v1/sessions/s1/{verb}", body)
            refusal(answer, 410, "chunk_unreachable", f"chunk {chunk or 60}", "0 to 20, 24 to 44")
        refusal(await rig.call("GET", "/v1/sessions/s1/export"), 410, "chunk_unreachable")
        rig.snapshots.put("s1", "p24", b"damaged")
        answer = await rig.call("POST", "/v1/sessions/s1/fork", {"chunk": 24})
        refusal(answer, 410, "chunk_unreachable", "what can: 0 to 20")
        rig.snapshots.put("s1", "p24", OTHER)
        answer = await rig.call("POST", "/v1/sessions/s1/rewind", {"chunk": 24})
        refusal(answer, 410, "chunk_unreachable", "what can: 0 to 20")
        assert only(rig, "s1")
        assert rig.directory.get("s1").state is SessionState.PAUSED

    run(test)


def test_no_room_and_no_replica() -> None:
    few = replace(CONFIG, limits=replace(CONFIG.limits, sessions=2))

    async def test(rig: Rig) -> None:
        rig.router()
        planted(rig)
        answer = await rig.call("POST", "/v1/sessions/s1/fork", {})
        refusal(answer, 503, "no_replica")
        refusal(await imported(rig, file_of(ARCHIVE)), 503, "no_replica")
        rig.replica("a")
        planted(rig, "s2")
        refusal(await rig.call("POST", "/v1/sessions/s1/fork", {}), 429, "capacity_exhausted")
        refusal(await imported(rig, file_of(ARCHIVE)), 429, "capacity_exhausted")
        assert only(rig, "s1", "s2")
        # A rewound session gives its own place up; a closed one has none.
        answer = await rig.call("POST", "/v1/sessions/s1/rewind", {"chunk": 26})
        assert answer.status_code == 201, answer.text
        answer = await rig.call("POST", "/v1/sessions/s1/rewind", {"chunk": 26})
        refusal(answer, 429, "capacity_exhausted")

    run(test, few)


FAILURES: dict[str, tuple[str, EchoError]] = {
    "no room for the snapshot": ("put", StoreFull("no room")),
    "not durable": ("make_durable", StoreUnavailable("the bucket is away")),
    "no answer from the directory": ("restore", StoreUnavailable("no answer")),
    "refused by the directory": ("restore", ConflictError("refused")),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    verb, error = FAILURES[failure]

    def failing(*_: object, **__: object) -> None:
        raise error

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        data = file_of(ARCHIVE)
        broken = rig.directory if verb == "restore" else rig.snapshots
        monkeypatch.setattr(broken, verb, failing)
        for answer in (
            await rig.call("POST", "/v1/sessions/s1/fork", {}),
            await rig.call("POST", "/v1/sessions/s1/rewind", {"chunk": 25}),
            await imported(rig, data),
        ):
            refusal(answer, error.http_status, error.code)
        assert only(rig, "s1")
        assert rig.directory.get("s1").state is SessionState.PAUSED

    run(test)


def test_a_session_that_was_made_although_nobody_heard_loses_no_blob() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        restore, delete = rig.directory.restore, rig.directory.delete

        def unheard(past: Past, **_: object) -> None:
            restore(past)
            raise StoreUnavailable("no answer")

        def unavailable(_: str) -> None:
            raise StoreUnavailable("no answer")

        rig.directory.restore = unheard  # type: ignore[method-assign]
        rig.directory.delete = unavailable  # type: ignore[method-assign]
        answer = await rig.call("POST", "/v1/sessions/s1/fork", {})
        refusal(answer, 503, "store_unavailable")
        made = next(r.id for r in rig.directory.list() if r.id != "s1")
        assert rig.snapshots.get(made, "p0000000024-e0") == BLOB
        rig.directory.delete = delete  # type: ignore[method-assign]
        refusal(await rig.call("POST", "/v1/sessions/s1/fork", {}), 503, "store_unavailable")
        assert only(rig, "s1", made)

    run(test)


def test_a_fork_that_nobody_takes_at_once_is_there_all_the_same() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a").refuse = Draining("going away")
        rig.router()
        planted(rig)
        answer = await rig.call("POST", "/v1/sessions/s1/fork", {"on_idle": "continue"})
        assert answer.status_code == 201, answer.text
        assert answer.json()["owner"] is None
        assert only(rig, "s1", answer.json()["id"])

    run(test)


def test_a_rewound_session_that_cannot_be_closed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "CLOSE_PAUSE_S", 0.01)

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        set_state = rig.directory.set_state
        tries: list[str] = []

        def down(session_id: str, *, state: str) -> SessionRecord:
            tries.append(state)
            if len(tries) <= forks.CLOSE_TRIES:
                raise StoreUnavailable("down")
            return set_state(session_id, state=state)

        rig.directory.set_state = down  # type: ignore[method-assign]
        answer = await rig.call("POST", "/v1/sessions/s1/rewind", {"chunk": 25})
        made = next(r.id for r in rig.directory.list() if r.id != "s1")
        refusal(answer, 503, "store_unavailable", made, "s1 could not be closed", "delete one")
        # The third try succeeds.
        tries[:] = ["closed"]
        answer = await rig.call("POST", "/v1/sessions/s1/rewind", {"chunk": 25})
        assert answer.status_code == 201
        assert rig.directory.get("s1").state is SessionState.CLOSED

    run(test)
