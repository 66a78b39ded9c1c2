"""A chunk or a state in the making: its slices one by one, and what each stage of a chunk took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, TypeVar

from echo_ray.engine.lanes import HostLanes, Lanes, Span
from echo_ray.engine.slices import Slices
from echo_ray.errors import EngineError
from echo_ray.session.chunk import Chunk

T = TypeVar("T")


class Stages:
    """Seconds by stage. Only what a stage does itself counts, not what comes between its slices."""

    def __init__(self, lanes: Lanes, spans: list[tuple[str, Span]]) -> None:
        """`spans`: those of the chunks before that were not over when they were told."""
        self._lanes = lanes
        self._host = HostLanes()
        self._spans = spans

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time what is launched inside on its device."""
        with self._lanes.span() as span:
            yield
        self._spans.append((name, span))

    @contextmanager
    def on_host(self, name: str) -> Iterator[None]:
        """Time what the host does itself, or waits for."""
        with self._host.span() as span:
            yield
        self._spans.append((name, span))

    def each(self, name: str, slices: Slices[T]) -> Slices[T]:
        """The same slices, each of them timed."""
        while True:
            with self.timed(name):
                try:
                    next(slices)
                except StopIteration as end:
                    made: T = end.value
                    break
            yield
        return made

    def told(self) -> dict[str, float]:
        """Seconds by stage of everything that is over; the rest is told next time."""
        seconds: dict[str, float] = {}
        running: list[tuple[str, Span]] = []
        for name, span in self._spans:
            took_s = span.seconds()
            if took_s is None:
                running.append((name, span))
            else:
                seconds[name] = seconds.get(name, 0.0) + took_s
        self._spans[:] = running
        return seconds


class InSlices(Generic[T]):
    """Implements `Step` and `Loading` of `echo_ray.session.engine_port`."""

    def __init__(
        self, slices: Slices[T], running: Callable[[], AbstractContextManager[None]], what: str
    ) -> None:
        """`running`: what has to hold while a slice runs. `what`: names the work in errors."""
        self._slices = slices
        self._running = running
        self._what = what
        self._over = False

    def advance(self) -> T | None:
        if self._over:
            raise EngineError(f"{self._what} is over; begin the next one")
        self._over = True
        try:
            with self._running():
                return self._next()
        except RuntimeError as e:
            raise EngineError(f"{self._what} failed: {e}") from e

    def finish(self) -> T:
        """All slices that are left in one go."""
        while (made := self.advance()) is None:
            pass
        return made

    def close(self) -> None:
        self._over = True
        self._slices.close()

    def _next(self) -> T | None:
        try:
            next(self._slices)
        except StopIteration as end:
            made: T = end.value
            return made
        self._over = False
        return None


EngineStep = InSlices[Chunk]
