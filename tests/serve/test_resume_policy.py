"""A session made by one kind of engine before replicas of another: mark, refusal, nothing lost."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest
from drain_rig import COUNT, PROMPT, Rig, Seen, run, until, view
from fakes import FakeEngine

from echo_ray import wire
from echo_ray.config import EchoConfig, from_mapping
from echo_ray.errors import ConfigError
from echo_ray.session.records import Lease, SessionState
from echo_ray.session.snapshot import Snapshot

HERE, OTHER, NEWER = "m/aa/cpu", "m/aa/gpu", "m/bb/cpu"


class Device(FakeEngine):
    """One kind of device; loads what another kind with the same model has saved."""

    def __init__(self, fingerprint: str) -> None:
        super().__init__(fingerprint=fingerprint, point_every=16)

    def load(self, snapshot: Snapshot) -> Any:
        if snapshot.fingerprint.rsplit("/", 1)[0] == self.fingerprint.rsplit("/", 1)[0]:
            snapshot = replace(snapshot, fingerprint=self.fingerprint)
        return super().load(snapshot)


def test_a_compatible_device_goes_on_and_marks_where_it_differs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(rig: Rig) -> None:
        rig.replicas.start("a", Device(HERE))
        client = rig.clients[0]
        sid = (await client.create(PROMPT, seed=1))["id"]

        async def leave() -> None:
            rig.replicas.start("b", Device(OTHER))
            await rig.drain("a")

        async def gone() -> None:
            await until(lambda: rig.owner(sid) == "b")

        with caplog.at_level(logging.ERROR, logger="echo_ray"):
            # Chunk 16 is a point: what is made after it is the other's own.
            seen = await view(client, sid, {9: leave, 11: gone})
        assert [s.index for s in seen.segments] == list(range(COUNT))
        marked = [s for s in seen.segments if s.metadata.discontinuity]
        assert [s.metadata.owner for s in marked][:1] == ["b"]
        assert seen.segments[-1].metadata.owner == "b"
        assert not seen.segments[-1].metadata.discontinuity
        told = [r.fields for r in caplog.records if r.getMessage() == "digest_mismatch"]  # type: ignore[attr-defined]
        assert {(t["committed_by"], t["made_by"]) for t in told} == {(HERE, OTHER)}

    run(test, resume_policy="compatible")


@pytest.mark.parametrize(
    ("policy", "other", "remedy"),
    [("exact", OTHER, "set compatible"), ("compatible", NEWER, "run the release that made it")],
)
def test_what_may_not_go_on_waits_with_a_reason_and_goes_on_exactly_where_it_may(
    policy: str, other: str, remedy: str
) -> None:
    async def test(rig: Rig) -> None:
        rig.replicas.start("a", Device(HERE))
        client = rig.clients[0]
        sid = (await client.create(PROMPT, seed=2))["id"]
        before: list[int] = []
        seen = Seen()

        async def leave() -> None:
            rig.replicas.start("b", Device(other))
            await rig.drain("a", {"deadline_s": 3.0})

        async def come_back() -> None:
            await until(lambda: rig.state("a") == "drained")
            await until(lambda: bool(seen.told(wire.ErrorMessage)))
            record = rig.replicas.directory.get(sid)
            assert (record.state, record.owner) == (SessionState.LIVE, None)
            before.append(record.next_index)
            rig.replicas.start("c", Device(HERE))

        async def parked() -> None:
            await until(lambda: rig.owner(sid) != "a")

        await asyncio.gather(view(client, sid, {6: leave, 9: parked}, seen), come_back())
        assert [s.index for s in seen.segments] == list(range(COUNT))
        assert not any(s.metadata.discontinuity for s in seen.segments)
        (told,) = seen.told(wire.ErrorMessage)
        assert isinstance(told, wire.ErrorMessage)
        assert told.code == "no_replica"
        assert remedy in told.message
        owners = [s.metadata.owner for s in seen.segments]
        assert set(owners) == {"a", "c"}
        assert owners[before[0]] == "c"

    run(test, resume_policy=policy)


def test_a_replica_refuses_by_itself_what_a_router_should_not_have_sent() -> None:
    async def test(rig: Rig) -> None:
        a, b = rig.replicas.start("a", Device(HERE)), rig.replicas.start("b", Device(NEWER))
        rig.replicas.session()
        lease = Lease("s1", "a", rig.replicas.claim(a))
        rig.replicas.directory.seal(lease, 0)
        rig.replicas.directory.commit(lease, 0, "d", HERE)
        rig.replicas.crash(a)
        b.host.own("s1", rig.replicas.claim(b))
        await until(lambda: rig.owner("s1") is None)
        assert rig.replicas.directory.get("s1").state is SessionState.LIVE
        assert b.telemetry.value("echo_ray_session_resumes_total", outcome="unfit") == 1
        assert rig.replicas.engines["b"].stepped == []

    run(test)


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"session.resume_policy: 'loose' .* exact or compatible"):
        from_mapping(EchoConfig, {"session": {"resume_policy": "loose"}})
