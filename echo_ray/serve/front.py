"""What a client can do with sessions, whichever door it came through: REST or socket.

Every verb checks, writes to the directory on a thread, and tells this router's viewers. Knows
nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from dataclasses import dataclass, replace
from typing import Any

import httpx

from echo_ray import wire
from echo_ray.clock import Clock
from echo_ray.config import EchoConfig
from echo_ray.errors import (
    CapacityError,
    ConflictError,
    EchoError,
    Fenced,
    InvalidRequestError,
    QuotaExceeded,
    SegmentBeyondEnd,
    UnavailableError,
)
from echo_ray.serve.clips import ClipDesk
from echo_ray.serve.logs import REQUEST_ID_HEADER, log, request_id
from echo_ray.serve.ownership import Owner, Owners
from echo_ray.serve.relay import Relays
from echo_ray.serve.retention import make_newest_durable_soon
from echo_ray.serve.telemetry import Telemetry
from echo_ray.session import rules
from echo_ray.session.access import Quota, quota_of
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.records import (
    ControlEntry,
    OnIdle,
    SessionRecord,
    SessionState,
    SnapshotRef,
)
from echo_ray.storage.interface import Directory, SnapshotStore

FETCH_TRIES = 4
FETCH_PAUSE_S = 0.1
RETRY_FULL_S = 5.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """A segment over plain HTTP: its bytes and what the replica says of them."""

    data: bytes
    headers: dict[str, str]


class _Unreachable(Exception):
    """Nobody listens at the replica's address, or the connection broke."""


class Front:
    """The router's actions on sessions; one per router."""

    def __init__(
        self,
        *,
        config: EchoConfig,
        shape: StreamShape,
        directory: Directory,
        snapshots: SnapshotStore,
        clock: Clock,
        telemetry: Telemetry,
        rng: random.Random,
    ) -> None:
        self.config = config
        self.shape = shape
        self.directory = directory
        self.clock = clock
        self.telemetry = telemetry
        self.owners = Owners(directory, config, clock, rng)
        self.relays = Relays(self.owners, config, clock, telemetry, rng, shape)
        self.snapshots = snapshots
        self.homeless = 0
        """Sessions that nobody watches and that the last sweep found no room for."""
        self.clips = ClipDesk(snapshots, shape, config.limits)
        self.http = httpx.AsyncClient(timeout=config.session.silence_s * 4, trust_env=False)

    async def close(self) -> None:
        """Send viewers elsewhere and close what is open; sessions go on without this router."""
        await self.relays.close()
        self.clips.close()
        await self.http.aclose()
        await asyncio.to_thread(self.snapshots.close)

    async def create(
        self, fields: dict[str, Any], clip: bytes | None = None, tenant: str = ""
    ) -> SessionRecord:
        """Create a session from a request's fields (a missing seed is drawn).

        `clip`: a video or picture that the session is to continue. Raises `ClipInvalid`,
        `ClipTooLarge`, `QuotaExceeded`.
        """
        given = {k: v for k, v in fields.items() if v is not None}
        given.setdefault("seed", secrets.randbelow(rules.MAX_SEED + 1))
        record = rules.new_session(
            new_id=self.new_id(),
            model=given.pop("model", None),
            served_model=self.shape.model,
            limits=self.config.limits,
            now=self.clock.wall(),
            **given,
        )
        record = replace(record, tenant=tenant)
        await self.admit(record)
        if clip is not None:
            record = replace(record, clip=await self.clips.take(record.id, clip))
        try:
            await asyncio.to_thread(self.directory.create, record, quota=self.quota(record))
        except EchoError as error:
            if isinstance(error, QuotaExceeded):
                self.telemetry.count("admission_rejections", reason=error.code)
            if record.clip is not None:
                await self.clips.drop(record.id, record.clip)
            raise
        return record

    def new_id(self) -> str:
        """An id that no session ever had."""
        return rules.session_id(secrets.token_bytes(rules.SESSION_ID_BYTES))

    async def admit(self, record: SessionRecord) -> None:
        """Raise `CapacityError` or `NoReplica` unless one more session finds room."""
        try:
            await self._check_count()
            await self.owners.admit(record.model, record.pace)
        except EchoError as e:
            self.telemetry.count("admission_rejections", reason=e.code)
            raise

    def quota(self, record: SessionRecord) -> Quota | None:
        """What the session's tenant may have; None while access is off."""
        return quota_of(self.config.access, record.tenant)

    async def get(self, session_id: str) -> SessionRecord:
        return await asyncio.to_thread(self.directory.get, session_id)

    async def all_sessions(self) -> list[SessionRecord]:
        return list(await asyncio.to_thread(self.directory.list))

    async def orphans(self) -> list[SessionRecord]:
        """Sessions that go on without viewers and wait for an owner."""
        return list(await asyncio.to_thread(self.directory.orphans))

    async def delete(self, session_id: str) -> None:
        """Forget the session: its owner is fenced, its viewers are told, its snapshots go."""
        await asyncio.to_thread(self.directory.delete, session_id)
        self.relays.finish(session_id, wire.Done(reason="deleted"))
        await asyncio.to_thread(self.snapshots.delete_session, session_id)

    async def add_event(
        self, session_id: str, event_id: str, prompt: str, at_chunk: int | None = None
    ) -> ControlEntry:
        """Append a prompt switch to the control log; returns when it is durable."""
        event_id = rules.check_event_id(event_id)
        prompt = rules.check_prompt(prompt, self.config.limits, param="event.prompt")
        limit = self.config.limits.events_per_session
        log = await asyncio.to_thread(self.directory.controls, session_id)
        if len(log) >= limit and all(e.event_id != event_id for e in log):
            raise CapacityError(
                f"session {session_id} has {limit} events (limits.events_per_session); "
                "go on in a new session"
            )
        entry = await asyncio.to_thread(
            self.directory.append_control, session_id, event_id, prompt, at_chunk=at_chunk
        )
        if at_chunk is None:
            self.relays.acknowledged(session_id, entry.chunk)
        return entry

    async def list_snapshots(self, session_id: str) -> list[SnapshotRef]:
        return list(await asyncio.to_thread(self.directory.snapshots, session_id))

    async def pin_latest(self, session_id: str) -> SnapshotRef:
        """Keep the latest snapshot for ever, durably. Raises `ConflictError` while there is none.

        Raises `StoreUnavailable` if it is pinned, but durable only later.
        """
        refs = await self.list_snapshots(session_id)
        if not refs:
            first = self.shape.point_every
            raise ConflictError(
                f"session {session_id} has no snapshot yet: the first point comes at chunk {first};"
                " ask again then"
                if first
                else f"model {self.shape.model} has no points, so no snapshots"
            )
        newest = max(refs, key=lambda ref: ref.chunk_index)
        pinned = await asyncio.to_thread(self.directory.pin_snapshot, session_id, newest.id)
        await asyncio.to_thread(self.snapshots.make_durable, session_id, pinned.id)
        return pinned

    async def pause(self, session_id: str) -> SessionRecord:
        """Release the device; viewers stay and wait."""
        record = await self._set_state(session_id, SessionState.PAUSED)
        self.relays.poke(session_id)
        try:
            await asyncio.to_thread(
                make_newest_durable_soon, self.directory, self.snapshots, session_id
            )
        except EchoError as e:
            self.telemetry.count("store_errors", op="durable")
            log(logging.WARNING, "store_failed", session=session_id, op="durable", error=e.message)
        return record

    async def resume(self, session_id: str) -> SessionRecord:
        """Let a paused session go on."""
        record = await self._set_state(session_id, SessionState.LIVE)
        self.relays.tell(session_id, wire.Resumed())
        self.relays.poke(session_id)
        if record.on_idle is OnIdle.CONTINUE and not self.owners.is_owned(record):
            with contextlib.suppress(UnavailableError, CapacityError):
                await self.adopt(session_id)
        return record

    async def stop(self, session_id: str) -> SessionRecord:
        """End the session; its log and snapshots stay until it is deleted."""
        record = await self._set_state(session_id, SessionState.CLOSED)
        self.relays.finish(session_id, wire.Done(reason="closed"))
        return record

    async def adopt(self, session_id: str) -> Owner:
        """Make sure that somebody generates the session, with or without readers."""
        owner = await self.owners.locate(session_id)
        await self.ask(owner, f"/v1/own/{session_id}", epoch=owner.epoch)
        return owner

    async def segment(self, session_id: str, index: int, fmt: str) -> Fetched:
        """One committed segment. Raises `SegmentBeyondEnd`, `SegmentExpired`."""
        record = await self.get(session_id)
        if index < 0:
            raise InvalidRequestError(f"segment {index}: the first index is 0", param="n")
        if index >= record.next_index:
            raise SegmentBeyondEnd(
                f"segment {index} does not exist yet; the next chunk is {record.next_index}",
                param="n",
            )
        failed: Owner | None = None
        for attempt in range(FETCH_TRIES):
            owner = await self.owners.locate(session_id, failed=failed)
            try:
                answer = await self._request(
                    owner,
                    "GET",
                    f"/v1/segments/{session_id}/{index}",
                    {"epoch": owner.epoch, "format": fmt},
                )
            except _Unreachable:
                failed = owner
                continue
            except Fenced:
                await asyncio.sleep(FETCH_PAUSE_S * attempt)
                continue
            headers = {k: v for k, v in answer.headers.items() if k.lower().startswith("x-echo-")}
            return Fetched(answer.content, headers)
        raise UnavailableError(
            f"segment {index}: no replica answered for it {FETCH_TRIES} times; retry",
            retry_after_s=1.0,
        )

    async def ask(
        self, owner: Owner, path: str, *, timeout_s: float | None = None, **query: Any
    ) -> httpx.Response:
        """POST to a replica. Raises its `EchoError`, or `UnavailableError` without an answer."""
        try:
            return await self._request(owner, "POST", path, query, timeout_s)
        except _Unreachable as e:
            raise UnavailableError(
                f"replica {owner.replica_id} cannot be reached: {e}; retry", retry_after_s=1.0
            ) from e

    async def _request(
        self,
        owner: Owner,
        method: str,
        path: str,
        query: dict[str, Any],
        timeout_s: float | None = None,
    ) -> httpx.Response:
        timeout = self.http.timeout if timeout_s is None else httpx.Timeout(timeout_s)
        headers = self.owners.credentials()
        if (asked_by := request_id()) is not None:
            headers = {**headers, REQUEST_ID_HEADER: asked_by}
        try:
            answer = await self.http.request(
                method,
                f"http://{owner.address}{path}",
                params=query,
                timeout=timeout,
                headers=headers,
            )
        except (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError) as e:
            self.owners.avoid(owner.replica_id)
            raise _Unreachable(repr(e)) from e
        except httpx.HTTPError as e:
            raise UnavailableError(
                f"replica {owner.replica_id} does not answer: {e!r}; retry", retry_after_s=1.0
            ) from e
        if answer.is_error:
            raise _error_of(answer, owner.replica_id)
        return answer

    async def _set_state(self, session_id: str, state: SessionState) -> SessionRecord:
        return await asyncio.to_thread(self.directory.set_state, session_id, state=state.value)

    async def _check_count(self) -> None:
        limit = self.config.limits.sessions
        if await asyncio.to_thread(self.directory.count_open) >= limit:
            raise CapacityError(
                f"{limit} sessions are open (limits.sessions); delete one or retry",
                retry_after_s=RETRY_FULL_S,
            )


def _error_of(answer: httpx.Response, replica_id: str) -> EchoError:
    try:
        body = answer.json()
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return wire.error_from(error)
    return UnavailableError(
        f"replica {replica_id} answered {answer.status_code} without a reason; retry",
        retry_after_s=1.0,
    )
