"""Whatever ends a session on a replica, the engine is told: its state is closed, and once only."""

import asyncio
import threading

import pytest
from fakes import FakeEngine
from replicas import Replicas, digests, eventually, truth, watch

from echo_ray.clock import SystemClock
from echo_ray.serve.stepper import Stepper


def none_held(engine):
    return eventually(lambda: not engine.held)


def test_a_session_that_pauses_holds_nothing():
    with Replicas(idle_grace_s=0.1) as bench:
        one = bench.start("r1")
        bench.session()
        asyncio.run(watch(one, bench.claim(one), 0, 3))
        assert none_held(bench.engines["r1"])


def test_a_session_that_another_replica_took_holds_nothing_here():
    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        asyncio.run(watch(one, bench.claim(one), 0, 3))
        assert len(bench.engines["r1"].held) == 1
        found = asyncio.run(watch(two, bench.claim(two), 3, 3))
        assert digests(found) == truth(6)[3:]
        assert none_held(bench.engines["r1"])
        assert eventually(lambda: len(bench.engines["r2"].held) == 1)


def test_a_closed_session_holds_nothing():
    with Replicas() as bench:
        one = bench.start("r1")
        bench.session()
        epoch = bench.claim(one)
        asyncio.run(watch(one, epoch, 0, 3))
        bench.directory.set_state("s1", state="closed")
        assert none_held(bench.engines["r1"])


def test_a_failed_state_is_closed_before_another_is_loaded():
    with Replicas() as bench:
        one = bench.start("r1")
        bench.session()
        bench.engines["r1"].failing = [2]
        assert digests(asyncio.run(watch(one, bench.claim(one), 0, 5))) == truth(5)
        assert len(bench.engines["r1"].held) == 1


def test_a_past_that_nobody_asks_for_any_more_holds_nothing():
    with Replicas() as bench:
        one, two = bench.start("r1"), bench.start("r2")
        bench.session()
        asyncio.run(watch(one, bench.claim(one), 0, 8))
        assert eventually(lambda: 8 in [s.chunk_index for s in bench.directory.snapshots("s1")])
        bench.crash(one)
        epoch = bench.claim(two)
        asyncio.run(watch(two, epoch, 8, 2))
        # What came before the point is made again with a state of its own.
        assert digests(asyncio.run(watch(two, epoch, 5, 5))) == truth(10)[5:]
        engine = bench.engines["r2"]
        assert len(engine.loaded) + len(engine.opened_with) == 2
        # The one that is left is the session's, which is beyond the point.
        assert eventually(lambda: [s.next_index >= 10 for s in engine.held] == [True])


def test_a_warm_up_leaves_nothing_behind():
    engine = FakeEngine()
    stepper = Stepper(
        lambda: engine, clock=SystemClock(), changed=threading.Condition(), warm_up_chunks=2
    )
    stepper.start()
    assert engine.stepped == [0, 1]
    assert engine.held == []
    assert stepper.stop(30)


@pytest.mark.parametrize("works", [1, 3])
def test_what_is_let_go_is_forgotten_on_the_engine_thread(works):
    class Held:
        thread = None

        def turn(self):
            return None

        def work(self):
            raise AssertionError

        def forget(self):
            self.thread = threading.current_thread().name

    stepper = Stepper(FakeEngine, clock=SystemClock(), changed=threading.Condition())
    stepper.start()
    over = [Held() for _ in range(works)]
    stepper.let_go(over)
    assert eventually(lambda: all(work.thread == "engine" for work in over))
    assert stepper.stop(30)
