"""A Redis directory whose sessions outlive it: their pasts are kept in a durable store.

What is gone and what was lost are told apart by the identity of the server: while there is none, a
session that is not found may come back, so that is `StoreUnavailable` and no `SessionNotFound`.
Sessions that are there can be used meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from echo_ray.clock import Clock
from echo_ray.errors import SessionNotFound, StoreUnavailable
from echo_ray.session.access import Quota
from echo_ray.session.forking import Past
from echo_ray.session.records import ControlEntry, Lease, SessionRecord, SnapshotRef
from echo_ray.storage.interface import SnapshotStore
from echo_ray.storage.pasts import PastKeeper
from echo_ray.storage.redis_change import SessionKeys
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_identity import RETRY_S, Identity
from echo_ray.storage.redis_link import Command, RedisServer
from echo_ray.storage.redis_rows import Stored


class _SureKeys(SessionKeys):
    """Says that a session does not exist only if it was not lost."""

    identity: Identity

    def found(self, session_id: str, reply: list[bytes]) -> Stored:
        try:
            return super().found(session_id, reply)
        except SessionNotFound:
            self.check_gone(session_id)
            raise

    def of(self, session_id: str, command: Command) -> list[bytes]:
        try:
            return super().of(session_id, command)
        except SessionNotFound:
            self.check_gone(session_id)
            raise

    def check_gone(self, session_id: str) -> None:
        with self.identity.unbroken():
            (there,) = self._link.run(("EXISTS", self._keys.of(session_id, "session")))
        if there:
            raise StoreUnavailable(
                f"session {session_id!r} was brought back a moment ago; retry",
                retry_after_s=RETRY_S,
            )


class KeptDirectory(RedisDirectory):
    """A `RedisDirectory` that keeps pasts in the store that `open_store` opens."""

    def __init__(
        self,
        server: RedisServer,
        clock: Clock,
        open_store: Callable[[], SnapshotStore],
        *,
        prefix: str = "echo",
        durability: str = "always",
        replicas: int = 0,
    ) -> None:
        # First of all, for a directory that cannot be opened is closed at once.
        self._keeper = PastKeeper(self, open_store, clock)
        super().__init__(server, clock, prefix=prefix, durability=durability, replicas=replicas)
        self._identity = Identity(self._link, prefix)
        self._sure = _SureKeys(self._link, self._keys, self._wait)
        self._sure.identity = self._identity
        self._sessions = self._sure

    def close(self) -> None:
        self._keeper.close()
        super().close()

    def restore(self, past: Past, *, quota: Quota | None = None) -> None:
        super().restore(past, quota=quota)
        self._keeper.changed(past.record.id)

    def list(self) -> Sequence[SessionRecord]:
        with self._identity.unbroken():
            return super().list()

    def delete(self, session_id: str) -> None:
        try:
            super().delete(session_id)
        except SessionNotFound:
            self._sure.check_gone(session_id)
            raise
        self._keeper.deleted(session_id)

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> Sequence[Lease]:
        lost = super().renew(leases, ttl_s=ttl_s)
        if lost:
            # An owner whose session was lost stops with its lease, by its own clock.
            with self._identity.unbroken():
                return lost
        return lost

    def release(self, lease: Lease, *, state: str) -> None:
        super().release(lease, state=state)
        self._keeper.changed(lease.session_id)

    def set_state(self, session_id: str, *, state: str) -> SessionRecord:
        record = super().set_state(session_id, state=state)
        self._keeper.changed(session_id)
        return record

    def append_control(
        self, session_id: str, event_id: str, prompt: str, *, at_chunk: int | None = None
    ) -> ControlEntry:
        entry = super().append_control(session_id, event_id, prompt, at_chunk=at_chunk)
        self._keeper.changed(session_id)
        return entry

    def add_snapshot(self, lease: Lease, ref: SnapshotRef) -> None:
        super().add_snapshot(lease, ref)
        self._keeper.moved(lease.session_id)

    def pin_snapshot(self, session_id: str, snapshot_id: str) -> SnapshotRef:
        ref = super().pin_snapshot(session_id, snapshot_id)
        self._keeper.changed(session_id)
        return ref
