"""A world in one thread: virtual time, hosts that crash, stop and wake, and links between them.

Everything that happens is an act in one queue, ordered by time and then by when it was asked for,
so a seed gives the same world again. Processes are generators on a host that yield what they wait
for. A crashed host's processes are gone, a stopped host's go on when it wakes, late and unaware.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Generator
from typing import Any, Protocol

Act = Callable[[], None]
Process = Generator["Awaited", Any, None]
"""Yields what it waits for, and is sent what came of it."""


class World:
    """Time, chance and the queue of what is going to happen."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.log: list[str] = []
        self._queue: list[tuple[float, int, Act]] = []
        self._numbers = itertools.count()

    def after(self, delay_s: float, act: Act) -> None:
        """Let `act` happen `delay_s` from now."""
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._numbers), act))

    def step(self, until_s: float) -> bool:
        """The next act, if there is one before `until_s`; whether there was."""
        if not self._queue or self._queue[0][0] > until_s:
            self.now_s = until_s
            return False
        self.now_s, _, act = heapq.heappop(self._queue)
        act()
        return True

    def note(self, text: str) -> None:
        """One line of the log that a failing seed prints."""
        self.log.append(f"{self.now_s:10.4f}  {text}")


class Host:
    """A machine or a process: its clock, its processes, and whether it runs."""

    def __init__(self, world: World, name: str, *, skew_s: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.up = True
        self.life = 0
        """Raised by every crash; what an earlier life waited for does not come any more."""
        self._skew_s = skew_s
        self._offset_s = world.rng.uniform(0, 1000)
        self._stopped = False
        self._missed: list[Act] = []
        self._partings: list[Act] = []

    def monotonic(self) -> float:
        return self.world.now_s + self._offset_s

    def wall(self) -> float:
        return 1_700_000_000.0 + self.world.now_s + self._skew_s

    def run(self, process: Process) -> None:
        """Begin a process."""
        self.later(0.0, lambda: _advance(self, process, None))

    def later(self, delay_s: float, act: Act) -> None:
        """Let `act` happen on this host, in this life of it, and only while it runs."""
        life = self.life
        self.world.after(delay_s, lambda: self.do(life, act))

    def do(self, life: int, act: Act) -> None:
        """Do something that this life waited for: now, on waking, or never."""
        if life != self.life or not self.up:
            return
        if self._stopped:
            self._missed.append(lambda: self.do(life, act))
        else:
            act()

    def parting(self, act: Act) -> None:
        """Let `act` happen if the process dies and its machine lives on to tell of it."""
        self._partings.append(act)

    def crash(self, *, silent: bool = False) -> None:
        """Everything on the host is gone; `silent`: with the machine, so that nobody is told."""
        self.up, self._stopped, self._missed = False, False, []
        self.life += 1
        self.world.note(f"{self.name} {'vanishes' if silent else 'crashes'}")
        partings, self._partings = self._partings, []
        if not silent:
            for act in partings:
                act()

    def start(self) -> None:
        """The host is there again, empty."""
        self.up = True
        self.world.note(f"{self.name} starts")

    def stop(self, seconds: float) -> None:
        """The host stands still; what it waits for comes when it wakes."""
        if not self.up or self._stopped:
            return
        self._stopped = True
        life = self.life
        self.world.note(f"{self.name} is stopped for {seconds:.2f} s")
        self.world.after(seconds, lambda: self._wake(life))

    def _wake(self, life: int) -> None:
        if life != self.life or not self._stopped:
            return
        self.world.note(f"{self.name} wakes up")
        self._stopped, missed = False, self._missed
        self._missed = []
        for act in missed:
            act()


class Awaited(Protocol):
    """What a process waits for."""

    def begin(self, host: Host, resume: Callable[[Any], None]) -> None:
        """Call `resume` on the host once, with the outcome; an exception is raised in it."""


class Sleep:
    """Time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def begin(self, host: Host, resume: Callable[[Any], None]) -> None:
        host.later(max(0.0, self._seconds), lambda: resume(None))


class Bell:
    """Something that processes of one host wait for together."""

    def __init__(self) -> None:
        self._waiting: list[Act] = []

    def ring(self) -> None:
        """Wake all who wait."""
        waiting, self._waiting = self._waiting, []
        for act in waiting:
            act()

    def add(self, act: Act) -> None:
        self._waiting.append(act)


class Rung:
    """A bell, or time, whichever is first."""

    def __init__(self, bell: Bell, at_most_s: float) -> None:
        self._bell, self._at_most_s = bell, at_most_s

    def begin(self, host: Host, resume: Callable[[Any], None]) -> None:
        once = _once(resume)
        self._bell.add(lambda: host.later(0.0, lambda: once(None)))
        host.later(self._at_most_s, lambda: once(None))


def _once(resume: Callable[[Any], None]) -> Callable[[Any], None]:
    done = False

    def call(outcome: Any) -> None:
        nonlocal done
        if not done:
            done = True
            resume(outcome)

    return call


def _advance(host: Host, process: Process, outcome: Any) -> None:
    try:
        if isinstance(outcome, Exception):
            awaited = process.throw(outcome)
        else:
            awaited = process.send(outcome)
    except StopIteration:
        return
    awaited.begin(host, lambda result: _advance(host, process, result))


class Network:
    """Links between hosts: each message takes its time, or does not arrive."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cut: dict[frozenset[str], float] = {}
        self.delay_s = (0.0002, 0.002)
        self.slow_share = 0.01
        """Share of messages that take up to a hundred times as long."""

    def cut(self, one: Host, other: Host, seconds: float) -> None:
        """Nothing gets through between two hosts for a while."""
        link = frozenset((one.name, other.name))
        self._cut[link] = max(self._cut.get(link, 0.0), self._world.now_s + seconds)
        self._world.note(f"{one.name} and {other.name} are cut off for {seconds:.2f} s")

    def open(self, one: Host, other: Host) -> bool:
        """Whether messages get through now."""
        link = frozenset((one.name, other.name))
        return self._cut.get(link, 0.0) <= self._world.now_s

    def delay(self) -> float:
        """How long one message takes, in seconds."""
        rng = self._world.rng
        seconds = rng.uniform(*self.delay_s)
        return seconds * rng.uniform(1, 100) if rng.random() < self.slow_share else seconds

    def send(self, source: Host, target: Host, act: Act) -> None:
        """Let `act` happen on the target, if the message arrives in the life it was sent to."""
        life = target.life

        def arrive() -> None:
            if self.open(source, target):
                target.do(life, act)

        self._world.after(self.delay(), arrive)


class Call:
    """A request to another host and its answer; `lost` is raised where none comes in time."""

    def __init__(
        self,
        network: Network,
        target: Host,
        work: Callable[[], Any],
        *,
        timeout_s: float,
        lost: Exception,
    ) -> None:
        self._network, self._target, self._work = network, target, work
        self._timeout_s, self._lost = timeout_s, lost

    def begin(self, host: Host, resume: Callable[[Any], None]) -> None:
        once = _once(resume)

        def serve() -> None:
            try:
                outcome = self._work()
            except Exception as error:
                outcome = error
            self._network.send(self._target, host, lambda: once(outcome))

        self._network.send(host, self._target, serve)
        host.later(self._timeout_s, lambda: once(self._lost))


class Pipe:
    """One direction of a connection: items arrive in their order, or, once one is lost, never.

    `closing` is what arrives when the source's process dies.
    """

    def __init__(self, network: Network, source: Host, target: Host, closing: Any) -> None:
        self.items: list[Any] = []
        self.bell = Bell()
        self._network, self._source, self._target = network, source, target
        self._life = target.life
        self._last_s = 0.0
        self._broken = False
        source.parting(lambda: self.send(closing))

    def send(self, item: Any) -> None:
        """Let `item` arrive after all that was sent before."""
        world, network = self._source.world, self._network
        at_s = max(self._last_s, world.now_s + network.delay())
        self._last_s = at_s
        world.after(at_s - world.now_s, lambda: self._arrive(item))

    def _arrive(self, item: Any) -> None:
        self._broken = self._broken or not self._network.open(self._source, self._target)
        if not self._broken:
            self._target.do(self._life, lambda: self._take(item))

    def _take(self, item: Any) -> None:
        self.items.append(item)
        self.bell.ring()
