"""Draining a replica, with routers before replicas of a fake engine: every session moves."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import httpx
import pytest
import yaml
from drain_rig import PROMPT, Rig, Seen, run, until, view
from fakes import FakeClock, FakeEngine
from replicas import Replicas, eventually
from stored import new

from echo_ray import wire
from echo_ray.config import EchoConfig, from_mapping
from echo_ray.errors import ConfigError, EngineError, ReplicaNotFound, StoreUnavailable
from echo_ray.serve.cursor import Viewer
from echo_ray.serve.drain import NodeWatch, before_exit, stop_budget_s
from echo_ray.serve.front import Front
from echo_ray.serve.mover import Mover
from echo_ray.serve.relay import Relay
from echo_ray.serve.replica import within
from echo_ray.serve.stream_accounts import StreamAccounts
from echo_ray.session.draining import Reason
from echo_ray.session.records import OnIdle, ReplicaRecord, SessionState
from echo_ray.session.snapshot import Snapshot

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"


def test_every_watched_session_moves_and_nobody_sees_it() -> None:
    async def test(rig: Rig) -> None:
        a = rig.replicas.start("a")
        client = rig.clients[0]
        made = [(await client.create(PROMPT, seed=n))["id"] for n in range(3)]
        answers: list[httpx.Response] = []

        async def drain() -> None:
            await until(lambda: rig.sessions("a") == set(made))
            rig.replicas.start("b")
            answers.append(await rig.drain("a"))

        async def moved() -> None:
            await until(lambda: rig.counted("echo_ray_migrations_total", outcome="ok") == 3)

        acts = [{5: drain, 15: moved}, {15: moved}, {15: moved}]
        views = [view(client, sid, act) for sid, act in zip(made, acts, strict=True)]
        for n, seen in enumerate(await asyncio.gather(*views)):
            seen.exact(n)
            told = seen.told(wire.Migrating, wire.Migrated)
            assert told == [wire.Migrating(to="b"), wire.Migrated(owner="b", epoch=2)]
        assert [rig.owner(sid) for sid in made] == ["b"] * 3
        (answer,) = answers
        assert answer.status_code == 202
        body = answer.json()
        assert (body["id"], body["state"]) == ("a", "draining")
        assert set(body["sessions"]) == set(made)
        assert 19 < body["deadline_s"] <= 20
        assert rig.counted("echo_ray_migrations_total", outcome="ok") == 3
        # The old owner may hear of a move before the router does: that is no failure.
        for cause in ("broken", "silent", "drain"):
            assert rig.counted("echo_ray_failovers_total", cause=cause) == 0
        await until(lambda: rig.state("a") == "drained")
        assert a.telemetry.value("echo_ray_drains_total", reason="admin") == 1

    run(test)


def test_of_two_routers_one_moves_a_session_and_the_viewers_of_both_hear_of_it() -> None:
    async def test(rig: Rig) -> None:
        rig.replicas.start("a")
        other = rig.router()
        sid = (await rig.clients[0].create(PROMPT, seed=3))["id"]

        async def drain() -> None:
            rig.replicas.start("b", FakeEngine(delay_s=0.02))
            await rig.drain("a")

        seen = await asyncio.gather(view(rig.clients[0], sid, {6: drain}), view(other, sid))
        for one in seen:
            one.exact(3)
            assert one.told(wire.Migrated) == [wire.Migrated(owner="b", epoch=2)]
        assert rig.replicas.directory.get(sid).epoch == 2

    run(test)


def test_a_router_that_comes_too_late_tells_its_viewers_where_the_session_went() -> None:
    gone = new("s1", owner="b", epoch=2)
    draining = [ReplicaRecord(id="a", node_id="n", pid=1, address="", sessions=("s1",))]
    told: list[object] = []

    async def test() -> None:
        front = SimpleNamespace(
            directory=SimpleNamespace(draining=lambda: draining),
            relays=SimpleNamespace(
                of=lambda _: ["somebody watches"],
                tell=lambda session_id, message: told.append((session_id, message)),
                poke=lambda _: None,
            ),
            get=lambda _: asyncio.sleep(0, gone),
        )
        mover = Mover(cast(Front, front), random.Random(0))
        await mover.look()
        await asyncio.gather(*mover._moves.values())

    asyncio.run(test())
    assert told == [("s1", wire.Migrated(owner="b", epoch=2))]


def test_viewers_hear_of_a_move_once_however_many_saw_it() -> None:
    told: list[object] = []
    relay = Relay(new("s1"), "raw", 0, EchoConfig(), cast(StreamAccounts, SimpleNamespace()))
    relay.viewers.add(cast(Viewer, Mock(tell=told.append)))
    first, second = wire.Migrated(owner="b", epoch=2), wire.Migrated(owner="c", epoch=3)
    for message in (wire.Paused(), first, first, wire.Paused(), second, first):
        relay.tell(message)
    assert told == [wire.Paused(), first, wire.Paused(), second]


def test_sessions_without_viewers_move_too() -> None:
    async def test(rig: Rig) -> None:
        a = rig.replicas.start("a")
        rig.replicas.session(on_idle=OnIdle.CONTINUE)
        a.host.own("s1", rig.replicas.claim(a))
        await until(lambda: rig.replicas.directory.get("s1").next_index > 3)
        rig.replicas.start("b")
        asked = await rig.clients[0].drain("a", deadline_s=7.0)
        assert (asked["id"], asked["state"]) == ("a", "draining")
        assert 0 < asked["deadline_s"] <= 7.0
        with pytest.raises(ReplicaNotFound, match="live: a"):
            await rig.clients[0].drain("nobody")
        await until(lambda: rig.owner("s1") == "b")
        await until(lambda: rig.state("a") == "drained")

    run(test)


def test_without_room_anywhere_a_session_is_parked_and_goes_on_when_a_replica_comes() -> None:
    async def test(rig: Rig) -> None:
        a = rig.replicas.start("a")
        client = rig.clients[0]
        sid = (await client.create(PROMPT, seed=4))["id"]
        stands: list[tuple[str | None, SessionState]] = []
        seen = Seen()

        async def drain() -> None:
            await rig.drain("a", {"deadline_s": 3.0})

        async def come() -> None:
            await until(lambda: rig.state("a") == "drained")
            record = rig.replicas.directory.get(sid)
            stands.append((record.owner, record.state))
            await until(lambda: bool(seen.told(wire.ErrorMessage)))
            rig.replicas.start("b")

        async def parked() -> None:
            await until(lambda: rig.owner(sid) != "a")

        await asyncio.gather(view(client, sid, {6: drain, 9: parked}, seen), come())
        seen.exact(4)
        assert stands == [(None, SessionState.LIVE)]
        (told,) = seen.told(wire.ErrorMessage)
        assert isinstance(told, wire.ErrorMessage)
        assert (told.code, told.retryable) == ("no_replica", True)
        assert a.telemetry.value("echo_ray_sessions_parked_total") == 1
        assert rig.owner(sid) == "b"

    run(test)


def test_a_deadline_that_is_too_short_tears_nothing() -> None:
    async def test(rig: Rig) -> None:
        rig.replicas.start("a")
        client = rig.clients[0]
        sid = (await client.create(PROMPT, seed=5))["id"]

        async def drain() -> None:
            rig.replicas.start("b")
            await rig.drain("a", {"deadline_s": 0})
            await until(lambda: rig.owner(sid) != "a")

        (await view(client, sid, {9: drain})).exact(5)
        assert rig.owner(sid) == "b"
        await until(lambda: rig.state("a") == "drained")

    run(test)


class Broken(FakeEngine):
    """A device that begins nothing."""

    def open(self, prompt: str, seed: int, first_frames: bytes = b"") -> Any:
        raise EngineError("no memory left")

    def load(self, snapshot: Snapshot) -> Any:
        raise EngineError("no memory left")


def test_a_target_that_cannot_take_a_session_leaves_it_where_it_is_until_another_can() -> None:
    async def test(rig: Rig) -> None:
        rig.replicas.start("a")
        client = rig.clients[0]
        sid = (await client.create(PROMPT, seed=6))["id"]
        broken = rig.replicas.start("b", Broken())

        async def drain() -> None:
            await rig.drain("a")

        async def free() -> None:
            failed = lambda: rig.counted("echo_ray_migrations_total", outcome="failed") > 0  # noqa: E731
            await until(failed)
            assert rig.owner(sid) == "a"
            await asyncio.to_thread(rig.replicas.crash, broken)
            rig.replicas.start("c")

        async def moved() -> None:
            await until(lambda: rig.owner(sid) == "c")

        seen, _ = await asyncio.gather(view(client, sid, {2: drain, 12: moved}), free())
        seen.exact(6)
        assert rig.owner(sid) == "c"

    run(test)


def test_a_replica_that_is_stopped_leaves_when_its_sessions_have_moved() -> None:
    async def test(rig: Rig) -> None:
        a = rig.replicas.start("a")
        client = rig.clients[0]
        sid = (await client.create(PROMPT, seed=7))["id"]
        left: list[bool] = []

        async def stop() -> None:
            rig.replicas.start("b")
            leaving = asyncio.create_task(asyncio.to_thread(a.leave, 600.0))
            leaving.add_done_callback(lambda _: left.append(True))

        async def moved() -> None:
            await until(lambda: rig.counted("echo_ray_migrations_total", outcome="ok") == 1)

        seen = await view(client, sid, {5: stop, 15: moved})
        seen.exact(7)
        assert seen.told(wire.Migrated) == [wire.Migrated(owner="b", epoch=2)]
        # Long before the time is over.
        await until(lambda: bool(left))
        assert rig.state("a") is None

    run(test)


def test_a_stop_waits_for_nobody_where_no_other_replica_takes_sessions() -> None:
    with Replicas() as replicas:
        a, b = replicas.start("a"), replicas.start("b")
        b.host.drain(Reason.ADMIN, 60.0)
        assert eventually(lambda: replicas.directory.replicas()[1].state == "drained")
        replicas.session(on_idle=OnIdle.CONTINUE)
        a.host.own("s1", replicas.claim(a))
        assert eventually(lambda: replicas.directory.get("s1").next_index > 3)
        began_s = time.monotonic()
        a.leave(600.0)
        assert time.monotonic() - began_s < 50
        assert replicas.directory.get("s1").owner is None
        a.leave(600.0)


def test_a_store_that_cannot_say_who_lives_does_not_end_the_wait() -> None:
    with Replicas() as replicas:
        a = replicas.start("a")
        assert not a.host._others_take()
        a.host._directory = Failing()
        assert a.host._others_take()


class Failing:
    def replicas(self) -> list[Any]:
        raise StoreUnavailable("gone")


def test_a_draining_replica_lets_nothing_in_and_forgets_what_it_only_followed() -> None:
    with Replicas() as replicas:
        a, b = replicas.start("a"), replicas.start("b")
        replicas.session()
        replicas.session("s2")
        a.host.own("s1", replicas.claim(a))
        b.host.prepare("s1")
        b.host.drain(Reason.ADMIN, 60.0)
        assert eventually(lambda: b.host.runners() == [])
        epoch = replicas.claim(b, "s2")
        with httpx.Client(base_url=f"http://{b.address}") as http:
            answer = http.post("/v1/own/s2", params={"epoch": epoch})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "draining"
            assert http.post("/v1/drain").status_code == 400
            assert http.post("/v1/drain?within_ms=-1").json()["error"]["param"] == "within_ms"


def test_what_the_route_refuses() -> None:
    async def test(rig: Rig) -> None:
        rig.replicas.start("a")
        unknown = await rig.drain("x")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "replica_not_found")
        assert "live: a" in unknown.json()["error"]["message"]
        for body in ({"deadline_s": -1}, {"deadline_s": 86401}, {"deadline_s": "1"}, {"when": 1}):
            answer = await rig.drain("a", body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        assert rig.state("a") == "ready"
        first = await rig.drain("a", {"deadline_s": 50})
        again = await rig.drain("a", {"deadline_s": 40})
        later = await rig.drain("a", {"deadline_s": 60})
        assert [r.status_code for r in (first, again, later)] == [202] * 3
        left = [r.json()["deadline_s"] for r in (first, again, later)]
        assert 40 < left[0] <= 50
        assert 0 < left[2] <= left[1] <= 40

    run(test)


# What Ray tells


@pytest.mark.parametrize(
    ("drain_s", "killed_after_s", "expected"),
    [
        (20.0, None, 20.0),
        (20.0, 60.0, 20.0),
        (20.0, 30.0, 20.0),
        (20.0, 15.0, 7.0),
        (20.0, 2.0, 0.0),
    ],
)
def test_sessions_are_moved_no_longer_than_there_is_time(
    drain_s: float, killed_after_s: float | None, expected: float
) -> None:
    assert within(drain_s, killed_after_s) == expected


@pytest.mark.parametrize("file", sorted(DEPLOYMENTS.glob("*.yaml")), ids=lambda f: f.stem)
def test_a_deployment_gives_its_replicas_the_time_that_they_take(file: Path) -> None:
    (app,) = yaml.safe_load(file.read_text())["applications"]
    replica = next(d for d in app["deployments"] if d["name"] == "GeneratorReplica")
    drain_s = from_mapping(EchoConfig, app["args"]).session.drain_s
    assert within(drain_s, replica["graceful_shutdown_timeout_s"]) == drain_s


@pytest.mark.parametrize("drain_s", [0, -1, 3601])
def test_a_time_to_drain_that_cannot_be_is_refused(drain_s: float) -> None:
    with pytest.raises(ConfigError, match=r"session.drain_s"):
        from_mapping(EchoConfig, {"session": {"drain_s": drain_s}})


def test_outside_of_serve_nothing_is_known_of_the_time_to_stop() -> None:
    assert stop_budget_s() is None


def test_a_python_without_the_hook_costs_the_farewell_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(threading, "_register_atexit", calls.append)
    before_exit(print)
    assert calls == [print]
    monkeypatch.delattr(threading, "_register_atexit")
    before_exit(print)


def test_a_node_that_drains_is_told_once_with_the_time_that_is_left() -> None:
    nodes: dict[str, int] = {}
    told: list[float | None] = []
    clock = FakeClock(wall=1000.0)
    watch = NodeWatch("me", told.append, clock, nodes=lambda: nodes)
    assert not watch.look()
    nodes["other"] = 1
    assert not watch.look()
    nodes["me"] = 1_030_000
    assert watch.look()
    nodes["me"] = 0
    assert watch.look()
    nodes["me"] = 999_000
    assert watch.look()
    assert told == [30.0, None, 0.0]


def test_a_ray_that_cannot_say_is_found_at_the_start_and_costs_nothing() -> None:
    def missing() -> dict[str, int]:
        raise AttributeError("get_draining_nodes")

    watch = NodeWatch("me", lambda _: None, FakeClock(), nodes=missing)
    watch.start()
    assert not watch._thread.is_alive()
    assert not watch.look()
