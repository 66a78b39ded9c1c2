"""Fan-out: one upstream per session and format, any number of viewers, each with its own cursor.

A relay keeps the latest segments in a ring, tells the owner how far to generate, and stays while
anybody watches, whatever becomes of the owner.
"""

from __future__ import annotations

import asyncio
import random
from contextvars import Context

from echo_ray import wire
from echo_ray.clock import Clock
from echo_ray.config import EchoConfig
from echo_ray.errors import CapacityError, EchoError, ViewerTooSlow
from echo_ray.serve.cursor import CatchUp, Ending, Ring, Viewer, ending_of, ran
from echo_ray.serve.ownership import Owner, Owners
from echo_ray.serve.stream_accounts import StreamAccounts
from echo_ray.serve.telemetry import Telemetry
from echo_ray.serve.upstream import Upstream, WireSegment
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.records import Pace, SessionRecord, SessionState

LINGER_S = 1.0
"""An upstream without viewers is kept so long, for the one who reconnects."""


class Relay:
    """One session in one format: the upstream's sink and its viewers."""

    def __init__(
        self,
        record: SessionRecord,
        fmt: str,
        start: int,
        config: EchoConfig,
        accounts: StreamAccounts,
    ) -> None:
        self.session_id = record.id
        self.accounts = accounts
        self.fmt = fmt
        self.ring = Ring(start, config.session.retention_chunks)
        self.viewers: set[Viewer] = set()
        self.upstream: Upstream | None = None
        self.task: asyncio.Task[None] | None = None
        self.linger: asyncio.TimerHandle | None = None
        self._pace = record.pace
        self._lead = config.session.lead_chunks
        self._wake = True
        self._told_epoch = 0

    def next_index(self) -> int:
        return self.ring.next

    def wanted_until(self) -> int | None:
        return wanted_until(self._pace, [v.position for v in self.viewers], self._lead)

    def waking(self) -> bool:
        return self._wake

    def wake(self) -> None:
        """Somebody wants to watch: a pause, if there is one, is over."""
        self._wake = True
        if self.upstream is not None:
            self.upstream.poke()

    def connected(self, owner: Owner) -> None:
        self._wake = False

    def waits(self) -> bool:
        """Whether viewers wait for an owner."""
        return bool(self.viewers) and self.upstream is not None and self.upstream.ownerless

    def paused(self) -> None:
        self.accounts.paused()
        self.tell(wire.Paused())

    async def deliver(self, segment: WireSegment) -> None:
        self.ring.append(segment)
        self.accounts.delivered(segment.index)
        for viewer in tuple(self.viewers):
            if viewer.caught_up and viewer.cursor < self.ring.first:
                viewer.end(
                    ViewerTooSlow(
                        f"chunk {viewer.cursor} is gone, the oldest kept is {self.ring.first} "
                        "(session.retention_chunks); read faster, or take a lighter format",
                        retry_after_s=1.0,
                    )
                )
            viewer.ring_bell()

    def handed_over(self, owner: Owner) -> None:
        # Whoever moved it may be another router, and done before this one has looked.
        self.tell(wire.Migrated(owner=owner.replica_id, epoch=owner.epoch))

    def trouble(self, error: EchoError) -> None:
        self.tell(wire.error_message(error))

    def tell(self, message: wire.Message) -> None:
        """Tell all viewers; of a move once, however many have seen it."""
        if isinstance(message, wire.Migrated):
            if message.epoch <= self._told_epoch:
                return
            self._told_epoch = message.epoch
        for viewer in tuple(self.viewers):
            viewer.tell(message)

    def moved(self) -> None:
        """A viewer's position has changed, and with it what may be generated."""
        self.accounts.asked(self.ring.next, self.wanted_until())
        if self.upstream is not None:
            self.upstream.want()

    def finish(self, ending: Ending) -> None:
        for viewer in tuple(self.viewers):
            viewer.end(ending)


class Relays:
    """All relays of one router."""

    def __init__(
        self,
        owners: Owners,
        config: EchoConfig,
        clock: Clock,
        telemetry: Telemetry,
        rng: random.Random,
        shape: StreamShape,
        linger_s: float = LINGER_S,
    ) -> None:
        self._shape = shape
        self._owners = owners
        self._config = config
        self._clock = clock
        self._telemetry = telemetry
        self._rng = rng
        self._linger_s = linger_s
        self._relays: dict[tuple[str, str], Relay] = {}
        self._seats: dict[Viewer, Relay] = {}
        self._viewers: dict[str, int] = {}

    def attach(self, record: SessionRecord, fmt: str, viewer: Viewer) -> Relay:
        """Let the viewer read from its cursor on. Raises `CapacityError` at the viewer limit."""
        limit = self._config.limits.viewers_per_session
        if sum(len(r.viewers) for r in self.of(record.id)) >= limit:
            raise CapacityError(
                f"session {record.id} has {limit} viewers (limits.viewers_per_session); retry",
                retry_after_s=5.0,
            )
        relay = self._relays.get((record.id, fmt))
        if relay is not None and not relay.viewers and viewer.cursor > relay.ring.next:
            self._drop(relay)
            relay = None
        if relay is None:
            relay = self._start(record, fmt, viewer.cursor)
        if relay.linger is not None:
            relay.linger.cancel()
            relay.linger = None
        relay.viewers.add(viewer)
        viewer.relay = relay
        self._seats[viewer] = relay
        self._count(viewer, 1)
        self._place(relay, viewer)
        if record.state is SessionState.PAUSED:
            relay.wake()
        relay.moved()
        return relay

    def reposition(self, viewer: Viewer, start: int) -> None:
        """Go on from another index, because the viewer asks for it."""
        relay = self._seats.get(viewer)
        if relay is None:
            return
        viewer.stop_catching_up()
        viewer.cursor, viewer.acked, viewer.caught_up = start, None, False
        self._place(relay, viewer)
        viewer.ring_bell()
        relay.moved()

    def detach(self, viewer: Viewer) -> None:
        relay = self._seats.pop(viewer, None)
        if relay is None:
            return
        viewer.stop_catching_up()
        relay.viewers.discard(viewer)
        self._count(viewer, -1)
        if relay.viewers:
            relay.moved()
        elif self._relays.get((relay.session_id, relay.fmt)) is relay:
            loop = asyncio.get_running_loop()
            relay.linger = loop.call_later(self._linger_s, self._drop, relay)

    def of(self, session_id: str) -> list[Relay]:
        return [r for (sid, _), r in self._relays.items() if sid == session_id]

    def get(self, session_id: str, fmt: str) -> Relay | None:
        return self._relays.get((session_id, fmt))

    def sessions(self) -> set[str]:
        return {sid for sid, _ in self._relays}

    def waiting(self) -> set[str]:
        """Sessions that are watched here and have no owner."""
        return {sid for (sid, _), relay in self._relays.items() if relay.waits()}

    def acknowledged(self, session_id: str, chunk: int) -> None:
        """An event of a session was acknowledged and takes effect at `chunk`."""
        for relay in self.of(session_id)[:1]:
            if chunk >= relay.ring.next:
                relay.accounts.acknowledged(chunk)

    def tell(self, session_id: str, message: wire.Message) -> None:
        for relay in self.of(session_id):
            relay.tell(message)

    def poke(self, session_id: str) -> None:
        """The session's record has changed; follow it at once."""
        for relay in self.of(session_id):
            if relay.upstream is not None:
                relay.upstream.poke()

    def finish(self, session_id: str, ending: Ending) -> None:
        """End all of the session's viewers here, and its upstreams."""
        for relay in self.of(session_id):
            relay.finish(ending)
            self._drop(relay)

    async def close(self) -> None:
        """Tell every viewer to go elsewhere and stop all pulls."""
        tasks = [r.task for r in self._relays.values() if r.task is not None]
        for relay in tuple(self._relays.values()):
            relay.tell(wire.GoingAway())
            self._drop(relay)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, record: SessionRecord, fmt: str, start: int) -> Relay:
        accounts = StreamAccounts(self._shape, record.pace, self._clock, self._telemetry)
        relay = Relay(record, fmt, start, self._config, accounts)
        relay.upstream = self._upstream(record.id, fmt, relay)
        self._relays[record.id, fmt] = relay
        # It outlives the request that began it.
        run = self._run(relay, relay.upstream)
        relay.task = asyncio.create_task(run, context=Context())
        return relay

    async def _run(self, relay: Relay, upstream: Upstream) -> None:
        relay.finish(ending_of(await ran(upstream)))
        self._drop(relay)

    def _place(self, relay: Relay, viewer: Viewer) -> None:
        viewer.caught_up = viewer.cursor >= relay.ring.first
        if not viewer.caught_up:
            viewer.catch_up(lambda sink: self._upstream(relay.session_id, relay.fmt, sink))

    def _upstream(self, session_id: str, fmt: str, sink: Relay | CatchUp) -> Upstream:
        return Upstream(
            session_id,
            fmt,
            sink,
            self._owners,
            self._config.session,
            self._clock,
            self._telemetry,
            self._rng,
        )

    def _count(self, viewer: Viewer, change: int) -> None:
        self._viewers[viewer.transport] = self._viewers.get(viewer.transport, 0) + change
        self._telemetry.set("viewers", self._viewers[viewer.transport], transport=viewer.transport)

    def _drop(self, relay: Relay) -> None:
        if self._relays.get((relay.session_id, relay.fmt)) is relay:
            del self._relays[relay.session_id, relay.fmt]
        if relay.linger is not None:
            relay.linger.cancel()
            relay.linger = None
        if relay.task is not None and relay.task is not asyncio.current_task():
            relay.task.cancel()


def wanted_until(pace: Pace, positions: list[int], lead: int) -> int | None:
    """Chunks below this may be generated: for viewers at these positions.

    At `pace: max` the slowest viewer's reading speed is the backpressure; a realtime session keeps
    time for the fastest one. `None` without viewers.
    """
    if not positions:
        return None
    return (min(positions) if pace is Pace.MAX else max(positions)) + lead
