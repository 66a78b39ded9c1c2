"""What follows from what for one session on one replica: every event as a pure function.

    <event>(owning, ..., now) -> the next value, and the effects that somebody has to carry out

Replicas execute the effects on threads and sockets, the simulation on a virtual clock. The order
that must hold: a chunk is sealed before it is made and committed before it is published; nothing is
written without a lease that is valid by the own clock; a state that is further than what was
committed is thrown away. After its end nothing happens to a session here any more.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto

from echo_ray.errors import (
    ClipLost,
    ConflictError,
    Draining,
    EchoError,
    EngineError,
    Fenced,
    InvalidRequestError,
    NotFoundError,
    SessionClosed,
    StoreUnavailable,
)
from echo_ray.session.fingerprint import NoFittingReplica
from echo_ray.session.lease import LeaseView
from echo_ray.session.owning import Owning, Pending
from echo_ray.session.pacing import Playout, idle_verdict
from echo_ray.session.records import Lease, OnIdle, SessionRecord, SessionState
from echo_ray.session.replay import Verdict

RETRY_AFTER_S = 0.05
"""Pause after a store that could not answer; short, for the lease runs meanwhile."""
FAILURES_IN_A_ROW = 3
SHADOW_TTL_S = 30.0
"""A prepared session that nobody takes over is dropped after this."""


class Effect(Enum):
    """What follows from an event, for somebody to carry out."""

    DROP_STATE = auto()
    """Forget the engine's state, the chunk that is not committed and a fetch under way."""
    PUBLISH = auto()
    """Readers may have the chunk that was waiting for its commit."""
    TELL = auto()
    """Wake everybody who waits for something of this session."""
    LOST = auto()
    """The lease is lost."""
    FIRST_CHUNK = auto()
    """The first chunk after the session arrived is published."""
    RESUMED = auto()
    """Every chunk that was committed elsewhere has been made here."""


Step = tuple[Owning, tuple[Effect, ...]]
NOTHING: tuple[Effect, ...] = ()


# The lease


def adopted(o: Owning, lease: LeaseView, now_s: float) -> Step:
    """Own the session under another lease; work goes on from the state that is here."""
    idle_since_s = None if o.idle_since_s is None else now_s
    o = replace(
        o,
        lease=lease,
        refresh=True,
        planned=False,
        caught_up=False,
        release_as=None,
        arrived_s=now_s,
        loading_s=0.0,
        idle_since_s=idle_since_s,
    )
    return o, (Effect.TELL,)


def renewed(o: Owning, lease: Lease, sent_s: float) -> Step:
    """A renewal of `lease` that was sent at `sent_s` has succeeded."""
    if o.lease is None or o.lease.lease != lease:
        return o, NOTHING
    return replace(o, lease=o.lease.renewed(sent_s)), NOTHING


def lost(o: Owning, lease: Lease, error: EchoError) -> Step:
    """`lease` is lost: end, unless the session is already held under a newer one."""
    if o.ended is not None or o.lease is None or o.lease.lease != lease:
        return o, NOTHING
    o, effects = ended(o, error)
    return o, (Effect.LOST, *effects)


def expired(o: Owning, now_s: float) -> Step:
    """Time has passed: a lease that ran out is lost, a shadow that nobody needs goes."""
    if o.ended is not None:
        return o, NOTHING
    if o.lease is None:
        if now_s - o.arrived_s < SHADOW_TTL_S:
            return o, NOTHING
        return ended(o, Fenced(f"session {o.session_id!r} was not taken over in time"))
    if o.lease.valid(now_s):
        return o, NOTHING
    lease = o.lease.lease
    return lost(
        o, lease, Fenced(f"session {o.session_id!r}: the lease of epoch {lease.epoch} ran out")
    )


# Giving up


def watched(o: Owning) -> Step:
    """A reader has come: a release for want of readers is off."""
    keep = o.failure is not None or o.going_away
    o = replace(o, idle_since_s=None, release_as=o.release_as if keep else None)
    return o, (Effect.TELL,)


def unwatched(o: Owning, now_s: float) -> Step:
    """The last reader has left: the idle grace begins."""
    return replace(o, idle_since_s=now_s), (Effect.TELL,)


def idled(o: Owning, now_s: float, grace_s: float) -> Step:
    """Do what `on_idle` says once nobody has watched for `grace_s`."""
    if o.shadow or o.releasing or o.release_as is not None:
        return o, NOTHING
    match idle_verdict(o.on_idle, o.idle_since_s, now_s, grace_s):
        case OnIdle.CLOSE:
            return retired(o, SessionState.CLOSED)
        case OnIdle.PAUSE:
            return retired(o, SessionState.PAUSED)
        case _:
            return o, NOTHING


def retired(
    o: Owning,
    state: SessionState,
    *,
    failure: EchoError | None = None,
    going_away: bool = False,
) -> Step:
    """Give the session up at the next chunk boundary, leaving it in `state`."""
    if o.ended is not None or o.releasing:
        return o, NOTHING
    o = replace(o, release_as=state, failure=failure, going_away=going_away)
    return o, (Effect.TELL,)


def begun(o: Owning, now_s: float) -> Step:
    """A piece of work begins."""
    return replace(o, served_s=now_s), NOTHING


def stepping(o: Owning) -> Step:
    """Chunk `at` is in hand: its step has begun, and is done slice by slice."""
    return replace(o, stepping=o.ended is None), NOTHING


def held_back(o: Owning) -> Step:
    """Nobody wants the next chunk."""
    return replace(o, held_back=True), NOTHING


def drained(o: Owning, replica_id: str) -> Step:
    """The replica goes away: give an owned session up, forget a shadow."""
    if o.shadow:
        return ended(o, Draining(f"replica {replica_id!r} is draining"))
    return retired(o, SessionState.LIVE, going_away=True)


def releasing(o: Owning) -> Step:
    """The release is under way, if there is one; nothing calls it off from here."""
    return replace(o, releasing=o.release_as is not None), NOTHING


def ended(o: Owning, error: EchoError) -> Step:
    """Nothing more happens to the session here; its readers hear why. The first end counts."""
    if o.ended is None:
        o = replace(o, ended=o.failure or error, at=None, pending=None, stepping=False)
    return o, (Effect.DROP_STATE, Effect.TELL)


# Coming back


def loading(o: Owning, now_s: float) -> Step:
    """The piece of work that is over now was a slice of loading."""
    return replace(o, loading_s=o.loading_s + now_s - o.served_s), NOTHING


def loaded(o: Owning, at: int, record: SessionRecord, fingerprint: str) -> Step:
    """The state at point `at` is here; `record` is the session as it stood when it was read."""
    if o.ended is not None:
        return o, NOTHING
    resumed = record.next_index > 0
    other = record.fingerprint not in (None, fingerprint)
    o = replace(
        o,
        at=at,
        committed=record.next_index,
        planned=not o.refresh,
        resumed=resumed,
        diverged=other and resumed,
    )
    return _looked_round(o)


def refreshed(o: Owning, record: SessionRecord, found: str | None, used: LeaseView | None) -> Step:
    """The record was read again; `found` is the digest now committed for the pending chunk.

    `used` is the lease under which reading began: under another one it has to be read once more.
    """
    if o.at is None:
        return o, NOTHING
    effects: list[Effect] = []
    o = replace(
        o,
        committed=record.next_index,
        replayed=0 if o.refresh else o.replayed,
        refresh=_lease_of(o.lease) != _lease_of(used),
    )
    o = replace(o, planned=not o.refresh)
    if o.pending is not None:
        pending = o.pending
        if found == pending.digest:
            o = replace(o, pending=None)
            effects.append(Effect.PUBLISH)
        elif not record.next_index == pending.index < record.sealed:
            o, dropped = _dropped(o)
            effects += dropped
    elif o.at is not None and o.at > record.next_index:
        o, dropped = _dropped(o)
        effects += dropped
    o, more = _looked_round(o)
    return o, (*effects, *more)


def replayed(o: Owning, index: int, verdict: Verdict) -> Step:
    """Committed chunk `index` was made again."""
    if o.ended is not None:
        return o, NOTHING
    o = replace(
        o,
        at=index + 1,
        stepping=False,
        replayed=o.replayed + 1,
        diverged=verdict is Verdict.DIFFERENT,
    )
    o, effects = _looked_round(o)
    return o, (Effect.PUBLISH, *effects)


# Going on


def made(o: Owning, index: int, digest: str) -> Step:
    """Chunk `index`, sealed before, is made; nobody may see it yet."""
    if o.ended is not None:
        return o, NOTHING
    return replace(o, at=index + 1, stepping=False, pending=Pending(index, digest)), NOTHING


def committed(o: Owning, index: int, start_s: float, now_s: float, *, seen: bool = False) -> Step:
    """Chunk `index`, which begins at media time `start_s`, is committed: readers may have it.

    `seen`: all of them had it before the session was lost, so it does not begin to play.
    """
    if o.ended is not None:
        return o, NOTHING
    first = o.playout is None and not seen
    if o.playout is None:
        playout = None if seen else Playout.begins(now_s, start_s)
    else:
        playout = o.playout.after_publishing(now_s, start_s)
    o = replace(
        o,
        committed=max(o.committed, index + 1),
        pending=None,
        diverged=False,
        failures=0,
        playout=playout,
        held_back=False,
    )
    return o, (Effect.PUBLISH, *((Effect.FIRST_CHUNK,) if first else ()))


def late_s(o: Owning, start_s: float, now_s: float) -> float:
    """How late a chunk that is committed now is for playout; not if nobody had wanted it."""
    if o.playout is None or o.held_back:
        return 0.0
    return now_s - o.playout.due_s(start_s)


# Failing


def failed(o: Owning, error: Exception, used: LeaseView | None, now_s: float) -> Step:
    """A piece of work that began under lease `used` has failed."""
    match error:
        case Fenced():
            return lost(o, used.lease, error) if used is not None else (o, NOTHING)
        case NotFoundError() | SessionClosed():
            return ended(o, error)
        case StoreUnavailable():
            return replace(o, retry_at_s=now_s + RETRY_AFTER_S), NOTHING
        case ConflictError():
            return replace(o, retry_at_s=now_s + RETRY_AFTER_S, refresh=True), NOTHING
        case NoFittingReplica():
            return ended(o, error) if o.shadow else retired(o, SessionState.LIVE, failure=error)
        case _:
            return _engine_failed(o, error, now_s)


def _engine_failed(o: Owning, error: Exception, now_s: float) -> Step:
    """The engine failed, and with it the state is lost: load and replay, or give up."""
    refused = isinstance(error, InvalidRequestError | ClipLost)
    o, effects = _dropped(replace(o, failures=o.failures + 1))
    if not refused and o.failures < FAILURES_IN_A_ROW:
        return replace(o, retry_at_s=now_s + RETRY_AFTER_S), effects
    told = error if isinstance(error, EchoError) else EngineError(f"engine failed: {error!r}")
    if o.shadow:
        return ended(o, told)
    # What is refused or lost here is so everywhere; handing it round helps nobody.
    state = SessionState.PAUSED if refused else SessionState.LIVE
    o, more = retired(o, state, failure=told)
    return o, (*effects, *more)


def _lease_of(view: LeaseView | None) -> Lease | None:
    return None if view is None else view.lease


def _dropped(o: Owning) -> Step:
    return replace(o, at=None, pending=None, stepping=False), (Effect.DROP_STATE,)


def _looked_round(o: Owning) -> Step:
    if o.at is None or o.at < o.committed or o.caught_up or o.refresh:
        return o, (Effect.TELL,)
    o = replace(o, caught_up=True)
    if o.resumed and not o.shadow:
        return o, (Effect.RESUMED, Effect.TELL)
    return o, (Effect.TELL,)
