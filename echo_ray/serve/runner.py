"""One session on this replica, as everybody but the engine thread sees it.

Lease, readers and their wants, published segments, and how it ended. Every method takes the lock
of the host for a moment and never does any work under it; the work itself is in `progress.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from echo_ray.clock import Clock
from echo_ray.config import SessionSection
from echo_ray.errors import EchoError, Fenced, SegmentBeyondEnd
from echo_ray.serve.segments import Segment, SegmentRing
from echo_ray.session.lease import LeaseView
from echo_ray.session.pacing import idle_verdict, wanted
from echo_ray.session.records import Lease, OnIdle, SessionRecord, SessionState


class LeaseOver(Fenced):
    """This process itself saw that it may not write; no store was asked."""


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
        self.lease = lease
        self.config = config
        self.ring = SegmentRing(config.retention_chunks)
        self.committed = record.next_index
        self.arrived_s = clock.monotonic()
        self.planned = False
        """Whether `ring.first` and `committed` hold: the point to load from is known."""
        self.refresh = False
        """The engine thread has to read the directory again before anything else."""
        self.caught_up = False
        self.release_as: SessionState | None = None
        self.releasing = False
        self.going_away = False
        self.ended: EchoError | None = None
        self.newest_snapshot_at: float | None = None
        self._failure: EchoError | None = None
        self._idle_since_s: float | None = self.arrived_s
        self._readers: list[Reader] = []
        self._past = SegmentRing(config.retention_chunks)
        """Segments before the ring that were made again for readers who lag."""
        self._past_floor = 0
        """Nothing before this can be made again."""
        self._clock = clock
        self._changed = changed

    # Ownership

    @property
    def shadow(self) -> bool:
        """Whether the session only follows another owner's commits here."""
        return self.lease is None

    def held(self) -> Lease:
        """The lease to write under. Raises `Fenced` if it ran out, by the own clock, or is none."""
        with self._changed:
            if self.ended is not None:
                raise LeaseOver(f"session {self.session_id!r} ended here: {self.ended.message}")
            if self.lease is None:
                raise LeaseOver(f"session {self.session_id!r} is followed here, not owned")
            if not self.lease.valid(self._clock.monotonic()):
                raise LeaseOver(
                    f"session {self.session_id!r}: the lease of epoch {self.lease.lease.epoch} "
                    f"ran out after {self.lease.ttl_s} s without a renewal"
                )
            return self.lease.lease

    def adopt(self, lease: LeaseView, record: SessionRecord) -> None:
        """Own the session under another lease; work goes on from the state that is here."""
        with self._changed:
            self.lease, self.record = lease, record
            self.refresh, self.planned, self.caught_up = True, False, False
            self.release_as = None
            self.arrived_s = self._clock.monotonic()
            if self._idle_since_s is not None:
                self._idle_since_s = self.arrived_s
            self._tell()

    def renewed(self, lease: Lease, sent_s: float) -> None:
        """A renewal of `lease` that was sent at `sent_s` has succeeded."""
        with self._changed:
            if self.lease is not None and self.lease.lease == lease:
                self.lease = self.lease.renewed(sent_s)

    def lost(self, lease: Lease, error: EchoError) -> bool:
        """`lease` is lost: end, unless the session is already held under a newer one."""
        with self._changed:
            if self.ended is not None or self.lease is None or self.lease.lease != lease:
                return False
            self.end(error)
            return True

    # Ending

    def retire(
        self,
        state: SessionState,
        *,
        failure: EchoError | None = None,
        going_away: bool = False,
    ) -> None:
        """Give the session up at the next chunk boundary, leaving it in `state`."""
        with self._changed:
            if self.ended is None and not self.releasing:
                self.release_as, self._failure, self.going_away = state, failure, going_away
                self._tell()

    def begin_release(self) -> SessionState | None:
        """The state to leave the session in, if it is to be given up; from here on it is."""
        with self._changed:
            self.releasing = self.release_as is not None
            return self.release_as

    def end(self, error: EchoError) -> None:
        """Nothing more happens to the session here; its readers hear why. The first end counts."""
        with self._changed:
            if self.ended is None:
                self.ended = self._failure or error
            self._tell()

    def idle_verdict(self, now_s: float) -> OnIdle | None:
        """What `on_idle` says now; None while somebody watches or the grace lasts."""
        with self._changed:
            if self.shadow or self.releasing or self.release_as is not None:
                return None
            return idle_verdict(
                self.record.on_idle, self._idle_since_s, now_s, self.config.idle_grace_s
            )

    # Readers

    def attach(self, reader: Reader, start: int | None) -> None:
        """Let a reader wait for segments from `start` on."""
        with self._changed:
            self._readers.append(reader)
            self._idle_since_s = None
            if self._failure is None and not self.going_away:
                self.release_as = None
            reader.cursor = start
            self._tell()

    def detach(self, reader: Reader) -> None:
        """Forget a reader; the last one starts the idle grace."""
        with self._changed:
            if reader in self._readers:
                self._readers.remove(reader)
            if not self._readers:
                self._idle_since_s = self._clock.monotonic()
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
            if self.ended is not None:
                raise self.ended
            if self.releasing and self._failure is None and not self.going_away:
                raise Fenced(f"session {self.session_id!r} is being given up here; claim it again")
            if self.held().epoch != epoch:
                raise Fenced(
                    f"session {self.session_id!r} is held here under another epoch than {epoch}"
                )

    def plan(self, epoch: int) -> tuple[int, int] | None:
        """(next index, first index) once they are known. Raises as `check`."""
        with self._changed:
            self.check(epoch)
            return (self.committed, self._oldest()) if self.planned else None

    def segment(self, reader: Reader, index: int) -> Segment | None:
        """Segment `index`, or None if it is not there yet. Raises as `check`, `SegmentExpired`."""
        with self._changed:
            self.check(reader.epoch)
            reader.cursor = index
            if not self.planned or index >= self.ring.next:
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
            return self.committed if self.caught_up else None

    # What the engine thread tells

    def restart(self, index: int, committed: int) -> None:
        """A point is loaded: segments come from `index` on; `committed` is the next chunk."""
        with self._changed:
            self.ring.restart(index)
            self.committed = committed
            self.planned = not self.refresh

    def refreshed(self, committed: int) -> None:
        """The directory was read again after a change of the lease."""
        with self._changed:
            self.committed, self.refresh = committed, False
            self.planned = True

    def publish(self, segment: Segment, committed: int) -> None:
        """Let readers have a committed segment."""
        with self._changed:
            self.ring.put(segment)
            self.committed = max(self.committed, committed)
            self._tell()

    # The past

    def _oldest(self) -> int:
        made_again = max(self._past_floor, self.committed - self.config.retention_chunks)
        return max(0, min(self.ring.first, made_again))

    def past_wanted(self) -> int | None:
        """The oldest segment before the ring that a reader waits for; None if nobody does."""
        with self._changed:
            if self.ended is not None or self.releasing or not self.planned or self.shadow:
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
