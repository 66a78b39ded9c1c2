"""How many replicas there are, on traces of arrivals; and mistakes that the same checks find."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sim.fleet import RETRY_S, START_S, Report, Sim

from echo_ray.session import scaling
from echo_ray.session.scaling import Fleet, Rules

RULES = Rules()
HOUR = 3600
MOST_TURNS = 2 * HOUR / RULES.stable_s
"""In an hour, whatever comes: a turn down waits for `stable_s` on end."""


@dataclass(frozen=True)
class Trace:
    """A run, and what must come of it."""

    sim: Callable[[], Sim]
    hours: float
    turns: float = MOST_TURNS
    """At most so many within any hour."""
    wait_s: float = 0
    """Nobody waits longer to be let in."""
    waiting: float = 0.05
    """At most this part of those that come have to wait at all."""
    waste: float = 2.0
    """At most so many times the replicas that the sessions fill."""


def sessions(count: float, mean_s: float = 600.0) -> float:
    """The rate that keeps so many sessions running."""
    return count / mean_s


def trace(rate: Callable[[int], float], **options: object) -> Callable[[], Sim]:
    return lambda: replace(Sim(RULES, rate), **options)  # type: ignore[arg-type]


def flash(t: int) -> float:
    return sessions(20) + (4.0 if HOUR <= t < HOUR + 20 else 0)


def pulses(on_s: int, off_s: int) -> Callable[[int], float]:
    return lambda t: sessions(70 if t % (on_s + off_s) < on_s else 10, 60)


def tides(high: float, low: float) -> Callable[[int], float]:
    return lambda t: sessions(high if t % (2 * HOUR) < HOUR else low)


BURST_S = START_S + 2 * RETRY_S
"""Until there is one replica more, for a burst that the spare slots did not hold."""
DOUBLINGS = 4
"""From five replicas to what the crowd needs."""
TRACES = {
    "steady": Trace(trace(lambda t: sessions(40)), 4, turns=6, wait_s=BURST_S),
    "diurnal": Trace(
        trace(lambda t: sessions(45 + 40 * math.sin(2 * math.pi * t / (6 * HOUR)))),
        6,
        turns=6,
        wait_s=BURST_S,
    ),
    "flash crowd": Trace(trace(flash), 3, turns=4, wait_s=DOUBLINGS * BURST_S, waiting=0.25),
    # A replica is needed again just after it went: the period that costs most.
    "on and off": Trace(
        trace(pulses(60, 720), mean_s=60.0), 3, wait_s=DOUBLINGS * BURST_S, waiting=0.15, waste=4.0
    ),
    "slow leak": Trace(
        trace(lambda t: sessions(0.001 * t, 900), mean_s=900.0), 4, turns=4, wait_s=BURST_S
    ),
    "devices that slow down": Trace(
        trace(lambda t: sessions(20), slots=lambda n, t: max(2, 6 - t // HOUR)), 4, wait_s=BURST_S
    ),
    "unlike devices": Trace(
        trace(tides(50, 15), slots=lambda n, t: 3 + n % 3 * 5), 4, turns=6, wait_s=BURST_S
    ),
    "two kinds": Trace(trace(tides(50, 5), kinds=2), 4, turns=6, wait_s=BURST_S),
}


def held(found: Trace) -> Report:
    """Run a trace and check all that it promises."""
    sim = found.sim()
    report = sim.run(int(found.hours * HOUR))
    assert report.harmed == report.cramped == 0, f"{report.harmed} sessions had nowhere to go"
    assert sim.least <= min(report.targets)
    assert max(report.targets) <= sim.most
    turns = report.turns_in_an_hour()
    assert turns <= found.turns, f"{turns} turns in an hour"
    wait_s = max(report.waits_s, default=0)
    assert wait_s <= found.wait_s, f"somebody waited for {wait_s} s"
    waiting = len(report.waits_s) / report.came
    assert waiting <= found.waiting, f"{waiting:.2f} of them waited"
    filled = sum(math.ceil(max(1, n) / 5) for n in report.asked)
    waste = sum(report.targets) / filled
    assert waste <= found.waste, f"{waste:.2f} times the replicas that are filled"
    return report


@pytest.mark.parametrize("name", TRACES)
def test_the_number_follows_a_trace(name: str) -> None:
    report = held(TRACES[name])
    assert len(set(report.targets)) > 1


SPELLS = st.lists(
    st.tuples(st.floats(0, 0.2), st.integers(30, 1200)), min_size=1, max_size=8
)  # fmt: skip
"""(sessions that come in a second, for so many seconds), in turn."""


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(SPELLS, st.integers(1, 9), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
def test_whatever_comes_nobody_is_harmed_and_nothing_flaps(spells, slots, kinds, at_once, seed):
    lasting = [rate for rate, seconds in spells for _ in range(seconds)]
    sim = Sim(
        Rules(at_once=at_once),
        lambda t: lasting[t % len(lasting)],
        seed=seed,
        mean_s=120.0,
        slots=lambda n, t: slots,
        kinds=kinds,
    )
    report = sim.run(HOUR)
    assert report.cramped == report.harmed == 0
    assert sim.least <= min(report.targets) <= max(report.targets) <= sim.most
    assert report.turns_in_an_hour() <= MOST_TURNS
    # 24 sessions and what chance adds, from one slot: six doublings.
    assert max(report.waits_s, default=0) <= 6 * BURST_S


# Mistakes that the traces find


def any_room(fleet: Fleet, count: int, rules: Rules) -> bool:
    return True


def smallest_goes(room: list[int], asked: int, typical: int) -> int:
    """As if Serve chose the replica with the fewest slots."""
    count = 0
    for slots in sorted(room, reverse=True):
        count += asked > 0
        asked -= slots
    return count + max(0, math.ceil(asked / typical))


MISTAKES = {
    "no hysteresis": ("steady", "turns in an hour", {"_needed": lambda s, n, now, rules: replace(
        s, since_s=-math.inf, changed_s=-math.inf, peaks=((now, n),)
    )}),
    "no headroom": ("steady", "waited", {"Rules.spare": lambda self, asked: 0}),
    "the smallest goes": ("unlike devices", "nowhere to go", {
        "_enough": smallest_goes, "_can_spare": any_room
    }),
    "kinds are alike": ("two kinds", "nowhere to go", {"_can_spare": any_room}),
    "those on their way are forgotten": ("steady", "times the replicas|turns", {
        "Fleet.coming": property(lambda self: self.unheard)
    }),
    "nothing ever goes": ("diurnal", "times the replicas", {"_going": lambda *_: 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, why, planted = MISTAKES[name]
    for where, mistake in planted.items():
        owner, _, attribute = where.rpartition(".")
        place = getattr(scaling, owner) if owner else scaling
        monkeypatch.setattr(place, attribute, mistake)
    with pytest.raises(AssertionError, match=why):
        held(TRACES[found])
