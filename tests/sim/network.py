"""Links between hosts: single messages, calls and connections, and what may become of them.

A single message, also a request or an answer of a call, takes its time, comes late, comes twice or
not at all. A connection keeps its order, and once one item is lost nothing more gets through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sim.kernel import Act, Bell, Host, Process, Waiting, World

GONE_S = 5.0
"""A connection's other end that cannot be reached is given up after this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weather:
    """What becomes of single messages."""

    slow: float = 0.01
    """Share that takes up to a hundred times as long."""
    late: float = 0.0
    """Share that takes up to two seconds: after everybody has given up."""
    lost: float = 0.0
    twice: float = 0.0


class Network:
    """All links of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.weather = Weather()
        self._cut: dict[frozenset[str], float] = {}

    def cut(self, one: Host, other: Host, seconds: float) -> None:
        """Nothing gets through between two hosts for a while."""
        link = frozenset((one.name, other.name))
        self._cut[link] = max(self._cut.get(link, 0.0), self.world.now_s + seconds)
        self.world.note("{} and {} are cut off for {:.2f} s", one.name, other.name, seconds)

    def mend(self) -> None:
        """No link is cut, and the weather is fine."""
        self._cut.clear()
        self.weather = Weather()

    def open(self, one: Host, other: Host) -> bool:
        """Whether messages get through now."""
        if not self._cut:
            return True
        return self._cut.get(frozenset((one.name, other.name)), 0.0) <= self.world.now_s

    def delay(self, source: Host, target: Host) -> float:
        """How long one message takes, in seconds."""
        random = self.world.rng.random
        seconds = 0.0002 + 0.002 * random() + source.lag_s + target.lag_s
        return seconds * 100 * random() if random() < self.weather.slow else seconds

    def send(self, source: Host, target: Host, act: Act) -> None:
        """Let `act` happen on the target, if the message arrives in the life it was sent to."""
        world, weather = self.world, self.weather
        arrive = partial(self._arrive, source, target, target.life, act)
        delay_s = self.delay(source, target)
        if weather.lost or weather.twice or weather.late:
            chance = world.rng.random()
            if chance < weather.lost:
                return
            chance -= weather.lost
            if chance < weather.twice:
                world.after(delay_s + world.rng.uniform(0, 1), arrive)
            elif chance - weather.twice < weather.late:
                delay_s += world.rng.uniform(0, 2)
        world.after(delay_s, arrive)

    def connect(self, source: Host, target: Host, act: Act, refused: Act) -> None:
        """Let `act` happen on the target, or `refused` where its machine says that it is down."""

        def arrive() -> None:
            if not self.open(source, target):
                return
            if target.up:
                target.do(target.life, act)
            elif not target.silent:
                refused()

        self.world.after(self.delay(source, target), arrive)

    def _arrive(self, source: Host, target: Host, life: int, act: Act) -> None:
        if self.open(source, target):
            target.do(life, act)


def _give_up(waiting: Waiting, lost: Callable[[], Exception]) -> None:
    if not waiting.done:
        waiting(lost())


class Call:
    """A request to another host and its answer; `lost` is raised where none comes in time."""

    __slots__ = ("_lost", "_network", "_target", "_timeout_s", "_work")

    def __init__(
        self,
        network: Network,
        target: Host,
        work: Callable[[], Any],
        *,
        timeout_s: float,
        lost: Callable[[], Exception],
    ) -> None:
        self._network, self._target, self._work = network, target, work
        self._timeout_s, self._lost = timeout_s, lost

    def begin(self, host: Host, waiting: Waiting) -> None:
        self._network.send(host, self._target, partial(self._serve, host, waiting))
        host.later(self._timeout_s, partial(_give_up, waiting, self._lost))

    def _serve(self, host: Host, waiting: Waiting) -> None:
        try:
            outcome = self._work()
        except Exception as error:
            outcome = error
        self._network.send(self._target, host, partial(waiting, outcome))


class Ask:
    """As `Call`, for work that itself waits: a process on the other host."""

    def __init__(
        self,
        network: Network,
        target: Host,
        work: Callable[[], Process],
        *,
        timeout_s: float,
        lost: Callable[[], Exception],
    ) -> None:
        self._network, self._target, self._work = network, target, work
        self._timeout_s, self._lost = timeout_s, lost

    def begin(self, host: Host, waiting: Waiting) -> None:
        served = partial(self._serve, host, waiting)
        self._network.send(host, self._target, lambda: self._target.run(served()))
        host.later(self._timeout_s, partial(_give_up, waiting, self._lost))

    def _serve(self, host: Host, waiting: Waiting) -> Process:
        try:
            outcome = yield from self._work()
        except Exception as error:
            outcome = error
        self._network.send(self._target, host, partial(waiting, outcome))


class Pipe:
    """One direction of a connection: items arrive in their order, or, once one is lost, never.

    `closing` is what arrives when the source's process dies.
    """

    def __init__(self, network: Network, source: Host, target: Host, closing: Any) -> None:
        self.items: deque[Any] = deque()
        self.bell = Bell(network.world)
        self._network, self._source, self._target = network, source, target
        self._life = target.life
        self._last_s = 0.0
        self._seen_s = network.world.now_s
        self._broken = False
        self._closed = False
        source.parting(lambda: self.send(closing))

    def send(self, item: Any) -> None:
        """Let `item` arrive after all that was sent before."""
        if self._broken or self._closed:
            return
        network, world = self._network, self._network.world
        at_s = max(self._last_s, world.now_s + network.delay(self._source, self._target))
        self._last_s = at_s
        world.after(at_s - world.now_s, partial(self._arrive, item))

    def close(self) -> None:
        """The target takes no more."""
        self._closed = True

    @property
    def gone(self) -> bool:
        """Whether the source knows that nobody is at the other end: pings go unanswered."""
        target, now_s = self._target, self._network.world.now_s
        here = target.up and target.life == self._life and not self._closed
        reached = self._network.open(self._source, target) and not self._broken
        if here and reached:
            self._seen_s = now_s
            return False
        told = reached and not target.silent and not target.stopped
        return told or now_s - self._seen_s > GONE_S

    def _arrive(self, item: Any) -> None:
        self._broken = self._broken or not self._network.open(self._source, self._target)
        if not self._broken and not self._closed:
            self._target.do(self._life, partial(self._take, item))

    def _take(self, item: Any) -> None:
        self.items.append(item)
        self.bell.ring()
