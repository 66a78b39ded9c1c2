"""One pull of one session, carried across the death of any owner, as a value: what is next.

    work(pulling, now) -> find an owner, read from one, rest, or end
    takes(pulling, index) -> whether a segment is the one to deliver

A pull finds or makes an owner and takes committed segments by index from it; when that owner is
lost, another one goes on at the next index. Only a session that has ended, or an index that is
gone, ends it. What follows from what stands in `pull_events`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from echo_ray.errors import EchoError
from echo_ray.session.locating import Ask, Avoided, Owner, avoided_at


class Shun(Enum):
    """Who is to avoid a replica for a while after a pull from it ended."""

    NOBODY = auto()
    SESSION = auto()
    """It refused this session; others may be fine there."""
    ALL = auto()
    """It cannot be reached, says nothing, or is leaving."""


class Cause(StrEnum):
    """What kind of loss it was, for the count of failovers."""

    BROKEN = "broken"
    SILENT = "silent"
    DRAIN = "drain"
    FENCED = "fenced"


class OwnerLost(Exception):
    """The owner gives no more segments to this pull."""

    def __init__(
        self,
        reason: str,
        *,
        cause: Cause = Cause.BROKEN,
        shun: Shun = Shun.ALL,
        error: EchoError | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cause = cause
        self.shun = shun
        self.error = error


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulling:
    """Everything that decides what happens to one pull."""

    next: int
    """The index that is delivered next."""
    told_s: float
    """When segments came last, or viewers heard why none do."""
    beat_s: float
    silence_s: float
    """An owner that says nothing for so long is lost."""
    patience_s: float
    """Viewers are told of trouble that lasts as long as this, and again each time it has."""
    owner: Owner | None = None
    """Whom segments come from; None while there is nobody."""
    quiet_beats: int = 0
    """How often in a row a whole beat passed without a word from the owner."""
    failed: Owner | None = None
    last_epoch: int | None = None
    shunned: Avoided = field(default_factory=dict)
    """The replicas that refused this session, each until when."""
    paused: bool = False
    poked: bool = False
    """Whether the record has changed since it was looked at."""
    attempts: int = 0
    """Failures since the last delivery."""
    lost_s: float | None = None
    """Since when segments are missing."""
    rest_until_s: float = -math.inf
    ended: EchoError | None = None


# What to do next


@dataclass(frozen=True, slots=True)
class Find:
    """Look for the session's owner."""

    ask: Ask


@dataclass(frozen=True, slots=True)
class Read:
    """Take segments from `owner`, from index `start` on."""

    owner: Owner
    start: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Do nothing before `until_s`, unless something happens."""

    until_s: float


@dataclass(frozen=True, slots=True)
class End:
    """It is over; readers hear why."""

    error: EchoError


def work(p: Pulling, now_s: float, *, wake: bool) -> Find | Read | Rest | End:
    """What comes next; `wake`: whether the reader wants a paused session woken."""
    if p.ended is not None:
        return End(p.ended)
    if p.owner is not None:
        return Read(p.owner, _start(p.next, p.owner.next_index))
    if now_s < p.rest_until_s:
        return Rest(p.rest_until_s)
    shunned = avoided_at(p.shunned, now_s)
    return Find(Ask(failed=p.failed, last_epoch=p.last_epoch, wake=wake, avoid=shunned))


def _start(wanted: int, standing: int | None) -> int:
    """Where to read from: a session that was brought back may stand before what is wanted.

    What is sent before that is made again, and not taken.
    """
    return wanted if standing is None else min(wanted, standing)


def takes(p: Pulling, index: object) -> bool:
    """Whether segment `index` is to be delivered; False: it has been.

    Raises `OwnerLost` for what is neither: a gap, or no index at all.
    """
    if not isinstance(index, int) or not 0 <= index <= p.next:
        raise OwnerLost(f"sent chunk {index!r} where {p.next} was due")
    return index == p.next
