"""Routers tell a replica of what asks for room, and the replica has it among its figures."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from drain_rig import Rig, run, until

from echo_ray.errors import EchoError, UnavailableError
from echo_ray.serve.demand import DemandTeller
from echo_ray.serve.replica import Generator
from echo_ray.session.demand import Demand
from echo_ray.session.draining import Reason
from echo_ray.session.figures import read
from echo_ray.session.records import Pace, ReplicaRecord
from echo_ray.session.scaling import Leaving


def told(generator: Generator) -> Demand | None:
    return read("r", generator.figures())[1]


def test_a_router_keeps_to_one_replica_and_tells_what_it_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("echo_ray.serve.demand.TIMEOUT_S", 40.0)

    async def test(rig: Rig) -> None:
        replicas = [rig.replicas.start(name) for name in ("r1", "r2", "r3")]
        front = rig.routers[0].front
        teller = DemandTeller(front)

        def told_to() -> list[Generator]:
            return [r for r in replicas if teller._router in r.host.told]

        for _ in range(9):
            await teller.tell()
        (heard,) = told_to()
        front.homeless = 2
        front.owners.refusals.add(front.clock.monotonic())
        seen = Demand(unwatched=2, refused=1)
        await teller.tell()
        assert heard.host.told[teller._router][0] == seen
        # The router itself does so all the time.
        await until(lambda: any(told(r) is not None for r in replicas))
        # One that goes away is told no more.
        heard.host.drain(Reason.ADMIN, 60.0)
        await until(lambda: rig.state(heard.host.replica_id) == "drained")
        for _ in range(50):
            # It looks at one more replica each time, and that may be the one that goes away.
            await teller.tell()
            if told_to() != [heard]:
                break
        assert any(r is not heard for r in told_to())

    run(test)


def test_an_admission_that_finds_no_room_is_counted() -> None:
    async def test(rig: Rig) -> None:
        front = rig.routers[0].front
        with pytest.raises(EchoError):
            await front.owners.admit("echo-tiny", Pace.REALTIME)
        assert front.owners.refusals.count(front.clock.monotonic()) == 1
        rig.replicas.start("r1")
        await until(lambda: rig.state("r1") == "ready")
        await front.owners.admit("echo-tiny", Pace.REALTIME)
        assert front.owners.refusals.count(front.clock.monotonic()) == 1

    run(test)


def test_sessions_on_draining_replicas_are_told_of() -> None:
    async def test(rig: Rig) -> None:
        directory = rig.replicas.directory
        place = {"node_id": "n", "pid": 1, "address": "127.0.0.1:9"}
        gone = ReplicaRecord(id="x", state="draining", sessions=("s1", "s2"), **place)
        empty = ReplicaRecord(id="y", state="draining", **place)
        for record in (gone, empty):
            directory.put_replica(record, ttl_s=60.0)
        generator = rig.replicas.start("r1")
        await until(lambda: told(generator) == Demand(draining=1, moving=2))

    run(test)


def test_nobody_is_told_where_nobody_listens() -> None:
    async def test(rig: Rig) -> None:
        teller = DemandTeller(rig.routers[0].front)
        await teller.tell()
        deaf = ReplicaRecord(id="x", node_id="n", pid=1, address="127.0.0.1:9")
        rig.replicas.directory.put_replica(deaf, ttl_s=60.0)
        with pytest.raises(UnavailableError, match="x"):
            await teller.tell()
        rig.routers[0].check()

    run(test)


def test_figures_of_a_replica_are_its_own() -> None:
    async def test(rig: Rig) -> None:
        generator = rig.replicas.start("r1")
        standing, demand = read("r1", generator.figures())
        assert (standing.id, standing.sessions, standing.leaving) == ("r1", 0, Leaving.NO)
        assert standing.slots >= 1
        assert standing.slack_chunks == rig.replicas.config.session.lead_chunks
        assert demand is None
        generator.host.drain(Reason.NODE, 60.0)
        assert read("r1", generator.figures())[0].leaving is Leaving.REPLACED

    run(test)


WHOLE: dict[str, Any] = {
    "router": "a", "watched": 1, "unwatched": 0, "refused": 0, "draining": 0, "moving": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"router": None}, {"router": ""}, {"router": "a b"}, {"router": "a" * 65},
        {"watched": None}, {"watched": -1}, {"watched": 1.5}, {"moving": "many"},
        {"refused": 10**15},
    ],
)  # fmt: skip
def test_what_is_no_demand_is_refused(wrong: dict[str, Any]) -> None:
    async def test(rig: Rig) -> None:
        generator = rig.replicas.start("r1")
        url = f"http://{generator.address}/v1/demand"
        query = {k: v for k, v in (WHOLE | wrong).items() if v is not None}
        async with httpx.AsyncClient() as http:
            answer = await http.post(url, params=query)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] in wrong
            assert (await http.get(url)).status_code == 405
            assert (await http.post(url, params=WHOLE)).status_code == 202

    run(test)
