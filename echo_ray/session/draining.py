"""A replica that is to go away, as a value: until when its sessions are moved, and what then.

    asked(drain, reason, until_s) -> the drain
    verdict(drain, now, ...) -> wait for the sessions to be moved, give the rest up, or done

Whoever moves the sessions does not matter here. What nobody has moved in time is given up at a
chunk boundary, and waits as a snapshot for somebody with room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

MAX_WITHIN_S = 86400.0
"""The longest time that a drain may be given."""


class Reason(StrEnum):
    """Why a replica is to go away."""

    ADMIN = "admin"
    NODE = "node"
    """Ray drains its node."""
    STOP = "stop"
    """Its process is being stopped."""


@dataclass(frozen=True, slots=True)
class Drain:
    """A drain that has begun; it is never called off."""

    reason: Reason
    until_s: float
    """By the replica's monotonic clock; what is still here then is given up."""
    given_up: bool = False


class Verdict(Enum):
    """What a replica does next that is to go away."""

    WAIT = auto()
    GIVE_UP = auto()
    """Release every session at its next chunk boundary."""
    DONE = auto()
    """No session is left."""


def asked(drain: Drain | None, reason: Reason, until_s: float) -> Drain:
    """The drain after one more request: the earliest deadline counts.

    A stop outweighs what an operator asked for, but not the drain of a node: for that, Serve starts
    replicas elsewhere before it stops those of the node.
    """
    if drain is None:
        return Drain(reason, until_s)
    if reason is Reason.ADMIN or drain.reason is Reason.NODE:
        reason = drain.reason
    return replace(drain, reason=reason, until_s=min(drain.until_s, until_s))


def verdict(drain: Drain, now_s: float, *, sessions: int, takers: bool) -> Verdict:
    """What follows with `sessions` left; `takers`: whether another replica takes sessions.

    A process that is being stopped waits for no replica to come: the one that replaces it may
    start only after it has gone.
    """
    if sessions == 0:
        return Verdict.DONE
    if drain.given_up:
        return Verdict.WAIT
    hopeless = drain.reason is Reason.STOP and not takers
    return Verdict.GIVE_UP if hopeless or now_s >= drain.until_s else Verdict.WAIT


def gave_up(drain: Drain, now_s: float) -> Drain:
    """Every session is being released."""
    return replace(drain, given_up=True, until_s=min(drain.until_s, now_s))
