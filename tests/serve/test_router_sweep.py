"""Which sessions a router adopts without viewers."""

from __future__ import annotations

import pytest
from stored import new

from echo_ray.serve.sweep import orphans
from echo_ray.session.records import OnIdle, SessionState

NOW = 100.0


def going_on(**changes: object):  # type: ignore[no-untyped-def]
    return new(**{"on_idle": OnIdle.CONTINUE, "epoch": 3, "next_index": 9, "sealed": 9, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lease_until": NOW, "owner": "r1"},
        {"next_index": 0, "sealed": 0},
        # It was given a past, and nobody has owned it yet: a fork, or brought back.
        {"epoch": 0},
    ],
)
def test_a_session_that_goes_on_without_viewers_is_adopted(changes: dict[str, object]) -> None:
    record = going_on(**changes)
    assert orphans([record], set(), NOW) == [record]


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0, "next_index": 0, "sealed": 0},
        {"on_idle": OnIdle.PAUSE},
        {"state": SessionState.PAUSED},
        {"state": SessionState.CLOSED},
        {"owner": "r1", "lease_until": NOW + 1},
        {"id": "watched"},
    ],
)
def test_others_are_left_alone(changes: dict[str, object]) -> None:
    assert orphans([going_on(**changes)], {"watched"}, NOW) == []
