"""Administration, health, metrics, OpenAPI, the player's files, and migration."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from router_rig import Rig, eventually, run

from echo_ray.config import HttpSection
from echo_ray.errors import ConfigError, EngineError
from echo_ray.serve.api import build_api
from echo_ray.serve.router_service import listen


def test_replicas_are_listed() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("b")
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(2)
            rig.owner(sid).register()
            shown = (await rig.call("GET", "/v1/admin/replicas")).json()["replicas"]
        assert [r["id"] for r in shown] == ["a", "b"]
        assert set(shown[0]) == {
            "id",
            "node_id",
            "pid",
            "address",
            "state",
            "sessions",
            "chunk_seconds",
            "free_slots",
            "fingerprint",
        }
        assert [sid] in [r["sessions"] for r in shown]

    run(test)


def test_a_migration_is_seen_as_messages_and_not_as_a_gap() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        rig.router()
        sid = await rig.create()
        async with (
            rig.watch(sid, "&from=0") as viewer,
            rig.watch(sid, "&from=0", router=1) as elsewhere,
        ):
            await asyncio.gather(viewer.until(4), elsewhere.until(4))
            source = rig.owner(sid).name
            target = "b" if source == "a" else "a"
            moving = asyncio.create_task(
                rig.call("POST", f"/v1/admin/sessions/{sid}/migrate", {"to": target})
            )
            await viewer.until_type("session.migrated")
            answer = await moving
            assert answer.status_code == 200
            assert answer.json() == {
                "id": sid,
                "source": source,
                "target": target,
                "epoch": 2,
                "moved": True,
            }
            await asyncio.gather(viewer.until(20), elsewhere.until(20))
        viewer.check(0)
        elsewhere.check(0)
        assert viewer.types.count("session.migrating") == 1
        assert rig.replicas[target].prepared == [sid]
        assert rig.directory.get(sid).epoch == 2
        assert rig.owner(sid).name == target
        value = rig.routers[0].front.telemetry.value
        assert value("echo_ray_migrations_total", outcome="ok") == 1
        # The old owner may hear of it before the viewers' router does: that is no failure.
        for cause in ("broken", "silent", "drain"):
            assert value("echo_ray_failovers_total", cause=cause) == 0

    run(test)


def test_a_migration_finds_a_target_by_itself_and_needs_no_viewers() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create(on_idle="continue")
        path = f"/v1/admin/sessions/{sid}/migrate"
        assert (await rig.call("POST", path)).json()["error"]["code"] == "conflict"
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(1)
        assert (await rig.call("POST", path)).json()["error"]["code"] == "no_replica"
        stay = await rig.call("POST", path, {"to": "a"})
        assert stay.json()["moved"] is False
        other = rig.replica("b")
        assert (await rig.call("POST", path)).json()["target"] == "b"
        await eventually(lambda: sid in other.owned)

    run(test)


def test_a_migration_that_cannot_be_leaves_everything_as_it_was() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(2)
            other = rig.replica("b")
            path = f"/v1/admin/sessions/{sid}/migrate"
            for body, status, code in (
                ({"to": "nobody"}, 404, "replica_not_found"),
                ({"too": "b"}, 400, "invalid_request"),
                ({"to": 5}, 400, "invalid_request"),
            ):
                answer = await rig.call("POST", path, body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            other.refuse = EngineError("cannot load")
            answer = await rig.call("POST", path, {"to": "b"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
            other.refuse = None
            other._beating.cancel()
            other.register(state="draining")
            answer = await rig.call("POST", path, {"to": "b"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
            missing = await rig.call("POST", "/v1/admin/sessions/nobody/migrate", {"to": "b"})
            assert missing.status_code == 404
            await viewer.until(10)
        viewer.check(0)
        assert rig.directory.get(sid).epoch == 1

    run(test)


def test_health_readiness_models_and_metrics() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        assert (await rig.call("GET", "/healthz")).json() == {"status": "ok"}
        unready = await rig.call("GET", "/readyz")
        assert (unready.status_code, unready.json()["error"]["code"]) == (503, "no_replica")
        rig.replica("a")
        assert (await rig.call("GET", "/readyz")).json() == {"status": "ready", "replicas": 1}
        models = (await rig.call("GET", "/v1/models")).json()["models"]
        assert [m["id"] for m in models] == ["fake"]
        assert models[0]["point_every"] == 4
        sid = await rig.create()
        await rig.call("GET", f"/v1/sessions/{sid}")
        text = (await rig.call("GET", "/metrics")).text
        assert 'echo_ray_requests_total{route="/v1/sessions/{session_id}",status="200"} 1.0' in text
        assert sid not in text

    run(test)


def test_openapi_lists_every_route() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        spec = (await rig.call("GET", "/openapi.json")).json()
        routes = {(verb, path) for path, verbs in spec["paths"].items() for verb in verbs}
        one = "/v1/sessions/{session_id}"
        assert routes == {
            ("post", "/v1/sessions"),
            ("get", "/v1/sessions"),
            ("get", one),
            ("delete", one),
            ("post", f"{one}/pause"),
            ("post", f"{one}/resume"),
            ("post", f"{one}/events"),
            ("get", f"{one}/snapshots"),
            ("post", f"{one}/snapshots"),
            ("get", f"{one}/segments/{{n}}"),
            ("get", f"{one}/stream.mjpeg"),
            ("post", f"{one}/fork"),
            ("post", f"{one}/rewind"),
            ("get", f"{one}/export"),
            ("post", "/v1/sessions/import"),
            ("get", "/v1/admin/replicas"),
            ("post", "/v1/admin/replicas/{replica_id}/drain"),
            ("post", "/v1/admin/sessions/{session_id}/migrate"),
            ("get", "/v1/models"),
            ("get", "/healthz"),
            ("get", "/readyz"),
            ("get", "/metrics"),
            ("get", "/metrics/targets"),
            ("post", f"{one}/viewer-tokens"),
        }

    run(test)


def test_what_is_not_there_is_said_in_the_error_shape() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        lost = await rig.call("GET", "/v2/nothing")
        assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")
        wrong = await rig.call("PUT", "/v1/sessions")
        assert wrong.status_code == 405
        assert wrong.json()["error"]["code"] == "invalid_request"
        assert "POST" in wrong.headers["allow"] or "GET" in wrong.headers["allow"]

    run(test)


def test_the_player_is_served_and_its_absence_is_said(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        import httpx

        front = rig.router().front
        (tmp_path / "index.html").write_text("<title>page</title>", encoding="utf-8")
        (tmp_path / "player.js").write_text("1", encoding="utf-8")
        for folder, status in ((tmp_path, 200), (tmp_path / "gone", 404)):
            app = build_api(front, folder)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                assert (await client.get("/")).status_code == status
                assert (await client.get("/player/player.js")).status_code == status
                assert (await client.get("/player/../../etc/passwd")).status_code == 404

    run(test)


def test_a_port_that_is_taken_is_a_configuration_error() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            listen(HttpSection(port=port))


def test_two_routers_of_a_node_share_a_port() -> None:
    first = listen(HttpSection(port=0))
    second = listen(HttpSection(port=first.getsockname()[1]))
    assert first.getsockname() == second.getsockname()
    first.close()
    second.close()
