"""Every route with every kind of token: found from the application, so that none is forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from access_rig import TOKENS, bearer, config, plant, viewer_token
from fastapi import FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute
from router_rig import Rig, run
from starlette.routing import Mount, Route
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from echo_ray.serve.access_rules import RULES, SOCKET, Rule, find
from echo_ray.serve.api import build_api
from echo_ray.session.access import Need

OK = "ok"
# What each caller hears where a token of this kind is asked for; OK: the route itself answers.
EXPECTED: dict[str, dict[Need, str]] = {
    "nobody": dict.fromkeys(Need, "unauthenticated"),
    "unknown": dict.fromkeys(Need, "token_invalid"),
    "forged viewer": dict.fromkeys(Need, "token_invalid"),
    "expired": dict.fromkeys(Need, "token_expired"),
    "expired viewer": dict.fromkeys(Need, "token_expired"),
    "user": {**dict.fromkeys(Need, OK), Need.ADMIN: "forbidden"},
    "both": dict.fromkeys(Need, OK),
    "watcher": {Need.TOKEN: OK, Need.WATCH: OK, Need.USE: "forbidden", Need.ADMIN: "forbidden"},
    "viewer": {Need.TOKEN: OK, Need.WATCH: OK, Need.USE: "forbidden", Need.ADMIN: "forbidden"},
    "admin": {
        Need.TOKEN: OK, Need.WATCH: "forbidden", Need.USE: "forbidden", Need.ADMIN: OK,
    },
    "stranger": {
        Need.TOKEN: OK, Need.WATCH: "session_not_found", Need.USE: "session_not_found",
        Need.ADMIN: "forbidden",
    },
    "other viewer": {
        Need.TOKEN: OK, Need.WATCH: "session_not_found", Need.USE: "forbidden",
        Need.ADMIN: "forbidden",
    },
}  # fmt: skip
CLOSED = [rule for rule in RULES if rule.need is not Need.NOTHING]


def routes_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of all that the application serves, however it was put together."""
    waiting: list[Any] = list(app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIWebSocketRoute):
            yield SOCKET, route.path
        elif isinstance(route, APIRoute | Route):
            for method in (route.methods or set()) - {"HEAD"}:
                yield method, route.path
        elif isinstance(route, Mount):
            yield "GET", f"{route.path}/{{path:path}}"
        else:
            waiting += route.original_router.routes


def test_every_route_is_classified_and_every_rule_has_a_route() -> None:
    async def test(rig: Rig) -> None:
        app = build_api(rig.router().front)
        served = sorted(routes_of(app))
        assert served == sorted((rule.method, rule.path) for rule in RULES)
        schema = app.openapi()["paths"]
        told = {(verb.upper(), path) for path, verbs in schema.items() for verb in verbs}
        assert told < set(served)
        assert len(told) > 20
        for rule in RULES:
            opens = rule.path in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json")
            opens = opens or rule.path.startswith("/player/")
            assert (rule.need is Need.NOTHING) == opens, rule
            inside = rule.path.startswith("/v1/admin/") or rule.path == "/metrics/targets"
            assert (rule.need is Need.ADMIN) == inside, rule
            assert not rule.in_url or (rule.need is Need.WATCH and rule.method in ("GET", SOCKET))

    run(test)


def token_of(caller: str, folder: Path, session: str) -> str | None:
    made = {
        "nobody": None,
        "unknown": "some-token-that-nobody-was-given",
        "viewer": viewer_token(folder, session),
        "other viewer": viewer_token(folder, "another"),
        "expired viewer": viewer_token(folder, session, ttl_s=-1.0),
        "forged viewer": viewer_token(folder, session)[:-4] + "AAAA",
    }
    return made[caller] if caller in made else TOKENS[caller]


async def answer_of(rig: Rig, rule: Rule, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and error code of a request or a socket; a stream is left at once."""
    if rule.method != SOCKET:
        async with rig.http.stream(rule.method, rig.url(path), headers=headers) as answer:
            if answer.status_code < 400:
                return answer.status_code, ""
            body = json.loads(await answer.aread())
            if answer.status_code == 401:
                assert answer.headers["www-authenticate"] == "Bearer"
            return answer.status_code, body["error"]["code"]
    url = rig.url(path).replace("http", "ws", 1)
    async with connect(url, additional_headers=headers, proxy=None, close_timeout=0.1) as socket:
        first = json.loads(await socket.recv())
        if first["type"] != "error":
            return 200, ""
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        return 0, first["code"]


def path_of(rule: Rule, session: str) -> str:
    return rule.path.format(session_id=session, n="29", replica_id="nobody")


@pytest.mark.parametrize("caller", EXPECTED)
def test_each_route_lets_in_who_may(caller: str, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        for number, rule in enumerate(CLOSED):
            session = f"s{number}"
            plant(rig, session)
            token = token_of(caller, tmp_path, session)
            headers = bearer(token) if token else {}
            status, code = await answer_of(rig, rule, path_of(rule, session), headers)
            expected = EXPECTED[caller][rule.need]
            no_session = "{session_id}" not in rule.path
            if no_session and rule.need in (Need.WATCH, Need.USE):
                # Nothing that could be another tenant's; a token of one session is for that alone.
                expected = OK if caller == "stranger" else expected
                viewers = caller in ("viewer", "other viewer")
                expected = "forbidden" if viewers else expected
            said = (rule.method, rule.path, status, code)
            if expected == OK:
                assert status not in (0, 401, 403), said
                assert code != "session_not_found", said
            else:
                assert code == expected, said
                kept = rig.directory.get(session)
                assert (kept.state, kept.epoch) == ("paused", 0), said
        assert all(r.tenant in ("acme", "initech") for r in rig.directory.list())

    run(test, config(tmp_path))


def test_a_foreign_session_looks_like_one_that_is_not_there(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        plant(rig, "real")
        for rule in CLOSED:
            if "{session_id}" not in rule.path or rule.need is Need.ADMIN or rule.method == SOCKET:
                continue
            answers = []
            for session in ("real", "fake"):
                answer = await rig.http.request(
                    rule.method, rig.url(path_of(rule, session)), headers=bearer(TOKENS["stranger"])
                )
                shown = {
                    k: v for k, v in answer.headers.items() if k not in ("date", "x-request-id")
                }
                own = answer.headers["x-request-id"]
                text = answer.text.replace(session, "SESSION").replace(own, "ID")
                answers.append((answer.status_code, shown, text))
            assert answers[0] == answers[1], rule
            assert answers[0][0] == 404

    run(test, config(tmp_path))


def test_what_is_not_classified_is_not_served(tmp_path: Path) -> None:
    assert find("GET", "/v1/sessions/") is None
    assert find("PATCH", "/v1/sessions/s1") is None
    assert find("HEAD", "/healthz") is not None

    async def test(rig: Rig) -> None:
        rig.router()
        plant(rig)
        for path in ("/v1/sessions/", "/v1/sessions/s1/", "/docs", "/v1/nothing", "//v1/sessions"):
            assert (await rig.call("GET", path)).status_code == 401, path
            answer = await rig.call("GET", path, headers=bearer(TOKENS["both"]))
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
        answer = await rig.call("PATCH", "/v1/sessions/s1", headers=bearer(TOKENS["user"]))
        assert answer.status_code == 404

    run(test, config(tmp_path))


def test_open_routes_need_no_token(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        for rule in RULES:
            if rule.need is Need.NOTHING:
                path = rule.path.replace("{path:path}", "player.js")
                for headers in ({}, bearer("not-a-token-of-anybody")):
                    assert (await rig.call("GET", path, headers=headers)).status_code == 200, path

    run(test, config(tmp_path))
