"""The number of replicas, look by look; whole traces are in `sim/test_scaling.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from echo_ray.errors import ConfigError
from echo_ray.session.demand import Demand
from echo_ray.session.scaling import (
    BEHIND_S,
    Decision,
    Fleet,
    Leaving,
    Rules,
    Standing,
    State,
    decide,
)

RULES = Rules(spare_slots=2, spare_share=0.1, stable_s=100, settle_s=30)
QUIET = Demand()


def fleet(*sessions: int, slots: int = 5, demand: Demand | None = QUIET, **more: Any) -> Fleet:
    """A fleet whose replicas run so many sessions each."""
    heard = [
        Standing(id=f"r{n}", sessions=count, slots=slots, slack_chunks=3.0)
        for n, count in enumerate(sessions)
    ]
    options = {"target": len(sessions), "most": 20, **more}
    return Fleet(heard=tuple(heard), demand=demand, **options)


def changed(found: Fleet, number: int, **said: Any) -> Fleet:
    """The same, but one replica says something else."""
    heard = list(found.heard)
    heard[number] = replace(heard[number], **said)
    return replace(found, heard=tuple(heard))


def once(found: Fleet, rules: Rules = RULES) -> int:
    return decide(State(), found, 0.0, rules).wanted


def long(found: Fleet, rules: Rules = RULES, seconds: int = 200) -> Decision:
    """The decision after the fleet was seen unchanged for so long."""
    state = State()
    for now_s in range(seconds):
        decision = decide(state, found, float(now_s), rules)
        state = decision.state
    return decision


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (fleet(3), 1),
        (fleet(4), 2),
        (fleet(5, 5), 3),
        (fleet(4, demand=Demand(watched=6)), 3),
        (fleet(4, demand=Demand(unwatched=6)), 3),
        # Overcommitted: by its own measure it has no room for what it runs.
        (fleet(9, 2), 3),
        # A tenth of many sessions is more than two.
        (fleet(*[9] * 9, slots=10), 9),
        (fleet(*[9] * 9, 10, slots=10), 11),
        # What was refused counts for no more than what serves.
        (fleet(5, demand=Demand(refused=1)), 2),
        (fleet(5, demand=Demand(refused=1000)), 3),
        # One is on its way.
        (fleet(4, target=2), 2),
        (fleet(4, target=2, demand=Demand(refused=5)), 3),
        (fleet(4, unheard=1, target=2), 2),
        # Never more than the most, nor fewer than the least, nor none.
        (fleet(4, demand=Demand(watched=500)), 20),
        (fleet(3, least=4), 4),
        (fleet(3, least=0), 1),
        (Fleet(target=0, most=3, least=0), 1),
    ],
)
def test_more_at_once_when_spare_slots_are_short(found: Fleet, wanted: int) -> None:
    assert once(found) == wanted


def test_sessions_of_draining_replicas_count_and_their_slots_do_not() -> None:
    busy = fleet(3, 3)
    assert once(busy) == 2
    moving = Demand(draining=1, moving=3)
    kept = replace(changed(busy, 1, leaving=Leaving.KEPT), demand=moving)
    assert once(kept) == 3
    # Serve starts another for it by itself.
    replaced = replace(changed(busy, 1, leaving=Leaving.REPLACED), demand=moving)
    assert once(replaced) == 2
    # No router tells of them, but they do.
    assert once(replace(kept, demand=None)) == 3


def test_a_replica_goes_when_it_was_not_needed_for_long() -> None:
    idle = fleet(1, 1, 1, 0)
    assert long(idle, seconds=100).wanted == 4
    assert long(idle, seconds=102).wanted == 3
    assert long(idle, replace(RULES, at_once=3), seconds=102).wanted == 2


def test_a_moment_of_need_begins_the_wait_anew() -> None:
    idle, rules = fleet(1, 1, 0), RULES
    state, wanted = State(), []
    for now_s in range(300):
        seen = fleet(4, 4, 1) if now_s == 150 else idle
        decision = decide(state, seen, float(now_s), rules)
        state = decision.state
        wanted.append(decision.wanted)
    assert wanted[149] == 2
    assert set(wanted[150:250]) == {3}
    assert wanted[255] == 2


def test_after_a_change_no_replica_goes_until_it_has_settled() -> None:
    state = long(fleet(1, 1, 0, 0)).state
    after = fleet(1, 1, 0)
    first = decide(state, after, 200.0, RULES)
    assert first.wanted == 3
    assert decide(first.state, after, 229.0, RULES).wanted == 3
    assert decide(first.state, after, 230.0, RULES).wanted == 2


def calm() -> Fleet:
    return fleet(1, 1, 0)


@pytest.mark.parametrize(
    "found",
    [
        replace(calm(), demand=None),
        replace(calm(), demand=Demand(watched=1)),
        replace(calm(), demand=Demand(unwatched=1)),
        replace(calm(), demand=Demand(refused=1)),
        replace(calm(), demand=Demand(draining=1)),
        replace(calm(), target=4, unheard=1),
        replace(calm(), target=4),
        changed(calm(), 0, leaving=Leaving.REPLACED),
        changed(calm(), 0, slack_chunks=0.5),
        changed(calm(), 0, kind=7, sessions=5),
        replace(calm(), least=3),
        replace(calm(), heard=()),
    ],
)
def test_no_replica_goes_while_anything_speaks_against_it(found: Fleet) -> None:
    assert long(calm()).wanted == 2
    assert long(found).wanted >= found.target


def test_a_replica_goes_only_if_half_as_many_spare_slots_again_are_left() -> None:
    assert long(fleet(4, 4, 0)).wanted == 3
    assert long(fleet(4, 3, 0)).wanted == 2


def test_any_replica_may_be_the_one_that_goes() -> None:
    # The small one could go, but it may be the large one.
    assert long(changed(fleet(2, 1), 0, slots=20)).wanted == 2
    assert long(changed(fleet(1, 1), 0, slots=20)).wanted == 1


def test_a_replica_that_stays_behind_has_room_for_fewer_than_it_runs() -> None:
    late = changed(fleet(3), 0, slack_chunks=0.9)
    assert long(late, seconds=int(BEHIND_S)).wanted == 1
    assert long(late, seconds=int(BEHIND_S) + 1).wanted == 3
    # A device that is too slow for its only session keeps it.
    assert long(fleet(1, slots=1)).wanted == long(changed(late, 0, sessions=1, slots=1)).wanted == 3


def test_what_is_not_seen_is_taken_for_needed() -> None:
    state = long(calm()).state
    blind = decide(state, replace(calm(), heard=(), unheard=3), 200.0, RULES)
    assert blind.wanted == 3
    assert "no replica says" in blind.why
    assert decide(blind.state, calm(), 299.0, RULES).wanted == 3
    assert decide(blind.state, calm(), 301.0, RULES).wanted == 2


def test_the_reason_has_the_numbers() -> None:
    why = decide(State(), fleet(5, 4), 0.0, RULES).why
    assert why == "9 sessions and 2 spare slots, 10 slots in 2 replicas"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spare_slots", 0),
        ("spare_slots", 1.5),
        ("spare_slots", "2"),
        ("spare_share", -0.1),
        ("spare_share", 11),
        ("stable_s", 0),
        ("stable_s", 100_000),
        ("stable_s", None),
        ("settle_s", -1),
        ("at_once", 0),
        ("at_once", True),
    ],
)
def test_rules_that_cannot_be_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^policy_kwargs\.{name}: "):
        Rules(**{name: value})  # type: ignore[arg-type]
