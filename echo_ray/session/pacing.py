"""Which session to work on next on one device, and when: the one that will stall first goes first.

Sessions take turns slice by slice. Realtime sessions have a playout clock, which starts with the
first chunk published after a start or a resume. Chunk n is due when playout reaches it, and may be
made from `lead` earlier on. Chunks nobody asked for (`want`) are not made at all. Sessions of pace
`max` and those that go on without a viewer are never due: they take what the others leave, in
turns.

Nobody starves. What is due stays due at the same time until it is made, and every chunk of another
session puts that one's next due time a chunk later, so only so many chunks can come before it. What
is never due gets a slice when it has waited for `PATIENCE_S`, whatever else there is.

A session that comes back takes as much as a stream that plays. Its first slice of loading is due
when it came, as its first chunk is, and those after it when such a stream would have made as much,
so a load of seconds goes on at that rate at least and nobody who plays is late for it. A shadow,
which nobody watches here, loads with what others leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from echo_ray.session.records import OnIdle, Pace

NEVER_DUE_S = math.inf
PATIENCE_S = 5.0
"""Who takes what others leave gets one slice after waiting for so long. A handful of such sessions
takes a hundredth part of an overloaded device or two with it; a device that keeps up has no need of
it."""


@dataclass(frozen=True, slots=True)
class Playout:
    """When the media of a session plays, by the owner's monotonic clock."""

    origin_s: float
    """The time at which media second 0 would have played."""

    @classmethod
    def begins(cls, now_s: float, start_s: float) -> Playout:
        """The clock of a session whose chunk with media time `start_s` begins to play now."""
        return cls(now_s - start_s)

    def due_s(self, start_s: float) -> float:
        """When the chunk with media time `start_s` has to be there."""
        return self.origin_s + start_s

    def after_publishing(self, now_s: float, start_s: float) -> Playout:
        """The clock after a chunk was published: a late one moves it, for viewers stalled too.

        Without the shift a session that was late once would be hurried for ever after.
        """
        return Playout(max(self.origin_s, now_s - start_s))


@dataclass(frozen=True, slots=True)
class Turn:
    """One session's claim on the device: from when it may be worked on, and by when it must be."""

    session_id: str
    ready_s: float
    due_s: float
    served_s: float
    """When it had the device last, or came; decides between equals."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Work on `session_id` now, or, if that is None, wait until `wake_s` (None: until told)."""

    session_id: str | None
    wake_s: float | None


def choose(turns: Iterable[Turn], now_s: float) -> Choice:
    """The session to do a slice of at `now_s`: least slack first, then least recently served."""
    best: Turn | None = None
    wake_s: float | None = None
    for turn in turns:
        if turn.ready_s > now_s:
            wake_s = turn.ready_s if wake_s is None else min(wake_s, turn.ready_s)
        elif best is None or _order(turn, now_s) < _order(best, now_s):
            best = turn
    if best is not None:
        return Choice(best.session_id, None)
    return Choice(None, wake_s)


def _order(turn: Turn, now_s: float) -> tuple[bool, float, float, str]:
    waited_s = now_s - max(turn.ready_s, turn.served_s)
    patient = turn.due_s != NEVER_DUE_S or waited_s < PATIENCE_S
    return patient, turn.due_s, turn.served_s, turn.session_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What one session's next chunk depends on."""

    pace: Pace
    index: int
    start_s: float
    """Media time at which the chunk begins."""
    want: int | None
    """Chunks below this index may be made. None: nobody watches, and as many as time asks for."""
    waiting_since_s: float
    """Since when the session waits for its first chunk; its due time until playout begins."""


def next_chunk(
    demand: Demand, playout: Playout | None, *, lead_s: float
) -> tuple[float, float] | None:
    """(ready, due) of a session's next chunk, or None while nobody wants it."""
    if demand.want is not None and demand.index >= demand.want:
        return None
    # With nobody to hold it back, a session of pace `max` would take the device for itself.
    if demand.pace is Pace.MAX and demand.want is not None:
        return -math.inf, NEVER_DUE_S
    watched = demand.want is not None
    if playout is None:
        return -math.inf, demand.waiting_since_s if watched else NEVER_DUE_S
    due_s = playout.due_s(demand.start_s)
    return due_s - lead_s, due_s if watched else NEVER_DUE_S


def returning_due_s(
    since_s: float, *, loading_s: float, made: int, chunk_seconds: float, chunk_s: float
) -> float:
    """When a session that has been coming back since `since_s` needs its next slice.

    `loading_s`: device time that its load has had; counts as the chunks of `chunk_seconds` (0: not
    measured) that are made in it. `made`: chunks that were made again.
    """
    rate = max(1.0, chunk_s / chunk_seconds) if chunk_seconds else 1.0
    return since_s + loading_s * rate + made * chunk_s


def wanted(reader_wants: Iterable[int | None], pace: Pace, on_idle: OnIdle) -> int | None:
    """The bound that a session's readers set together; without readers, what `on_idle` says.

    A realtime session keeps time for the reader that is furthest; at `pace: max` the slowest one's
    reading speed is the backpressure. None: a reader that asks for nothing new.
    """
    wants = list(reader_wants)
    if not wants:
        return None if on_idle is OnIdle.CONTINUE else 0
    asked = [want for want in wants if want is not None]
    return (min if pace is Pace.MAX else max)(asked, default=0)


def idle_verdict(
    on_idle: OnIdle, idle_since_s: float | None, now_s: float, grace_s: float
) -> OnIdle | None:
    """What to do with a session that has had no reader since `idle_since_s`; None: nothing yet."""
    if idle_since_s is None or on_idle is OnIdle.CONTINUE:
        return None
    return on_idle if now_s - idle_since_s >= grace_s else None
