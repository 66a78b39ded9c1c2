"""The API and the socket under bounded fuzzing: no crash, no 5xx that is not told of, no leak."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from access_rig import INSIDE, SECRET, TOKENS, bearer, config, plant
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from router_rig import Rig
from schemathesis.config import SchemathesisConfig
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from echo_ray.serve.access_rules import RULES
from echo_ray.serve.api import build_api

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
BOUNDED = {"deadline": None, "suppress_health_check": QUIET, "derandomize": True}
MAY_FAIL = {503: {"no_replica", "unavailable", "draining", "store_unavailable"}}
ENDLESS = "/v1/sessions/{session_id}/stream.mjpeg"
LEAKS = ("Traceback", 'File "', "/site-packages/", "echo_ray/serve", SECRET, INSIDE)


class Target:
    """A router and a replica on a loop of their own, with sessions to do harm to."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.rig = self.on_loop(self._start(folder))
        self.address = self.rig.routers[0].address
        self.url = f"http://{self.address}"

    async def _start(self, folder: Path) -> Rig:
        rig = Rig(config(folder))
        rig.replica("a")
        rig.router()
        plant(rig, "s1")
        return rig

    def on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def stop(self) -> None:
        self.on_loop(self.rig.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.stop()


def check(status: int, text: str) -> None:
    """An answer that this service may give."""
    if status >= 500:
        assert json.loads(text)["error"]["code"] in MAY_FAIL.get(status, ()), (status, text)
    elif status >= 400:
        error = json.loads(text)["error"]
        assert error["code"]
        assert error["message"]
    for leak in (*LEAKS, *TOKENS.values()):
        assert leak not in text, leak


def operations(target: Target) -> list[Any]:
    document = build_api(target.rig.routers[0].front).openapi()
    schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig())
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if operation.path != ENDLESS]


@pytest.mark.parametrize("token", ["both", None])
def test_the_api_survives_what_its_schema_allows_and_forbids(
    token: str | None, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    found = operations(target)
    assert len(found) >= len(RULES) - 5
    headers = bearer(TOKENS[token]) if token else {}
    for operation in found:
        _fuzz(target, operation, schemathesis.GenerationMode.POSITIVE, headers, 3 if token else 1)
        if token:
            _fuzz(target, operation, schemathesis.GenerationMode.NEGATIVE, headers, 3)
    said = repr([r.__dict__ for r in caplog.records if r.name.startswith("echo_ray")])
    for leak in (SECRET, INSIDE, *TOKENS.values()):
        assert leak not in said
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], caplog.text


def _fuzz(target: Target, operation: Any, mode: Any, headers: dict[str, str], count: int) -> None:
    @settings(max_examples=count, phases=[Phase.generate], database=None, **BOUNDED)  # type: ignore[arg-type]
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        # Half of the time at a session that is there.
        if "session_id" in case.path_parameters and hash(str(case.body)) % 2:
            case.path_parameters["session_id"] = "s1"
        answer = case.call(base_url=target.url, headers=headers, timeout=20)
        check(answer.status_code, answer.text)
        if not headers and "/v1/" in operation.path:
            assert answer.status_code == 401, (operation.path, answer.text)

    # Operations without parameters have nothing to forbid.
    with contextlib.suppress(Unsatisfiable):
        one()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = ("attach", "interaction", "ack", "pause", "resume", "snapshot", "ping", "unknown")
MESSAGES = st.fixed_dictionaries(
    {"type": st.sampled_from([f"session.{name}" for name in NAMES]) | JSON_VALUES},
    optional={
        "from": JSON_VALUES, "event_id": JSON_VALUES, "chunk_index": JSON_VALUES,
        "at_chunk": JSON_VALUES, "event": JSON_VALUES | st.just({"prompt": "blue"}),
    },
).map(lambda body: json.dumps(body))  # fmt: skip
TEXTS = MESSAGES | JSON_VALUES.map(json.dumps) | st.text(max_size=200) | st.binary(max_size=200)


def open_socket(target: Target) -> ClientConnection:
    address = f"ws://{target.address}/v1/sessions/s1/stream?format=raw"
    return connect(
        address, additional_headers=bearer(TOKENS["user"]), proxy=None, close_timeout=0.2
    )


@settings(max_examples=60, phases=[Phase.generate], database=None, **BOUNDED)  # type: ignore[arg-type]
@given(messages=st.lists(TEXTS, min_size=1, max_size=8))
def test_the_socket_survives_every_message(target: Target, messages: list[str | bytes]) -> None:
    with open_socket(target) as socket:
        try:
            for message in messages:
                socket.send(message)
            socket.send(json.dumps({"type": "session.ping"}))
            while True:
                heard = socket.recv(timeout=10)
                if isinstance(heard, bytes):
                    continue
                for leak in (*LEAKS, *TOKENS.values()):
                    assert leak not in heard
                body = json.loads(heard)
                assert body.get("code") not in ("internal", "engine_failed"), body
                if body["type"] == "pong":
                    break
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else None
        else:
            code = 1000
    assert code in (1000, 1007, 1008, 1009)


def test_it_all_left_a_service_that_works(target: Target) -> None:
    answer = httpx.get(f"{target.url}/v1/sessions", headers=bearer(TOKENS["user"]))
    assert answer.status_code == 200
    fresh = {"prompt": "red", "pace": "max"}
    made = httpx.post(f"{target.url}/v1/sessions", json=fresh, headers=bearer(TOKENS["user"]))
    assert made.status_code == 201
