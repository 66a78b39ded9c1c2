"""Time as an argument: whoever needs it takes a `Clock`, and tests hand in their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings of time, in seconds."""

    def wall(self) -> float:
        """Seconds since the epoch: comparable between processes, may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds since some start: never jumps, means nothing to another process."""
        ...


class SystemClock:
    """The clock of this machine."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
