"""Which sessions a router adopts without viewers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from router_rig import CONFIG, Rig, run
from stored import new

from echo_ray.serve.sweep import sweep_once
from echo_ray.session.control_log import orphaned
from echo_ray.session.forking import Past
from echo_ray.session.records import OnIdle, SessionRecord, SessionState

NOW = 100.0


def going_on(**changes: object) -> SessionRecord:
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
def test_a_session_that_goes_on_without_viewers_waits_for_an_owner(
    changes: dict[str, object],
) -> None:
    assert orphaned(going_on(**changes), NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 0, "next_index": 0, "sealed": 0},
        {"on_idle": OnIdle.PAUSE},
        {"state": SessionState.PAUSED},
        {"state": SessionState.CLOSED},
        {"owner": "r1", "lease_until": NOW + 1},
    ],
)
def test_others_do_not(changes: dict[str, object]) -> None:
    assert not orphaned(going_on(**changes), NOW)


def test_orphans_are_adopted_and_those_that_are_watched_are_left_to_their_upstream() -> None:
    async def test(rig: Rig) -> None:
        fake = rig.replica("a")
        front = rig.router().front
        for id_ in ("s1", "s2"):
            rig.directory.restore(Past(record=going_on(id=id_, model="fake", epoch=0)))
        front.relays.sessions = lambda: {"s2"}  # type: ignore[method-assign]
        assert await sweep_once(front) == 1
        assert fake.owned == ["s1"]
        assert rig.directory.get("s2").owner is None
        # A refusal of one is no reason to leave the others.
        front.relays.sessions = set  # type: ignore[method-assign,assignment]
        await fake.crash()
        assert await sweep_once(front) == 0

    run(test, replace(CONFIG, session=replace(CONFIG.session, sweep_s=60.0)))
