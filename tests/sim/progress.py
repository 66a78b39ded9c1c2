"""One session on a replica's engine: carries out what `session/owning.py` says is to be done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sim.kernel import Host, Process, Sleep
from sim.seat import RETENTION, Seat
from sim.store import Store
from sim.stream import (
    CHUNK_S,
    FINGERPRINT,
    POINT_EVERY,
    Segment,
    StreamState,
    opened,
    start_s,
    stepped,
)
from sim.writer import Writer

from echo_ray.errors import EchoError, EngineError, SnapshotNotFound
from echo_ray.session import owner_events, owning
from echo_ray.session.lease import LeaseView
from echo_ray.session.owning import Pacing, Work
from echo_ray.session.pacing import Turn
from echo_ray.session.records import SessionRecord
from echo_ray.session.replay import ControlLog, Verdict, compare, points_to_try

LEAD = 3
STEP_S = (0.02, 0.08)
SLICES = 3
"""Pieces of a step, between which other sessions of the replica are worked on."""
LOAD_SLICES = 5
"""Of a load, as long as those of a step."""
CHUNK_SECONDS = sum(STEP_S) / 2
LIMIT = 2 * RETENTION + POINT_EVERY
"""Longest replay that is worth its time for the sake of past segments."""
NOTHING_WANTED = Pacing(
    start_s=0.0,
    chunk_s=CHUNK_S,
    lead_s=LEAD * CHUNK_S,
    want=None,
    chunk_seconds=CHUNK_SECONDS,
)


@dataclass(slots=True)
class Bench:
    """What the sessions of one replica work with."""

    host: Host
    store: Store
    writer: Writer
    wake: Callable[[], None]
    """Look for work again."""
    failing: int = 0
    """How many of the next steps the engine spoils."""

    def compute(self, slices: int = 1) -> Process:
        """The time that so many slices of a chunk take."""
        seconds = self.host.world.rng.uniform(*STEP_S) * slices / SLICES
        yield Sleep(seconds * self.host.slow)
        if self.failing:
            self.failing -= 1
            raise EngineError("the engine spoiled a chunk")


@dataclass(frozen=True, slots=True)
class Fetched:
    """Everything that bringing a session back takes."""

    record: SessionRecord
    state: StreamState
    log: ControlLog
    digests: dict[int, str]
    saved: set[int]
    refused: frozenset[str]


class Progress:
    """The engine's side of one session."""

    def __init__(self, bench: Bench, seat: Seat) -> None:
        self.seat = seat
        self._bench = bench
        self._host = bench.host
        self._store = bench.store
        self._left = 0
        self._prompts: Sequence[str] = ()
        self._replaying = False

    def turn(self) -> Turn | None:
        """When this session needs the engine next; None until something changes."""
        seat, now = self.seat, self.seat.now
        work = owning.work(now)
        if work is None or (work is Work.FETCH and seat.fetching and seat.fetched is None):
            return None
        pacing = NOTHING_WANTED
        if work in (Work.PRODUCE, Work.ADVANCE):
            pacing = replace(NOTHING_WANTED, start_s=start_s(now.committed), want=seat.wanted())
        times = owning.times(now, pacing)
        if times is None:
            if not now.held_back:
                seat.apply(owner_events.held_back)
            return None
        return Turn(seat.record.id, *times, now.served_s)

    def work(self) -> Process:
        """Do the next piece of work; whatever fails ends here."""
        seat, used = self.seat, self.seat.now.lease
        seat.apply(partial(owner_events.begun, now_s=self._host.monotonic()))
        try:
            yield from self._work(used)
        except EchoError as error:
            now_s = self._host.monotonic()
            seat.apply(partial(owner_events.failed, error=error, used=used, now_s=now_s))

    def _work(self, used: LeaseView | None) -> Process:
        seat = self.seat
        work, state = owning.work(seat.now), seat.state
        if work is Work.RELEASE:
            seat.apply(owner_events.releasing)
            self._bench.writer.release(seat)
        elif work is Work.FETCH:
            yield from self._load()
        elif state is None:
            return
        elif work is Work.REFRESH:
            yield from self._refresh(state, used)
        elif work is Work.COMMIT and seat.unconfirmed is not None:
            yield from self._commit(seat.unconfirmed)
        elif work is Work.ADVANCE:
            yield from self._advance(state)
        elif work is Work.REPLAY:
            yield from self._begin(state, replay=True)
        elif work is Work.PRODUCE:
            yield from self._produce(state)

    # Coming back

    def _load(self) -> Process:
        seat, outcome = self.seat, self.seat.fetched
        if outcome is None:
            seat.fetching, seat.loaded = True, 0
            self._host.run(self._fetch())
            return
        if isinstance(outcome, Exception):
            seat.fetched, seat.fetching = None, False
            raise outcome
        yield from self._bench.compute()
        if seat.fetched is not outcome:
            return
        seat.loaded += 1
        seat.apply(partial(owner_events.loading, now_s=self._host.monotonic()))
        if seat.loaded == LOAD_SLICES:
            seat.fetched, seat.fetching = None, False
            self._take(outcome)

    def _take(self, fetched: Fetched) -> None:
        seat, at = self.seat, fetched.state.next_index
        seat.state, seat.log, seat.digests = fetched.state, fetched.log, fetched.digests
        seat.saved, seat.refused = fetched.saved, fetched.refused
        seat.restart(at)
        seat.apply(
            partial(owner_events.loaded, at=at, record=fetched.record, fingerprint=FINGERPRINT)
        )

    def _fetch(self) -> Process:
        try:
            self.seat.fetched = yield from self._read_back(None)
        except EchoError as error:
            self.seat.fetched = error
        self._bench.wake()

    def _read_back(self, needed: int | None) -> Iterator[Any]:
        """The session as the stores have it, at a point from which `needed` can be made."""
        session_id, host, store = self.seat.record.id, self._host, self._store
        record = yield from store.get(host, session_id)
        refs = yield from store.snapshots(host, session_id)
        refused = self.seat.refused
        points = points_to_try(
            refs,
            next_index=record.next_index,
            needed=record.next_index if needed is None else min(needed, record.next_index),
            limit=LIMIT,
            refused=refused,
        )
        state = opened(record)
        for ref in points:
            if ref is None:
                break
            try:
                state = yield from store.blob(host, session_id, ref.id)
            except SnapshotNotFound:
                refused |= {ref.id}
                continue
            break
        entries = yield from store.controls(host, session_id, 0)
        digests = yield from store.digests(host, session_id, state.next_index, record.next_index)
        saved = {ref.chunk_index for ref in refs}
        return Fetched(record, state, ControlLog(entries), digests, saved, refused)

    def backfill(self) -> Process:
        """Make again what readers want of the past, with a state of its own."""
        seat = self.seat
        try:
            while (needed := seat.past_wanted()) is not None:
                fetched = yield from self._read_back(needed)
                if fetched.state.next_index > needed:
                    seat.past_floor = fetched.state.next_index
                    seat.bell.ring()
                    continue
                yield from self._past(fetched)
        except EchoError:
            # The reader that still waits begins it again.
            yield Sleep(owner_events.RETRY_AFTER_S)
        seat.backfilling, seat.past = False, {}

    def _past(self, fetched: Fetched) -> Process:
        seat, state = self.seat, fetched.state
        while state.next_index < min(seat.first, fetched.record.next_index):
            needed = seat.past_wanted()
            if needed is None or state.next_index > needed:
                if needed not in seat.past:
                    return
                yield Sleep(0.1)
                continue
            at = state.next_index
            yield from self._bench.compute(SLICES)
            state, digest = stepped(state, fetched.log.prompts(at))
            verdict = compare(fetched.digests, at, digest)
            seat.publish_past(Segment(at, digest, discontinuity=verdict is Verdict.DIFFERENT))

    def _refresh(self, state: StreamState, used: LeaseView | None) -> Process:
        seat, host, store = self.seat, self._host, self._store
        now, session_id = seat.now, seat.record.id
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
            seat.apply(event)
            return
        seat.publish(segment, event)
        if seat.now.pending is None:
            seat.unconfirmed = None

    # Going on

    def _begin(self, state: StreamState, *, replay: bool) -> Process:
        """The first slice of a step; the others follow as turns come."""
        self._left, self._replaying = SLICES, replay
        self._prompts = self.seat.log.prompts(state.next_index)
        self.seat.apply(owner_events.stepping)
        yield from self._advance(state)

    def _advance(self, state: StreamState) -> Process:
        yield from self._bench.compute()
        if self.seat.state is not state:
            return
        self._left -= 1
        if not self._left:
            after, digest = stepped(state, self._prompts)
            self.seat.state = after
            if self._replaying:
                self._replayed(after, digest)
            else:
                yield from self._produced(after, digest)

    def _replayed(self, after: StreamState, digest: str) -> None:
        seat, index = self.seat, after.next_index - 1
        verdict = compare(seat.digests, index, digest)
        segment = Segment(index, digest, discontinuity=verdict is Verdict.DIFFERENT)
        seat.publish(segment, partial(owner_events.replayed, index=index, verdict=verdict))
        self._save(after)

    def _produce(self, state: StreamState) -> Process:
        seat, index = self.seat, state.next_index
        lease = owning.held(seat.now, self._host.monotonic())
        entries = yield from self._store.seal(self._host, lease, index)
        seat.log.fix(index, entries)
        yield from self._begin(state, replay=False)

    def _produced(self, after: StreamState, digest: str) -> Process:
        seat, index = self.seat, after.next_index - 1
        seat.unconfirmed = Segment(index, digest, discontinuity=seat.now.diverged)
        seat.apply(partial(owner_events.made, index=index, digest=digest))
        yield from self._commit(seat.unconfirmed)

    def _commit(self, segment: Segment) -> Process:
        seat, host = self.seat, self._host
        lease = owning.held(seat.now, host.monotonic())
        yield from self._store.commit(host, lease, segment.index, segment.digest, FINGERPRINT)
        if seat.unconfirmed is not segment:
            return
        seat.unconfirmed = None
        event = partial(
            owner_events.committed,
            index=segment.index,
            start_s=start_s(segment.index),
            now_s=host.monotonic(),
        )
        seat.publish(segment, event)
        if seat.state is not None:
            self._save(seat.state)

    def _save(self, state: StreamState) -> None:
        seat, index = self.seat, state.next_index
        if seat.now.shadow or not state.at_point or index in seat.saved:
            return
        seat.saved.add(index)
        self._bench.writer.save(seat, state)
