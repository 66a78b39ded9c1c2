"""One session on a replica: its machine's value, its state, its segments and its readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sim.kernel import Bell, Host
from sim.stream import Segment, StreamState

from echo_ray.errors import SegmentExpired
from echo_ray.session import owner_events, owning
from echo_ray.session.lease import LeaseView
from echo_ray.session.owner_events import Effect, Step
from echo_ray.session.owning import Owning
from echo_ray.session.pacing import wanted
from echo_ray.session.records import SessionRecord
from echo_ray.session.replay import ControlLog

RETENTION = 12


@dataclass(slots=True, eq=False)
class Reader:
    """One pull: where it is, and up to where it wants segments."""

    epoch: int
    cursor: int
    want: int


@dataclass(slots=True, eq=False)
class Seat:
    """Everything of one session here; what happens to it is decided by `owner_events`."""

    host: Host
    record: SessionRecord
    now: Owning
    bell: Bell
    """Rung for readers."""
    wake: Callable[[], None]
    """Let the engine look for work again."""
    state: StreamState | None = None
    log: ControlLog = field(default_factory=ControlLog)
    digests: dict[int, str] = field(default_factory=dict)
    saved: set[int] = field(default_factory=set)
    refused: frozenset[str] = frozenset()
    """Snapshots that could not be read."""
    unconfirmed: Segment | None = None
    fetching: bool = False
    fetched: Any = None
    loaded: int = 0
    """Slices that were done of loading what is fetched."""
    segments: dict[int, Segment] = field(default_factory=dict)
    past: dict[int, Segment] = field(default_factory=dict)
    """Segments before `first`, made again for readers who lag."""
    first: int = 0
    past_floor: int = 0
    """Nothing before this can be made again."""
    backfilling: bool = False
    readers: list[Reader] = field(default_factory=list)

    @classmethod
    def taken(
        cls, host: Host, record: SessionRecord, lease: LeaseView | None, wake: Callable[[], None]
    ) -> Seat:
        """A session that has just come here."""
        now = owning.started(record, lease, host.monotonic())
        return cls(host, record, now, Bell(host.world), wake)

    def apply(self, event: Callable[[Owning], Step]) -> tuple[Effect, ...]:
        """Let an event have happened, and do what follows."""
        was = self.now.ended
        self.now, effects = event(self.now)
        if was is None and self.now.ended is not None:
            reason = self.now.ended.message
            self.host.world.note("{} ends at {}: {}", self.record.id, self.host.name, reason)
        if Effect.DROP_STATE in effects:
            self.state = self.unconfirmed = self.fetched = None
            self.fetching = False
        if Effect.TELL in effects:
            self.bell.ring()
            self.wake()
        return effects

    def publish(self, segment: Segment, event: Callable[[Owning], Step]) -> None:
        """Let readers have a segment, if that is what follows from the event."""
        if Effect.PUBLISH in self.apply(event):
            self.segments[segment.index] = segment
            self.segments.pop(segment.index - RETENTION, None)
            if segment.index - RETENTION >= self.first:
                self.first = segment.index - RETENTION + 1
            self.bell.ring()

    def restart(self, at: int) -> None:
        """A point is loaded: segments come from `at` on."""
        self.segments, self.past, self.first, self.past_floor = {}, {}, at, 0

    # Readers

    def attach(self, reader: Reader) -> None:
        self.readers.append(reader)
        self.apply(owner_events.watched)

    def detach(self, reader: Reader) -> None:
        if reader in self.readers:
            self.readers.remove(reader)
        if not self.readers:
            now_s = self.host.monotonic()
            self.apply(partial(owner_events.unwatched, now_s=now_s))

    def wanted(self) -> int | None:
        """The first chunk that nobody wants yet; None: time decides."""
        wants = [r.want for r in self.readers]
        return wanted(wants, self.now.pace, self.now.on_idle)

    def segment(self, reader: Reader, index: int) -> Segment | None:
        """A published segment, or None if it is not there yet. Raises `SegmentExpired`."""
        owning.check_reader(self.now, reader.epoch, self.host.monotonic())
        reader.cursor = index
        if not self.now.planned or index >= self.now.committed:
            return None
        if index >= self.first:
            return self.segments.get(index)
        if index < self.past_floor or index < self.now.committed - 2 * RETENTION:
            raise SegmentExpired(f"{self.record.id}: {index} cannot be made again")
        return self.past.get(index)

    def past_wanted(self) -> int | None:
        """The oldest segment before the first one that a reader waits for; None if nobody does."""
        now = self.now
        if now.ended is not None or now.releasing or not now.planned or now.shadow:
            return None
        floor = max(self.past_floor, now.committed - 2 * RETENTION)
        low = [r.cursor for r in self.readers if floor <= r.cursor < self.first]
        return min(low, default=None)

    def publish_past(self, segment: Segment) -> None:
        """Let readers have a segment that was made again."""
        if len(self.past) >= RETENTION:
            del self.past[min(self.past)]
        self.past[segment.index] = segment
        self.bell.ring()
