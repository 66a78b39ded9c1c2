"""Who generates a session, and making somebody do it: reads the record, claims when nobody does.

Every claim is a compare-and-set on the epoch, so two routers that want the same session cannot
both win; the loser reads the record again and follows. Knows nothing about frames or viewers.
"""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from echo_ray.clock import Clock
from echo_ray.config import EchoConfig
from echo_ray.errors import Fenced, NoReplica, SessionClosed
from echo_ray.session.placement import admit, best_replica
from echo_ray.session.records import Pace, ReplicaRecord, SessionRecord, SessionState
from echo_ray.storage.interface import Directory

AVOID_S = 3.0
"""A replica that failed a reader is this router's last choice for so long."""
PENDING_S = 2.0
"""A session counts against its replica for so long, until the replica counts it itself."""
JITTER_S = 0.04
CLAIM_TRIES = 5


class SessionPaused(Exception):
    """Somebody paused the session on purpose; it waits to be resumed. Never reaches a client."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Where a session is generated, and under which epoch."""

    session_id: str
    replica_id: str
    address: str
    epoch: int


class Owners:
    """Finds and makes owners; one per router."""

    def __init__(
        self, directory: Directory, config: EchoConfig, clock: Clock, rng: random.Random
    ) -> None:
        self._directory = directory
        self._config = config
        self._clock = clock
        self._rng = rng
        self._avoided: dict[str, float] = {}
        self._sent: list[tuple[str, str, float]] = []
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def avoid(self, replica_id: str) -> None:
        """Make this replica the last choice for a few seconds: it just failed somebody."""
        self._avoided[replica_id] = self._clock.monotonic() + AVOID_S

    async def locate(
        self,
        session_id: str,
        *,
        failed: Owner | None = None,
        last_epoch: int | None = None,
        wake: bool = True,
        avoid: Collection[str] = (),
    ) -> Owner:
        """The session's owner, claiming the session for the best live replica if it has none.

        `failed`: the owner that just failed this reader; while the record still names it, it
        counts as none. `last_epoch`: the epoch followed so far; a session paused under it was
        paused for want of readers, and there is one. A session paused by anybody else is woken
        only with `wake`, otherwise `SessionPaused` is raised. `avoid`: replicas that refused this
        session. Raises `SessionNotFound`,
        `SessionClosed`, `NoReplica`, `CapacityError`.
        """
        async with self._lock(session_id):
            for attempt in range(CLAIM_TRIES):
                record, replicas = await self._read(session_id)
                self._refuse(record, last_epoch, wake)
                owner = self._standing(record, replicas, failed)
                if owner is not None:
                    return owner
                if attempt == 0 and record.epoch > 0:
                    # Other routers have just seen the same loss: let one of them be first.
                    await asyncio.sleep(self._rng.uniform(0, JITTER_S))
                    continue
                replica = best_replica(
                    replicas,
                    model=record.model,
                    cap=self._config.limits.sessions_per_replica,
                    avoid=avoid,
                    suspects=self._avoided_now(),
                    pending=self._pending(replicas),
                )
                try:
                    return await self.claim(record, replica)
                except Fenced:
                    continue
        raise NoReplica(
            f"session {session_id} changed hands {CLAIM_TRIES} times in a row; retry",
            retry_after_s=1.0,
        )

    async def claim(self, record: SessionRecord, replica: ReplicaRecord) -> Owner:
        """Make `replica` the owner if the record still stands. Raises `Fenced` if it does not."""
        ttl_s = self._config.session.lease_ttl_s
        lease = await asyncio.to_thread(
            self._directory.claim, record.id, replica.id, expect_epoch=record.epoch, ttl_s=ttl_s
        )
        self._sent.append((replica.id, record.id, self._clock.monotonic() + PENDING_S))
        return Owner(record.id, replica.id, replica.address, lease.epoch)

    async def admit(self, model: str, pace: Pace) -> None:
        """Raise `NoReplica` or `CapacityError` unless a new session finds room somewhere."""
        replicas = await asyncio.to_thread(self._directory.replicas)
        cap = self._config.limits.sessions_per_replica
        admit(replicas, model=model, pace=pace, cap=cap, pending=self._pending(replicas))

    async def another(self, record: SessionRecord) -> ReplicaRecord:
        """The best replica that is not the session's owner. Raises `NoReplica`."""
        replicas = await asyncio.to_thread(self._directory.replicas)
        return best_replica(
            replicas,
            model=record.model,
            cap=self._config.limits.sessions_per_replica,
            avoid={record.owner or ""},
            suspects=self._avoided_now(),
            pending=self._pending(replicas),
        )

    def is_owned(self, record: SessionRecord) -> bool:
        """Whether somebody holds a lease on the session that has not run out."""
        return record.owner is not None and record.lease_until > self._clock.wall()

    async def _read(self, session_id: str) -> tuple[SessionRecord, Sequence[ReplicaRecord]]:
        record = await asyncio.to_thread(self._directory.get, session_id)
        return record, await asyncio.to_thread(self._directory.replicas)

    def _refuse(self, record: SessionRecord, last_epoch: int | None, wake: bool) -> None:
        if record.state is SessionState.CLOSED:
            raise SessionClosed(f"session {record.id} is closed; create another one")
        if record.state is SessionState.PAUSED and not wake and record.epoch != last_epoch:
            raise SessionPaused(f"session {record.id} is paused; resume it")

    def _standing(
        self, record: SessionRecord, replicas: Sequence[ReplicaRecord], failed: Owner | None
    ) -> Owner | None:
        if record.state is not SessionState.LIVE or not self.is_owned(record):
            return None
        if failed is not None and record.epoch <= failed.epoch:
            return None
        replica = next((r for r in replicas if r.id == record.owner), None)
        if replica is None:
            return None
        return Owner(record.id, replica.id, replica.address, record.epoch)

    def _avoided_now(self) -> set[str]:
        now = self._clock.monotonic()
        self._avoided = {rid: until for rid, until in self._avoided.items() if until > now}
        return set(self._avoided)

    def _pending(self, replicas: Sequence[ReplicaRecord]) -> dict[str, int]:
        now = self._clock.monotonic()
        self._sent = [s for s in self._sent if s[2] > now]
        known = {r.id: r.sessions for r in replicas}
        # The latest claim of a session counts; earlier ones have been taken back by it.
        latest = {session_id: replica_id for replica_id, session_id, _ in self._sent}
        counts: dict[str, int] = {}
        for session_id, replica_id in latest.items():
            if session_id not in known.get(replica_id, ()):
                counts[replica_id] = counts.get(replica_id, 0) + 1
        return counts

    def _lock(self, session_id: str) -> asyncio.Lock:
        lock = self._locks.get(session_id)
        if lock is None:
            lock = self._locks[session_id] = asyncio.Lock()
        return lock
