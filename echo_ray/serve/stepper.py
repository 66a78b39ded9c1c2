"""The one thread that touches the engine: builds it, and works on one session after the other.

A piece of work is a slice of a step at most, so a session that comes waits for one slice of the
others and not for a whole chunk. Whose is next is decided in `session/pacing.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from echo_ray.clock import Clock
from echo_ray.errors import EngineError
from echo_ray.serve.telemetry import log
from echo_ray.session.engine_port import Engine
from echo_ray.session.pacing import Turn, choose

LONGEST_WAIT_S = 0.5
"""Upper bound of a wait, so that a missed wake-up costs half a second and no more."""
WARM_UP_PROMPT = "a red circle"


class Work(Protocol):
    """Something that takes turns on the engine thread."""

    def turn(self) -> Turn | None: ...

    def work(self) -> None: ...

    def forget(self) -> None:
        """Let go of everything that the engine made; called last, and on its thread."""
        ...


class Stepper:
    """The engine thread. `sessions` names who takes part, `changed` tells that this may differ."""

    def __init__(
        self,
        build: Callable[[], Engine],
        *,
        clock: Clock,
        changed: threading.Condition,
        warm_up_chunks: int = 0,
    ) -> None:
        self.warm_up_seconds = 0.0
        """Seconds of the quickest warm-up chunk: a first measurement of the device."""
        self._build = build
        self._clock = clock
        self._changed = changed
        self._warm_up_chunks = warm_up_chunks
        self._sessions: Callable[[], Iterable[Work]] = lambda: ()
        self._over: list[Work] = []
        self._engine: Engine | None = None
        self._failure: BaseException | None = None
        self._busy_since_s: float | None = None
        self._built = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Engine:
        """Build the engine on its thread and return it. Raises what building it raised."""
        self._thread.start()
        self._built.wait()
        if self._engine is None:
            raise self._failure or EngineError("the engine was not built")
        return self._engine

    def serve(self, sessions: Callable[[], Iterable[Work]]) -> None:
        """From now on work on these."""
        with self._changed:
            self._sessions = sessions
            self._changed.notify_all()

    def let_go(self, works: Iterable[Work]) -> None:
        """These take turns no more: the engine thread has them forget what they hold."""
        with self._changed:
            self._over += works
            self._changed.notify_all()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the work in hand; whether it ended in time.

        Steps that are not over are left where they are: their chunks were not committed, and
        whoever goes on makes them again.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def busy_s(self) -> float:
        """For how long the thread has been at one piece of work."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else self._clock.monotonic() - since_s

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            engine = self._build()
            self._warm_up(engine)
            self._engine = engine
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._built.set()
        try:
            self._loop()
        except BaseException as error:
            self._failure = error
            log(logging.CRITICAL, "engine_thread_died", failure=error)

    def _warm_up(self, engine: Engine) -> None:
        if not self._warm_up_chunks:
            return
        state = engine.open(WARM_UP_PROMPT, 0)
        seconds = []
        for _ in range(self._warm_up_chunks):
            began_s = self._clock.monotonic()
            engine.step(state)
            seconds.append(self._clock.monotonic() - began_s)
        engine.close(state)
        # Whatever else starts on the machine at the same time is not the device's own slowness.
        self.warm_up_seconds = min(seconds)

    def _loop(self) -> None:
        while (work := self._next()) is not None:
            self._busy_since_s = self._clock.monotonic()
            work.work()
            self._busy_since_s = None

    def _next(self) -> Work | None:
        """Wait for the next piece of work; None when stopping."""
        with self._changed:
            while not self._stopping:
                while self._over:
                    self._over.pop().forget()
                now_s = self._clock.monotonic()
                due: dict[str, Work] = {}
                turns: list[Turn] = []
                for session in self._sessions():
                    turn = session.turn()
                    if turn is not None:
                        due[turn.session_id] = session
                        turns.append(turn)
                choice = choose(turns, now_s)
                if choice.session_id is not None:
                    return due[choice.session_id]
                wait_s = LONGEST_WAIT_S if choice.wake_s is None else choice.wake_s - now_s
                self._changed.wait(min(wait_s, LONGEST_WAIT_S))
            return None
