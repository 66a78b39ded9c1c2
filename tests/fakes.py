"""Stand-ins that tests hand to the code: time that moves only when told."""

from __future__ import annotations

import threading


class FakeClock:
    """A clock that stands still until `advance` moves it."""

    def __init__(self, wall: float = 1_700_000_000.0, monotonic: float = 1_000.0) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._lock = threading.Lock()

    def wall(self) -> float:
        with self._lock:
            return self._wall

    def monotonic(self) -> float:
        with self._lock:
            return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass on both readings."""
        with self._lock:
            self._wall += seconds
            self._monotonic += seconds
