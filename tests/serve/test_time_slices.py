"""What happens between two slices of a chunk on a running replica: counted, never timed."""

import asyncio
import threading
from contextlib import suppress
from functools import partial

import pytest
from fakes import FakeEngine, FakeStep, undisturbed
from replicas import Replicas, digests, eventually, hello, pull, truth, watch
from websockets.exceptions import ConnectionClosed

from echo_ray.errors import EngineError
from echo_ray.session import owner_events
from echo_ray.session.records import Pace, SessionState

HELD = "a red circle"
"""The prompt of the session whose slices wait for a permit each."""


class HeldStep(FakeStep):
    def advance(self):
        engine = self._engine
        if self._state.name == HELD:
            engine.waiting.set()
            assert engine.permits.acquire(timeout=60)
            if engine.broken_slices:
                engine.broken_slices -= 1
                raise EngineError("this slice fails, as it was told to")
        return super().advance()


class HeldEngine(FakeEngine):
    """Slices of the session of prompt `HELD` happen one for each permit."""

    def __init__(self, slices=4, **options):
        super().__init__(slices=slices, **options)
        self.permits = threading.Semaphore(0)
        self.waiting = threading.Event()
        self.broken_slices = 0

    def begin(self, state, prompts=()):
        super().begin(state, prompts)
        return HeldStep(self, state, prompts)

    def count(self):
        return self.advanced.count(HELD)

    def allow(self, slices):
        self.permits.release(slices)

    def hold_at(self, slices):
        """Let so many slices happen, and wait until the next one is tried."""
        done = self.count() + slices
        self.waiting.clear()
        self.allow(slices)
        assert eventually(lambda: self.count() >= done)
        assert self.waiting.wait(30)


@pytest.fixture
def held():
    engine = HeldEngine()
    yield engine
    # Nothing may wait for a permit when the replicas go.
    engine.allow(10**6)


def watching(generator, epoch, count, **how):
    """A viewer on a thread of its own; ends with the digests that it has seen."""
    seen = []

    async def view():
        async with pull(generator, epoch, want=count, **how) as end:
            await hello(end)
            seen.extend(await end.chunks(count))

    def run():
        # Some are cut off, or told why it is over; what counts is what they have seen.
        with suppress(ConnectionClosed, AssertionError, TimeoutError):
            asyncio.run(view())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, seen


def test_a_late_joiner_does_not_wait_for_another_sessions_chunk(held):
    held.slices = 400
    with Replicas(lease_ttl_s=30.0) as bench:
        one = bench.start("r1", held)
        bench.session("s1", prompt=HELD)
        watching(one, bench.claim(one), 1)
        held.hold_at(2)
        bench.session("s2", prompt="a blue square", seed=3, pace=Pace.REALTIME)
        viewer, seen = watching(one, bench.claim(one, "s2"), 1, session_id="s2")
        # Fetching and loading take place beside slices of the other, each of them permitted here.
        while viewer.is_alive() and held.count() < 399:
            held.allow(1)
            viewer.join(0.05)
        viewer.join(30)
        assert digests(seen) == undisturbed(FakeEngine(), "a blue square", 3, 1, {})
        assert held.count() < 400, "the chunk that was in hand is still in hand"
        assert bench.directory.get("s1").next_index == 0
        held.allow(10**6)


def test_a_lease_that_is_lost_between_two_slices_leaves_the_chunk(held):
    with Replicas() as bench:
        one, two = bench.start("r1", held), bench.start("r2")
        bench.session(prompt=HELD)
        watching(one, bench.claim(one), 1)
        held.hold_at(2)
        runner = next(r for r in one.host.runners())
        epoch = bench.claim(two)
        assert eventually(lambda: runner.ended is not None)
        held.allow(100)
        assert digests(asyncio.run(watch(two, epoch, 0, 6))) == truth(6)
        assert held.stepped == [], "its chunk was never finished"
        assert held.count() <= 3
        assert bench.directory.get("s1").next_index == 6


def test_a_pause_between_two_slices_comes_behind_the_chunk(held):
    with Replicas() as bench:
        one = bench.start("r1", held)
        bench.session(prompt=HELD)
        watching(one, bench.claim(one), 8)
        held.hold_at(4 + 2)
        runner = next(r for r in one.host.runners())
        runner.apply(partial(owner_events.retired, state=SessionState.PAUSED))
        held.allow(100)
        assert eventually(lambda: bench.directory.get("s1").state is SessionState.PAUSED)
        assert bench.directory.get("s1").next_index == 2
        assert held.count() == 8


def test_a_new_lease_between_two_slices_takes_the_chunk_over(held):
    with Replicas() as bench:
        one = bench.start("r1", held)
        bench.session(prompt=HELD)
        watching(one, bench.claim(one), 1)
        held.hold_at(2)
        epoch = bench.claim(one)
        viewer, seen = watching(one, epoch, 3)
        assert eventually(lambda: [r.now.lease.lease.epoch for r in one.host.runners()] == [epoch])
        held.allow(100)
        viewer.join(30)
        assert digests(seen) == truth(3)
        assert held.stepped == [0, 1, 2], "nothing was made twice"


def test_a_switch_between_two_slices_is_of_the_next_chunk(held):
    with Replicas() as bench:
        one = bench.start("r1", held)
        bench.session(prompt=HELD)
        viewer, seen = watching(one, bench.claim(one), 3)
        held.hold_at(2)
        entry = bench.directory.append_control("s1", "e1", "a green star")
        assert entry.chunk == 1
        held.allow(100)
        viewer.join(30)
        assert digests(seen) == truth(3, switches={1: ["a green star"]})


def test_a_slice_that_fails_costs_the_state_and_no_chunk(held):
    with Replicas() as bench:
        one = bench.start("r1", held)
        bench.session(prompt=HELD)
        viewer, seen = watching(one, bench.claim(one), 6)
        held.hold_at(4 * 5 + 1)
        held.broken_slices = 1
        held.allow(100)
        viewer.join(30)
        assert digests(seen) == truth(6)
        assert held.loaded == [4]
        assert one.telemetry.value("echo_ray_engine_failures_total") == 1
