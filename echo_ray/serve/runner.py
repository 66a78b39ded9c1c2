"""One session on this replica, as everybody but the engine thread sees it.

Where the session stands, which is a value of `session/owning.py`, its readers and their wants, and
the published segments. Every method takes the lock of the host for a moment and never does any work
under it; the work itself is in `progress.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from echo_ray.clock import Clock
from echo_ray.config import SessionSection
from echo_ray.errors import EchoError, SegmentBeyondEnd
from echo_ray.serve.segments import Segment, SegmentRing
from echo_ray.session import owner_events, owning
from echo_ray.session.lease import LeaseView
from echo_ray.session.owner_events import Effect, Step
from echo_ray.session.owning import Owning
from echo_ray.session.pacing import wanted
from echo_ray.session.records import Lease, SessionRecord

Event = Callable[[Owning], Step]
"""One of `owner_events`, with all its arguments but the first."""


@dataclass(slots=True)
class Reader:
    """One open pull: up to where it wants segments, and how to wake it."""

    epoch: int
    wake: Callable[[], None]
    cursor: int | None = None
    """The segment it waits for."""
    want: int = 0
    bounded: bool = False
    """Whether it ever said what it wants; until then it gets what is committed and no more."""


class SessionRunner:
    """What a session on this replica looks like to readers, the lease keeper and the host."""

    def __init__(
        self,
        record: SessionRecord,
        lease: LeaseView | None,
        *,
        config: SessionSection,
        clock: Clock,
        changed: threading.Condition,
    ) -> None:
        self.session_id = record.id
        self.record = record
        self.config = config
        self.ring = SegmentRing(config.retention_chunks)
        self.newest_snapshot_at: float | None = None
        self.state_bytes = 0
        """Memory of the engine's state of it; 0 while there is none."""
        self._now = owning.started(record, lease, clock.monotonic())
        self._readers: list[Reader] = []
        self._past = SegmentRing(config.retention_chunks)
        """Segments before the ring that were made again for readers who lag."""
        self._past_floor = 0
        """Nothing before this can be made again."""
        self._clock = clock
        self._changed = changed

    @property
    def now(self) -> Owning:
        """Where the session stands."""
        return self._now

    @property
    def shadow(self) -> bool:
        """Whether the session only follows another owner's commits here."""
        return self._now.shadow

    @property
    def ended(self) -> EchoError | None:
        """Why nothing more happens to the session here."""
        return self._now.ended

    def apply(self, event: Event) -> tuple[Effect, ...]:
        """Let an event have happened; the effects that are left for the caller to carry out."""
        with self._changed:
            self._now, effects = event(self._now)
            if Effect.TELL in effects:
                self._tell()
            return effects

    def held(self) -> Lease:
        """The lease to write under. Raises `Fenced` if it ran out, by the own clock, or is none."""
        with self._changed:
            return owning.held(self._now, self._clock.monotonic())

    def adopt(self, lease: LeaseView, record: SessionRecord) -> None:
        """Own the session under another lease; work goes on from the state that is here."""
        with self._changed:
            self.record = record
            self.apply(partial(owner_events.adopted, lease=lease, now_s=self._clock.monotonic()))

    # Readers

    def attach(self, reader: Reader, start: int | None) -> None:
        """Let a reader wait for segments from `start` on."""
        with self._changed:
            self._readers.append(reader)
            reader.cursor = start
            self.apply(owner_events.watched)

    def detach(self, reader: Reader) -> None:
        """Forget a reader; the last one starts the idle grace."""
        with self._changed:
            if reader in self._readers:
                self._readers.remove(reader)
            if not self._readers:
                self.apply(partial(owner_events.unwatched, now_s=self._clock.monotonic()))
            self._tell()

    def want(self, reader: Reader, until: int) -> None:
        """Chunks below `until` may be made and sent to this reader."""
        with self._changed:
            reader.want, reader.bounded = max(reader.want, until), True
            self._tell()

    def wanted(self) -> int | None:
        """The first chunk that nobody wants yet; None: time decides."""
        with self._changed:
            wants = (r.want if r.bounded else None for r in self._readers)
            return wanted(wants, self.record.pace, self.record.on_idle)

    @property
    def reader_count(self) -> int:
        return len(self._readers)

    # Segments

    def check(self, epoch: int) -> None:
        """Raise what a reader under `epoch` has to hear, if anything."""
        with self._changed:
            owning.check_reader(self._now, epoch, self._clock.monotonic())

    def plan(self, epoch: int) -> tuple[int, int] | None:
        """(next index, first index) once they are known. Raises as `check`."""
        with self._changed:
            self.check(epoch)
            return (self._now.committed, self._oldest()) if self._now.planned else None

    def segment(self, reader: Reader, index: int) -> Segment | None:
        """Segment `index`, or None if it is not there yet. Raises as `check`, `SegmentExpired`."""
        with self._changed:
            self.check(reader.epoch)
            reader.cursor = index
            if not self._now.planned or index >= self.ring.next:
                return None
            if index >= self.ring.first:
                return self.ring.get(index)
            past = self._past.kept(index)
            return self.ring.get(index) if past is None and index < self._past_floor else past

    def committed_segment(self, reader: Reader, index: int) -> Segment | None:
        """As `segment`, but refuses an index that is not committed: `SegmentBeyondEnd`."""
        with self._changed:
            plan = self.plan(reader.epoch)
            if plan is not None and index >= plan[0]:
                raise SegmentBeyondEnd(
                    f"segment {index} does not exist yet; the next one is {plan[0]}",
                    param="chunk_index",
                )
            if plan is not None and index < plan[1]:
                self.ring.get(index)
            return self.segment(reader, index)

    def caught_up_index(self) -> int | None:
        """The next index once every committed chunk has been made here. Raises how it ended."""
        with self._changed:
            if self.ended is not None:
                raise self.ended
            return self._now.committed if self._now.caught_up else None

    # What the engine thread tells

    def restart(self, index: int, event: Event) -> tuple[Effect, ...]:
        """A point is loaded: segments come from `index` on."""
        with self._changed:
            self.ring.restart(index)
            return self.apply(event)

    def publish(self, segment: Segment, event: Event) -> tuple[Effect, ...]:
        """Let readers have a segment, if that is what follows from the event."""
        with self._changed:
            effects = self.apply(event)
            if Effect.PUBLISH in effects:
                self.ring.put(segment)
                self._tell()
            return effects

    # The past

    def _oldest(self) -> int:
        made_again = max(self._past_floor, self._now.committed - self.config.retention_chunks)
        return max(0, min(self.ring.first, made_again))

    def past_wanted(self) -> int | None:
        """The oldest segment before the ring that a reader waits for; None if nobody does."""
        with self._changed:
            now = self._now
            if now.ended is not None or now.releasing or not now.planned or now.shadow:
                return None
            cursors = [r.cursor for r in self._readers if r.cursor is not None]
            low = [c for c in cursors if self._past_floor <= c < self.ring.first]
            if not low:
                self._past = SegmentRing(self.config.retention_chunks)
                return None
            if not self._past.first <= min(low) <= self._past.next:
                self._past.restart(min(low))
            return min(low)

    def past_next(self) -> int | None:
        """The segment to make again next; None once those before the ring are all there."""
        with self._changed:
            return self._past.next if self._past.next < self.ring.first else None

    def publish_past(self, segment: Segment) -> None:
        """Let readers have a segment that was made again."""
        with self._changed:
            if segment.chunk.index == self._past.next:
                self._past.put(segment)
            self._tell()

    def past_begins_at(self, index: int | None) -> None:
        """Nothing before `index` (None: before the ring) can be made again."""
        with self._changed:
            self._past_floor = self.ring.first if index is None else index
            self._tell()

    def tell(self) -> None:
        """Wake everybody who waits for something of this session."""
        with self._changed:
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for reader in self._readers:
            reader.wake()
