"""The stores of the simulation: the in-memory ones behind a network, watched by the ledger.

Every call takes its time. It may be lost, late or doubled on the way there, or its answer on the
way back: then the caller hears `StoreUnavailable` and cannot know whether the change was made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any

from sim.kernel import Awaited, Host
from sim.ledger import Ledger
from sim.network import Call, Network
from sim.stream import StreamState

from echo_ray.errors import SnapshotNotFound, StoreUnavailable
from echo_ray.session.records import (
    ControlEntry,
    Lease,
    ReplicaRecord,
    SessionRecord,
    SessionState,
    SnapshotRef,
)
from echo_ray.storage.memory import MemoryDirectory

TIMEOUT_S = 0.5
Asked = Generator[Awaited, Any, Any]


def _lost() -> StoreUnavailable:
    return StoreUnavailable(f"no answer within {TIMEOUT_S} s")


class Store:
    """Directory and blobs on one host; every method is a generator run on the caller's host."""

    def __init__(self, host: Host, network: Network, ledger: Ledger) -> None:
        self.host = host
        self.directory = MemoryDirectory(host, host.world.rng)
        self.blobs: dict[tuple[str, str], StreamState] = {}
        self.ledger = ledger
        self.refusing = 0.0
        """The share of calls that the store answers with an error of its own."""
        self._network = network

    def _ask(self, caller: Host, work: Callable[[], Any]) -> Asked:
        outcome = yield Call(
            self._network, self.host, lambda: self._served(work), timeout_s=TIMEOUT_S, lost=_lost
        )
        return outcome

    def _served(self, work: Callable[[], Any]) -> Any:
        if self.refusing and self.host.world.rng.random() < self.refusing:
            raise StoreUnavailable("the store cannot")
        return work()

    # Sessions and owners

    def get(self, caller: Host, session_id: str) -> Asked:
        return self._ask(caller, lambda: self.directory.get(session_id))

    def list(self, caller: Host) -> Asked:
        return self._ask(caller, self.directory.list)

    def claim(self, caller: Host, session_id: str, owner: str, epoch: int, ttl_s: float) -> Asked:
        def work() -> Lease:
            lease = self.directory.claim(session_id, owner, expect_epoch=epoch, ttl_s=ttl_s)
            self.ledger.claimed(lease)
            return lease

        return self._ask(caller, work)

    def renew(self, caller: Host, leases: Sequence[Lease], ttl_s: float) -> Asked:
        return self._ask(caller, lambda: self.directory.renew(leases, ttl_s=ttl_s))

    def release(self, caller: Host, lease: Lease, state: str) -> Asked:
        def work() -> None:
            self.directory.release(lease, state=state)
            self.ledger.released(lease, state)

        return self._ask(caller, work)

    def set_state(self, caller: Host, session_id: str, state: SessionState) -> Asked:
        def work() -> SessionRecord:
            record = self.directory.set_state(session_id, state=state.value)
            self.ledger.set(session_id, state)
            return record

        return self._ask(caller, work)

    # Chunks and controls

    def seal(self, caller: Host, lease: Lease, index: int) -> Asked:
        def work() -> Sequence[ControlEntry]:
            entries = self.directory.seal(lease, index)
            self.ledger.sealed(lease, index, entries)
            return entries

        return self._ask(caller, work)

    def commit(self, caller: Host, lease: Lease, index: int, digest: str, print_: str) -> Asked:
        def work() -> None:
            self.directory.commit(lease, index, digest, print_)
            self.ledger.committed(lease, index, digest)

        return self._ask(caller, work)

    def digests(self, caller: Host, session_id: str, start: int, stop: int) -> Asked:
        return self._ask(caller, lambda: self.directory.digests(session_id, start, stop))

    def append_control(
        self, caller: Host, session_id: str, event_id: str, prompt: str, at_chunk: int | None
    ) -> Asked:
        return self._ask(caller, lambda: self.append(session_id, event_id, prompt, at_chunk))

    def append(
        self, session_id: str, event_id: str, prompt: str, at_chunk: int | None
    ) -> ControlEntry:
        """What the store does when an event reaches it."""
        entry = self.directory.append_control(session_id, event_id, prompt, at_chunk=at_chunk)
        self.ledger.appended(session_id, entry, at_chunk)
        return entry

    def controls(self, caller: Host, session_id: str, start: int) -> Asked:
        return self._ask(caller, lambda: self.directory.controls(session_id, start))

    # Snapshots and replicas

    def add_snapshot(self, caller: Host, lease: Lease, ref: SnapshotRef) -> Asked:
        def work() -> None:
            self.directory.add_snapshot(lease, ref)
            self.ledger.recorded(lease, ref)

        return self._ask(caller, work)

    def snapshots(self, caller: Host, session_id: str) -> Asked:
        return self._ask(caller, lambda: self.directory.snapshots(session_id))

    def drop_snapshot(self, caller: Host, session_id: str, snapshot_id: str) -> Asked:
        return self._ask(caller, lambda: self.directory.drop_snapshot(session_id, snapshot_id))

    def put_replica(self, caller: Host, record: ReplicaRecord, ttl_s: float) -> Asked:
        return self._ask(caller, lambda: self.directory.put_replica(record, ttl_s=ttl_s))

    def replicas(
        self, caller: Host, *, among: int | None = None, named: Collection[str] = ()
    ) -> Asked:
        return self._ask(caller, lambda: self.directory.replicas(among=among, named=named))

    def put_blob(self, caller: Host, session_id: str, name: str, state: StreamState) -> Asked:
        def work() -> None:
            self.blobs[session_id, name] = state

        return self._ask(caller, work)

    def blob(self, caller: Host, session_id: str, name: str) -> Asked:
        def work() -> StreamState:
            found = self.blobs.get((session_id, name))
            if found is None:
                raise SnapshotNotFound(f"{session_id}: no blob {name}")
            return found

        return self._ask(caller, work)

    def delete_blob(self, caller: Host, session_id: str, name: str) -> Asked:
        return self._ask(caller, lambda: self.blobs.pop((session_id, name), None))
