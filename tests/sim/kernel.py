"""A world in one thread: virtual time, hosts that crash, stop and wake, and what runs on them.

Everything that happens is an act in one queue, ordered by time and then by when it was asked for,
so a seed gives the same world again. Processes are generators on a host that yield what they wait
for. A crashed host's processes are gone, a stopped host's go on when it wakes, late and unaware.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Protocol

Act = Callable[[], Any]
Process = Generator["Awaited", Any, Any]
"""Yields what it waits for, and is sent what came of it; an exception is raised in it."""


class World:
    """Time, chance and the queue of what is going to happen."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.acts = 0
        self._log: list[tuple[float, str, tuple[Any, ...]]] = []
        self._queue: list[tuple[float, int, Act]] = []
        self._soon: deque[Act] = deque()
        self._asked = 0

    def after(self, delay_s: float, act: Act) -> None:
        """Let `act` happen `delay_s` from now."""
        self._asked += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._asked, act))

    def soon(self, act: Act) -> None:
        """Let `act` happen now, after what is happening."""
        self._soon.append(act)

    def run(self, until_s: float) -> None:
        """Everything that happens before `until_s`."""
        queue, soon = self._queue, self._soon
        while True:
            while soon:
                self.acts += 1
                soon.popleft()()
            if not queue or queue[0][0] > until_s:
                self.now_s = until_s
                return
            self.acts += 1
            self.now_s, _, act = heapq.heappop(queue)
            act()

    def note(self, text: str, *what: Any) -> None:
        """One line of the log that a failing seed prints; `what` fills the text's braces."""
        self._log.append((self.now_s, text, what))

    @property
    def log(self) -> list[str]:
        return [f"{at_s:10.4f}  {text.format(*what)}" for at_s, text, what in self._log]


class Host:
    """A machine or a process: its clocks, its processes, and whether it runs."""

    def __init__(self, world: World, name: str, *, skew_s: float = 0.0, rate: float = 1.0) -> None:
        self.world = world
        self.name = name
        self.up = True
        self.silent = False
        """Whether it went down with its machine, so that nobody is told."""
        self.stopped = False
        self.life = 0
        """Raised by every crash; what an earlier life waited for does not come any more."""
        self.slow = 1.0
        """How many times longer work takes here than it should."""
        self.lag_s = 0.0
        """What every message from or to here takes longer."""
        self.skew_s = skew_s
        self._rate = rate
        self._offset_s = world.rng.uniform(0, 1000)
        self.missed: list[Act] = []
        self._partings: list[Act] = []

    def monotonic(self) -> float:
        return self.world.now_s * self._rate + self._offset_s

    def wall(self) -> float:
        return 1_700_000_000.0 + self.world.now_s + self.skew_s

    def run(self, process: Process) -> None:
        """Begin a process."""
        self.world.soon(Waiting(self, process))

    def later(self, delay_s: float, act: Act) -> None:
        """Let `act` happen after `delay_s` of the own clock."""
        self.world.after(delay_s / self._rate, act)

    def do(self, life: int, act: Act) -> None:
        """Do something that this life waited for: now, on waking, or never."""
        if life != self.life or not self.up:
            return
        if self.stopped:
            self.missed.append(partial(self.do, life, act))
        else:
            act()

    def parting(self, act: Act) -> None:
        """Let `act` happen if the process dies and its machine lives on to tell of it."""
        self._partings.append(act)

    def crash(self, *, silent: bool = False) -> None:
        """Everything on the host is gone; `silent`: with the machine, so that nobody is told."""
        self.up, self.stopped, self.missed, self.silent = False, False, [], silent
        self.life += 1
        self.slow, self.lag_s = 1.0, 0.0
        self.world.note("{} {}", self.name, "vanishes" if silent else "crashes")
        partings, self._partings = self._partings, []
        if not silent:
            for act in partings:
                act()

    def start(self) -> None:
        """The host is there again, empty."""
        self.up = True
        self.world.note("{} starts", self.name)

    def stop(self, seconds: float) -> None:
        """The host stands still; what it waits for comes when it wakes."""
        if not self.up or self.stopped:
            return
        self.stopped = True
        self.world.note("{} is stopped for {:.2f} s", self.name, seconds)
        self.world.after(seconds, partial(self.wake, self.life))

    def wake(self, life: int) -> None:
        """Go on, if it is this life that was stopped and it still stands."""
        if life != self.life or not self.stopped:
            return
        self.world.note("{} wakes up", self.name)
        self.stopped, missed = False, self.missed
        self.missed = []
        for act in missed:
            act()


class Waiting:
    """One process that waits: the first call lets it go on with an outcome, later ones do nothing.

    It goes on where it waited: not in another life of the host, and not while that stands still.
    """

    __slots__ = ("_host", "_life", "_process", "done")

    def __init__(self, host: Host, process: Process) -> None:
        self._host = host
        self._life = host.life
        self._process = process
        self.done = False

    def __call__(self, outcome: Any = None) -> None:
        if self.done:
            return
        host = self._host
        if host.life != self._life:
            self.done = True
        elif host.stopped:
            host.missed.append(partial(self, outcome))
        else:
            self.done = True
            process = self._process
            try:
                if isinstance(outcome, Exception):
                    awaited = process.throw(outcome)
                else:
                    awaited = process.send(outcome)
            except StopIteration:
                return
            awaited.begin(host, Waiting(host, process))


class Awaited(Protocol):
    """What a process waits for."""

    def begin(self, host: Host, waiting: Waiting) -> None:
        """Call `waiting` with the outcome."""


class Sleep:
    """Time of the own clock."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = max(0.0, seconds)

    def begin(self, host: Host, waiting: Waiting) -> None:
        host.later(self._seconds, waiting)


class Bell:
    """Something that processes of one host wait for together."""

    __slots__ = ("_waiting", "_world")

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: list[Waiting] = []

    def ring(self) -> None:
        """Wake all who wait."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for one in waiting:
                self._world.soon(one)

    def add(self, waiting: Waiting) -> None:
        """Wake this one too, next time."""
        if len(self._waiting) > 8:
            self._waiting = [w for w in self._waiting if not w.done]
        self._waiting.append(waiting)


class Rung:
    """One of the bells, or time, whichever is first."""

    __slots__ = ("_at_most_s", "_bells")

    def __init__(self, at_most_s: float, *bells: Bell) -> None:
        # Less than a millisecond might be no time at all beside the rounding of the clock.
        self._at_most_s, self._bells = max(0.001, at_most_s), bells

    def begin(self, host: Host, waiting: Waiting) -> None:
        for bell in self._bells:
            bell.add(waiting)
        host.later(self._at_most_s, waiting)
