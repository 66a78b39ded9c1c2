"""Where a viewer stands: the latest segments of a stream, and one viewer's cursor in them.

A viewer takes segments by index from the ring; one that asked for an older index catches up
through a pull of its own until the ring has what it wants.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from echo_ray import wire
from echo_ray.errors import EchoError, MessageError, SessionClosed, SessionNotFound, ViewerTooSlow
from echo_ray.serve.ownership import Owner
from echo_ray.serve.telemetry import log
from echo_ray.serve.upstream import Upstream, WireSegment

CATCH_UP_AHEAD = 4
OUTBOX_MESSAGES = 1000

Ending = EchoError | wire.Done


class Ring:
    """The latest segments of a stream, without gaps."""

    def __init__(self, start: int, size: int) -> None:
        self.first = start
        self._size = size
        self._kept: deque[WireSegment] = deque()

    @property
    def next(self) -> int:
        return self.first + len(self._kept)

    def get(self, index: int) -> WireSegment | None:
        inside = self.first <= index < self.next
        return self._kept[index - self.first] if inside else None

    def append(self, segment: WireSegment) -> None:
        """Add segment `next`; the oldest falls out when there are too many."""
        if segment.index != self.next:
            raise ValueError(f"segment {segment.index} does not follow {self.next - 1}")
        self._kept.append(segment)
        while len(self._kept) > self._size:
            self._kept.popleft()
            self.first += 1


class Source(Protocol):
    """What a viewer reads from."""

    @property
    def ring(self) -> Ring: ...

    def moved(self) -> None: ...


class Viewer:
    """One reader: where it stands in the stream, and what it is to be told in between."""

    def __init__(self, start: int, transport: str = "websocket") -> None:
        self.cursor = start
        self.transport = transport
        self.acked: int | None = None
        self.caught_up = False
        self.relay: Source | None = None
        self.over = asyncio.Event()
        self._ending: Ending | None = None
        self._outbox: deque[str] = deque()
        self._backlog: deque[WireSegment] = deque()
        self._bell = asyncio.Event()
        self._room = asyncio.Event()
        self._catching: asyncio.Task[None] | None = None

    @property
    def position(self) -> int:
        """The first chunk that the viewer has not consumed, as far as one can know."""
        return self.cursor if self.acked is None else min(self.cursor, self.acked + 1)

    def tell(self, message: wire.Message) -> None:
        """Queue a message, to be sent between two segments."""
        if len(self._outbox) >= OUTBOX_MESSAGES:
            self.end(ViewerTooSlow(f"{OUTBOX_MESSAGES} messages wait unread; read faster"))
            return
        self._outbox.append(wire.encode(message))
        self._bell.set()

    def end(self, ending: Ending) -> None:
        """Nothing but this comes after what is queued already."""
        if self._ending is None:
            self._ending = ending
            self.over.set()
            self._bell.set()

    def ring_bell(self) -> None:
        self._bell.set()

    async def next_item(self) -> str | WireSegment | EchoError | wire.Done:
        """What to send next: a message, a segment (in order, each once), or the end."""
        while True:
            if self._outbox:
                return self._outbox.popleft()
            if self._ending is not None:
                return self._ending
            segment = self._take()
            if segment is not None:
                return segment
            self._bell.clear()
            await self._bell.wait()

    def sent(self, segment: WireSegment) -> None:
        """The segment is on its way: the next one is wanted."""
        self.cursor = segment.index + 1
        if self.relay is not None:
            self.relay.moved()

    def acknowledge(self, index: int) -> None:
        """The viewer says that it has consumed this chunk. Raises `MessageError` if not sent."""
        if index >= self.cursor:
            raise MessageError(
                f"session.ack: chunk {index} has not been sent; the next one is {self.cursor}",
                param="chunk_index",
            )
        self.acked = index if self.acked is None else max(index, self.acked)
        if self.relay is not None:
            self.relay.moved()

    def stop_catching_up(self) -> None:
        if self._catching is not None:
            self._catching.cancel()
            self._catching = None
        self._backlog.clear()

    def catch_up(self, pull: Callable[[CatchUp], Upstream]) -> None:
        """Fetch what the ring has no longer, through a pull of this viewer's own."""
        upstream = pull(CatchUp(self))

        async def fetch() -> None:
            self.end(ending_of(await ran(upstream)))

        self._catching = asyncio.create_task(fetch())

    async def take_in(self, segment: WireSegment) -> None:
        """Hold a caught-up segment, waiting while the viewer is not keeping pace."""
        while len(self._backlog) >= CATCH_UP_AHEAD:
            self._room.clear()
            await self._room.wait()
        self._backlog.append(segment)
        self._bell.set()

    def backlog_end(self) -> int:
        return self.cursor if not self._backlog else self._backlog[-1].index + 1

    def _take(self) -> WireSegment | None:
        if self.relay is None:
            return None
        segment = self.relay.ring.get(self.cursor)
        if segment is not None or self.cursor >= self.relay.ring.first:
            self.caught_up = True
            self.stop_catching_up()
            return segment
        while self._backlog:
            segment = self._backlog.popleft()
            self._room.set()
            if segment.index == self.cursor:
                return segment
        return None


class CatchUp:
    """The sink of a viewer's own pull; it asks for nothing to be generated."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self._next = viewer.cursor

    def next_index(self) -> int:
        return self._next

    def wanted_until(self) -> int | None:
        return None

    def waking(self) -> bool:
        return True

    def connected(self, owner: Owner) -> None:
        pass

    def paused(self) -> None:
        pass

    async def deliver(self, segment: WireSegment) -> None:
        await self._viewer.take_in(segment)
        self._next = segment.index + 1

    def handed_over(self, owner: Owner) -> None:
        pass

    def trouble(self, error: EchoError) -> None:
        self._viewer.tell(wire.error_message(error))


async def ran(upstream: Upstream) -> EchoError:
    """Run a pull; a fault of ours ends its viewers with an error instead of in silence."""
    try:
        return await upstream.run()
    except Exception as e:
        log(logging.ERROR, "upstream_failed", failure=e, session=upstream.session_id)
        return EchoError(f"session {upstream.session_id}: the router failed: {e!r}; connect again")


def ending_of(error: EchoError) -> Ending:
    """How the end of a session looks to its viewers: an end, not an error."""
    if isinstance(error, SessionClosed):
        return wire.Done(reason="closed")
    if isinstance(error, SessionNotFound):
        return wire.Done(reason="deleted")
    return error
