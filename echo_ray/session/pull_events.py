"""What follows from what for one pull: every event as a pure function.

    <event>(pulling, ..., now) -> the next value, and the effects that somebody has to carry out

Routers execute the effects on sockets, the simulation on a virtual clock. The order that must hold:
indices are delivered one by one, each once. What an owner does after a poke has ended the reading
from it is nothing to the pull any more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from echo_ray.errors import (
    ClipLost,
    EchoError,
    Fenced,
    InvalidRequestError,
    NotFoundError,
    SegmentExpired,
    SessionClosed,
    UnavailableError,
)
from echo_ray.session.locating import Owner, SessionPaused, avoiding
from echo_ray.session.pulling import Cause, OwnerLost, Pulling, Shun

TERMINAL = (NotFoundError, SessionClosed, SegmentExpired, ClipLost, InvalidRequestError)
"""No other replica would answer otherwise, today or tomorrow."""
FIRST_DELAY_S = 0.05
MAX_DELAY_S = 1.0
PAUSED_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Drop the connection to the owner, whatever is on its way."""


@dataclass(frozen=True, slots=True)
class Lost:
    """An owner is lost. `avoid`: every session is to avoid its replica for a while."""

    owner: Owner
    reason: str
    avoid: bool


@dataclass(frozen=True, slots=True)
class Failover:
    """Segments are missing from now on."""

    cause: Cause


@dataclass(frozen=True, slots=True)
class Recovered:
    """Segments come again."""

    after_s: float


@dataclass(frozen=True, slots=True)
class TellPaused:
    """Viewers hear that the session was paused on purpose."""


@dataclass(frozen=True, slots=True)
class TellTrouble:
    """Viewers hear why nothing has come for long."""

    error: EchoError


Effect = Disconnect | Lost | Failover | Recovered | TellPaused | TellTrouble
Step = tuple[Pulling, tuple[Effect, ...]]
NOTHING: tuple[Effect, ...] = ()


# Finding an owner


def finding(p: Pulling) -> Step:
    """The record is being looked at."""
    return replace(p, poked=False), NOTHING


def found(p: Pulling, owner: Owner) -> Step:
    """The session is generated there."""
    p = replace(p, failed=owner, last_epoch=owner.epoch, paused=False)
    if p.poked:
        return replace(p, failed=None), NOTHING
    return replace(p, owner=owner, quiet_beats=0), NOTHING


def not_found(p: Pulling, error: EchoError | SessionPaused, now_s: float, jitter: float) -> Step:
    """No owner was found or made. `jitter` (0.5 to 1) scales the rest before the next try."""
    if isinstance(error, TERMINAL):
        return replace(p, ended=error), NOTHING
    if isinstance(error, SessionPaused):
        effects = NOTHING if p.paused else (TellPaused(),)
        p = replace(p, paused=True, failed=None, lost_s=None, told_s=now_s)
        return _resting(p, now_s + PAUSED_POLL_S), effects
    p, effects = _complained(p, error, now_s)
    return _backed_off(p, now_s, jitter), effects


def poked(p: Pulling) -> Step:
    """Somebody has changed the record: look at it again at once."""
    effects = NOTHING if p.owner is None else (Disconnect(),)
    failed = p.failed if p.owner is None else None
    return replace(p, poked=True, owner=None, failed=failed, rest_until_s=-math.inf), effects


# Reading from it


def heard(p: Pulling) -> Step:
    """The owner has said something, whatever it is."""
    return (replace(p, quiet_beats=0) if p.quiet_beats else p), NOTHING


def quiet(p: Pulling, now_s: float, jitter: float) -> Step:
    """A whole beat has passed without a word from the owner.

    All beats of the silence must pass one by one: when the reader itself was stopped or starved,
    one of them runs out at once, and the owner is not to blame.
    """
    p = replace(p, quiet_beats=p.quiet_beats + 1)
    if p.quiet_beats < math.ceil(p.silence_s / p.beat_s):
        return p, NOTHING
    return lost(p, OwnerLost(f"silent for {p.silence_s} s", cause=Cause.SILENT), now_s, jitter)


def delivered(p: Pulling, index: int, now_s: float) -> Step:
    """Segment `index`, which `takes` let through, has been delivered."""
    effects = NOTHING if p.lost_s is None else (Recovered(now_s - p.lost_s),)
    return replace(p, next=index + 1, attempts=0, lost_s=None, told_s=now_s), effects


def refused(p: Pulling, error: EchoError, now_s: float, jitter: float) -> Step:
    """The owner refuses to go on, and says why."""
    if p.owner is not None and isinstance(error, TERMINAL):
        return replace(p, owner=None, ended=error), NOTHING
    reason = f"refused: {error.message}"
    if isinstance(error, Fenced):
        # Somebody else owns the session by now, so this one has not failed.
        loss = OwnerLost(reason, cause=Cause.FENCED, shun=Shun.NOBODY, error=error)
    else:
        loss = OwnerLost(reason, shun=Shun.SESSION, error=error)
    return lost(p, loss, now_s, jitter)


def lost(p: Pulling, loss: OwnerLost, now_s: float, jitter: float) -> Step:
    """The owner is lost: another one is needed. `jitter` as for `not_found`."""
    owner = p.owner
    if owner is None:
        return p, NOTHING
    effects: tuple[Effect, ...] = (Lost(owner, loss.reason, avoid=loss.shun is Shun.ALL),)
    if p.lost_s is None:
        effects = (*effects, Failover(loss.cause))
        p = replace(p, lost_s=now_s)
    if loss.shun is Shun.SESSION:
        p = replace(p, shunned=avoiding(p.shunned, owner.replica_id, now_s))
    error = loss.error or UnavailableError(
        f"replica {owner.replica_id}: {loss.reason}", retry_after_s=1.0
    )
    p, more = _complained(replace(p, owner=None), error, now_s)
    return _backed_off(p, now_s, jitter), (*effects, *more)


def _complained(p: Pulling, error: EchoError, now_s: float) -> Step:
    if now_s - p.told_s < p.patience_s:
        return p, NOTHING
    return replace(p, told_s=now_s), (TellTrouble(error),)


def _backed_off(p: Pulling, now_s: float, jitter: float) -> Pulling:
    """The first failure after a delivery costs no wait; later ones a growing one."""
    delay_s = 0.0
    if p.attempts > 0:
        delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(p.attempts - 1, 10))
    return _resting(replace(p, attempts=p.attempts + 1), now_s + delay_s * jitter)


def _resting(p: Pulling, until_s: float) -> Pulling:
    return p if p.poked else replace(p, rest_until_s=until_s)
