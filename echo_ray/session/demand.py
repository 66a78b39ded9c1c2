"""What asks for room where no replica can see it: routers count it, a replica passes it on.

    heard(told, router, demand, now) -> what a replica was told
    total(told, now) -> all of it as one demand

Routers tell one replica each, so what only one router sees is summed, and what all of them read in
the directory is counted once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from echo_ray.session.placement import RETRY_FULL_S

TELL_S = 1.0
"""A router tells what it sees this often."""
KEPT_S = 5.0
"""What a router told counts for so long; then it is gone, or tells another replica."""
LATELY_S = RETRY_FULL_S
"""Refusals count for as long as clients are asked to wait, so one that waits counts once."""
REFUSALS_KEPT = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What one router sees; all are numbers of 0 or more."""

    watched: int = 0
    """Sessions that are watched at this router and that nobody generates."""
    unwatched: int = 0
    """Sessions that go on without viewers, and that nobody had room for."""
    refused: int = 0
    """Sessions not admitted for want of room, of late."""
    draining: int = 0
    """Replicas that drain and still have sessions."""
    moving: int = 0
    """The sessions that are still there."""

    @property
    def waiting(self) -> int:
        """Live sessions that nobody generates."""
        return self.watched + self.unwatched


Told = Mapping[str, tuple[Demand, float]]
"""Router -> what it told last, and when, by the listener's monotonic clock."""


def heard(told: Told, router: str, demand: Demand, now_s: float) -> Told:
    """What is known after one more router told; without what is too old to count."""
    return _fresh(told, now_s) | {router: (demand, now_s)}


def total(told: Told, now_s: float) -> Demand | None:
    """What all routers told, as one; None if none did of late."""
    return together([demand for demand, _ in _fresh(told, now_s).values()])


def together(demands: Iterable[Demand]) -> Demand | None:
    """The demand that several make up; None of none."""
    found = tuple(demands)
    if not found:
        return None
    return Demand(
        watched=sum(d.watched for d in found),
        unwatched=max(d.unwatched for d in found),
        refused=sum(d.refused for d in found),
        draining=max(d.draining for d in found),
        moving=max(d.moving for d in found),
    )


class Refusals:
    """The admissions that one router refused of late."""

    def __init__(self) -> None:
        self._at_s: deque[float] = deque(maxlen=REFUSALS_KEPT)

    def add(self, now_s: float) -> None:
        self._at_s.append(now_s)

    def count(self, now_s: float) -> int:
        """How many there were in the last `LATELY_S`; at most `REFUSALS_KEPT`."""
        while self._at_s and self._at_s[0] <= now_s - LATELY_S:
            self._at_s.popleft()
        return len(self._at_s)


def _fresh(told: Told, now_s: float) -> dict[str, tuple[Demand, float]]:
    return {router: (d, at_s) for router, (d, at_s) in told.items() if at_s > now_s - KEPT_S}
