"""Replicas, sessions that come and go, and a Serve that knows nothing of sessions; for scaling.

One tick is a second. Serve stops the fullest replica, which is the worst that it may choose.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from echo_ray.session.demand import Demand, Refusals
from echo_ray.session.scaling import Fleet, Rules, Standing, State, decide

PUSH_S = 2
START_S = 60
RETRY_S = 5
DRAIN_S = 20
MOVED_A_SECOND = 4
Rate = Callable[[int], float]
"""Sessions that come in a second, by time."""


@dataclass
class Replica:
    id: int
    slots: int
    kind: int
    ready_s: int
    sessions: list[int] = field(default_factory=list)
    """When each of them ends."""
    stopped_s: int | None = None

    def free(self) -> int:
        return self.slots - len(self.sessions)


@dataclass
class Report:
    """What came of it."""

    targets: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    """Sessions that run or wait to be let in, each second."""
    came: int = 0
    waits_s: list[int] = field(default_factory=list)
    """Of those that were refused at first, until they were let in or the end."""
    harmed: int = 0
    """Sessions of a replica that went that found no room in time."""
    cramped: int = 0
    """Replicas that went when there was no room for their sessions elsewhere."""

    def turns_in_an_hour(self) -> int:
        """The most turns, from more to fewer or back, within any hour."""
        pairs = enumerate(pairwise(self.targets))
        rises = [(t, after > before) for t, (before, after) in pairs if before != after]
        at_s = [t for (_, up), (t, next_up) in pairwise(rises) if up != next_up]
        return max((sum(s <= t < s + 3600 for t in at_s) for s in at_s), default=0)


@dataclass
class Sim:
    """One run. `slots`: of the replica that is started nth, at time t."""

    rules: Rules
    rate: Rate
    seed: int = 0
    least: int = 1
    most: int = 50
    mean_s: float = 600.0
    """How long sessions last."""
    slots: Callable[[int, int], int] = lambda n, t: 5
    kinds: int = 1

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.replicas: list[Replica] = []
        self.waiting: list[tuple[int, int]] = []
        """(when it came, when it asks again) of each client that was refused."""
        self.state, self.report = State(), Report()
        self.refusals = Refusals()
        self.target, self.made = self.least, 0
        self.pushed: dict[int, Standing] = {}
        self._start(self.least, -START_S)

    def run(self, seconds: int) -> Report:
        for now in range(seconds):
            for replica in self.replicas:
                replica.sessions = [end for end in replica.sessions if end > now]
                replica.slots = self.slots(replica.id, now)
            self._drain(now)
            self._come(now)
            if now % PUSH_S == 0:
                self.pushed = {r.id: self._said(r) for r in self._running(now)}
            self._scale(now)
            running = sum(len(r.sessions) for r in self.replicas)
            self.report.asked.append(running + len(self.waiting))
            self.report.targets.append(self.target)
        self.report.waits_s += [seconds - came for came, _ in self.waiting]
        return self.report

    def _running(self, now: int) -> list[Replica]:
        return [r for r in self.replicas if r.ready_s <= now and r.stopped_s is None]

    @staticmethod
    def _said(replica: Replica) -> Standing:
        return Standing(
            id=str(replica.id),
            sessions=len(replica.sessions),
            slots=replica.slots,
            slack_chunks=3.0 if replica.free() >= 0 else 0.1,
            kind=replica.kind,
        )

    def _come(self, now: int) -> None:
        asking = [came for came, again in self.waiting if again <= now]
        self.waiting = [w for w in self.waiting if w[1] > now]
        arrivals = self._arrivals(now)
        self.report.came += arrivals
        for came in asking + [now] * arrivals:
            place = max(self._running(now), key=Replica.free, default=None)
            if place is not None and place.free() > 0:
                place.sessions.append(now + math.ceil(self.rng.expovariate(1 / self.mean_s)))
                if came < now:
                    self.report.waits_s.append(now - came)
            else:
                self.refusals.add(now)
                self.waiting.append((came, now + RETRY_S))

    def _arrivals(self, now: int) -> int:
        # Poisson, by Knuth: rates are small.
        limit, count, product = math.exp(-min(self.rate(now), 500.0)), 0, self.rng.random()
        while product > limit:
            product *= self.rng.random()
            count += 1
        return count

    def _drain(self, now: int) -> None:
        """Move the sessions of stopped replicas; what finds no room in time is harmed."""
        for gone in [r for r in self.replicas if r.stopped_s is not None]:
            assert gone.stopped_s is not None
            for end in gone.sessions[:MOVED_A_SECOND]:
                alike = [r for r in self._running(now) if r.kind == gone.kind]
                place = max(alike, key=Replica.free, default=None)
                if place is not None and place.free() > 0:
                    gone.sessions.remove(end)
                    place.sessions.append(end)
            if gone.sessions and now - gone.stopped_s > DRAIN_S:
                self.report.harmed += len(gone.sessions)
                gone.sessions = []
            if not gone.sessions:
                self.replicas.remove(gone)

    def _scale(self, now: int) -> None:
        running = {str(r.id) for r in self._running(now)}
        heard = tuple(s for s in self.pushed.values() if s.id in running)
        leaving = [r for r in self.replicas if r.stopped_s is not None]
        fleet = Fleet(
            target=self.target,
            heard=heard,
            unheard=len(running) - len(heard),
            demand=Demand(
                refused=self.refusals.count(now),
                draining=len(leaving),
                moving=sum(len(r.sessions) for r in leaving),
            ),
            least=self.least,
            most=self.most,
        )
        decision = decide(self.state, fleet, now, self.rules)
        self.state = decision.state
        self._start(decision.wanted - self.target, now)
        self._stop(self.target - decision.wanted, now)
        self.target = decision.wanted

    def _start(self, count: int, now: int) -> None:
        for _ in range(count):
            number, self.made = self.made, self.made + 1
            kind = number % self.kinds
            self.replicas.append(Replica(number, self.slots(number, now), kind, now + START_S))

    def _stop(self, count: int, now: int) -> None:
        """Those that do not run yet go first, as Serve has it; then the fullest ones."""
        there = [r for r in self.replicas if r.stopped_s is None]
        there.sort(key=lambda r: (r.ready_s <= now, -len(r.sessions)))
        for replica in there[: max(0, count)]:
            if replica.ready_s > now:
                self.replicas.remove(replica)
            else:
                replica.stopped_s = now
                self._check_room(replica, now)

    def _check_room(self, gone: Replica, now: int) -> None:
        alike = [r for r in self._running(now) if r.kind == gone.kind]
        room = sum(max(0, r.free()) for r in alike)
        self.report.cramped += room < len(gone.sessions)
