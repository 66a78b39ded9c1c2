import math

import pytest

from echo_ray.session.pacing import (
    NEVER_DUE_S,
    PATIENCE_S,
    Choice,
    Demand,
    Playout,
    Turn,
    choose,
    idle_verdict,
    next_chunk,
    wanted,
)
from echo_ray.session.records import OnIdle, Pace

LEAD_S = 1.5


def demand(**changes):
    values = {
        "pace": Pace.REALTIME,
        "index": 4,
        "start_s": 3.0,
        "want": 100,
        "waiting_since_s": 7.0,
    }
    return Demand(**{**values, **changes})


def test_the_session_that_will_stall_first_goes_first():
    turns = [Turn("a", 0.0, 12.0, 1.0), Turn("b", 0.0, 11.0, 5.0), Turn("c", 10.5, 9.0, 0.0)]
    assert choose(turns, 10.0) == Choice("b", None)
    assert choose(turns, 10.5) == Choice("c", None)


def test_equals_take_turns():
    turns = [Turn("a", 0.0, NEVER_DUE_S, 2.0), Turn("b", 0.0, NEVER_DUE_S, 1.0)]
    assert choose(turns, 10.0).session_id == "b"


def test_realtime_goes_before_max():
    turns = [Turn("max", 0.0, NEVER_DUE_S, 8.0), Turn("live", 0.0, 99.0, 9.0)]
    assert choose(turns, 10.0).session_id == "live"


def test_with_nothing_ready_it_waits_for_the_earliest():
    assert choose([Turn("a", 12.0, 13.0, 0.0), Turn("b", 11.0, 14.0, 0.0)], 10.0) == Choice(
        None, 11.0
    )
    assert choose([], 10.0) == Choice(None, None)


def test_a_chunk_may_be_made_the_lead_before_playout_reaches_it():
    playout = Playout.begins(100.0, 0.0)
    assert next_chunk(demand(), playout, lead_s=LEAD_S) == (101.5, 103.0)


def test_before_playout_the_first_chunk_is_due_since_the_session_waits():
    assert next_chunk(demand(), None, lead_s=LEAD_S) == (-math.inf, 7.0)


@pytest.mark.parametrize("pace", Pace)
def test_nothing_that_nobody_wants_is_made(pace):
    assert next_chunk(demand(pace=pace, want=4), None, lead_s=LEAD_S) is None
    assert next_chunk(demand(pace=pace, want=5), None, lead_s=LEAD_S) is not None


def test_max_is_bounded_by_want_only_and_without_readers_by_time():
    playout = Playout.begins(100.0, 0.0)
    fast = demand(pace=Pace.MAX)
    assert next_chunk(fast, playout, lead_s=LEAD_S) == (-math.inf, NEVER_DUE_S)
    alone = demand(pace=Pace.MAX, want=None)
    assert next_chunk(alone, playout, lead_s=LEAD_S) == (101.5, NEVER_DUE_S)


def test_without_a_viewer_a_session_keeps_time_with_what_others_leave():
    playout = Playout.begins(100.0, 0.0)
    assert next_chunk(demand(want=None), playout, lead_s=LEAD_S) == (101.5, NEVER_DUE_S)
    assert next_chunk(demand(want=None), None, lead_s=LEAD_S) == (-math.inf, NEVER_DUE_S)


def test_who_takes_what_is_left_gets_a_slice_when_it_has_waited_long():
    live = [Turn("live", 0.0, 99.0, 9.0), Turn("late", 0.0, 1.0, 9.0)]
    left = Turn("left", -math.inf, NEVER_DUE_S, 100.0)
    assert choose([*live, left], 100.0 + PATIENCE_S - 0.1).session_id == "late"
    assert choose([*live, left], 100.0 + PATIENCE_S).session_id == "left"
    longer = Turn("longer", -math.inf, NEVER_DUE_S, 99.0)
    assert choose([*live, left, longer], 100.0 + PATIENCE_S).session_id == "longer"
    # Waiting begins when there is something to do.
    early = Turn("early", 104.0, NEVER_DUE_S, 1.0)
    assert choose([*live, early], 104.0 + PATIENCE_S - 0.1).session_id == "late"


def test_a_late_chunk_moves_the_clock_and_an_early_one_does_not():
    playout = Playout.begins(100.0, 0.0)
    assert playout.after_publishing(101.0, 3.0) == playout
    late = playout.after_publishing(110.0, 3.0)
    assert late.due_s(3.0) == 110.0
    # Seven seconds of delay are not made up for by seven seconds of hurry.
    assert next_chunk(demand(start_s=6.0), late, lead_s=LEAD_S) == (111.5, 113.0)


def test_playout_begins_anywhere_in_the_stream():
    assert Playout.begins(100.0, 500.0).due_s(501.0) == 101.0


@pytest.mark.parametrize(
    ("wants", "pace", "on_idle", "expected"),
    [
        ([3, 9, 5], Pace.REALTIME, OnIdle.PAUSE, 9),
        ([3, 9, 5], Pace.MAX, OnIdle.PAUSE, 3),
        ([3, None, 5], Pace.MAX, OnIdle.PAUSE, 3),
        ([None], Pace.MAX, OnIdle.CONTINUE, 0),
        ([0], Pace.REALTIME, OnIdle.CONTINUE, 0),
        ([], Pace.REALTIME, OnIdle.PAUSE, 0),
        ([], Pace.MAX, OnIdle.CLOSE, 0),
        ([], Pace.MAX, OnIdle.CONTINUE, None),
    ],
)
def test_readers_bound_what_is_made(wants, pace, on_idle, expected):
    assert wanted(wants, pace, on_idle) == expected


def test_idleness_counts_after_the_grace():
    assert idle_verdict(OnIdle.PAUSE, 10.0, 14.9, 5.0) is None
    assert idle_verdict(OnIdle.PAUSE, 10.0, 15.0, 5.0) is OnIdle.PAUSE
    assert idle_verdict(OnIdle.CLOSE, 10.0, 15.0, 5.0) is OnIdle.CLOSE
    assert idle_verdict(OnIdle.CONTINUE, 10.0, 99.0, 5.0) is None
    assert idle_verdict(OnIdle.PAUSE, None, 99.0, 5.0) is None
