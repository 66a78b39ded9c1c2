"""A generator replica of the simulation: executes the owner's machine on virtual threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sim.kernel import Awaited, Bell, Host, Process, Rung, Sleep
from sim.store import Store
from sim.stream import (
    CHUNK_S,
    FINGERPRINT,
    POINT_EVERY,
    StreamState,
    opened,
    start_s,
    stepped,
)

from echo_ray.errors import EchoError, Fenced, SegmentExpired, SessionClosed
from echo_ray.session import owner_events, owning
from echo_ray.session.lease import LeaseView
from echo_ray.session.owner_events import Effect, Step
from echo_ray.session.owning import LeaseOver, Owning, Pacing, Work
from echo_ray.session.pacing import Turn, choose, wanted
from echo_ray.session.records import (
    Lease,
    ReplicaRecord,
    SessionRecord,
    SessionState,
    SnapshotRef,
)
from echo_ray.session.replay import ControlLog, Verdict, compare, points_to_try, to_prune

Waiting = Iterator[Awaited]
LEASE_TTL_S = 1.5
RENEW_S = 0.25
IDLE_GRACE_S = 5.0
LEAD = 3
RETENTION = 32
KEPT = 3
SLOTS = 8
STEP_S = (0.02, 0.08)


@dataclass(frozen=True, slots=True)
class Segment:
    """What readers get of a chunk."""

    index: int
    digest: str
    discontinuity: bool = False


@dataclass(slots=True, eq=False)
class Reader:
    """One pull: where it is, what it wants, and how to wake it."""

    epoch: int
    cursor: int
    want: int
    bell: Bell = field(default_factory=Bell)


@dataclass(slots=True, eq=False)
class Seat:
    """One session here: its machine's value and what the machine does not hold."""

    record: SessionRecord
    now: Owning
    state: StreamState | None = None
    log: ControlLog = field(default_factory=ControlLog)
    digests: dict[int, str] = field(default_factory=dict)
    saved: set[int] = field(default_factory=set)
    refused: frozenset[str] = frozenset()
    unconfirmed: Segment | None = None
    fetching: bool = False
    fetched: Any = None
    segments: dict[int, Segment] = field(default_factory=dict)
    past: dict[int, Segment] = field(default_factory=dict)
    """Segments before `first`, made again for readers who lag."""
    first: int = 0
    backfilling: bool = False
    readers: list[Reader] = field(default_factory=list)

    def ring(self) -> None:
        for reader in self.readers:
            reader.bell.ring()


class Replica:
    """One process with one device."""

    def __init__(self, host: Host, store: Store) -> None:
        self.host = host
        self.store = store
        self.seats: dict[str, Seat] = {}
        self.draining = False
        self._bell = Bell()
        self._writes: list[Callable[[], Process]] = []
        self._writes_bell = Bell()

    @property
    def id(self) -> str:
        return f"{self.host.name}.{self.host.life}"

    def start(self) -> None:
        """Begin as an empty process."""
        self.seats, self.draining, self._writes = {}, False, []
        self._bell, self._writes_bell = Bell(), Bell()
        for process in (self._engine(), self._keeper(), self._writer()):
            self.host.run(process)

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
        """The session followed as a shadow, or as it runs here already."""
        record = yield from self.store.get(self.host, session_id)
        return self._let_in(record, None)

    def _let_in(self, record: SessionRecord, lease: LeaseView | None) -> Seat:
        seat = self.seats.get(record.id)
        if seat is not None and seat.now.ended is None and not seat.now.releasing:
            held = seat.now.lease
            if lease is None:
                return seat
            if held is not None and held.lease == lease.lease:
                self.apply(
                    seat, partial(owner_events.renewed, lease=lease.lease, sent_s=lease.sent_s)
                )
                return seat
            if held is None or held.lease.epoch < lease.lease.epoch:
                seat.record = record
                now_s = self.host.monotonic()
                self.apply(seat, partial(owner_events.adopted, lease=lease, now_s=now_s))
                return seat
            raise Fenced(f"{record.id} runs here under the newer epoch {held.lease.epoch}")
        seat = Seat(record, owning.started(record, lease, self.host.monotonic()))
        self.seats[record.id] = seat
        self._bell.ring()
        return seat

    def attach(self, seat: Seat, reader: Reader) -> None:
        seat.readers.append(reader)
        self.apply(seat, owner_events.watched)

    def detach(self, seat: Seat, reader: Reader) -> None:
        if reader in seat.readers:
            seat.readers.remove(reader)
        if not seat.readers:
            now_s = self.host.monotonic()
            self.apply(seat, partial(owner_events.unwatched, now_s=now_s))

    def segment(self, seat: Seat, reader: Reader, index: int) -> Segment | None:
        """A published segment, or None if it is not there yet."""
        owning.check_reader(seat.now, reader.epoch, self.host.monotonic())
        reader.cursor = index
        if not seat.now.planned or index >= seat.now.committed:
            return None
        if index < seat.now.committed - RETENTION:
            raise SegmentExpired(f"{seat.record.id}: {index} is gone")
        found = seat.segments.get(index) or seat.past.get(index)
        if found is None and index < seat.first and not seat.backfilling:
            seat.backfilling = True
            self.host.run(self._backfill(seat, index))
        return found

    def drain(self) -> None:
        """Give everything up at a chunk boundary."""
        self.draining = True
        for seat in list(self.seats.values()):
            self.apply(seat, partial(owner_events.drained, replica_id=self.id))

    def wake(self) -> None:
        """Somebody wants something else now."""
        self._bell.ring()

    # The machine

    def apply(self, seat: Seat, event: Callable[[Owning], Step]) -> tuple[Effect, ...]:
        """Let an event have happened, and do what follows."""
        was = seat.now.ended
        seat.now, effects = event(seat.now)
        if was is None and seat.now.ended is not None:
            reason = seat.now.ended.message
            self.host.world.note(f"{seat.record.id} ends at {self.id}: {reason}")
        if Effect.DROP_STATE in effects:
            seat.state = seat.unconfirmed = seat.fetched = None
            seat.fetching = False
        if Effect.TELL in effects:
            self._bell.ring()
            seat.ring()
        return effects

    def _publish(self, seat: Seat, segment: Segment, event: Callable[[Owning], Step]) -> None:
        effects = self.apply(seat, event)
        if Effect.PUBLISH in effects:
            seat.segments[segment.index] = segment
            seat.segments.pop(segment.index - RETENTION, None)
            seat.ring()

    def _turn(self, seat: Seat) -> Turn | None:
        now = seat.now
        work = owning.work(now)
        if work is None or (work is Work.FETCH and seat.fetching and seat.fetched is None):
            return None
        wants = [r.want for r in seat.readers]
        want = wanted(wants, now.pace, now.on_idle) if work is Work.PRODUCE else None
        pacing = Pacing(
            start_s=start_s(now.committed), chunk_s=CHUNK_S, lead_s=LEAD * CHUNK_S, want=want
        )
        times = owning.times(now, pacing)
        if times is None:
            self.apply(seat, owner_events.held_back)
            return None
        return Turn(seat.record.id, *times, now.served_s)

    def _engine(self) -> Process:
        while True:
            turns = [t for s in self.seats.values() if (t := self._turn(s)) is not None]
            choice = choose(turns, self.host.monotonic())
            if choice.session_id is None:
                wake_s = 0.5 if choice.wake_s is None else choice.wake_s - self.host.monotonic()
                yield Rung(self._bell, min(0.5, max(0.0, wake_s)))
                continue
            seat = self.seats[choice.session_id]
            used = seat.now.lease
            self.apply(seat, partial(owner_events.begun, now_s=self.host.monotonic()))
            try:
                yield from self._work(seat, used)
            except Exception as error:
                if not isinstance(error, EchoError):
                    raise
                now_s = self.host.monotonic()
                self.apply(seat, partial(owner_events.failed, error=error, used=used, now_s=now_s))

    def _work(self, seat: Seat, used: LeaseView | None) -> Waiting:
        work, state = owning.work(seat.now), seat.state
        if work is Work.RELEASE:
            self.apply(seat, owner_events.releasing)
            self._submit(partial(self._release, seat))
        elif work is Work.FETCH:
            self._load(seat)
        elif state is None:
            return
        elif work is Work.REFRESH:
            yield from self._refresh(seat, state, used)
        elif work is Work.COMMIT and seat.unconfirmed is not None:
            yield from self._commit(seat, seat.unconfirmed)
        elif work is Work.REPLAY:
            yield from self._replay(seat, state)
        elif work is Work.PRODUCE:
            yield from self._produce(seat, state)

    def _load(self, seat: Seat) -> None:
        if seat.fetched is None:
            seat.fetching = True
            self.host.run(self._fetch(seat))
            return
        outcome, seat.fetched, seat.fetching = seat.fetched, None, False
        if isinstance(outcome, Exception):
            raise outcome
        record, state, entries, digests, saved = outcome
        seat.state, seat.log, seat.digests = state, ControlLog(entries), digests
        seat.saved, seat.segments, seat.first = saved, {}, state.next_index
        event = partial(
            owner_events.loaded, at=state.next_index, record=record, fingerprint=FINGERPRINT
        )
        self.apply(seat, event)

    def _fetch(self, seat: Seat) -> Process:
        try:
            seat.fetched = yield from self._read_back(seat, None)
        except EchoError as error:
            seat.fetched = error
        self._bell.ring()

    def _read_back(self, seat: Seat, needed: int | None) -> Iterator[Any]:
        """Record, state at a point, log, digests, and the points that are stored."""
        session_id, host, store = seat.record.id, self.host, self.store
        record = yield from store.get(host, session_id)
        refs = yield from store.snapshots(host, session_id)
        needed = record.next_index if needed is None else needed
        points = points_to_try(
            refs, next_index=record.next_index, needed=needed, limit=2 * RETENTION + POINT_EVERY
        )
        state = opened(record)
        if points[0] is not None:
            state = yield from store.blob(host, session_id, points[0].id)
        entries = yield from store.controls(host, session_id, 0)
        digests = yield from store.digests(host, session_id, state.next_index, record.next_index)
        return record, state, entries, digests, {r.chunk_index for r in refs}

    def _backfill(self, seat: Seat, index: int) -> Process:
        try:
            record, state, entries, digests, _ = yield from self._read_back(seat, index)
        except EchoError:
            seat.backfilling = False
            return
        log = ControlLog(entries)
        while state.next_index < min(seat.first, record.next_index):
            at = state.next_index
            yield Sleep(self.host.world.rng.uniform(*STEP_S))
            state, digest = stepped(state, log.prompts(at))
            verdict = compare(digests, at, digest)
            seat.past[at] = Segment(at, digest, discontinuity=verdict is Verdict.DIFFERENT)
            seat.ring()
        seat.backfilling = False

    def _refresh(self, seat: Seat, state: StreamState, used: LeaseView | None) -> Waiting:
        now, session_id, host, store = seat.now, seat.record.id, self.host, self.store
        record = yield from store.get(host, session_id)
        if now.shadow and not now.refresh and record.next_index == now.committed:
            return
        start = min(state.next_index, now.committed, record.next_index)
        entries = yield from store.controls(host, session_id, start)
        found = yield from store.digests(host, session_id, start, record.next_index)
        seat.log.fix(start, entries)
        seat.digests = {**seat.digests, **found}
        pending = found.get(now.pending.index) if now.pending else None
        event = partial(owner_events.refreshed, record=record, found=pending, used=used)
        segment = seat.unconfirmed
        if segment is None:
            self.apply(seat, event)
            return
        self._publish(seat, segment, event)
        if seat.now.pending is None:
            seat.unconfirmed = None

    def _step(self, seat: Seat, state: StreamState) -> Iterator[Any]:
        yield Sleep(self.host.world.rng.uniform(*STEP_S))
        return stepped(state, seat.log.prompts(state.next_index))

    def _replay(self, seat: Seat, state: StreamState) -> Waiting:
        index = state.next_index
        after, digest = yield from self._step(seat, state)
        if seat.state is not state:
            return
        seat.state = after
        verdict = compare(seat.digests, index, digest)
        segment = Segment(index, digest, discontinuity=verdict is Verdict.DIFFERENT)
        event = partial(owner_events.replayed, index=index, verdict=verdict)
        self._publish(seat, segment, event)
        self._save(seat, after)

    def _produce(self, seat: Seat, state: StreamState) -> Waiting:
        index = state.next_index
        lease = owning.held(seat.now, self.host.monotonic())
        entries = yield from self.store.seal(self.host, lease, index)
        seat.log.fix(index, entries)
        after, digest = yield from self._step(seat, state)
        if seat.state is not state:
            return
        seat.state = after
        seat.unconfirmed = Segment(index, digest, discontinuity=seat.now.diverged)
        self.apply(seat, partial(owner_events.made, index=index, digest=digest))
        yield from self._commit(seat, seat.unconfirmed)

    def _commit(self, seat: Seat, segment: Segment) -> Waiting:
        lease = owning.held(seat.now, self.host.monotonic())
        yield from self.store.commit(self.host, lease, segment.index, segment.digest, FINGERPRINT)
        if seat.unconfirmed is not segment:
            return
        seat.unconfirmed = None
        event = partial(
            owner_events.committed,
            index=segment.index,
            start_s=start_s(segment.index),
            now_s=self.host.monotonic(),
        )
        self._publish(seat, segment, event)
        if seat.state is not None:
            self._save(seat, seat.state)

    # Snapshots and releases

    def _save(self, seat: Seat, state: StreamState) -> None:
        index = state.next_index
        if seat.now.shadow or not state.at_point or index in seat.saved:
            return
        seat.saved.add(index)
        self._submit(partial(self._write, seat, state))

    def _submit(self, job: Callable[[], Process]) -> None:
        self._writes.append(job)
        self._writes_bell.ring()

    def _writer(self) -> Process:
        while True:
            if not self._writes:
                yield Rung(self._writes_bell, 60.0)
                continue
            job = self._writes.pop(0)
            yield from job()

    def _write(self, seat: Seat, state: StreamState) -> Process:
        host, store, index = self.host, self.store, state.next_index
        session_id = seat.record.id
        try:
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
            yield from store.add_snapshot(host, lease, ref)
            refs = yield from store.snapshots(host, session_id)
            for old in to_prune(refs, kept=KEPT):
                owning.held(seat.now, host.monotonic())
                yield from store.drop_snapshot(host, session_id, old.id)
                yield from store.delete_blob(host, session_id, old.id)
        except EchoError:
            return

    def _release(self, seat: Seat) -> Process:
        state = seat.now.release_as
        told: EchoError = LeaseOver("given up")
        if state is not None:
            try:
                lease = owning.held(seat.now, self.host.monotonic())
                yield from self.store.release(self.host, lease, state.value)
            except EchoError:
                pass
        self.apply(seat, partial(owner_events.ended, error=told))

    # Housekeeping

    def record(self) -> ReplicaRecord:
        """What the replica says of itself."""
        owned = [s for s in self.seats.values() if not s.now.shadow and s.now.ended is None]
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
            for seat in list(self.seats.values()):
                self.apply(seat, partial(owner_events.expired, now_s=now_s))
                idled = partial(owner_events.idled, now_s=now_s, grace_s=IDLE_GRACE_S)
                self.apply(seat, idled)
                if seat.now.ended is not None and self.seats.get(seat.record.id) is seat:
                    del self.seats[seat.record.id]
            yield Sleep(max(0.01, RENEW_S - (self.host.monotonic() - began_s)))

    def _renew(self) -> Waiting:
        held = {
            s.now.lease.lease: s
            for s in self.seats.values()
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
                    self.apply(seat, event)
            yield from self.store.put_replica(self.host, self.record(), LEASE_TTL_S)
        except EchoError:
            return
