"""A generator replica of the simulation: lets sessions in, runs them, and gives them up."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from sim.kernel import Bell, Host, Process, Rung, Sleep
from sim.progress import STEP_S, Bench, Progress
from sim.seat import RETENTION, Seat
from sim.store import Store
from sim.writer import Writer

from echo_ray.errors import CapacityError, Draining, EchoError, Fenced, SessionClosed
from echo_ray.session import owner_events
from echo_ray.session.lease import LeaseView
from echo_ray.session.pacing import choose
from echo_ray.session.records import Lease, ReplicaRecord, SessionRecord, SessionState

LEASE_TTL_S = 1.5
RENEW_S = 0.5
IDLE_GRACE_S = 5.0
SLOTS = 8
LONGEST_WAIT_S = 5.0


class Replica:
    """One process with one device."""

    def __init__(self, host: Host, store: Store) -> None:
        self.host = host
        self.store = store
        self._begin()

    @property
    def id(self) -> str:
        return f"{self.host.name}.{self.host.life}"

    def _begin(self) -> None:
        self.draining = False
        self._bell = Bell(self.host.world)
        self.writer = Writer(self.host, self.store)
        self.bench = Bench(self.host, self.store, self.writer, self._bell.ring)
        self.sessions: dict[str, Progress] = {}

    def start(self) -> None:
        """Begin as an empty process."""
        self._begin()
        for process in (self._engine(), self._keeper(), self.writer.run()):
            self.host.run(process)

    @property
    def seats(self) -> list[Seat]:
        return [progress.seat for progress in self.sessions.values()]

    # Letting in

    def own(self, session_id: str, epoch: int) -> Iterator[Any]:
        """The session under `epoch`, begun here if it was not. Raises `Fenced` and others."""
        sent_s = self.host.monotonic()
        record = yield from self.store.get(self.host, session_id)
        lease = Lease(session_id, self.id, epoch)
        if record.state is SessionState.CLOSED:
            raise SessionClosed(f"{session_id} is closed")
        lost = yield from self.store.renew(self.host, [lease], LEASE_TTL_S)
        if record.epoch != epoch or lost:
            raise Fenced(f"{session_id}: {self.id} does not own it under {epoch}")
        return self._let_in(record, LeaseView(lease, LEASE_TTL_S, sent_s))

    def prepare(self, session_id: str) -> Iterator[Any]:
        """Follow the session as a shadow until every committed chunk has been made here."""
        record = yield from self.store.get(self.host, session_id)
        if record.state is SessionState.CLOSED:
            raise SessionClosed(f"{session_id} is closed")
        seat = self._let_in(record, None)
        while not seat.now.caught_up:
            if seat.now.ended is not None:
                raise seat.now.ended
            yield Rung(1.0, seat.bell)

    def _let_in(self, record: SessionRecord, lease: LeaseView | None) -> Seat:
        here = self.sessions.get(record.id)
        seat = here.seat if here else None
        if seat is not None and seat.now.ended is None and not seat.now.releasing:
            held = seat.now.lease
            if lease is None:
                return seat
            if held is not None and held.lease == lease.lease:
                seat.apply(partial(owner_events.renewed, lease=lease.lease, sent_s=lease.sent_s))
                return seat
            if held is None or held.lease.epoch < lease.lease.epoch:
                seat.record = record
                now_s = self.host.monotonic()
                seat.apply(partial(owner_events.adopted, lease=lease, now_s=now_s))
                return seat
            raise Fenced(f"{record.id} runs here under the newer epoch {held.lease.epoch}")
        self._check_room(record.id)
        seat = Seat.taken(self.host, record, lease, self.wake)
        self.sessions[record.id] = Progress(self.bench, seat)
        self.wake()
        return seat

    def _check_room(self, session_id: str) -> None:
        if self.draining:
            raise Draining(f"{self.id} takes no sessions")
        others = [s for s in self.seats if s.now.ended is None and s.record.id != session_id]
        if len(others) >= SLOTS:
            raise CapacityError(f"{self.id} runs {len(others)} sessions")

    def backfill(self, seat: Seat) -> None:
        """Make again what a reader wants of the past, unless it is being made."""
        here = self.sessions.get(seat.record.id)
        if here is not None and here.seat is seat and not seat.backfilling:
            seat.backfilling = True
            self.host.run(here.backfill())

    def drain(self) -> None:
        """Take nobody in, and give everything up at a chunk boundary."""
        self.draining = True
        for seat in self.seats:
            seat.apply(partial(owner_events.drained, replica_id=self.id))

    def wake(self) -> None:
        """Somebody wants something else now."""
        self._bell.ring()

    # Work

    def _engine(self) -> Process:
        while True:
            turns = [t for p in self.sessions.values() if (t := p.turn()) is not None]
            now_s = self.host.monotonic()
            choice = choose(turns, now_s)
            if choice.session_id is not None:
                yield from self.sessions[choice.session_id].work()
                continue
            wait_s = LONGEST_WAIT_S if choice.wake_s is None else choice.wake_s - now_s
            yield Rung(min(LONGEST_WAIT_S, wait_s), self._bell)

    # Housekeeping

    def record(self) -> ReplicaRecord:
        """What the replica says of itself."""
        owned = [s for s in self.seats if not s.now.shadow and s.now.ended is None]
        return ReplicaRecord(
            id=self.id,
            node_id=self.host.name,
            pid=self.host.life,
            address=self.host.name,
            state="draining" if self.draining else "ready",
            model="sim",
            sessions=tuple(sorted(s.record.id for s in owned)),
            chunk_seconds=sum(STEP_S) / 2,
            free_slots=0 if self.draining else max(0, SLOTS - len(owned)),
        )

    def _keeper(self) -> Process:
        while True:
            began_s = self.host.monotonic()
            yield from self._renew()
            now_s = self.host.monotonic()
            for seat in self.seats:
                if seat.now.ended is None:
                    seat.apply(partial(owner_events.expired, now_s=now_s))
                    idled = partial(owner_events.idled, now_s=now_s, grace_s=IDLE_GRACE_S)
                    seat.apply(idled)
                here = self.sessions.get(seat.record.id)
                if seat.now.ended is not None and here is not None and here.seat is seat:
                    del self.sessions[seat.record.id]
            yield Sleep(max(0.01, RENEW_S - (self.host.monotonic() - began_s)))

    def _renew(self) -> Process:
        held = {
            s.now.lease.lease: s
            for s in self.seats
            if s.now.lease is not None and s.now.ended is None
        }
        try:
            sent_s = self.host.monotonic()
            if held:
                lost = yield from self.store.renew(self.host, list(held), LEASE_TTL_S)
                for lease, seat in held.items():
                    if lease in lost:
                        taken = Fenced(f"{lease.session_id}: taken")
                        event = partial(owner_events.lost, lease=lease, error=taken)
                    else:
                        event = partial(owner_events.renewed, lease=lease, sent_s=sent_s)
                    seat.apply(event)
            yield from self.store.put_replica(self.host, self.record(), LEASE_TTL_S)
        except EchoError:
            return

    # What must stay small

    def excess(self) -> str | None:
        """What is larger here than it may ever be."""
        for seat in self.seats:
            kept = max(len(seat.segments), len(seat.past))
            if kept > RETENTION:
                return f"{self.id} keeps {kept} segments of {seat.record.id}"
        if len(self.sessions) > 2 * SLOTS:
            return f"{self.id} has {len(self.sessions)} seats"
        # Those of sessions that have ended wait as well, for the writer to see that they have.
        if len(self.writer) > 4 * SLOTS:
            return f"{self.id} has {len(self.writer)} writes waiting"
        return None

    def left_behind(self, watched: dict[str, int]) -> str | None:
        """Readers here that no viewer is behind; `watched`: pulls by session that there are."""
        for seat in self.seats:
            if len(seat.readers) > watched.get(seat.record.id, 0) and seat.now.ended is None:
                return f"{len(seat.readers)} readers of {seat.record.id} at {self.id}"
        return None
