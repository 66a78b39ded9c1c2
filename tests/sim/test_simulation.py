"""Many small worlds full of faults: nobody sees a chunk lost, twice, out of order or torn.

The code under test is `session/` (owners, pulls, moves, leases, placement, the control log) and the
in-memory stores; what executes them here is a virtual clock, network and set of processes. A seed
that fails prints its log and the command that replays it. `make sim` runs very many more.
"""

from __future__ import annotations

import re

import pytest
from sim import account
from sim.account import account_of
from sim.ledger import Breach
from sim.plans import CALM, CROWD, LARGE, LONG, TINY, plan_of
from sim.replica import Replica
from sim.scenario import run

CHUNKS, SEEDS = 20, 100


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_stream_is_lost_or_torn_whatever_happens(chunk: int) -> None:
    small = (s for s in range(chunk * SEEDS, (chunk + 1) * SEEDS) if s % 200 != 199)
    total = account_of(small)
    assert not total.failures, account.failures(total)
    assert total.counts["deliveries"] > 50 * SEEDS
    assert total.counts["moves"] > 10
    assert total.counts["switches"] > 300


@pytest.mark.parametrize("seed", [199, 399])
def test_a_crowd_is_served_too(seed: int) -> None:
    assert run(seed, CROWD).ledger.counts["deliveries"] > 1000


def test_a_seed_is_the_same_world_again() -> None:
    assert run(3, TINY).world.log == run(3, TINY).world.log
    assert run(3, TINY).world.log != run(4, TINY).world.log


def test_every_kind_of_plan_is_drawn() -> None:
    assert {plan_of(seed).name for seed in range(1000)} == {
        plan.name for plan in (TINY, CALM, LONG, CROWD, LARGE)
    }


def test_accounts_add_up_the_same_in_one_process_and_in_two() -> None:
    one, two = account.run_all(0, 60, 1), account.run_all(0, 60, 2)
    assert one == two
    assert one.seeds == 60
    text = account.summary(one, 60.0)
    assert re.search(r"seeds +60 in 1\.0 minutes: tiny 54, calm 5, long 1", text)
    assert "breaches       0" in text


def test_a_seed_that_fails_tells_its_log_and_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Replica, "excess", lambda self: f"{self.id} is too large")
    with pytest.raises(Breach, match="too large"):
        run(7, TINY)
    text = account.failures(account_of(range(7, 12)))
    assert "BREACH r0.0 is too large" in text
    assert "again: make sim SEED=7 STEPS=1" in text
    assert "failed as well: 10, 11" in text
