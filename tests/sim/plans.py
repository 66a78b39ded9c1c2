"""How large a world is, for how long, and with what in it; each seed has its plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sim.faults import FAULTS, PLANNED


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One kind of run."""

    name: str
    replicas: int = 3
    routers: int = 2
    sessions: int = 2
    quiet_s: float = 2.0
    """Virtual seconds before the first fault."""
    troubled_s: float = 12.0
    """Virtual seconds until the faults are over; recovery and peace follow."""
    peaceful_s: float = 4.0
    """Virtual seconds after the recovery, in which every stream has to run."""
    faults_per_s: float = 0.7
    faults: tuple[str, ...] = tuple(FAULTS)
    skew_s: float = 3.0
    """How far a wall clock may be off."""
    switch_every_s: float = 2.5
    interrupted: float = 0.3
    """Share of sessions that somebody pauses or stops."""
    comings: bool = True
    """Whether viewers leave and come back, or come late for the past."""
    no_stall: bool = False
    """Whether a viewer with a buffer of two seconds must never stall."""


TINY = Plan(name="tiny")
CALM = Plan(
    name="calm",
    faults=PLANNED,
    faults_per_s=0.6,
    interrupted=0.0,
    comings=False,
    no_stall=True,
)
LONG = replace(TINY, name="long", sessions=3, replicas=4, troubled_s=60.0)
CROWD = replace(
    TINY, name="crowd", sessions=30, replicas=8, routers=4, troubled_s=20.0, faults_per_s=2.0
)
LARGE = replace(
    TINY, name="large", sessions=200, replicas=40, routers=10, troubled_s=20.0, faults_per_s=5.0
)


def plan_of(seed: int) -> Plan:
    """The plan of a seed: most are tiny, one in a thousand has hundreds of sessions."""
    if seed % 1000 == 999:
        return LARGE
    if seed % 200 == 199:
        return CROWD
    if seed % 50 == 49:
        return LONG
    return CALM if seed % 10 == 9 else TINY
