"""One session on one replica, as a value: what is to be done next.

    work(owning)       -> what the engine thread has to do next, if anything
    times(owning, ...) -> from when, and by when
    held(owning, now)  -> the lease to write under, or an error

An owner fetches a point, replays up to the first chunk that was never committed, and then seals,
makes, commits and publishes one chunk after the other; a shadow follows without writing. What
follows from what stands in `owner_events`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto

from echo_ray.errors import EchoError, Fenced
from echo_ray.session.lease import LeaseView
from echo_ray.session.pacing import Demand, Playout, next_chunk, returning_due_s
from echo_ray.session.records import Lease, OnIdle, Pace, SessionRecord, SessionState

FOLLOW_EVERY_S = 0.05
"""A shadow looks for new commits this often."""


class LeaseOver(Fenced):
    """This process itself saw that it may not write; no store was asked."""


class Work(Enum):
    """A piece of work for the engine thread."""

    FETCH = auto()
    """Read point, log and digests from the stores, and load them slice by slice.

    Nothing holds a load that is under way: it is left where it is if the session is given up."""
    REFRESH = auto()
    """Read the record again, and what was committed since."""
    REPLAY = auto()
    """Make a committed chunk again and publish it."""
    PRODUCE = auto()
    """Seal the next chunk, make it, commit it."""
    ADVANCE = auto()
    """Do the next slice of the chunk in hand, of a replay or not; behind the last, what follows."""
    COMMIT = auto()
    """Commit the chunk that is made and not known to be committed."""
    RELEASE = auto()
    """Give the session up, behind its snapshots."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A chunk that is made and not known to be committed."""

    index: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Owning:
    """Everything that decides what happens to one session on this replica."""

    session_id: str
    pace: Pace
    on_idle: OnIdle
    arrived_s: float
    lease: LeaseView | None
    """None: a shadow, which follows another owner's commits and writes nothing."""
    committed: int
    """The first chunk that is not known to be committed."""
    at: int | None = None
    """The next chunk of the engine's state; None while there is no state."""
    planned: bool = False
    """Whether `committed` and the point to load from are known to hold."""
    refresh: bool = False
    """The record has to be read again before anything else."""
    stepping: bool = False
    """Whether chunk `at` is in hand: its step has begun and is not over."""
    pending: Pending | None = None
    caught_up: bool = False
    resumed: bool = False
    """Whether chunks had been committed before the session came here."""
    diverged: bool = False
    """Whether what is made next follows chunks that differ from the committed ones."""
    loading_s: float = 0.0
    """Device time that loading has had since the session came under this lease."""
    replayed: int = 0
    playout: Playout | None = None
    held_back: bool = False
    """Nobody wanted the next chunk for a while, so its being late is no stall."""
    failures: int = 0
    retry_at_s: float = -math.inf
    served_s: float = -math.inf
    idle_since_s: float | None = None
    release_as: SessionState | None = None
    releasing: bool = False
    going_away: bool = False
    failure: EchoError | None = None
    """Why the session is being given up, for its readers."""
    ended: EchoError | None = None

    @property
    def shadow(self) -> bool:
        return self.lease is None


def started(record: SessionRecord, lease: LeaseView | None, now_s: float) -> Owning:
    """A session that has just come here, owned under `lease` or followed as a shadow."""
    return Owning(
        session_id=record.id,
        pace=record.pace,
        on_idle=record.on_idle,
        arrived_s=now_s,
        lease=lease,
        committed=record.next_index,
        served_s=now_s,
        idle_since_s=now_s,
    )


# What to do next


def work(o: Owning) -> Work | None:
    """The next piece of work; None until an event changes something.

    A chunk in hand comes before everything but the end of the session here: whatever else happens
    takes effect at chunk boundaries, as if a step were one piece. After the end its step is left
    where it is, and another owner makes the chunk again.
    """
    if o.ended is not None or o.releasing:
        return None
    if o.stepping:
        return Work.ADVANCE
    if o.release_as is not None:
        return Work.RELEASE
    if o.at is None:
        return Work.FETCH
    if o.refresh:
        return Work.REFRESH
    if o.pending is not None:
        return Work.COMMIT
    if o.at < o.committed:
        return Work.REPLAY
    return Work.REFRESH if o.shadow else Work.PRODUCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """What the next chunk's time depends on beside the session itself."""

    start_s: float
    """Media time at which chunk `committed` begins."""
    chunk_s: float
    lead_s: float
    want: int | None
    """Chunks below this index may be made. None: nobody watches, and as many as time asks for."""
    chunk_seconds: float = 0.0
    """Measured device time of a chunk; 0 until one was made."""


def times(o: Owning, pacing: Pacing) -> tuple[float, float] | None:
    """(ready, due) of the next piece of work; None until something changes or somebody wants it."""
    match work(o):
        case None:
            return None
        case Work.RELEASE:
            ready_s, due_s = -math.inf, -math.inf
        case Work.COMMIT:
            ready_s, due_s = -math.inf, o.arrived_s
        case Work.REFRESH if o.refresh:
            ready_s, due_s = -math.inf, o.arrived_s
        case Work.REFRESH:
            ready_s, due_s = o.served_s + FOLLOW_EVERY_S, math.inf
        case Work.ADVANCE if o.release_as is not None:
            # What is given up is done with as soon as the chunk is there.
            ready_s, due_s = -math.inf, -math.inf
        case Work.ADVANCE if o.at == o.committed and not o.shadow:
            # A chunk that nobody wants any more is finished with what others leave.
            _, due_s = _next_chunk(o, pacing) or (-math.inf, math.inf)
            ready_s = -math.inf
        case Work.FETCH | Work.REPLAY | Work.ADVANCE:
            # Coming back counts as a stream that began to play when the session arrived: it uses
            # what others leave, and does not make them stall for its sake.
            ready_s, due_s = -math.inf, math.inf if o.shadow else _returning(o, pacing)
        case Work.PRODUCE:
            found = _next_chunk(o, pacing)
            if found is None:
                return None
            ready_s, due_s = found
    return max(ready_s, o.retry_at_s), due_s


def _returning(o: Owning, pacing: Pacing) -> float:
    return returning_due_s(
        o.arrived_s,
        loading_s=o.loading_s,
        made=o.replayed,
        chunk_seconds=pacing.chunk_seconds,
        chunk_s=pacing.chunk_s,
    )


def _next_chunk(o: Owning, pacing: Pacing) -> tuple[float, float] | None:
    demand = Demand(
        pace=o.pace,
        index=o.committed,
        start_s=pacing.start_s,
        want=pacing.want,
        waiting_since_s=o.arrived_s,
    )
    return next_chunk(demand, o.playout, lead_s=pacing.lead_s)


def held(o: Owning, now_s: float) -> Lease:
    """The lease to write under. Raises `LeaseOver` if it ran out, by the own clock, or is none."""
    if o.ended is not None:
        raise LeaseOver(f"session {o.session_id!r} ended here: {o.ended.message}")
    if o.lease is None:
        raise LeaseOver(f"session {o.session_id!r} is followed here, not owned")
    if not o.lease.valid(now_s):
        raise LeaseOver(
            f"session {o.session_id!r}: the lease of epoch {o.lease.lease.epoch} "
            f"ran out after {o.lease.ttl_s} s without a renewal"
        )
    return o.lease.lease


def check_reader(o: Owning, epoch: int, now_s: float) -> None:
    """Raise what a reader under `epoch` has to hear, if anything."""
    if o.ended is not None:
        raise o.ended
    if o.releasing and o.failure is None and not o.going_away:
        raise Fenced(f"session {o.session_id!r} is being given up here; claim it again")
    if held(o, now_s).epoch != epoch:
        raise Fenced(f"session {o.session_id!r} is held here under another epoch than {epoch}")
