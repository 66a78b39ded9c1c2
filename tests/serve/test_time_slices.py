"""What happens between two slices of a chunk on a running replica: counted, never timed."""

import asyncio
import threading
from contextlib import suppress
from functools import partial

import pytest
from fakes import FakeEngine, FakeLoading, FakeStep, undisturbed
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


class HeldLoading(FakeLoading):
    def advance(self):
        engine = self._engine
        engine.load_waiting.set()
        assert engine.load_permits.acquire(timeout=60)
        if engine.broken_loads:
            engine.broken_loads -= 1
            self.close()
            raise EngineError("this slice fails, as it was told to")
        return super().advance()


class SlowToLoad(FakeEngine):
    """Slices of opening and loading happen one for each permit."""

    def __init__(self, **options):
        super().__init__(**options)
        self.load_permits = threading.Semaphore(0)
        self.load_waiting = threading.Event()
        self.broken_loads = 0

    def begin_open(self, prompt, seed, first_frames=b""):
        return HeldLoading(self, lambda: self.open(prompt, seed, first_frames))

    def begin_load(self, snapshot):
        return HeldLoading(self, lambda: self.load(snapshot))

    def hold_at(self, slices):
        """Let so many slices happen, and wait until the next one is tried."""
        for _ in range(slices):
            assert self.load_waiting.wait(30)
            self.load_waiting.clear()
            self.load_permits.release()
        assert self.load_waiting.wait(30)


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


@pytest.fixture
def slow():
    engine = SlowToLoad()
    yield engine
    engine.load_permits.release(10**6)


def test_a_session_that_plays_goes_on_between_the_slices_of_a_load(slow):
    slow.load_permits.release(slow.load_slices)
    with Replicas(lease_ttl_s=30.0) as bench:
        one = bench.start("r1", slow)
        bench.session("s1", prompt="a blue square", seed=3, pace=Pace.REALTIME)
        epoch = bench.claim(one)
        viewer, _ = watching(one, epoch, 1)
        viewer.join(30)
        slow.load_slices = 1500
        slow.load_waiting.clear()
        bench.session("s2", prompt="a green star", seed=4)
        late, came = watching(one, bench.claim(one, "s2"), 1, session_id="s2")
        assert slow.load_waiting.wait(30)
        viewer, seen = watching(one, epoch, 6)
        while viewer.is_alive():
            slow.load_permits.release()
            viewer.join(0.05)
        assert digests(seen) == undisturbed(FakeEngine(), "a blue square", 3, 6, {})
        assert len(slow.arriving) == 1, "the load is still in hand"
        slow.load_permits.release(10**6)
        late.join(60)
        assert digests(came) == undisturbed(FakeEngine(), "a green star", 4, 1, {})


@pytest.mark.parametrize("how", ["lease", "close", "stop"])
def test_a_load_whose_session_ends_here_is_left_and_given_back(slow, how):
    with Replicas() as bench:
        one, two = bench.start("r1", slow), bench.start("r2")
        bench.session()
        watching(one, bench.claim(one), 1)
        slow.hold_at(1)
        runner = next(r for r in one.host.runners())
        if how == "lease":
            bench.claim(two)
            assert eventually(lambda: runner.ended is not None)
        else:
            state = SessionState.CLOSED if how == "close" else SessionState.LIVE
            runner.apply(partial(owner_events.retired, state=state, going_away=how == "stop"))
        slow.load_permits.release()
        assert eventually(lambda: runner.ended is not None)
        assert eventually(lambda: slow.arriving == [])
        assert slow.opened_with == [], "no slice more was done than the one in hand"
        assert slow.held == []


def test_a_slice_of_a_load_that_fails_begins_the_load_again(slow):
    with Replicas() as bench:
        one = bench.start("r1", slow)
        bench.session()
        viewer, seen = watching(one, bench.claim(one), 3)
        slow.hold_at(1)
        slow.broken_loads = 1
        slow.load_permits.release(100)
        viewer.join(30)
        assert digests(seen) == truth(3)
        assert slow.arriving == []
        assert one.telemetry.value("echo_ray_engine_failures_total") == 1


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
