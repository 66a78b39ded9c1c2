"""Owners are found and placed among a few replicas; all are read only where a few are no help."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fakes import FakeClock

from echo_ray.config import EchoConfig, LimitsSection, SessionSection
from echo_ray.errors import CapacityError, NoReplica
from echo_ray.serve.ownership import Owners
from echo_ray.session.locating import SAMPLE, Ask
from echo_ray.session.records import Pace, ReplicaRecord, SessionRecord
from echo_ray.storage.memory import MemoryDirectory

MANY = 200
CAP = 4
FULL = tuple(f"other{n}" for n in range(CAP))
SESSION = SessionRecord(id="s1", model="m", prompt="p", seed=1)


class Counted(MemoryDirectory):
    """Notes what was asked for: a number, or None for all."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock, random.Random(7))
        self.asked: list[int | None] = []

    def replicas(
        self, *, among: int | None = None, named: Sequence[str] = ()
    ) -> Sequence[ReplicaRecord]:
        self.asked.append(among)
        found = super().replicas(among=among, named=named)
        if among is not None:
            assert len(found) <= among + len(named)
        return found


def replica(number: int) -> ReplicaRecord:
    return ReplicaRecord(id=f"r{number:03}", node_id="n", pid=1, address=f"{number}", model="m")


@pytest.fixture
def directory() -> Counted:
    return Counted(FakeClock())


def owners(directory: Counted, policy: str = "exact") -> Owners:
    config = EchoConfig(
        limits=LimitsSection(sessions_per_replica=CAP),
        session=SessionSection(resume_policy=policy),
    )
    return Owners(directory, config, FakeClock(), random.Random(1))


def fill(directory: Counted, count: int = MANY, **changes: object) -> None:
    for n in range(count):
        directory.put_replica(replace(replica(n), **changes), ttl_s=60)  # type: ignore[arg-type]


def test_a_place_is_chosen_among_a_few(directory: Counted) -> None:
    fill(directory)
    places = set()
    for n in range(40):
        directory.create(replace(SESSION, id=f"s{n}"))
        places.add(asyncio.run(owners(directory).locate(f"s{n}")).replica_id)
    assert directory.asked == [SAMPLE] * 40
    assert len(places) > 20


def test_the_owner_is_found_by_name_however_many_others_there_are(directory: Counted) -> None:
    fill(directory)
    directory.create(SESSION)
    directory.claim("s1", "r150", expect_epoch=0, ttl_s=60)
    for _ in range(20):
        assert asyncio.run(owners(directory).find("s1", Ask())).replica_id == "r150"
    assert directory.asked == [SAMPLE] * 20


def test_a_lost_owner_is_replaced_by_one_of_a_few(directory: Counted) -> None:
    fill(directory)
    directory.create(SESSION)
    directory.claim("s1", "gone", expect_epoch=0, ttl_s=60)
    owner = asyncio.run(owners(directory).find("s1", Ask()))
    assert (owner.replica_id != "gone", owner.epoch) == (True, 2)
    assert directory.asked == [SAMPLE] * 2


def test_the_only_one_with_room_is_found_among_all(directory: Counted) -> None:
    fill(directory, sessions=FULL)
    directory.put_replica(replica(77), ttl_s=60)
    directory.create(SESSION)
    asyncio.run(owners(directory).admit("m", Pace.REALTIME))
    assert asyncio.run(owners(directory).find("s1", Ask())).replica_id == "r077"
    assert directory.asked == [SAMPLE, None] * 2


def test_the_only_engine_that_makes_the_same_bits_is_found_among_all(directory: Counted) -> None:
    fill(directory, fingerprint="m/two")
    directory.put_replica(replace(replica(77), fingerprint="m/one"), ttl_s=60)
    for policy in ("exact", "compatible"):
        directory.create(replace(SESSION, id=policy, fingerprint="m/one"))
        owner = asyncio.run(owners(directory, policy).find(policy, Ask()))
        assert owner.replica_id == "r077"
    assert directory.asked == [SAMPLE, None] * 2


def test_a_suspect_is_taken_only_when_nobody_else_has_room(directory: Counted) -> None:
    fill(directory, sessions=FULL)
    directory.put_replica(replica(77), ttl_s=60)
    directory.put_replica(replica(78), ttl_s=60)
    directory.create(SESSION)
    finder = owners(directory)
    finder.avoid("r077")
    assert asyncio.run(finder.find("s1", Ask())).replica_id == "r078"


@pytest.mark.parametrize(("count", "refusal"), [(MANY, CapacityError), (0, NoReplica)])
def test_a_refusal_speaks_of_all_replicas(
    directory: Counted, count: int, refusal: type[Exception]
) -> None:
    fill(directory, count, sessions=FULL)
    directory.create(SESSION)
    with pytest.raises(refusal, match=f"{count} (ready|live)"):
        asyncio.run(owners(directory).find("s1", Ask()))
    with pytest.raises(refusal, match=f"{count} (ready|live)"):
        asyncio.run(owners(directory).admit("m", Pace.REALTIME))
    assert directory.asked == [SAMPLE, None] * 2
