"""The stores of the simulation: the in-memory ones behind a network, watched by the ledger.

Every call takes its time. It may be lost on the way there, or its answer on the way back: then the
caller hears `StoreUnavailable` and cannot know whether the change was made.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from sim.kernel import Awaited, Call, Host, Network
from sim.ledger import Ledger
from sim.stream import StreamState

from echo_ray.errors import SnapshotNotFound, StoreUnavailable
from echo_ray.session.records import (
    ControlEntry,
    Lease,
    ReplicaRecord,
    SnapshotRef,
)
from echo_ray.storage.memory import MemoryDirectory

TIMEOUT_S = 0.5
Asked = Generator[Awaited, Any, Any]


class Store:
    """Directory and blobs on one host; every method is a generator run on the caller's host."""

    def __init__(self, host: Host, network: Network, ledger: Ledger) -> None:
        self.host = host
        self.directory = MemoryDirectory(host)
        self.blobs: dict[tuple[str, str], StreamState] = {}
        self.ledger = ledger
        self.refusing = False
        """The store answers, and every answer is that it cannot."""
        self._network = network

    def _ask(self, caller: Host, work: Callable[[], Any]) -> Asked:
        def served() -> Any:
            if self.refusing:
                raise StoreUnavailable("the store cannot")
            return work()

        lost = StoreUnavailable(f"no answer within {TIMEOUT_S} s")
        outcome = yield Call(self._network, self.host, served, timeout_s=TIMEOUT_S, lost=lost)
        return outcome

    def get(self, caller: Host, session_id: str) -> Asked:
        return self._ask(caller, lambda: self.directory.get(session_id))

    def claim(self, caller: Host, session_id: str, owner: str, epoch: int, ttl_s: float) -> Asked:
        def work() -> Lease:
            lease = self.directory.claim(session_id, owner, expect_epoch=epoch, ttl_s=ttl_s)
            self.ledger.claimed(lease)
            return lease

        return self._ask(caller, work)

    def renew(self, caller: Host, leases: Sequence[Lease], ttl_s: float) -> Asked:
        return self._ask(caller, lambda: self.directory.renew(leases, ttl_s=ttl_s))

    def release(self, caller: Host, lease: Lease, state: str) -> Asked:
        return self._ask(caller, lambda: self.directory.release(lease, state=state))

    def seal(self, caller: Host, lease: Lease, index: int) -> Asked:
        return self._ask(caller, lambda: self.directory.seal(lease, index))

    def commit(self, caller: Host, lease: Lease, index: int, digest: str, print_: str) -> Asked:
        def work() -> None:
            self.directory.commit(lease, index, digest, print_)
            log = self.directory.controls(lease.session_id)
            self.ledger.committed(lease, index, digest, log)

        return self._ask(caller, work)

    def digests(self, caller: Host, session_id: str, start: int, stop: int) -> Asked:
        return self._ask(caller, lambda: self.directory.digests(session_id, start, stop))

    def append_control(
        self, caller: Host, session_id: str, event_id: str, prompt: str, at_chunk: int | None
    ) -> Asked:
        def work() -> ControlEntry:
            return self.directory.append_control(session_id, event_id, prompt, at_chunk=at_chunk)

        return self._ask(caller, work)

    def controls(self, caller: Host, session_id: str, start: int) -> Asked:
        return self._ask(caller, lambda: self.directory.controls(session_id, start))

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

    def replicas(self, caller: Host) -> Asked:
        return self._ask(caller, self.directory.replicas)

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
