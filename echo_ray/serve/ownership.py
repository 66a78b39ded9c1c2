"""Finding and making owners: reads the directory, and does what `session/locating.py` decides.

Holds the locks, the randomness and the memory of one router. Knows nothing about frames or viewers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import weakref
from collections.abc import Collection, Sequence
from functools import partial

from echo_ray.clock import Clock
from echo_ray.config import EchoConfig
from echo_ray.errors import CapacityError, Fenced, NoReplica
from echo_ray.serve.access_replica import replica_headers, replica_secret
from echo_ray.session import locating
from echo_ray.session.demand import Refusals
from echo_ray.session.fingerprint import ResumePolicy
from echo_ray.session.locating import LOOKS, SAMPLE, Ask, Claim, Memory, Standing, Wait
from echo_ray.session.locating import Owner as Owner
from echo_ray.session.moving import Move, plan
from echo_ray.session.placement import admit
from echo_ray.session.records import Pace, ReplicaRecord, SessionRecord
from echo_ray.storage.interface import Directory


class Owners:
    """Finds and makes owners; one per router."""

    def __init__(
        self, directory: Directory, config: EchoConfig, clock: Clock, rng: random.Random
    ) -> None:
        self._directory = directory
        self._config = config
        self._clock = clock
        self._rng = rng
        self._secret = replica_secret(config.access, clock)
        self._memory = Memory()
        self.refusals = Refusals()
        """Admissions refused for want of room."""
        self._policy = ResumePolicy(config.session.resume_policy)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def credentials(self) -> dict[str, str]:
        """The headers that a replica lets this router in for."""
        return replica_headers(self._secret)

    def avoid(self, replica_id: str) -> None:
        """Make this replica the last choice for a few seconds: it just failed somebody."""
        self._memory = locating.failed(self._memory, replica_id, self._clock.monotonic())

    async def locate(self, session_id: str, *, failed: Owner | None = None) -> Owner:
        """The owner of a session, woken if it is paused. Raises as `find`."""
        return await self.find(session_id, Ask(failed=failed))

    async def find(self, session_id: str, ask: Ask) -> Owner:
        """The session's owner, claiming the session if it has none for the best of a few replicas.

        All of them are read only if those few have no good place for it.
        Raises `SessionNotFound`, `SessionClosed`, `SessionPaused`, `NoReplica`, `CapacityError`.
        """
        async with self._lock(session_id):
            for look in range(LOOKS):
                record = await asyncio.to_thread(self._directory.get, session_id)
                match await self._look(record, ask, first=look == 0):
                    case Standing(owner):
                        return owner
                    case Wait(at_most_s):
                        await asyncio.sleep(self._rng.uniform(0, at_most_s))
                    case Claim(replica):
                        with contextlib.suppress(Fenced):
                            return await self.claim(record, replica)
        raise locating.unsettled(session_id)

    async def claim(self, record: SessionRecord, replica: ReplicaRecord) -> Owner:
        """Make `replica` the owner if the record still stands. Raises `Fenced` if it does not."""
        ttl_s = self._config.session.lease_ttl_s
        lease = await asyncio.to_thread(
            self._directory.claim, record.id, replica.id, expect_epoch=record.epoch, ttl_s=ttl_s
        )
        self._memory = locating.claimed(
            self._memory, record.id, replica.id, self._clock.monotonic()
        )
        return Owner(record.id, replica.id, replica.address, lease.epoch, record.next_index)

    async def admit(self, model: str, pace: Pace) -> None:
        """Raise `NoReplica` or `CapacityError` unless a new session finds room somewhere."""
        try:
            self._admit(await self._few(), model, pace)
        except (NoReplica, CapacityError):
            try:
                self._admit(await self._all(), model, pace)
            except (NoReplica, CapacityError):
                self.refusals.add(self._clock.monotonic())
                raise

    async def plan_move(self, record: SessionRecord, to: str | None) -> Move | None:
        """The move of a session as `moving.plan` has it, and refuses it.

        It counts against its target from here, so that several moves at once are spread.
        """
        replicas = await self._all()
        now_s = self._clock.monotonic()
        move = plan(
            record,
            replicas,
            to,
            cap=self._config.limits.sessions_per_replica,
            policy=self._policy,
            suspects=self._memory.suspects(now_s),
            pending=self._memory.pending(replicas, now_s),
        )
        if move is not None:
            self._memory = locating.claimed(self._memory, record.id, move.target.id, now_s)
        return move

    def is_owned(self, record: SessionRecord) -> bool:
        """Whether somebody holds a lease on the session that has not run out."""
        return locating.is_owned(record, self._clock.wall())

    async def _look(
        self, record: SessionRecord, ask: Ask, *, first: bool
    ) -> Standing | Wait | Claim:
        """What follows from a few replicas, or from all if that is not good enough."""
        owner = () if record.owner is None else (record.owner,)
        with contextlib.suppress(NoReplica, CapacityError):
            decision = self._decide(record, await self._few(owner), ask, first)
            suspects = self._memory.suspects(self._clock.monotonic())
            if locating.holds_for_all(decision, record, suspects):
                return decision
        return self._decide(record, await self._all(), ask, first)

    def _decide(
        self, record: SessionRecord, replicas: Sequence[ReplicaRecord], ask: Ask, first: bool
    ) -> Standing | Wait | Claim:
        now_s = self._clock.monotonic()
        return locating.decide(
            record,
            replicas,
            ask,
            first=first,
            cap=self._config.limits.sessions_per_replica,
            policy=self._policy,
            suspects=self._memory.suspects(now_s),
            pending=self._memory.pending(replicas, now_s),
        )

    def _admit(self, replicas: Sequence[ReplicaRecord], model: str, pace: Pace) -> None:
        cap = self._config.limits.sessions_per_replica
        pending = self._memory.pending(replicas, self._clock.monotonic())
        admit(replicas, model=model, pace=pace, cap=cap, pending=pending)

    async def _few(self, named: Collection[str] = ()) -> Sequence[ReplicaRecord]:
        read = partial(self._directory.replicas, among=SAMPLE, named=named)
        return await asyncio.to_thread(read)

    async def _all(self) -> Sequence[ReplicaRecord]:
        return await asyncio.to_thread(self._directory.replicas)

    def _lock(self, session_id: str) -> asyncio.Lock:
        lock = self._locks.get(session_id)
        if lock is None:
            lock = self._locks[session_id] = asyncio.Lock()
        return lock
