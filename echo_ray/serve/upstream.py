"""One pull of one session in one format, carried across the death of any replica.

Connects to the owner's data socket, hands on committed segments by index, and whenever the owner
breaks, refuses, is fenced, goes away or falls silent, finds or makes another owner and goes on at
the next index wanted. Only a session that has ended, or an index that is gone, ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import random
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from echo_ray.clock import Clock
from echo_ray.config import SessionSection
from echo_ray.errors import (
    ClipLost,
    EchoError,
    Fenced,
    InvalidRequestError,
    MessageError,
    NotFoundError,
    SegmentExpired,
    SessionClosed,
    UnavailableError,
)
from echo_ray.serve.ownership import Owners
from echo_ray.serve.telemetry import Telemetry, log
from echo_ray.session.locating import AVOID_S, Ask, Owner, SessionPaused
from echo_ray.wire import error_from, parse_object

TERMINAL = (NotFoundError, SessionClosed, SegmentExpired, ClipLost, InvalidRequestError)
"""No other replica would answer otherwise, today or tomorrow."""
MAX_SEGMENT_BYTES = 2**28
FIRST_DELAY_S = 0.05
MAX_DELAY_S = 1.0
PAUSED_POLL_S = 0.5
PATIENCE_S = 30.0
"""Viewers are told of trouble that lasts as long as this, and again each time it has."""


@dataclass(frozen=True, slots=True)
class WireSegment:
    """A committed segment as viewers get it: its metadata message, then its bytes."""

    index: int
    metadata: str
    data: bytes


class Sink(Protocol):
    """Where an upstream delivers."""

    def next_index(self) -> int:
        """The first index wanted."""
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

    def trouble(self, error: EchoError) -> None:
        """Nothing has come for long; this is why. The upstream goes on trying."""
        ...


class Shun(Enum):
    """Who is to avoid a replica for a while after a pull from it ended."""

    NOBODY = auto()
    SESSION = auto()
    """It refused this session; others may be fine there."""
    ALL = auto()
    """It cannot be reached, says nothing, or is leaving."""


class OwnerLost(Exception):
    """The pull ended."""

    def __init__(
        self, reason: str, *, shun: Shun = Shun.ALL, error: EchoError | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.shun = shun
        self.error = error


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
        self._shunned: dict[str, float] = {}
        self._attempts = 0
        self._lost_at: float | None = None
        self._told_at = clock.monotonic()

    def poke(self) -> None:
        """Read the record again at once: somebody has changed it."""
        self._poked.set()
        if self._socket is not None:
            self._socket.transport.abort()

    def want(self) -> None:
        """Tell the owner the sink's new `wanted_until`."""
        self._want.set()

    async def run(self) -> EchoError:
        """Pull for ever; returns the error that ends the session for its readers."""
        failed: Owner | None = None
        last_epoch: int | None = None
        paused = False
        self._told_at = self._clock.monotonic()
        while True:
            self._poked.clear()
            try:
                ask = Ask(
                    failed=failed,
                    last_epoch=last_epoch,
                    wake=self._sink.waking(),
                    avoid=self._shunned_now(),
                )
                owner = await self._owners.find(self.session_id, ask)
                failed, last_epoch, paused = owner, owner.epoch, False
                await self._pull(owner)
                failed = None
            except SessionPaused:
                if not paused:
                    self._sink.paused()
                paused, failed, self._lost_at = True, None, None
                self._told_at = self._clock.monotonic()
                await self._pause(PAUSED_POLL_S)
                continue
            except OwnerLost as lost:
                if self._poked.is_set():
                    failed = None
                    continue
                self._note_loss(owner, lost)
            except TERMINAL as error:
                return error
            except EchoError as error:
                self._complain(error)
            await self._back_off()

    async def _pull(self, owner: Owner) -> None:
        start = self._sink.next_index()
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
                socket = await connect(
                    url,
                    compression=None,
                    max_size=MAX_SEGMENT_BYTES,
                    open_timeout=None,
                    ping_interval=None,
                    proxy=None,
                )
        except (OSError, TimeoutError, WebSocketException) as e:
            raise OwnerLost(f"refused: {e!r}") from e
        self._socket = socket
        wants = asyncio.create_task(self._send_wants(socket))
        try:
            if not self._poked.is_set():
                await self._read(socket, owner)
        except ConnectionClosed as e:
            fenced = e.rcvd is not None and e.rcvd.code == Fenced.ws_close
            raise OwnerLost(
                "fenced" if fenced else f"broke: {e}", shun=Shun.NOBODY if fenced else Shun.ALL
            ) from e
        finally:
            self._socket = None
            wants.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await wants
            socket.transport.abort()

    async def _read(self, socket: ClientConnection, owner: Owner) -> None:
        while True:
            text = await self._hear(socket)
            if isinstance(text, bytes):
                raise OwnerLost("sent a segment without metadata")
            body = _parse(text)
            match body.get("type"):
                case "hello":
                    self._sink.connected(owner)
                    self._want.set()
                case "video.chunk_metadata":
                    await self._segment(socket, text, body)
                case "session.going_away":
                    raise OwnerLost("going away")
                case "beat":
                    pass
                case _ if "code" in body and "message" in body:
                    self._refused(error_from(body))

    async def _segment(self, socket: ClientConnection, text: str, body: dict[str, Any]) -> None:
        data = await self._hear(socket)
        index = body.get("chunk_index")
        if not isinstance(data, bytes) or len(data) != body.get("byte_length"):
            raise OwnerLost(f"chunk {index!r}: metadata and segment do not fit")
        wanted = self._sink.next_index()
        if isinstance(index, int) and 0 <= index < wanted:
            return
        if index != wanted:
            raise OwnerLost(f"sent chunk {index!r} where {wanted} was due")
        await self._sink.deliver(WireSegment(index, text, data))
        self._attempts = 0
        now = self._clock.monotonic()
        self._told_at = now
        if self._lost_at is not None:
            self._telemetry.observe("failover_seconds", now - self._lost_at)
            self._lost_at = None

    async def _hear(self, socket: ClientConnection) -> str | bytes:
        """The next message; `OwnerLost` after `silence_s` without one.

        The wait is cut into slices and all of them must pass: when this process itself was
        stopped or starved, one slice runs out at once, and the owner is not to blame.
        """
        slice_s = self._section.beat_s
        for _ in range(math.ceil(self._section.silence_s / slice_s)):
            try:
                async with asyncio.timeout(slice_s):
                    return await socket.recv()
            except TimeoutError:
                continue
        raise OwnerLost(f"silent for {self._section.silence_s} s")

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

    def _refused(self, error: EchoError) -> None:
        if isinstance(error, TERMINAL):
            raise error
        shun = Shun.NOBODY if isinstance(error, Fenced) else Shun.SESSION
        raise OwnerLost(f"refused: {error.message}", shun=shun, error=error)

    def _note_loss(self, owner: Owner, lost: OwnerLost) -> None:
        log(
            logging.WARNING,
            "owner_lost",
            session=self.session_id,
            replica=owner.replica_id,
            epoch=owner.epoch,
            reason=lost.reason,
        )
        if lost.shun is Shun.ALL:
            self._owners.avoid(owner.replica_id)
        elif lost.shun is Shun.SESSION:
            self._shunned[owner.replica_id] = self._clock.monotonic() + AVOID_S
        if self._lost_at is None:
            self._lost_at = self._clock.monotonic()
            self._telemetry.count("failovers", cause=_cause(lost))
        self._complain(
            lost.error
            or UnavailableError(f"replica {owner.replica_id}: {lost.reason}", retry_after_s=1.0)
        )

    def _shunned_now(self) -> set[str]:
        now = self._clock.monotonic()
        self._shunned = {rid: until for rid, until in self._shunned.items() if until > now}
        return set(self._shunned)

    def _complain(self, error: EchoError) -> None:
        now = self._clock.monotonic()
        if now - self._told_at >= PATIENCE_S:
            self._told_at = now
            self._sink.trouble(error)

    async def _back_off(self) -> None:
        """The first loss after a delivery costs no wait; later ones a growing, jittered one."""
        self._attempts += 1
        if self._attempts > 1:
            delay = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(self._attempts - 2, 10))
            await self._pause(delay * self._rng.uniform(0.5, 1.0))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poked.wait()


def _parse(text: str) -> dict[str, Any]:
    try:
        return parse_object(text)
    except MessageError as e:
        raise OwnerLost(f"sent what is no message: {e.message}") from e


def _cause(lost: OwnerLost) -> str:
    first = lost.reason.split(":")[0].split(" for ")[0]
    return {"silent": "silent", "going away": "drain", "fenced": "fenced"}.get(first, "broken")
