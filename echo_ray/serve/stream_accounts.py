"""What a router sees of one stream: stalls, handovers, and how soon events become pictures.

The playout clock is a viewer's that plays every segment as soon as it may: it starts with the first
segment and waits for a late one. A segment that nobody had asked for in time is not late.
"""

from __future__ import annotations

from echo_ray.clock import Clock
from echo_ray.serve.telemetry import Telemetry
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.pacing import Playout
from echo_ray.session.records import Pace

EVENTS_AWAITED = 64


class StreamAccounts:
    """The measurements of one relay."""

    def __init__(self, shape: StreamShape, pace: Pace, clock: Clock, telemetry: Telemetry) -> None:
        self._shape = shape
        self._realtime = pace is Pace.REALTIME
        self._clock = clock
        self._telemetry = telemetry
        self._playout: Playout | None = None
        self._asked_s: dict[int, float] = {}
        self._asked_until = 0
        self._acknowledged_s: dict[int, float] = {}

    def asked(self, next_index: int, until: int | None) -> None:
        """Segments below `until` may be made; those from `next_index` on have not come yet."""
        if until is None:
            return
        now_s = self._clock.monotonic()
        for index in range(max(next_index, self._asked_until), until):
            self._asked_s[index] = now_s
        self._asked_until = max(self._asked_until, until)

    def paused(self) -> None:
        """Nothing comes for a while, on purpose: playout begins anew after it."""
        self._playout = None

    def acknowledged(self, chunk: int) -> None:
        """An event that takes effect at `chunk` was just acknowledged."""
        if len(self._acknowledged_s) < EVENTS_AWAITED:
            self._acknowledged_s.setdefault(chunk, self._clock.monotonic())

    def delivered(self, index: int) -> None:
        """Segment `index` has come."""
        now_s = self._clock.monotonic()
        since_s = self._acknowledged_s.pop(index, None)
        if since_s is not None:
            self._telemetry.observe("event_to_frame_seconds", now_s - since_s)
        asked_s = self._asked_s.pop(index, now_s)
        if self._realtime:
            self._played(self._shape.start_s(index), asked_s, now_s)

    def _played(self, start_s: float, asked_s: float, now_s: float) -> None:
        if self._playout is None:
            self._playout = Playout.begins(now_s, start_s)
            return
        due_s = self._playout.due_s(start_s)
        if now_s > due_s and asked_s < due_s:
            self._telemetry.count("viewer_stalls")
            self._telemetry.count("viewer_stall_seconds", now_s - due_s)
        self._playout = self._playout.after_publishing(now_s, start_s)
