"""What a replica writes off its engine: snapshots, and releases behind them, in one queue."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

from sim.kernel import Bell, Host, Process, Rung
from sim.seat import Seat
from sim.store import Store
from sim.stream import StreamState

from echo_ray.errors import Draining, EchoError
from echo_ray.session import owner_events, owning
from echo_ray.session.records import SnapshotRef
from echo_ray.session.replay import to_prune

KEPT = 4


@dataclass(frozen=True, slots=True)
class _Write:
    seat: Seat
    state: StreamState


@dataclass(frozen=True, slots=True)
class _Release:
    seat: Seat


class Writer:
    """The queue, with one snapshot per session at most."""

    def __init__(self, host: Host, store: Store) -> None:
        self._host, self._store = host, store
        self._bell = Bell(host.world)
        self._jobs: deque[_Write | _Release] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def save(self, seat: Seat, state: StreamState) -> None:
        """Write the state at a point, some time soon."""
        for at, job in enumerate(self._jobs):
            if isinstance(job, _Write) and job.seat is seat:
                self._jobs[at] = _Write(seat, state)
                return
        self._jobs.append(_Write(seat, state))
        self._bell.ring()

    def release(self, seat: Seat) -> None:
        """Give the session up, after its snapshot, and end it here."""
        self._jobs.append(_Release(seat))
        self._bell.ring()

    def run(self) -> Process:
        """The writer's process."""
        while True:
            if not self._jobs:
                yield Rung(60.0, self._bell)
                continue
            job = self._jobs.popleft()
            if isinstance(job, _Release):
                yield from self._release(job.seat)
                continue
            try:
                yield from self._write(job.seat, job.state)
                yield from self._prune(job.seat)
            except EchoError:
                continue

    def _write(self, seat: Seat, state: StreamState) -> Process:
        host, store, index, session_id = self._host, self._store, state.next_index, seat.record.id
        lease = owning.held(seat.now, host.monotonic())
        ref = SnapshotRef(
            id=f"p{index:010d}-e{lease.epoch}",
            session_id=session_id,
            chunk_index=index,
            size_bytes=1,
            digest=str(state.hidden),
            created_at=host.wall(),
            store="sim",
            epoch=lease.epoch,
        )
        yield from store.put_blob(host, session_id, ref.id, state)
        lease = owning.held(seat.now, host.monotonic())
        try:
            yield from store.add_snapshot(host, lease, ref)
        except EchoError:
            yield from store.delete_blob(host, session_id, ref.id)
            raise

    def _prune(self, seat: Seat) -> Process:
        host, store, session_id = self._host, self._store, seat.record.id
        refs = yield from store.snapshots(host, session_id)
        for old in to_prune(refs, kept=KEPT):
            owning.held(seat.now, host.monotonic())
            yield from store.drop_snapshot(host, session_id, old.id)
            yield from store.delete_blob(host, session_id, old.id)

    def _release(self, seat: Seat) -> Process:
        state = seat.now.release_as
        told = Draining(f"{seat.record.id} was given up")
        if state is not None:
            try:
                lease = owning.held(seat.now, self._host.monotonic())
                yield from self._store.release(self._host, lease, state.value)
            except EchoError:
                # The lease runs out by itself then.
                pass
        seat.apply(partial(owner_events.ended, error=told))
