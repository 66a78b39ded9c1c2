"""One pull of one session in one format: what `session/pulling.py` decides, over websockets.

Connects to the owner's data socket and hands on committed segments by index. Nothing is decided
here but what a broken or strange connection is to be called.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from echo_ray.clock import Clock
from echo_ray.config import SessionSection
from echo_ray.errors import EchoError, Fenced, MessageError
from echo_ray.serve.ownership import Owners
from echo_ray.serve.telemetry import Telemetry, log
from echo_ray.session import pull_events, pulling
from echo_ray.session.locating import Ask, Owner, SessionPaused
from echo_ray.session.pull_events import (
    Disconnect,
    Failover,
    Lost,
    Recovered,
    Step,
    TellPaused,
    TellTrouble,
)
from echo_ray.session.pulling import Cause, End, Find, OwnerLost, Pulling, Read, Rest, Shun
from echo_ray.wire import error_from, parse_object

MAX_SEGMENT_BYTES = 2**28
PATIENCE_S = 30.0
"""Viewers are told of trouble that lasts as long as this, and again each time it has."""

Event = Callable[[Pulling], Step]
"""One of `pull_events`, with all its arguments but the first."""


@dataclass(frozen=True, slots=True)
class WireSegment:
    """A committed segment as viewers get it: its metadata message, then its bytes."""

    index: int
    metadata: str
    data: bytes


class Sink(Protocol):
    """Where an upstream delivers."""

    def next_index(self) -> int:
        """The first index wanted; read when the pull begins."""
        ...

    def wanted_until(self) -> int | None:
        """Chunks below this may be generated; `None` asks for none to be."""
        ...

    def waking(self) -> bool:
        """Whether a paused session is to be woken."""
        ...

    def connected(self, owner: Owner) -> None: ...

    def paused(self) -> None:
        """The session was paused on purpose; told once."""
        ...

    async def deliver(self, segment: WireSegment) -> None: ...

    def handed_over(self, owner: Owner) -> None:
        """Another replica makes the segments now, and the one before has not failed."""
        ...

    def trouble(self, error: EchoError) -> None:
        """Nothing has come for long; this is why. The upstream goes on trying."""
        ...


class Upstream:
    """The loop behind every relay; run it as a task."""

    def __init__(
        self,
        session_id: str,
        fmt: str,
        sink: Sink,
        owners: Owners,
        section: SessionSection,
        clock: Clock,
        telemetry: Telemetry,
        rng: random.Random,
    ) -> None:
        self.session_id = session_id
        self.fmt = fmt
        self._sink = sink
        self._owners = owners
        self._section = section
        self._clock = clock
        self._telemetry = telemetry
        self._rng = rng
        self._socket: ClientConnection | None = None
        self._poked = asyncio.Event()
        self._want = asyncio.Event()
        self._last: tuple[Owner, float] | None = None
        """Owner and time of the last segment."""
        self._loss: Cause | None = None
        """How its owner was lost, if it was."""
        self._now = Pulling(
            next=sink.next_index(),
            told_s=clock.monotonic(),
            beat_s=section.beat_s,
            silence_s=section.silence_s,
            patience_s=PATIENCE_S,
        )

    def poke(self) -> None:
        """Read the record again at once: somebody has changed it."""
        self._apply(pull_events.poked)
        self._poked.set()

    def want(self) -> None:
        """Tell the owner the sink's new `wanted_until`."""
        self._want.set()

    @property
    def ownerless(self) -> bool:
        """Whether segments are wanted and nobody is there to make them."""
        return self._now.owner is None and not self._now.paused and self._now.ended is None

    async def run(self) -> EchoError:
        """Pull for ever; returns the error that ends the session for its readers."""
        while True:
            now_s = self._clock.monotonic()
            match pulling.work(self._now, now_s, wake=self._sink.waking()):
                case Find(ask):
                    await self._find(ask)
                case Read(owner, start):
                    await self._read(owner, start)
                case Rest(until_s):
                    await self._rest(until_s - now_s)
                case End(error):
                    return error

    def _apply(self, event: Event) -> None:
        self._now, effects = event(self._now)
        for effect in effects:
            match effect:
                case Disconnect():
                    if self._socket is not None:
                        self._socket.transport.abort()
                case Lost(owner, reason, avoid):
                    self._log_loss(owner, reason)
                    if avoid:
                        self._owners.avoid(owner.replica_id)
                case Failover(cause):
                    self._loss = cause
                    self._telemetry.count("failovers", cause=cause.value)
                case Recovered(after_s):
                    self._telemetry.observe("failover_seconds", after_s)
                case TellPaused():
                    self._last = None
                    self._sink.paused()
                case TellTrouble(error):
                    self._sink.trouble(error)

    def _log_loss(self, owner: Owner, reason: str) -> None:
        log(
            logging.WARNING,
            "owner_lost",
            session=self.session_id,
            replica=owner.replica_id,
            epoch=owner.epoch,
            reason=reason,
        )

    def _failed(self, event: Callable[..., Step], **what: Any) -> None:
        jitter = self._rng.uniform(0.5, 1.0)
        self._apply(partial(event, now_s=self._clock.monotonic(), jitter=jitter, **what))

    async def _find(self, ask: Ask) -> None:
        self._apply(pull_events.finding)
        try:
            owner = await self._owners.find(self.session_id, ask)
        except (EchoError, SessionPaused) as error:
            self._failed(pull_events.not_found, error=error)
        else:
            self._apply(partial(pull_events.found, owner=owner))

    async def _rest(self, seconds: float) -> None:
        self._poked.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poked.wait()

    async def _read(self, owner: Owner, start: int) -> None:
        try:
            socket = await self._connect(owner, start)
            self._socket = socket
            wants = asyncio.create_task(self._send_wants(socket))
            try:
                while self._now.owner is owner:
                    await self._message(socket, owner)
            finally:
                self._socket = None
                wants.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await wants
                socket.transport.abort()
        except OwnerLost as loss:
            self._failed(pull_events.lost, loss=loss)

    async def _connect(self, owner: Owner, start: int) -> ClientConnection:
        url = (
            f"ws://{owner.address}/v1/pull/{self.session_id}"
            f"?epoch={owner.epoch}&from={start}&format={self.fmt}"
        )
        until = self._sink.wanted_until()
        if until is not None:
            # With the request, so that no burst of old chunks comes before the first `want`.
            url += f"&until={until}"
        try:
            async with asyncio.timeout(self._section.silence_s):
                return await connect(
                    url,
                    compression=None,
                    max_size=MAX_SEGMENT_BYTES,
                    open_timeout=None,
                    ping_interval=None,
                    proxy=None,
                    additional_headers=self._owners.credentials(),
                )
        except (OSError, TimeoutError, WebSocketException) as e:
            raise OwnerLost(f"refused: {e!r}") from e

    async def _message(self, socket: ClientConnection, owner: Owner) -> None:
        text = await self._hear(socket)
        if isinstance(text, bytes):
            raise OwnerLost("sent a segment without metadata")
        body = _parse(text)
        match body.get("type"):
            case "hello":
                self._sink.connected(owner)
                self._want.set()
            case "video.chunk_metadata":
                await self._segment(socket, owner, text, body)
            case "session.going_away":
                raise OwnerLost("going away", cause=Cause.DRAIN)
            case "beat":
                pass
            case _ if "code" in body and "message" in body:
                self._failed(pull_events.refused, error=error_from(body))

    def _handed_over(self, owner: Owner, now_s: float) -> None:
        """Measure the gap between two owners; one that somebody else took over from was moved."""
        if self._last is not None and self._last[0].epoch != owner.epoch:
            cause = "failover" if self._loss in (Cause.BROKEN, Cause.SILENT) else "move"
            gap_s = now_s - self._last[1]
            self._telemetry.observe("handover_gap_seconds", gap_s, cause=cause)
            if cause == "move" and self._last[0].replica_id != owner.replica_id:
                self._sink.handed_over(owner)
        self._last, self._loss = (owner, now_s), None

    async def _segment(
        self, socket: ClientConnection, owner: Owner, text: str, body: dict[str, Any]
    ) -> None:
        data = await self._hear(socket)
        index: Any = body.get("chunk_index")
        if not isinstance(data, bytes) or len(data) != body.get("byte_length"):
            raise OwnerLost(f"chunk {index!r}: metadata and segment do not fit")
        if pulling.takes(self._now, index):
            await self._sink.deliver(WireSegment(index, text, data))
            now_s = self._clock.monotonic()
            self._handed_over(owner, now_s)
            self._apply(partial(pull_events.delivered, index=index, now_s=now_s))

    async def _hear(self, socket: ClientConnection) -> str | bytes:
        """The next message. Raises `OwnerLost` if none comes, or nobody listens any more."""
        while self._now.owner is not None:
            try:
                async with asyncio.timeout(self._section.beat_s):
                    message = await socket.recv()
            except TimeoutError:
                self._failed(pull_events.quiet)
            except ConnectionClosed as e:
                if e.rcvd is not None and e.rcvd.code == Fenced.ws_close:
                    raise OwnerLost("fenced", cause=Cause.FENCED, shun=Shun.NOBODY) from e
                raise OwnerLost(f"broke: {e}") from e
            else:
                self._apply(pull_events.heard)
                return message
        raise OwnerLost("given up")

    async def _send_wants(self, socket: ClientConnection) -> None:
        sent: int | None = None
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._want.wait()
                self._want.clear()
                until = self._sink.wanted_until()
                if until is not None and until != sent:
                    await socket.send(json.dumps({"type": "want", "until": until}))
                    sent = until


def _parse(text: str) -> dict[str, Any]:
    try:
        return parse_object(text)
    except MessageError as e:
        raise OwnerLost(f"sent what is no message: {e.message}") from e
