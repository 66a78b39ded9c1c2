"""What access does to a service: sockets, quotas, tenants of what is made, audit, headers, CORS."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from access_rig import (
    INSIDE,
    ROWS,
    TOKENS,
    bearer,
    config,
    plant,
    section,
    viewer_token,
    write_tokens,
)
from forking_rig import BINARY
from replicas import Replicas
from router_rig import Rig, Watch, run
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from echo_ray.config_access import QuotaSection, TenantQuota
from echo_ray.serve import access, access_files
from echo_ray.serve.web_headers import DATA_POLICY, PAGE_POLICY

USER, STRANGER = bearer(TOKENS["user"]), bearer(TOKENS["stranger"])


async def create(rig: Rig, headers: dict[str, str], **fields: Any) -> httpx.Response:
    return await rig.call("POST", "/v1/sessions", {"prompt": "red", **fields}, headers=headers)


def watch(rig: Rig, query: str) -> Watch:
    return Watch(f"ws://{rig.routers[0].address}/v1/sessions/s1/stream?format=raw&{query}")


# Sockets


def test_a_viewer_watches_and_steers_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        made = await create(rig, USER, pace="max", seed=7)
        id_ = made.json()["id"]
        address = f"ws://{rig.routers[0].address}/v1/sessions/{id_}/stream"
        token = viewer_token(tmp_path, id_)
        async with Watch(f"{address}?format=raw&from=0&token={token}") as viewer:
            await viewer.until(2)
            for kind in ("pause", "resume", "snapshot", "stop"):
                await viewer.send({"type": f"session.{kind}"})
                assert (await viewer.until_type("error"))["code"] == "forbidden"
            event = {"event_id": "e", "event": {"prompt": "blue"}}
            await viewer.send({"type": "session.interaction", **event})
            refused = await viewer.until_type("error")
            assert (refused["code"], refused["event_id"]) == ("forbidden", "e")
            await viewer.send({"type": "session.attach", "from": 0})
            await viewer.until_type("video.start")
            await viewer.send({"type": "session.ping"})
            await viewer.until_type("pong")
        assert rig.directory.controls(id_) == []
        assert rig.directory.get(id_).state == "live"

    run(test, config(tmp_path))


def runs_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rig's router, every token of a minute has run out from now on."""
    monkeypatch.setattr(rig.routers[0].front.clock, "wall", lambda: time.time() + 61.0)


@pytest.mark.parametrize("how", ["runs out", "withdrawn"])
def test_a_stream_ends_with_its_token(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "RECHECK_S", 0.05)
    monkeypatch.setattr(access_files, "LOOK_S", 0.0)

    async def test(rig: Rig) -> None:
        rig.router()
        plant(rig)
        if how == "runs out":
            viewer = watch(rig, f"token={viewer_token(tmp_path)}")
        else:
            viewer = watch(rig, "")
            url = viewer._connecting.uri
            viewer._connecting = connect(url, additional_headers=USER, proxy=None)
        async with viewer:
            await viewer.until_type("video.start")
            if how == "withdrawn":
                write_tokens(tmp_path / "tokens", ROWS[1:])
            else:
                runs_out(rig, monkeypatch)
            expected = "token_expired" if how == "runs out" else "token_invalid"
            assert (await viewer.until_type("error"))["code"] == expected
            assert await viewer.until_closed() == 1008

    run(test, config(tmp_path))


def test_motion_jpeg_ends_with_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "RECHECK_S", 0.05)

    async def test(rig: Rig) -> None:
        rig.router()
        plant(rig)
        token = viewer_token(tmp_path)
        url = rig.url(f"/v1/sessions/s1/stream.mjpeg?token={token}")
        async with rig.http.stream("GET", url) as answer:
            assert answer.status_code == 200
            runs_out(rig, monkeypatch)
            assert await answer.aread() == b""

    run(test, config(tmp_path))


# Tenants


def test_what_is_made_belongs_to_who_makes_it(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        plant(rig)
        mine = (await create(rig, USER)).json()["id"]
        theirs = (await create(rig, STRANGER)).json()["id"]
        fork = await rig.call("POST", "/v1/sessions/s1/fork", {}, headers=USER)
        back = await rig.call("POST", "/v1/sessions/s1/rewind", {"chunk": 24}, headers=USER)
        exported = await rig.call("GET", "/v1/sessions/s1/export", headers=USER)
        assert b"acme" not in exported.content
        taken = await rig.http.post(
            rig.url("/v1/sessions/import"), content=exported.content, headers=BINARY | STRANGER
        )
        assert taken.status_code == 201, taken.text
        ids = {"mine": mine, "fork": fork.json()["id"], "back": back.json()["id"], "s1": "s1"}
        tenants = {r.id: r.tenant for r in rig.directory.list()}
        others = {theirs, taken.json()["id"]}
        assert tenants == dict.fromkeys(ids.values(), "acme") | dict.fromkeys(others, "initech")
        for headers, seen in ((USER, set(ids.values())), (STRANGER, others)):
            listed = await rig.call("GET", "/v1/sessions", headers=headers)
            assert {s["id"] for s in listed.json()["sessions"]} == seen

    run(test, config(tmp_path))


# Quotas


def refusal(answer: httpx.Response, param: str) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (429, "quota_exceeded", param)
    return error


def test_quotas_hold_across_routers_and_every_way_to_make_a_session(tmp_path: Path) -> None:
    quota = QuotaSection(sessions=2, realtime_sessions=1, creates_per_minute=100)
    own = (TenantQuota(tenant="initech", sessions=0),)

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        rig.router()
        refusal(await create(rig, STRANGER), "sessions")
        first = await create(rig, USER)
        assert first.status_code == 201
        error = refusal(await create(rig, USER), "realtime_sessions")
        assert "1 realtime sessions are open; the quota is 1" in error["message"]
        wish = {"prompt": "red", "pace": "max"}
        calls = [
            rig.call("POST", "/v1/sessions", wish, router=n % 2, headers=USER) for n in range(6)
        ]
        answers = await asyncio.gather(*calls)
        assert sorted(a.status_code for a in answers) == [201] + [429] * 5
        id_ = first.json()["id"]
        refusal(await rig.call("POST", f"/v1/sessions/{id_}/fork", {}, headers=USER), "sessions")
        exported = await rig.call("GET", f"/v1/sessions/{id_}/export", headers=USER)
        url = rig.url("/v1/sessions/import")
        taken = await rig.http.post(url, content=exported.content, headers=BINARY | USER)
        refusal(taken, "sessions")
        back = await rig.call("POST", f"/v1/sessions/{id_}/rewind", {"chunk": 0}, headers=USER)
        assert back.status_code == 201, "it takes the place of the other"
        assert rig.directory.count_open() == 2
        rejected = rig.routers[0].front.telemetry.value(
            "echo_ray_admission_rejections_total", reason="quota_exceeded"
        )
        assert rejected >= 3

    run(test, config(tmp_path, quota=quota, quotas=own))


def test_the_rate_of_creations_says_when_to_come_again(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        assert (await create(rig, USER)).status_code == 201
        answer = await create(rig, USER)
        error = refusal(answer, "creates_per_minute")
        assert 50 < error["retry_after_s"] <= 60
        assert 50 < int(answer.headers["retry-after"]) <= 60
        assert (await create(rig, STRANGER)).status_code == 201

    run(test, config(tmp_path, quota=QuotaSection(creates_per_minute=1)))


# Audit


def audited(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [r for r in caplog.records if r.getMessage() == "audit"]
    return [r.fields for r in lines]  # type: ignore[attr-defined]


def test_the_audit_log_says_who_did_what_and_never_a_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "echo_ray")

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        made = await create(rig, USER | {"X-Request-Id": "req-1"})
        assert made.headers["x-request-id"] == "req-1"
        id_ = made.json()["id"]
        bad = await create(rig, USER | {"X-Request-Id": "bad\tid"}, seed=-1)
        assert bad.headers["x-request-id"].isalnum()
        await rig.call("GET", f"/v1/sessions/{id_}", headers=USER)
        await rig.call("DELETE", f"/v1/sessions/{id_}", headers=STRANGER)
        await rig.call("DELETE", f"/v1/sessions/{id_}?token=secret-in-the-url")
        await rig.call("POST", f"/v1/sessions/{id_}/pause", headers=bearer("secret-nobody-knows"))
        token = viewer_token(tmp_path, id_)
        url = f"ws://{rig.routers[0].address}/v1/sessions/{id_}/stream?token={token}"
        async with Watch(url) as viewer:
            await viewer.until_type("video.start")
            await viewer.send({"type": "session.stop"})
            await viewer.until_type("error")

    run(test, config(tmp_path))
    lines = audited(caplog)
    shown = [(x["who"], x["tenant"], x["action"], x["outcome"]) for x in lines]
    assert shown == [
        ("user", "acme", "session.create", "ok"),
        ("user", "acme", "session.create", "invalid_request"),
        ("stranger", "initech", "session.delete", "session_not_found"),
        ("nobody", None, "session.delete", "unauthenticated"),
        ("nobody", None, "session.pause", "token_invalid"),
        ("user", "acme", "stream", "ok"),
        ("user", "acme", "session.stop", "forbidden"),
    ]
    assert lines[0]["request_id"] == "req-1"
    assert lines[0]["session"] == lines[2]["session"]
    everything = repr([r.__dict__ for r in caplog.records])
    for secret in (*TOKENS.values(), "secret-", "echo-view."):
        assert secret not in everything


# Browsers


def test_headers_keep_browsers_and_addresses_apart(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        for path, policy in (
            ("/", PAGE_POLICY), ("/player/player.js", PAGE_POLICY), ("/healthz", DATA_POLICY),
            ("/v1/sessions", DATA_POLICY), ("/nowhere", DATA_POLICY),
        ):  # fmt: skip
            headers = (await rig.call("GET", path)).headers
            assert headers["content-security-policy"] == policy, path
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert headers["referrer-policy"] == "no-referrer"
            assert "access-control-allow-origin" not in headers

    run(test, config(tmp_path))


def test_only_configured_origins_may_call(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        ask = {"Access-Control-Request-Method": "POST", "Origin": "https://app.example"}
        ask["Access-Control-Request-Headers"] = "authorization,content-type"
        may = await rig.call("OPTIONS", "/v1/sessions", headers=ask)
        assert may.status_code == 200
        assert may.headers["access-control-allow-origin"] == "https://app.example"
        evil = await rig.call("OPTIONS", "/v1/sessions", headers=ask | {"Origin": "https://evil"})
        assert evil.status_code == 400
        assert "access-control-allow-origin" not in evil.headers
        for origin, allowed in (("https://app.example", True), ("https://evil", False)):
            answer = await rig.call("GET", "/v1/sessions", headers=USER | {"Origin": origin})
            assert ("access-control-allow-origin" in answer.headers) == allowed
            refused = await rig.call("GET", "/v1/sessions", headers={"Origin": origin})
            assert refused.status_code == 401
            assert ("access-control-allow-origin" in refused.headers) == allowed
        assert "access-control-allow-credentials" not in answer.headers

    run(test, config(tmp_path, cors_origins=("https://app.example",)))


# Replicas


def test_a_replica_lets_only_routers_in(tmp_path: Path) -> None:
    closed = [
        ("POST", "/v1/own/s1?epoch=1"), ("POST", "/v1/prepare/s1"),
        ("GET", "/v1/segments/s1/0?epoch=1"), ("POST", "/v1/drain?within_ms=5"),
        ("GET", "/nowhere"),
    ]  # fmt: skip

    async def test(address: str) -> None:
        pull = f"ws://{address}/v1/pull/s1?epoch=1&from=0&format=raw"
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
            for headers in ({}, bearer("x" * 40), {"Authorization": INSIDE}):
                for method, path in closed:
                    answer = await client.request(method, path, headers=headers)
                    assert answer.status_code == 401, path
                with pytest.raises(InvalidStatus):
                    await connect(pull, additional_headers=headers, proxy=None)
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            let_in = await client.post("/v1/own/s1?epoch=1", headers=bearer(INSIDE))
            assert let_in.json()["error"]["code"] == "session_not_found"

    with Replicas() as replicas:
        replicas.config = replace(replicas.config, access=section(tmp_path))
        asyncio.run(test(replicas.start("a").address))
        assert replicas.directory.replicas()[0].state == "ready"


def test_a_router_shows_the_secret_to_replicas(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        assert rig.routers[0].front.owners.credentials() == bearer(INSIDE)

    run(test, config(tmp_path))
