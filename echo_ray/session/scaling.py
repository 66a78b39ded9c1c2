"""How many replicas there should be, as a value: from the room they have and what asks for it.

    decide(state, fleet, now, rules) -> the number, why, and the next state

More at once, as soon as fewer slots are free than are kept spare. Fewer slowly: when for `stable_s`
on end nothing asked for more, a few at a time, and never while sessions are being moved. Slots are
each replica's own measure. Serve stops whichever replica it likes, so one goes only if the sessions
of any of them find room in the others. What is not seen is taken for needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

from echo_ray.config_rules import require
from echo_ray.session.demand import Demand

BEHIND_CHUNKS = 1.0
"""A replica whose session with least slack is less than this ahead of playout is behind ..."""
BEHIND_S = 20.0
"""... if it stays so for this long: a session that has just come begins without a lead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What an operator may set. Raises `ConfigError`."""

    spare_slots: int = 2
    """At least so many slots are kept free for sessions to come."""
    spare_share: float = 0.1
    """And at least this part of the sessions."""
    stable_s: float = 600.0
    """A replica goes only if it was not needed for so long."""
    settle_s: float = 60.0
    """So long after each change no replica goes."""
    at_once: int = 1
    """At most so many go at a time."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(number, f"policy_kwargs.{item.name}", value, "a number")
        for name in ("spare_slots", "at_once"):
            value = getattr(self, name)
            whole = isinstance(value, int) and 1 <= value <= 1000
            require(whole, f"policy_kwargs.{name}", value, "1 to 1000")
        share = self.spare_share
        require(0 <= share <= 10, "policy_kwargs.spare_share", share, "0 to 10")
        for name in ("stable_s", "settle_s"):
            value = getattr(self, name)
            fits = 0 < value <= 86400
            require(fits, f"policy_kwargs.{name}", value, "more than 0, at most 86400 seconds")

    def spare(self, asked: int) -> int:
        """Slots to keep free while `asked` are asked for."""
        return max(self.spare_slots, math.ceil(self.spare_share * asked))

    def spare_to_go(self, asked: int) -> int:
        """Slots that must be free without a replica that goes: half as many again.

        Else the next session would bring it back.
        """
        return math.ceil(1.5 * self.spare(asked))


class Leaving(IntEnum):
    """Whether a replica is to go away, and what follows."""

    NO = 0
    REPLACED = 1
    """Serve starts another for it."""
    KEPT = 2
    """An operator drained it; it stays, empty, until its process is ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What one replica says of itself."""

    id: str
    sessions: int
    slots: int
    """Realtime sessions it has room for by its own measure, those that it runs included."""
    slack_chunks: float
    """How far its session with least slack is ahead of playout."""
    leaving: Leaving = Leaving.NO
    kind: int = 0
    """Replicas of one kind may go on with each other's sessions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """What is seen at one time."""

    target: int
    """The present number, as Serve tries to have it."""
    heard: tuple[Standing, ...] = ()
    unheard: int = 0
    """Replicas that run and have not said anything of late."""
    demand: Demand | None = None
    """None: no router was heard."""
    least: int = 1
    most: int = 1

    @property
    def ready(self) -> tuple[Standing, ...]:
        return tuple(r for r in self.heard if r.leaving is Leaving.NO)

    @property
    def useless(self) -> int:
        """Replicas that count for Serve and take no sessions."""
        return sum(r.leaving is Leaving.KEPT for r in self.heard)

    @property
    def coming(self) -> int:
        """Replicas that will take sessions and have not said so yet."""
        return max(self.unheard, self.target - self.useless - len(self.ready))

    @property
    def calm(self) -> bool:
        """Whether every replica is seen to serve, and nobody waits or is being moved."""
        told = self.demand
        still = len(self.ready) == len(self.heard) == self.target and not self.unheard
        return still and told is not None and not (told.waiting + told.refused + told.draining)


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered from one decision to the next."""

    since_s: float | None = None
    """When the first one was made."""
    target: int | None = None
    changed_s: float = -math.inf
    """When the present number was seen to change."""
    peaks: tuple[tuple[float, int], ...] = ()
    """(when, replicas needed) in the last `stable_s`: those that nothing later exceeds."""
    behind: Mapping[str, float] = field(default_factory=dict)
    """Replicas that are behind playout, and since when."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of replicas to have."""

    wanted: int
    why: str
    state: State


def decide(state: State, fleet: Fleet, now_s: float, rules: Rules) -> Decision:
    """The number to have after one look; the present one if nothing can be seen."""
    state = _looked(state, fleet, now_s)
    slots = _slots(fleet, state, now_s)
    if not slots:
        state = _needed(state, fleet.target, now_s, rules)
        return Decision(
            _bounded(fleet.target, fleet), "no replica says what it has room for", state
        )
    asked = _asked(fleet, sum(slots))
    spare = rules.spare(asked)
    typical = max(1, statistics.median_low(slots))
    room = [*slots, *[typical] * fleet.coming]
    why = f"{asked} sessions and {spare} spare slots, {sum(room)} slots in {len(room)} replicas"
    enough = fleet.useless + _enough(room, asked + rules.spare_to_go(asked), typical)
    blind = fleet.unheard or fleet.demand is None
    state = _needed(state, max(enough, fleet.target) if blind else enough, now_s, rules)
    missing = asked + spare - sum(room)
    if missing > 0:
        return Decision(_bounded(fleet.target + math.ceil(missing / typical), fleet), why, state)
    return Decision(_bounded(fleet.target - _going(state, fleet, now_s, rules), fleet), why, state)


def _looked(state: State, fleet: Fleet, now_s: float) -> State:
    """The state after one more look: since when it is kept, what changed, and who is behind."""
    late = {r.id for r in fleet.ready if r.sessions and r.slack_chunks < BEHIND_CHUNKS}
    behind = {rid: state.behind.get(rid, now_s) for rid in late}
    since_s = now_s if state.since_s is None else state.since_s
    changed_s = state.changed_s if state.target in (None, fleet.target) else now_s
    return replace(state, since_s=since_s, target=fleet.target, changed_s=changed_s, behind=behind)


def _slots(fleet: Fleet, state: State, now_s: float) -> list[int]:
    """Slots of each replica that serves; one that is behind has too few for what it runs."""
    return [
        min(r.slots, max(1, r.sessions - 1)) if _is_behind(state, r.id, now_s) else r.slots
        for r in fleet.ready
    ]


def _is_behind(state: State, replica_id: str, now_s: float) -> bool:
    return now_s - state.behind.get(replica_id, now_s) >= BEHIND_S


def _asked(fleet: Fleet, slots: int) -> int:
    """Slots that are asked for. Refusals at most double what serves: anybody can ask again and
    again, whereas sessions that wait exist."""
    told = fleet.demand or Demand()
    drained = sum(r.sessions for r in fleet.heard if r.leaving is not Leaving.NO)
    sessions = sum(r.sessions for r in fleet.ready) + max(told.moving, drained)
    return sessions + told.waiting + min(told.refused, slots)


def _enough(room: list[int], asked: int, typical: int) -> int:
    """How many replicas have room for `asked`, whichever of them go."""
    count = 0
    for slots in sorted(room):
        if asked <= 0:
            break
        asked -= slots
        count += 1
    return count + max(0, math.ceil(asked / typical))


def _needed(state: State, count: int, now_s: float, rules: Rules) -> State:
    """So many replicas are needed now."""
    kept = (p for p in state.peaks if p[1] > count and p[0] > now_s - rules.stable_s)
    return replace(state, peaks=(*kept, (now_s, count)))


def _going(state: State, fleet: Fleet, now_s: float, rules: Rules) -> int:
    """How many replicas may go now."""
    watched_s = now_s - (now_s if state.since_s is None else state.since_s)
    settled = min(watched_s - rules.stable_s, now_s - state.changed_s - rules.settle_s) >= 0
    if not (settled and fleet.calm) or state.behind:
        return 0
    highest = max(count for _, count in state.peaks)
    surplus = fleet.target - max(highest, fleet.least, 1)
    fitting = (n for n in range(min(rules.at_once, surplus), 0, -1) if _can_spare(fleet, n, rules))
    return next(fitting, 0)


def _can_spare(fleet: Fleet, count: int, rules: Rules) -> bool:
    """Whether the sessions of any `count` replicas find room, each among those of its kind.

    With spare slots in every kind: a session may have come since.
    """
    for kind in {r.kind for r in fleet.ready}:
        alike = [r for r in fleet.ready if r.kind == kind]
        left = sorted((r.slots for r in alike), reverse=True)[count:]
        sessions = sum(r.sessions for r in alike)
        if sum(left) < sessions + rules.spare_to_go(sessions):
            return False
    return True


def _bounded(count: int, fleet: Fleet) -> int:
    return min(max(count, fleet.least, 1), max(fleet.most, 1))
